"""What writes cost a shard: searches over delta and hidden rows beside none, and ``apply``.

One shard of 250,000 clustered 128-d rows, ivfpq-fs, as one of four that hold a million; in this
process, one thread. A search of a state with n rows in its delta reads all n vectors besides: the
floor of one query is n x dim x 4 bytes at the speed of the cache they lie in, that of a batch n x
dim multiplications per query. Hidden rows cost the selector's look at each candidate. The baseline
is the state without writes, asked the same queries; rounds take turns over all states, and the
ratio is the median of the rounds' own ratios. Times are processor time of the one thread, as other
work on the machine would count otherwise.

    python -m shardline.bench.live_state [--rows N] [--folder FOLDER] [--json FILE]
"""

import json
import platform
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from shardline.bench.corpus import clusters_of
from shardline.bench.vectors import clustered
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import FloatArray, IdArray, Metric
from shardline.shards.index.main_index import MainIndex, set_search_threads
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexKind, IndexSpec
from shardline.shards.index.template import (
    build_shard_index,
    in_blocks,
    train_template,
    write_index,
)
from shardline.shards.live.records import Delete, Record, Upsert
from shardline.shards.live.state import ShardState, apply

DIM, K, SEED = 128, 100, 7
NLIST = 2048  # what a build chooses for the million rows of four such shards
PARAMS = SearchParams(nprobe=16)
DELTAS = (1_000, 5_000, 12_500)
HIDDEN = (0.01, 0.05)  # of the rows
FEW, BATCH = 4, 64  # queries at once: as a busy router sends them, and as batch jobs do
QUERIES = 512
ROUNDS = 12
RECORD_ROWS = 100
TEMPLATE = "live-state-template.faiss"


def load_main(folder: Path, rows: int) -> MainIndex:
    """The index over ``rows`` clustered rows, built in ``folder`` unless it is there."""
    spec = IndexSpec(kind=IndexKind.IVFPQ_FS, nlist=NLIST)
    resolved = resolve(spec, rows=rows, dim=DIM, metric=Metric.COSINE)
    path, template = folder / f"live-state-{rows}.faiss", folder / TEMPLATE
    if not path.exists():
        vectors = clustered(rows, DIM, clusters_of(4 * rows), SEED)
        chosen = np.random.default_rng(0).permutation(rows)[: resolved.train_rows]
        trained = train_template(resolved, vectors[chosen], metric=Metric.COSINE, seed=0, threads=1)
        write_index(trained, template)
        build_shard_index(template, in_blocks(vectors), path, threads=1)
    return MainIndex.load(path, metric=Metric.COSINE, defaults=resolved.search_params)


