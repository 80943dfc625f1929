"""``shardline bench index``: all index kinds on one data set, as table, JSON and Pareto plot."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faiss

from shardline.bench.index import kinds as index_kinds
from shardline.bench.index.datasets import IndexData
from shardline.bench.plots import plot_pareto
from shardline.cluster.console import print_table
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.recall import exact_scores, recall_at_k
from shardline.shards.index.spec import IndexKind

TRUTH_K = 100


def run(
    data: IndexData,
    *,
    kinds: Sequence[IndexKind],
    k: int,
    threads: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Every kind's figures, ready for JSON.

    Raises:
        InvalidInput: fewer rows than k: the recall of so short an index says nothing.
    """
    rows, dim = data.vectors.shape
    if rows < k:
        raise InvalidInput(
            "no answer is that long", field="-k", expected=f"<= {rows} rows", got=str(k)
        )
    with tempfile.TemporaryDirectory() as folder:
        reports = index_kinds.compare(
            data.vectors,
            data.queries,
            Path(folder),
            metric=data.metric,
            threads=threads,
            kinds=kinds,
            k=k,
            sweep=True,
            progress=progress,
        )
    return {
        "setup": {
            "data": data.name,
            "rows": rows,
            "dim": dim,
            "metric": str(data.metric),
            "queries": len(data.queries),
            "k": k,
            "threads": threads,
            "faiss": faiss.__version__,
        },
        "flat_against_truth": _truth_check(data),
        "kinds": [asdict(report) for report in reports],
    }


def show(report: dict[str, Any], json_path: Path | None, plot_path: Path | None) -> list[str]:
    """Prints the table; writes JSON and plot where asked; the lines to print after them."""
    setup = report["setup"]
    title = (
        f"index kinds, {setup['data']}, {setup['metric']}, k = {setup['k']}, "
        f"{setup['queries']} queries; singly on one thread, batch and build on {setup['threads']}"
    )
    header = [name.replace("recall@100", f"recall@{setup['k']}") for name in index_kinds.HEADER]
    reports = [index_kinds.KindReport(**row) for row in report["kinds"]]
    print_table(title, header, index_kinds.table_rows(reports))
    lines = []
    if report["flat_against_truth"] is not None:
        share = report["flat_against_truth"]
        lines.append(f"flat against the set's own exact neighbours: {share:.4f}")
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
        lines.append(f"figures: {json_path}")
    if plot_path is not None:
        plot_pareto(report["kinds"], f"{setup['data']}, {setup['metric']}", plot_path)
        lines.append(f"plot: {plot_path}")
    return lines


def _truth_check(data: IndexData) -> float | None:
    """Recall of our exact answers against the data set's own."""
    if data.truth is None:
        return None
    k = min(TRUTH_K, data.truth.shape[1])
    _, found = faiss.knn(data.queries, data.vectors, k, metric=faiss.METRIC_L2)
    ours, theirs = (
        exact_scores(data.queries, data.vectors, rows, data.metric)
        for rows in (found, data.truth[:, :k])
    )
    return round(recall_at_k(ours, theirs), 4)
