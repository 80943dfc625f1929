"""The costs that ``shardline plan`` reckons with, measured in this process on one thread.

    python -m shardline.bench.plan_costs [--rows 250000] [--dim 128] [--out FILE]

Theory: a search of one shard is a sum of a few kinds of work: a part that every call has, all
centroids compared, lists opened, codes read, candidates re-ranked. Each is found as a slope: the
same queries with other search parameters over the same index, and over one with a quarter of its
rows, and a least-squares fit of the processor times, of which each is the least of some rounds.
Centroids alone are a flat index of as many rows, small enough for a cache and too large for one.

The distribution of a shard's latency is that of queries that leave at random, 100 per second, as
quantiles by their median; beside them stands what the same queries take one after the other, since
a processor that has paused finds its caches cold. Other work on the machine lengthens the tail.

Recall by the lists searched is that of ``manifold``, whose rows have no clusters and whose queries
lie between them, which is nearer to the output of a trained tower than the clustered corpus.

The JSON at the end has what ``cluster/planner/measured_costs.py`` holds.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np

from shardline.bench.corpus import SEED, clusters_of
from shardline.bench.vectors import clustered, manifold
from shardline.cluster.console import print_table
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.recall import exact_scores, recall_at_k
from shardline.shards.core.schema import FloatArray, Metric
from shardline.shards.index.exact import exact_top_k
from shardline.shards.index.main_index import MainIndex, set_search_threads
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import MEASURED_K, IndexKind, IndexSpec
from shardline.shards.index.template import filled_copy, in_blocks, train_template

SHARDS = 4  # the index is one of four shards: its lists are those of four times its rows
QUERIES = 64
ROUNDS = 5
PACED_RATE = 100.0  # queries per second of the latencies
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999)
CENTROIDS = (2048, 65_536)
LATENT = 16  # dimensions of the surface of ``manifold``
RECALL_NPROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RECALL_FACTOR = 4
PARAMS = {
    IndexKind.FLAT: (SearchParams(),),
    IndexKind.IVF: tuple(SearchParams(nprobe=n) for n in (1, 4, 16, 64)),
    IndexKind.IVFPQ: tuple(SearchParams(nprobe=n) for n in (1, 4, 16, 64)),
    IndexKind.IVFPQ_FS: tuple(
        SearchParams(nprobe=nprobe, rerank_factor=factor)
        for nprobe in (1, 4, 16, 64, 256)
        for factor in (1, 4)
    ),
}


def least_us(ask: Callable[[FloatArray], object], queries: FloatArray) -> float:
    """Processor time of one query: the least of some rounds over all of them."""
    took = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        for at in range(len(queries)):
            ask(queries[at : at + 1])
        took.append((time.thread_time() - began) / len(queries) * 1e6)
    return min(took)


def fit(rows: Sequence[Sequence[float]], times_us: Sequence[float]) -> list[float]:
    """The costs whose sums come nearest to the times in ratio; none below 0."""
    work, times = np.asarray(rows), np.asarray(times_us)
    kept = list(range(work.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(work[:, kept] / times[:, None], np.ones(len(times)))
        if (found >= 0).all():
            break
        del kept[int(np.argmin(found))]
    costs = [0.0] * work.shape[1]
    for place, cost in zip(kept, found, strict=True):
        costs[place] = float(cost)
    return costs


def _search(main: MainIndex, params: SearchParams, query: FloatArray) -> object:
    return main.search(query, MEASURED_K, params)


def indexes_of(
    kind: IndexKind, vectors: FloatArray
) -> tuple[list[tuple[MainIndex, int]], int | None]:
    """One over all rows, one over a quarter of them, both of one template; and their lists."""
    rows, dim = vectors.shape
    spec = IndexSpec(kind=kind)
    index = resolve(spec, rows=rows * SHARDS, dim=dim, metric=Metric.COSINE)
    sample = vectors[: min(rows, max(index.train_rows, 1))]
    template = train_template(index, sample, metric=Metric.COSINE, seed=0, threads=1)
    found = []
    for part in (rows, rows // 4):
        layers = filled_copy(template, in_blocks(vectors[:part]), threads=1)
        found.append((MainIndex(layers.whole, metric=Metric.COSINE, defaults=SearchParams()), part))
    return found, index.nlist


def kind_costs(
    kind: IndexKind, vectors: FloatArray, queries: FloatArray, centroid_us: float
) -> tuple[dict[str, float], MainIndex]:
    """Microseconds: ``call``, ``list``, ``row``, ``candidate``; the index over all rows."""
    indexes, nlist = indexes_of(kind, vectors)
    work, times = [], []
    for main, rows in indexes:
        for params in PARAMS[kind]:
            lists = params.nprobe or 0
            scanned = rows * lists / nlist if nlist else rows
            candidates = (params.rerank_factor or 0) * MEASURED_K
            took = least_us(partial(_search, main, params), queries)
            work.append((1.0, float(lists), float(scanned), float(candidates)))
            times.append(max(took - centroid_us * (nlist or 0), 0.1))
    used = [any(row[place] for row in work) for place in range(4)]
    costs = fit([[row[p] for p in range(4) if used[p]] for row in work], times)
    each = iter(costs)
    names = ("call", "list", "row", "candidate")
    return {name: next(each) for name, is_used in zip(names, used, strict=True) if is_used}, (
        indexes[0][0]
    )


def centroid_us(dim: int, lists: int) -> float:
    """Of one centroid, of so many that a query is compared with."""
    rng = np.random.default_rng(SEED)
    index = faiss.IndexFlatIP(dim)
    index.add(rng.standard_normal((lists, dim), dtype=np.float32))
    queries = rng.standard_normal((QUERIES, dim), dtype=np.float32)
    return least_us(lambda query: index.search(query, 16), queries) / lists


def paced_ms(
    main: MainIndex, params: SearchParams, queries: FloatArray, *, seconds: float, rate: float
) -> dict[str, Any]:
    """Latencies of single queries that leave at random, and of the same one after the other."""

    def ask(at: int) -> tuple[float, float]:
        query = queries[at % len(queries)][None]
        cpu, began = time.thread_time(), time.perf_counter()
        main.search(query, MEASURED_K, params)
        return (time.perf_counter() - began) * 1e3, (time.thread_time() - cpu) * 1e3

    count = int(seconds * rate)
    one_by_one = [ask(at) for at in range(count)]
    paced = []
    for at, gap in enumerate(np.random.default_rng(0).exponential(1 / rate, count)):
        time.sleep(gap)
        paced.append(ask(at))
    found: dict[str, Any] = {}
    for name, times in (("one_by_one", one_by_one), ("paced", paced)):
        wall, cpu = (np.asarray(column) for column in zip(*times, strict=True))
        median = float(np.median(wall))
        found[name] = {
            "p50_ms": round(median, 4),
            "cpu_p50_ms": round(float(np.median(cpu)), 4),
            "quantiles_by_p50": {
                f"{q:g}": round(float(np.quantile(wall, q)) / median, 3) for q in QUANTILES
            },
            "longest_by_p50": round(float(wall.max()) / median, 3),
        }
    return found


def recall_by_nprobe(rows: int, dim: int) -> dict[str, Any]:
    """recall@100 of one index of kind ivfpq-fs over ``rows`` of the manifold, by lists searched."""
    vectors = manifold(rows, dim, LATENT, SEED)
    queries = manifold(4 * QUERIES, dim, LATENT, SEED, stream=1)
    index = resolve(IndexSpec(kind=IndexKind.IVFPQ_FS), rows=rows, dim=dim, metric=Metric.COSINE)
    template = train_template(
        index, vectors[: index.train_rows], metric=Metric.COSINE, seed=0, threads=1
    )
    layers = filled_copy(template, in_blocks(vectors), threads=1)
    main = MainIndex(layers.whole, metric=Metric.COSINE, defaults=SearchParams())
    exact = exact_top_k(queries, vectors, MEASURED_K, Metric.COSINE).scores
    found = {}
    for nprobe in RECALL_NPROBES:
        params = SearchParams(nprobe=nprobe, rerank_factor=RECALL_FACTOR)
        ids = main.search(queries, MEASURED_K, params).ids
        own = exact_scores(queries, vectors, ids, Metric.COSINE)
        found[str(nprobe)] = round(recall_at_k(own, exact), 4)
    return {"rows": rows, "nlist": index.nlist, "rerank_factor": RECALL_FACTOR, "recall": found}


@click.command()
@click.option("--rows", type=click.IntRange(min=4096), default=250_000, show_default=True)
@click.option("--dim", type=click.IntRange(min=8), default=128, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=1), default=20.0, show_default=True)
@click.option("--recall-rows", type=click.IntRange(min=4096), default=250_000, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False))
def main(rows: int, dim: int, seconds: float, recall_rows: int, out: Path | None) -> None:
    """Costs of searches of one shard, by kind of index, and how its latencies are spread."""
    set_search_threads(1)
    clusters = clusters_of(rows * SHARDS)
    vectors = clustered(rows, dim, clusters, SEED)
    queries = clustered(QUERIES, dim, clusters, SEED, first_row=1 << 24)
    centroids = {lists: centroid_us(dim, lists) for lists in CENTROIDS}
    report: dict[str, Any] = {
        "setup": {"rows": rows, "dim": dim, "k": MEASURED_K, "faiss": faiss.__version__},
        "centroid_us": {str(lists): round(us, 6) for lists, us in centroids.items()},
        "kinds": {},
    }
    for kind in PARAMS:
        costs, index = kind_costs(kind, vectors, queries, centroids[CENTROIDS[0]])
        report["kinds"][str(kind)] = {name: round(us, 5) for name, us in costs.items()}
        click.echo(f"{kind}: " + ", ".join(f"{name} {us:.4f} us" for name, us in costs.items()))
    params = SearchParams(nprobe=16, rerank_factor=1)
    report["latency"] = paced_ms(index, params, queries, seconds=seconds, rate=PACED_RATE)
    rows_of = [
        (name, *(f"{each[figure]:.3f}" for figure in ("p50_ms", "cpu_p50_ms", "longest_by_p50")))
        for name, each in report["latency"].items()
    ]
    title = f"{rows:,} x {dim}, {IndexKind.IVFPQ_FS}, nprobe 16, rerank_factor 1, k = {MEASURED_K}"
    print_table(title, ("single queries", "p50 ms", "CPU p50 ms", "longest / p50"), rows_of)
    report["recall"] = recall_by_nprobe(recall_rows, dim)
    text = json.dumps(report, indent=2)
    if out is not None:
        out.write_text(text + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
