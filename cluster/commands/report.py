"""Tables of metrics: side by side with ceilings and targets, by segment, and as a waterfall."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch: not needed to print a table
    from shardline.training.evaluation.budget import Step
    from shardline.training.evaluation.ranking_metrics import MetricResult

Metrics = Mapping[str, float]


def metric_rows(
    columns: Mapping[str, Metrics], ceilings: Mapping[str, Any], targets: Mapping[str, Metrics] = {}
) -> tuple[list[str], list[list[str]]]:
    """(header, rows): one row per metric, the first column's ratio to the best-estimate ceiling.

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


def segment_rows(
    columns: "Mapping[str, MetricResult]", metric: str
) -> tuple[list[str], list[list[str]]]:
    """(header, rows): one row per segment; empty cells where a segment has no users."""
    first = next(iter(columns.values()))
    rows = []
    for name, segment in first.segments.items():
        counts = (0, 0) if segment is None else (segment.users, segment.relevant)
        parts = [column.segments[name] for column in columns.values()]
        figures = [_figure(None if part is None else part.means[metric]) for part in parts]
        rows.append([name, *(f"{count:,}" for count in counts), *figures])
    return ["segment", "users", "relevant items", *columns], rows


def budget_rows(steps: "Sequence[Step]", k: int) -> tuple[list[str], list[list[str]]]:
    """(header, rows): one row per stage, from all relevant items down to the served answer."""
    rows = [["all relevant items", "", f"{1:.4f}", "", ""]]
    for step in steps:
        figures = (f"{step.recall:.4f}", f"{step.change:+.4f}", f"{step.agreement:.4f}")
        rows.append([step.name, step.about, *figures])
    return ["stage", "how", f"recall@{k}", "change", "agreement with exact"], rows


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
