"""Tables of metrics: columns side by side, with ceilings and targets where there are any."""

from collections.abc import Mapping
from typing import Any

Metrics = Mapping[str, float]


def metric_rows(
    columns: Mapping[str, Metrics], ceilings: Mapping[str, Any], targets: Mapping[str, Metrics] = {}
) -> tuple[list[str], list[list[str]]]:
    """(header, rows): one row a metric, the first column's ratio to the best-estimate ceiling.

    ``columns`` are what was measured, the model first; ceilings are those of a synthetic data set.
    """
    best: Metrics = ceilings.get("best_estimate", {}).get("means", {})
    oracle: Metrics = ceilings.get("oracle", {}).get("means", {})
    first = next(iter(columns.values()))
    header = ["metric", *columns]
    if best:
        header += ["of ceiling", "best estimate", "oracle"]
    header += list(targets)
    rows = []
    for name in first:
        row = [name, *(_figure(column.get(name)) for column in columns.values())]
        if best:
            ratio = first[name] / best[name] if best.get(name) else None
            row += [
                "" if ratio is None else f"{ratio:.1%}",
                _figure(best.get(name)),
                _figure(oracle.get(name)),
            ]
        row += [_figure(target.get(name)) for target in targets.values()]
        rows.append(row)
    return header, rows


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
