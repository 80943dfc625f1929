"""``shardline tune`` against a full grid: is its choice as fast, and in what share of the time?

The grid builds every configuration that tune knows over all rows, each on its own as a build does,
and asks it with the same search parameters. Both have the same sample, queries and bounds. In the
end the three fastest of the grid and the choice of tune are asked in the same alternating rounds.

gowalla: the SVD of the train interactions, 64 dimensions, inner product; users are the queries, and
recall is that of their test items. The others: the share of exact neighbours.

    python -m shardline.bench.index.tune_bench --data clustered --rows 1000000
    python -m shardline.bench.index.tune_bench --data mnist784 --path MNIST
    python -m shardline.bench.index.tune_bench --data gowalla --path GOWALLA
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import click
import numpy as np

from shardline.bench.corpus import SEED
from shardline.bench.index.datasets import clustered_data, mnist_data
from shardline.cluster.console import StageProgress, print_table
from shardline.cluster.serving.ray_session import cores
from shardline.cluster.tuner.configurations import (
    KINDS,
    Configuration,
    configurations,
    within_bytes,
)
from shardline.cluster.tuner.corpus_sample import NUM_QUERIES, CorpusSample, HeldOut
from shardline.cluster.tuner.halving import Bounds, halve, misses
from shardline.cluster.tuner.outcome import Outcome
from shardline.cluster.tuner.trial import Trial, Trials
from shardline.cluster.tuner.tuning_report import as_json, describe_bounds
from shardline.shards.core.errors import InvalidInput, NotFound
from shardline.shards.core.schema import IdArray, Metric
from shardline.shards.index.spec import IndexKind
from shardline.training.data.csr import Csr
from shardline.training.evaluation.baselines import svd_vectors

CONTENDERS = 3  # of the grid; their first times are too close to tell which is the fastest
SVD_DIM = 64
USERS = 500


class Data(StrEnum):
    CLUSTERED = "clustered"
    MNIST784 = "mnist784"
    GOWALLA = "gowalla"


def gowalla_sample(folder: Path) -> CorpusSample:
    """Items of the SVD in random order, and users with what they took later."""
    train, test = (_interactions(folder / name) for name in ("train.txt", "test.txt"))
    num_items = int(max(train.items.max(), test.items.max())) + 1
    vectors = svd_vectors(train, num_items, rank=SVD_DIM)
    rng = np.random.default_rng(SEED)
    users = np.sort(rng.permutation(np.flatnonzero(test.lengths))[:USERS])
    taken = test.take(users)
    held_out = HeldOut(queries=vectors.users[users], owners=taken.owners, items=taken.items)
    ids = rng.permutation(num_items)
    return CorpusSample(
        vectors=np.ascontiguousarray(vectors.items[ids]),
        ids=ids,
        rows=num_items,
        shards=1,
        metric=Metric.DOT,
        queries=held_out.queries,
        query_source="users with held-out items",
        held_out=held_out,
    )


def sample_of(data: Data, rows: int, dim: int, path: Path | None) -> CorpusSample:
    """Raises InvalidInput: a data set of files without their folder."""
    if data is not Data.CLUSTERED and path is None:
        raise InvalidInput(f"--data {data} needs --path, the folder of its files")
    if data is Data.GOWALLA and path is not None:
        return gowalla_sample(path)
    if data is Data.MNIST784 and path is not None:
        made = mnist_data(path, NUM_QUERIES)
    else:
        made = clustered_data(rows, dim, NUM_QUERIES)
    ids = np.random.default_rng(SEED).permutation(len(made.vectors))
    is_shuffled = data is Data.CLUSTERED  # its rows are drawn independently
    return CorpusSample(
        vectors=made.vectors if is_shuffled else np.ascontiguousarray(made.vectors[ids]),
        ids=np.arange(len(ids)) if is_shuffled else ids,
        rows=len(made.vectors),
        shards=1,
        metric=made.metric,
        queries=np.ascontiguousarray(made.queries),
        query_source="queries of the data set",
    )


def run_grid(
    tried: list[Configuration],
    trials: Trials,
    bounds: Bounds,
    progress: Callable[[str, int, int], None],
    note: Callable[[str], None],
) -> tuple[list[Outcome], list[Trial]]:
    """Every outcome, and the CONTENDERS fastest within the bounds; other indexes are dropped."""
    outcomes: list[Outcome] = []
    best: list[Trial] = []
    for number, configuration in enumerate(tried):
        progress("grid", number, len(tried))
        trial = trials.run(configuration, trials.rungs[-1], bounds.target_recall)
        outcomes.append(trial.outcome)
        if not misses(trial.outcome, bounds):
            best.append(trial)
            best.sort(key=lambda each: each.outcome.chosen.latency.p50_ms)
            del best[CONTENDERS:]
        del trial
        made = outcomes[-1]
        note(
            f"  {configuration.name}: recall {made.chosen.recall:.3f}, p50 "
            f"{made.chosen.latency.p50_ms:.3f} ms; {made.seconds:.1f} s"
        )
    progress("grid", len(tried), len(tried))
    return outcomes, best


def measure(
    sample: CorpusSample,
    bounds: Bounds,
    progress: StageProgress,
    threads: int,
    kinds: Sequence[IndexKind] = (),
) -> dict[str, Any]:
    """All figures, ready for JSON. kinds: that both try; none for all."""
    every = configurations(rows=sample.rows, dim=sample.dim, metric=sample.metric, kinds=kinds)
    tried = within_bytes(every, bounds.max_bytes_per_vector)
    started = time.monotonic()
    found = halve(
        tried,
        Trials(sample, threads=threads),
        bounds,
        clock=time.monotonic,
        progress=progress,
        note=progress.note,
    )
    tune_s = time.monotonic() - started
    progress.note(f"tune: {tune_s:.1f} s; the grid of {len(tried)} next")
    started = time.monotonic()
    grid = Trials(sample, threads=threads, shares_centroids=False)
    outcomes, best = run_grid(tried, grid, bounds, progress, progress.note)
    grid_s = time.monotonic() - started
    report = as_json(sample, bounds, found, tune_s) | {
        "grid_seconds": round(grid_s, 1),
        "time_ratio": round(tune_s / grid_s, 4),
        "grid": [_described(outcome) for outcome in outcomes],
    }
    if found.chosen is None or not best:
        return report | {"latency_ratio": None}
    name = found.chosen.configuration.name
    contenders = {trial.outcome.configuration.name: trial for trial in best}
    if name not in contenders:
        contenders[name] = grid.run(
            found.chosen.configuration, grid.rungs[-1], bounds.target_recall
        )
    again = {o.configuration.name: o for o in grid.compare(list(contenders.values()))}
    fastest = min((again[t.outcome.configuration.name] for t in best), key=_p50)
    return report | {
        "best_of_grid": _described(fastest),
        "choice": _described(again[name]),
        "latency_ratio": round(_p50(again[name]) / _p50(fastest), 4),
    }


def show(report: dict[str, Any], bounds: Bounds) -> None:
    setup = report["setup"]
    title = (
        f"{setup['rows']:,} x {setup['dim']}, {setup['metric']}; {describe_bounds(bounds)}; tune "
        f"{report['seconds']:.1f} s, grid of {len(report['grid'])} {report['grid_seconds']:.1f} s: "
        f"{report['time_ratio']:.3f} of it"
    )
    header = ("in the same rounds", "recall", "p50 ms", "p99 ms", "bytes per vector")
    if report["latency_ratio"] is None:
        click.echo(f"{title}\nnothing within the bounds")
        return
    rows = [
        (
            f"{what}: {each['name']}",
            f"{each['recall']:.4f}",
            f"{each['p50_ms']:.4f}",
            f"{each['p99_ms']:.4f}",
            f"{each['bytes_per_vector']:.0f}",
        )
        for what, each in (("grid", report["best_of_grid"]), ("tune", report["choice"]))
    ]
    print_table(title, header, rows)
    click.echo(f"latency of tune's choice by that of the grid's: {report['latency_ratio']:.3f}")


def _described(outcome: Outcome) -> dict[str, Any]:
    chosen = outcome.chosen
    return {
        "name": outcome.configuration.name,
        "params": {
            name: value
            for name in ("nprobe", "ef_search", "rerank_factor")
            if (value := getattr(chosen.params, name)) is not None
        },
        "recall": round(chosen.recall, 4),
        "overlap": round(chosen.overlap, 4),
        "p50_ms": round(chosen.latency.p50_ms, 4),
        "p99_ms": round(chosen.latency.p99_ms, 4),
        "bytes_per_vector": round(outcome.configuration.bytes_per_vector, 1),
        "build_seconds": round(outcome.build_seconds, 2),
        "seconds": round(outcome.seconds, 2),
    }


def _p50(outcome: Outcome) -> float:
    return outcome.chosen.latency.p50_ms


def _interactions(path: Path) -> Csr:
    """Items of each user, from lines `user item item ...`; users by their number."""
    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    lines = [np.array(line.split(), np.int64) for line in path.read_text().splitlines() if line]
    lengths = np.zeros(max(int(line[0]) for line in lines) + 1, np.int64)
    ordered: list[IdArray] = sorted(lines, key=lambda line: int(line[0]))
    for line in ordered:
        lengths[line[0]] = len(line) - 1
    return Csr.of(lengths, np.concatenate([line[1:] for line in ordered]))


@click.command()
@click.option("--data", type=click.Choice([*map(str, Data)]), default="clustered")
@click.option("--path", type=click.Path(path_type=Path), help="Of the files of mnist784, gowalla.")
@click.option("--rows", default=1_000_000, help="Of clustered.")
@click.option("--dim", default=128, help="Of clustered.")
@click.option("--target-recall", default=0.98)
@click.option("--max-p99-ms", type=float)
@click.option("--max-bytes-per-vector", type=float)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice([*map(str, KINDS)]),
    help="That both try, repeatable.  [default: all]",
)
@click.option("--threads", type=int, help="Of builds.  [default: all cores]")
@click.option("--json", "report_path", type=click.Path(path_type=Path), help="File to write.")
def main(
    data: str,
    path: Path | None,
    rows: int,
    dim: int,
    target_recall: float,
    max_p99_ms: float | None,
    max_bytes_per_vector: float | None,
    kinds: tuple[str, ...],
    threads: int | None,
    report_path: Path | None,
) -> None:
    """Prints what each found, and both ratios."""
    sample = sample_of(Data(data), rows, dim, path)
    bounds = Bounds(
        target_recall=target_recall,
        max_p99_ms=max_p99_ms,
        max_bytes_per_vector=max_bytes_per_vector,
    )
    with StageProgress() as progress:
        chosen = [IndexKind(kind) for kind in kinds]
        report = measure(sample, bounds, progress, threads or cores(), chosen)
    show(report, bounds)
    if report_path is not None:
        report_path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
