"""The figures of ``demo`` as tables."""

from collections.abc import Mapping
from typing import Any

import click

from shardline.bench.index import kinds as index_kinds
from shardline.cluster.commands.report import metric_rows
from shardline.cluster.console import print_table
from shardline.cluster.serving.ray_session import cores

# The table of the text this project started from: what a good and an excellent system reach.
TARGETS = {
    "target": {"recall@10": 0.30, "recall@100": 0.60, "recall@1000": 0.85, "mrr": 0.20}
    | {"ndcg@100": 0.40},
    "excellent": {"recall@10": 0.50, "recall@100": 0.80, "recall@1000": 0.95, "mrr": 0.35}
    | {"ndcg@100": 0.60},
}


def print_report(figures: dict[str, Any]) -> None:
    """The tables of a demo's figures, as the JSON report holds them."""
    metrics = figures["metrics"]
    header, rows = metric_rows(
        {
            "model over HTTP": metrics["model"],
            "exact": metrics["exact"],
            "popularity": metrics["popularity"],
        },
        metrics["ceilings"] or {},
        # the targets are of the full size: a quick demo's few items are found more easily
        {name: metrics[name] for name in TARGETS if metrics["ceilings"]},
    )
    print_table(f"retrieval quality, {metrics['users']:,} test users", header, rows)
    note = target_note(metrics, preset=figures["data"]["preset"])
    if note is not None:
        click.echo(note)
    if "index_kinds" in figures:  # a quick demo compares none
        reports = [index_kinds.KindReport(**row) for row in figures["index_kinds"]]
        print_table(
            "index kinds, one thread, whole corpus in one index",
            index_kinds.HEADER,
            index_kinds.table_rows(reports),
        )
    http = figures["http_ms"]
    print_table(
        f"HTTP latency, {http['rate']:g} requests/s, k = {http['k']}, "
        f"{figures['generation']['shards']} shards, {cores()} cores",
        ("ms", "p50", "p99", "answered", "failed"),
        [
            (
                label,
                f"{http[name]['p50_ms']:.2f}",
                "-" if http[name]["p99_ms"] is None else f"{http[name]['p99_ms']:.2f}",
                str(http[name]["answered"]),
                str(http[name]["sent"] - http[name]["answered"]),
            )
            for label, name in (
                ("empty request (floor)", "empty_request"),
                ("search by user features", "search_by_features"),
            )
        ],
    )
    seconds = ", ".join(f"{name} {value:g}" for name, value in figures["seconds"].items())
    click.echo(f"seconds: {seconds}")


def target_note(metrics: Mapping[str, Any], *, preset: str) -> str | None:
    """How far the targets can be reached on these data; None without ceilings, and so targets."""
    if not metrics["ceilings"]:
        return None
    best, targets = metrics["ceilings"]["oracle"]["means"], TARGETS["target"]
    missed = [name for name, target in targets.items() if best[name] < target]
    if missed:
        return (
            f"targets: {', '.join(missed)} cannot be reached on data of the preset {preset}: even "
            "the oracle, which ranks by the true affinities, misses them"
        )
    return (
        "targets: set for the preset seed, where even the oracle misses four of the five; on data "
        f"of the preset {preset} compare with the best estimate"
    )