def upserts(ids: IdArray, vectors: FloatArray, first: int, rows: int = RECORD_ROWS) -> list[Record]:
    """Records of ``rows`` rows each, numbered from ``first``."""
    records = []
    for at in range(0, len(ids), rows):
        part = slice(at, at + rows)
        change = Upsert(item_ids=ids[part], vectors=vectors[part], attributes=b"")
        records.append(record(first + at // rows, change))
    return records


def record(seq: int, change: Upsert | Delete) -> Record:
    return Record(seq=seq, epoch=1, key="", change=change)


def states_of(base: ShardState, new: FloatArray) -> dict[str, ShardState]:
    """By what was written: new rows, deletions, or rows written anew (which are both)."""
    rows = base.main.rows
    states = {"no writes": base}
    for count in DELTAS:
        ids = np.arange(rows, rows + count)
        states[f"{count:,} new rows"] = apply(base, upserts(ids, new[:count], 1))[0]
    shuffled = np.random.default_rng(1).permutation(rows).astype(np.int64)
    for share in HIDDEN:
        gone = np.sort(shuffled[: int(rows * share)])
        states[f"{share:.0%} deleted"] = apply(base, [record(1, Delete(item_ids=gone))])[0]
    again = shuffled[: DELTAS[0]]
    states[f"{len(again):,} rows anew"] = apply(base, upserts(again, new[: len(again)], 1))[0]
    return states


def time_searches(
    states: dict[str, ShardState], queries: FloatArray, rounds: int
) -> dict[str, dict[str, float]]:
    """Microseconds of processor time per call, single and in batches, and ratios to the first."""

    def asked_by(width: int) -> Callable[[ShardState], list[float]]:
        parts = [queries[at : at + width] for at in range(0, len(queries), width)]
        return lambda state: [timed(state, part) for part in parts]

    asked = {"single": asked_by(1), "few": asked_by(FEW), "batch": asked_by(BATCH)}
    found: dict[str, dict[str, float]] = {name: {} for name in states}
    for kind, ask in asked.items():
        samples: dict[str, list[float]] = {name: [] for name in states}
        for turn in range(rounds + 1):
            for name, state in states.items():
                middle = float(np.median(ask(state)))
                if turn:  # the first warms up
                    samples[name].append(middle)
        base = np.array(next(iter(samples.values())))
        for name, values in samples.items():
            found[name][f"{kind}_us"] = float(np.median(values)) * 1e6
            found[name][f"{kind}_ratio"] = float(np.median(np.array(values) / base))
    return found


def timed(state: ShardState, queries: FloatArray) -> float:
    started = time.thread_time()
    state.search(queries, K, PARAMS)
    return time.thread_time() - started


def time_apply(base: ShardState, new: FloatArray) -> dict[str, float]:
    """Median microseconds of one call that applies one record, and bytes per row of a delta."""
    rows = base.main.rows
    fresh, known = np.arange(rows, rows + len(new)), np.arange(len(new))
    cases = {
        "1 new row": (fresh, 1),
        "1 row anew": (known, 1),
        f"{RECORD_ROWS} new rows": (fresh, RECORD_ROWS),
        f"{RECORD_ROWS} rows anew": (known, RECORD_ROWS),
    }
    found = {}
    for name, (ids, width) in cases.items():
        for already in (0, DELTAS[0], DELTAS[-1] - 1000):
            state, records = base, upserts(ids, new, 1, already or 1)[: 1 if already else 0]
            state = apply(state, records)[0]
            rest = slice(already, already + min(1000, 50 * width))
            samples = []
            for each in upserts(ids[rest], new[rest], state.seq + 1, width):
                started = time.thread_time()
                state, _ = apply(state, [each])
                samples.append(time.thread_time() - started)
            found[f"{name}, {already:,} there"] = float(np.median(samples)) * 1e6
    return found


def bytes_per_row(base: ShardState, new: FloatArray) -> float:
    """What a delta of these rows takes per row, vector, id and spare room included."""
    ids = np.arange(base.main.rows, base.main.rows + len(new))
    tracemalloc.start()
    state, _ = apply(base, upserts(ids, new, 1))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert state.delta.num_live == len(new)
    return taken / len(new)


def time_second_tier(folder: Path, new: FloatArray, queries: FloatArray) -> dict[str, float]:
    """Median microseconds of a search of the delta's rows as an index made from the template: what
    a second tier would cost instead of an exact search, which finds all."""
    found = {}
    for count in DELTAS:
        path = folder / "live-state-tier.faiss"
        build_shard_index(folder / TEMPLATE, in_blocks(new[:count]), path, threads=1)
        tier = MainIndex.load(path, metric=Metric.COSINE, defaults=SearchParams(rerank_factor=1))
        path.unlink()
        for name, width in (("single", 1), (f"batch of {BATCH}", BATCH)):
            samples = []
            for at in range(0, len(queries) - width + 1, width):
                started = time.thread_time()
                tier.search(queries[at : at + width], K, PARAMS)
                samples.append(time.thread_time() - started)
            found[f"{count:,} rows, {name}"] = float(np.median(samples)) * 1e6
    return found


@click.command()
@click.option("--rows", default=250_000, help="Of the shard.")
@click.option("--rounds", default=ROUNDS, help="Turns over all states.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("shardline-store/bench"),
    help="Where the index is kept.",
)
@click.option("--json", "report", type=click.Path(path_type=Path), help="File to write.")
def main(rows: int, rounds: int, folder: Path, report: Path | None) -> None:
    """Prints the tables."""
    set_search_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    base = ShardState.of(load_main(folder, rows), np.arange(rows))
    # further rows of the corpus, and queries beyond them
    new = clustered(DELTAS[-1], DIM, clusters_of(4 * rows), SEED, first_row=4 * rows)
    queries = clustered(QUERIES, DIM, clusters_of(4 * rows), SEED, first_row=5 * rows)
    click.echo(f"numpy {np.__version__}, {platform.machine()}, {rows:,} x {DIM}, k {K}, {PARAMS}")
    memory = bytes_per_row(base, new)
    searches = time_searches(states_of(base, new), queries, rounds)
    click.echo("search                  one, us  of none  4, us    of none  64, us    of none")
    for name, line in searches.items():
        click.echo(
            f"{name:<23} {line['single_us']:<8.1f} {line['single_ratio']:<8.3f} "
            f"{line['few_us']:<8.1f} {line['few_ratio']:<8.3f} "
            f"{line['batch_us']:<9.0f} {line['batch_ratio']:.3f}"
        )
    applies, tiers = time_apply(base, new), time_second_tier(folder, new, queries)
    click.echo(f"bytes per row of a delta: {memory:.0f}, of them its vector {4 * DIM}")
    for title, values in (("apply", applies), ("an index instead of a delta", tiers)):
        click.echo(f"{title}, us")
        for name, value in values.items():
            click.echo(f"  {name:<30} {value:.1f}")
    if report is not None:
        lines = {"search": searches, "apply_us": applies, "tier_us": tiers, "row_bytes": memory}
        report.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
