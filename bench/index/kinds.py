"""Index kinds side by side on one corpus: recall, time per query, size, build time.

One index over all rows, in this process. Singly: one query at a time on one thread, what a single
shard pays. In batch: all queries at once on the threads given. Recall@k is against the flat index,
which is exact, counted by score; flat is also the baseline of the times. A sweep asks every kind
with several search-time settings, because one setting per kind says little about which is better.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardline.shards.core.messages import SearchParams
from shardline.shards.core.recall import exact_scores, recall_at_k
from shardline.shards.core.schema import FloatArray, IdArray, Metric
from shardline.shards.index.main_index import MainIndex, set_search_threads
from shardline.shards.index.resolve import IVF_KINDS, resolve
from shardline.shards.index.spec import IndexKind, IndexSpec, ResolvedIndex
from shardline.shards.index.template import (
    build_shard_index,
    in_blocks,
    train_template,
    write_index,
)

KINDS = (
    IndexKind.FLAT,
    IndexKind.IVF,
    IndexKind.HNSW,
    IndexKind.PQ,
    IndexKind.IVFPQ,
    IndexKind.IVFPQ_FS,
)
ALL_KINDS = (*KINDS, IndexKind.SQ8)
HEADER = (
    "index",
    "recall@100",
    "ms per query",
    "of flat",
    "batch, queries/s",
    "bytes per vector",
    "build s",
    "factory",
)
K = 100
NPROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
EF_SEARCHES = (100, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One search-time setting of a kind; params are those set, none for the kind's defaults."""

    params: dict[str, int]
    recall: float
    ms_per_query: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KindReport:
    """One row of the table; ms_per_query is the median of single queries on one thread.

    points: what a sweep measured; without one, the defaults alone.
    """

    kind: str
    factory: str
    k: int
    recall: float
    ms_per_query: float
    batch_queries_per_second: float
    bytes_per_vector: float
    build_seconds: float
    points: list[Setting]


def compare(
    vectors: FloatArray,
    queries: FloatArray,
    folder: Path,
    *,
    metric: Metric,
    threads: int,
    kinds: Sequence[IndexKind] = KINDS,
    k: int = K,
    sweep: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> list[KindReport]:
    """Builds each kind over vectors (m, dim) in ``folder`` and asks it queries (n, dim).

    ``threads`` are those of builds and batches; single searches use one. Flat comes first, asked
    for or not. ``note`` takes a line for each kind that is done.
    """
    exact: FloatArray | None = None
    reports = []
    chosen = (IndexKind.FLAT, *(kind for kind in kinds if kind != IndexKind.FLAT))
    for number, kind in enumerate(chosen):
        progress("index kinds", number, len(chosen))
        index, resolved, seconds = _build(vectors, folder, kind, metric, threads)
        points = []
        for params in ({}, *(settings_of(resolved) if sweep else ())):
            found, ms_per_query = _ask(index, queries, k, SearchParams(**params))
            scores = exact_scores(queries, vectors, found, metric)
            exact = scores if exact is None else exact
            recall = recall_at_k(scores, exact)
            points.append(Setting(params=params, recall=recall, ms_per_query=ms_per_query))
        recall, ms_per_query = points[0].recall, points[0].ms_per_query
        reports.append(
            KindReport(
                kind=kind.value,
                factory=resolved.factory,
                k=k,
                recall=recall,
                ms_per_query=ms_per_query,
                batch_queries_per_second=_ask_at_once(index, queries, k, threads),
                bytes_per_vector=index.bytes_per_vector,
                build_seconds=seconds,
                points=points,
            )
        )
        note(
            f"  {kind}: built in {seconds:.1f} s, recall@{k} {recall:.3f}, "
            f"{ms_per_query:.2f} ms per query"
            + (f"; {chosen[number + 1]} next" if number + 1 < len(chosen) else "")
        )
    progress("index kinds", len(chosen), len(chosen))
    return reports


def settings_of(resolved: ResolvedIndex) -> list[dict[str, int]]:
    """The search-time settings worth trying besides the defaults; none where there is no knob."""
    if resolved.kind in IVF_KINDS:
        assert resolved.nlist is not None
        return [
            {"nprobe": nprobe}
            for nprobe in NPROBES
            if nprobe <= resolved.nlist and nprobe != resolved.nprobe
        ]
    if resolved.kind is IndexKind.HNSW:
        return [{"ef_search": ef} for ef in EF_SEARCHES if ef != resolved.ef_search]
    return []


def table_rows(reports: Sequence[KindReport]) -> list[tuple[str, ...]]:
    """Rows for HEADER; the first report is the baseline of the column "of flat"."""
    flat_ms = reports[0].ms_per_query
    return [
        (
            report.kind,
            f"{report.recall:.3f}",
            f"{report.ms_per_query:.3f}",
            f"{report.ms_per_query / flat_ms:.3f}",
            f"{report.batch_queries_per_second:,.0f}",
            f"{report.bytes_per_vector:.0f}",
            f"{report.build_seconds:.1f}",
            report.factory,
        )
        for report in reports
    ]


def _build(
    vectors: FloatArray, folder: Path, kind: IndexKind, metric: Metric, threads: int
) -> tuple[MainIndex, ResolvedIndex, float]:
    """The index, what it resolved to, and the seconds of training and adding."""
    started = time.perf_counter()
    rows, dim = vectors.shape
    resolved = resolve(IndexSpec(kind=kind), rows=rows, dim=dim, metric=metric)
    chosen = np.random.default_rng(0).permutation(rows)[: max(resolved.train_rows, 1)]
    template, path = folder / f"{kind}-template.faiss", folder / f"{kind}.faiss"
    trained = train_template(resolved, vectors[chosen], metric=metric, seed=0, threads=threads)
    write_index(trained, template)
    build_shard_index(template, in_blocks(vectors), path, threads=threads)
    seconds = time.perf_counter() - started
    index = MainIndex.load(path, metric=metric, defaults=resolved.search_params)
    template.unlink()
    path.unlink()
    return index, resolved, seconds


def _ask(
    index: MainIndex, queries: FloatArray, k: int, params: SearchParams
) -> tuple[IdArray, float]:
    """(n, k) rows found, and the median milliseconds of one query."""
    set_search_threads(1)
    found, samples = [], []
    for query in queries:
        started = time.perf_counter()
        rows, _ = index.search(query[None], k, params)
        samples.append((time.perf_counter() - started) * 1e3)
        found.append(rows)
    return np.concatenate(found), float(np.median(samples))


def _ask_at_once(index: MainIndex, queries: FloatArray, k: int, threads: int) -> float:
    """Queries/s of one batch of them all."""
    set_search_threads(threads)
    started = time.perf_counter()
    index.search(queries, k, SearchParams())
    return len(queries) / (time.perf_counter() - started)
