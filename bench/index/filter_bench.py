"""Filtered search beside unfiltered search: recall, milliseconds per query and shard, one thread.

Indexes of the default kind over the shards of one clustered corpus, in this process. Filters are
random, of several selectivities, and correlated with the vectors: rows fall into categories by the
nearest of some centroids, and a filter takes the query's own category, one other, ten others, or
half of all without the query's own. Recall is that of the merged answer, by score, against an exact
scan of what matches; the times are those of one shard. ``first`` is the first search with a filter,
for which everything is derived from its rows; ``p50`` and ``p99`` are of all others.

The baseline, on the first line, is an unfiltered search with the fewest lists and candidates that
find TARGET of the results; with these as the default parameters all filters are searched.

    python -m shardline.bench.index.filter_bench [--rows 1000000 --shards 4]
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np
from numpy.typing import NDArray

from shardline.bench.corpus import SEED, clusters_of
from shardline.bench.vectors import BLOCK_ROWS, clustered
from shardline.shards.core.messages import NO_PARAMS, SearchParams
from shardline.shards.core.recall import exact_scores, recall_at_k
from shardline.shards.core.schema import EMPTY_ID, FloatArray, IdArray, Metric, Ranked, in_order
from shardline.shards.index.main_index import MainIndex, set_search_threads
from shardline.shards.index.resolve import resolve
from shardline.shards.index.selection import Selection
from shardline.shards.index.spec import IndexKind, IndexSpec
from shardline.shards.index.template import train_template, write_index

METRIC = Metric.COSINE
TARGET = 0.99
SETTINGS = [(nprobe, factor) for nprobe in (4, 8, 16, 32, 64, 128) for factor in (1, 2, 4)]
SELECTIVITIES = (0.5, 0.1, 0.01, 0.001)
CATEGORIES = 100
CATEGORY_SAMPLE = 20_000
CORRELATED = ("own", "one other", "ten others", "half, not own")
QUERIES_PER_FILTER = 50  # of the same filter; correlated ones have as many filters as categories

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What was measured of one kind of filter; selectivity is the share of rows that match."""

    name: str
    selectivity: float
    recall: float
    first_ms: float
    p50_ms: float
    p99_ms: float


class Shards:
    """The indexes of a corpus (m, dim) float32, cut into equal ranges of rows."""

    def __init__(self, indexes: list[Any], vectors: FloatArray, defaults: SearchParams) -> None:
        self.vectors = vectors
        self._mains = [MainIndex(each, metric=METRIC, defaults=defaults) for each in indexes]
        self._starts = np.cumsum([0, *(main.rows for main in self._mains)])

    def selections(self, mask: Mask) -> list[Selection]:
        """Of each shard, for mask (m,)."""
        return [
            Selection.of(mask[start : start + main.rows])
            for start, main in zip(self._starts, self._mains, strict=False)
        ]

    def ask(
        self, query: FloatArray, k: int, selections: list[Selection] | None
    ) -> tuple[IdArray, list[float]]:
        """(k,) rows of the merged answer, and the milliseconds of each shard."""
        parts, times = [], []
        for at, main in enumerate(self._mains):
            began = time.perf_counter()
            if selections is None:
                found = main.search(query[None], k, NO_PARAMS)
            else:
                found = main.search_filtered(query[None], k, NO_PARAMS, selections[at])
            times.append((time.perf_counter() - began) * 1e3)
            rows = np.where(found.ids == EMPTY_ID, EMPTY_ID, found.ids + self._starts[at])
            parts.append(Ranked(rows, found.scores))
        merged = in_order(
            np.concatenate([part.ids for part in parts], axis=1),
            np.concatenate([part.scores for part in parts], axis=1),
        )
        return merged.ids[0, :k], times


def built(vectors: FloatArray, shards: int, folder: Path | None) -> list[Any]:
    """Indexes of faiss over vectors, one per shard; kept in ``folder`` and read from there."""
    rows, dim = vectors.shape
    names = [f"filter-bench-{rows}x{dim}-{at}of{shards}.faiss" for at in range(shards)]
    if folder is not None and all((folder / name).exists() for name in names):
        return [faiss.read_index(str(folder / name)) for name in names]
    resolved = resolve(IndexSpec(kind=IndexKind.IVFPQ_FS), rows=rows, dim=dim, metric=METRIC)
    chosen = np.random.default_rng(SEED).permutation(rows)[: resolved.train_rows]
    template = train_template(resolved, vectors[chosen], metric=METRIC, seed=SEED, threads=1)
    indexes = []
    for name, part in zip(names, np.array_split(vectors, shards), strict=True):
        index = faiss.clone_index(template)
        index.add(part)
        indexes.append(index)
        if folder is not None:
            write_index(index, folder / name)
    return indexes


def exact(queries: FloatArray, vectors: FloatArray, mask: Mask, k: int) -> FloatArray:
    """(n, k): the scores of the exact answer, -inf where fewer match."""
    rows = np.flatnonzero(mask)
    out = np.full((len(queries), k), -np.inf, np.float32)
    width = min(k, len(rows))
    if width:
        _, found = faiss.knn(queries, vectors[rows], width, metric=faiss.METRIC_INNER_PRODUCT)
        out[:, :width] = exact_scores(queries, vectors[rows], found, METRIC)
    return out


