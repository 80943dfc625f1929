"""What the exclusions of each query cost a shard: milliseconds per query, and recall, one thread.

A shard of the default kind over a clustered corpus, asked in this process as its search thread
asks it: single queries, and batches. Queries exclude the items that are nearest to them, which is
the worst case, or items at random, as a history that has little to do with the query. Recall is of
what is left, by score, against an exact scan. A time is the median over queries, or batches, of the
fastest of REPEATS: what a search takes where nothing else is in its way. The baseline, on the first
line of each, is the same search without exclusions.

    python -m shardline.bench.index.exclusion_bench [--rows 250000]
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from shardline.bench.corpus import SEED, clusters_of
from shardline.bench.index.filter_bench import METRIC, Shards, built, tuned
from shardline.bench.vectors import BLOCK_ROWS, clustered
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.exclusions import Excluded
from shardline.shards.core.messages import SearchParams, SearchReply, SearchRequest
from shardline.shards.core.recall import exact_scores, recall_at_k
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.shards.index.main_index import MainIndex, set_search_threads
from shardline.shards.live.state import ShardState
from shardline.shards.server.shard import Shard

COUNTS = (10, 250, 1000)
BATCH = 64
REPEATS = 7  # of each query, one case after the other, so that all see the same machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Of one case; times are per query."""

    name: str
    batch: int
    recall: float
    ms: float


def requests_of(
    queries: FloatArray, lists: Sequence[IdArray], k: int, batch: int
) -> list[SearchRequest]:
    """lists: of each query the ids that it excludes, ascending."""
    requests = []
    for start in range(0, len(queries) - batch + 1, batch):
        own = lists[start : start + batch]
        counts = np.array([len(ids) for ids in own], np.int32)
        excluded = Excluded(counts, np.concatenate(own)) if counts.any() else None
        some = queries[start : start + batch]
        requests.append(SearchRequest(queries=some, k=k, timeout_ms=1e4, excluded=excluded))
    return requests


def answered(shard: Shard, request: SearchRequest) -> tuple[SearchReply, float]:
    """The reply, and the milliseconds that it took."""
    began = time.perf_counter()
    (reply,) = shard.search_batch([request])
    took_ms = (time.perf_counter() - began) * 1e3
    if isinstance(reply, ShardlineError):
        raise reply
    return reply, took_ms


def measure(
    shard: Shard, vectors: FloatArray, queries: FloatArray, k: int, batch: int
) -> list[Line]:
    """The search without exclusions first."""
    cases = lists_of(shard, queries)
    asked = {name: requests_of(queries, lists, k, batch) for name, lists in cases.items()}
    num_batches = len(queries) // batch
    times = {name: np.empty((REPEATS, num_batches)) for name in cases}
    found: dict[str, list[IdArray]] = {}
    for repeat in range(REPEATS):
        found = {name: [] for name in cases}
        for at in range(num_batches):
            for name, requests in asked.items():
                reply, took_ms = answered(shard, requests[at])
                times[name][repeat, at] = took_ms / batch
                found[name].append(reply.ranked.ids)
    lines = []
    for name, requests in asked.items():
        best = np.concatenate([exact(shard, request) for request in requests])
        of_found = exact_scores(queries, vectors, np.concatenate(found[name]), METRIC)
        lines.append(
            Line(
                name=name,
                batch=batch,
                recall=recall_at_k(of_found, exact_scores(queries, vectors, best, METRIC)),
                ms=float(np.median(times[name].min(axis=0))),
            )
        )
    return lines


def lists_of(shard: Shard, queries: FloatArray) -> dict[str, list[IdArray]]:
    """Of each case the ids that each query excludes."""
    rng = np.random.default_rng(SEED)
    whole = SearchRequest(queries=queries, k=max(COUNTS), timeout_ms=1e6)
    best = exact(shard, whole)
    none = np.empty(0, np.int64)
    cases = {"none": [none] * len(queries)}
    for count in COUNTS:
        cases[f"{count} nearest"] = [np.sort(ids[:count]) for ids in best]
    for count in COUNTS:
        some = [rng.choice(shard.rows, count, replace=False) for _ in queries]
        cases[f"{count} at random"] = [np.sort(ids) for ids in some]
    return cases


def exact(shard: Shard, request: SearchRequest) -> IdArray:
    """(n, k): the ids of the exact answer."""
    state = shard.state
    if request.excluded is None:
        return state.search_exactly(request.queries, request.k, lambda: None).ids
    return state.search_excluding(request.queries, request.k, None, request.excluded)[0].ids


@click.command()
@click.option("--rows", default=250_000, help="Of the shard.")
@click.option("--dim", default=128, help="Of the vectors.")
@click.option("--queries", "count", default=128, help="Asked in each case.")
@click.option("-k", default=100, help="Results.")
@click.option("--folder", type=click.Path(path_type=Path), help="To keep the index in.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="File to write.")
def main(rows: int, dim: int, count: int, k: int, folder: Path | None, report: Path | None) -> None:
    """Prints the table."""
    set_search_threads(1)
    clusters = clusters_of(rows)
    vectors = clustered(rows, dim, clusters, SEED)
    first_row = -(-rows // BLOCK_ROWS) * BLOCK_ROWS
    queries = clustered(count, dim, clusters, SEED, first_row=first_row)
    indexes = built(vectors, 1, folder)

    def make(params: SearchParams) -> Shards:
        return Shards(indexes, vectors, params)

    params = tuned(make, queries, k)
    main_index = MainIndex(indexes[0], metric=METRIC, defaults=params)
    state = ShardState.of(main_index, np.arange(rows))
    shard = Shard(shard=0, generation=1, state=state)
    lines = [line for batch in (1, BATCH) for line in measure(shard, vectors, queries, k, batch)]
    click.echo(
        f"{rows:,} x {dim}, k = {k}, {count} queries, one thread, defaults nprobe "
        f"{params.nprobe}, rerank_factor {params.rerank_factor}; ms per query"
    )
    click.echo("batch  excluded          recall  ms      more, us")
    plain = {line.batch: line for line in lines if line.name == "none"}
    for line in lines:
        more_us = (line.ms - plain[line.batch].ms) * 1e3
        click.echo(
            f"{line.batch:<6} {line.name:<17} {line.recall:<7.4f} {line.ms:<7.3f} {more_us:.1f}"
        )
    if report is not None:
        setup = {"rows": rows, "dim": dim, "k": k, "queries": count} | asdict(params)
        found = {"setup": setup, "lines": [asdict(line) for line in lines]}
        report.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