def tuned(make: Callable[[SearchParams], Shards], queries: FloatArray, k: int) -> SearchParams:
    """The cheapest setting that finds TARGET."""
    best = None
    for nprobe, factor in SETTINGS:
        params = SearchParams(nprobe=nprobe, rerank_factor=factor)
        shards = make(params)
        if best is None:
            everything = np.ones(len(shards.vectors), np.bool_)
            best = exact(queries, shards.vectors, everything, k)
        found = np.array([shards.ask(query, k, None)[0] for query in queries])
        if recall_at_k(exact_scores(queries, shards.vectors, found, METRIC), best) >= TARGET:
            return params
    return params


def filters_of(vectors: FloatArray, queries: FloatArray) -> Iterator[tuple[str, Mask, IdArray]]:
    """(name, which rows match (m,), which queries are asked): a name has one filter or several."""
    rng = np.random.default_rng(SEED)
    for selectivity in SELECTIVITIES:
        yield f"random {selectivity:g}", rng.random(len(vectors)) < selectivity, every(queries)
    trained = faiss.Kmeans(vectors.shape[1], CATEGORIES, niter=8, seed=SEED, spherical=True)
    trained.train(vectors[rng.permutation(len(vectors))[:CATEGORY_SAMPLE]])
    of_row = trained.index.search(vectors, 1)[1][:, 0]
    of_query = trained.index.search(queries, 1)[1][:, 0]
    for name in CORRELATED:
        for own in np.unique(of_query).tolist():
            others = rng.permutation(np.delete(np.arange(CATEGORIES), own))
            counts = {"own": 0, "one other": 1, "ten others": 10, "half, not own": 50}
            chosen = [own] if name == "own" else others[: counts[name]].tolist()
            yield name, np.isin(of_row, chosen), np.flatnonzero(of_query == own)


def every(queries: FloatArray) -> IdArray:
    return np.arange(len(queries), dtype=np.int64)


def measure(shards: Shards, queries: FloatArray, k: int) -> list[Line]:
    """The unfiltered search first."""
    everything = np.ones(len(shards.vectors), np.bool_)
    lines = [_line("unfiltered", [(everything, every(queries))], shards, queries, k)]
    by_name: dict[str, list[tuple[Mask, IdArray]]] = {}
    for name, mask, asked in filters_of(shards.vectors, queries):
        by_name.setdefault(name, []).append((mask, asked))
    lines += [_line(name, filters, shards, queries, k) for name, filters in by_name.items()]
    return lines


def _line(
    name: str, filters: list[tuple[Mask, IdArray]], shards: Shards, queries: FloatArray, k: int
) -> Line:
    first, times, found, best = [], [], [], []
    for mask, asked in filters:
        selections = None if name == "unfiltered" else shards.selections(mask)
        first += shards.ask(queries[asked[0]], k, selections)[1]
        repeats = max(1, QUERIES_PER_FILTER // len(asked)) if len(filters) > 1 else 1
        for _ in range(repeats):
            answers = [shards.ask(queries[at], k, selections) for at in asked]
            times += [each for _, milliseconds in answers for each in milliseconds]
        rows = np.array([rows for rows, _ in answers])
        found.append(exact_scores(queries[asked], shards.vectors, rows, METRIC))
        best.append(exact(queries[asked], shards.vectors, mask, k))
    return Line(
        name=name,
        selectivity=float(np.mean([mask.mean() for mask, _ in filters])),
        recall=recall_at_k(np.concatenate(found), np.concatenate(best)),
        first_ms=float(np.median(first)),
        p50_ms=float(np.median(times)),
        p99_ms=float(np.quantile(times, 0.99)),
    )


@click.command()
@click.option("--rows", default=250_000, help="Of the corpus.")
@click.option("--dim", default=128, help="Of the vectors.")
@click.option("--shards", default=1, help="That the corpus is cut into.")
@click.option("--queries", "count", default=200, help="Asked with each kind of filter.")
@click.option("-k", default=100, help="Results.")
@click.option("--folder", type=click.Path(path_type=Path), help="To keep the indexes in.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="File to write.")
def main(
    rows: int, dim: int, shards: int, count: int, k: int, folder: Path | None, report: Path | None
) -> None:
    """Prints the table."""
    set_search_threads(1)
    clusters = clusters_of(rows)
    vectors = clustered(rows, dim, clusters, SEED)
    first_row = -(-rows // BLOCK_ROWS) * BLOCK_ROWS
    queries = clustered(count, dim, clusters, SEED, first_row=first_row)
    indexes = built(vectors, shards, folder)

    def make(params: SearchParams) -> Shards:
        return Shards(indexes, vectors, params)

    params = tuned(make, queries, k)
    lines = measure(make(params), queries, k)
    click.echo(
        f"{rows:,} x {dim} in {shards} shards, k = {k}, {count} queries, one thread, defaults "
        f"nprobe {params.nprobe}, rerank_factor {params.rerank_factor}; ms per shard"
    )
    click.echo("filter          selectivity  recall  first    p50     of unfiltered  p99")
    for line in lines:
        click.echo(
            f"{line.name:<15} {line.selectivity:<12.4f} {line.recall:<7.4f} {line.first_ms:<8.3f} "
            f"{line.p50_ms:<7.3f} {line.p50_ms / lines[0].p50_ms:<14.2f} {line.p99_ms:.3f}"
        )
    if report is not None:
        setup = {"rows": rows, "dim": dim, "shards": shards, "k": k, "queries": count}
        found = {"setup": setup | asdict(params), "lines": [asdict(line) for line in lines]}
        report.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
