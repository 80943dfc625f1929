"""Index kinds side by side on one corpus: recall, time of a query, size, build time.

One index over all rows, in this process, one thread, queries one at a time: what a single shard
pays. Recall@k is against the flat index, which is exact; flat is also the baseline of the times.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.vectors import recall_at_k
from shards.index_build import build_shard_index, train_template, write_index
from shards.index_resolve import resolve
from shards.index_spec import IndexKind, IndexSpec
from shards.main_index import MainIndex, set_search_threads
from shards.schema import FloatArray, IdArray, Metric
from shards.types import SearchParams

KINDS = (
    IndexKind.FLAT,
    IndexKind.IVF,
    IndexKind.HNSW,
    IndexKind.PQ,
    IndexKind.IVFPQ,
    IndexKind.IVFPQ_FS,
)
HEADER = ("index", "recall@100", "ms a query", "of flat", "bytes a vector", "build s", "factory")
K = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class KindReport:
    """One row of the table; ms_per_query is the median of single queries on one thread."""

    kind: str
    factory: str
    recall: float
    ms_per_query: float
    bytes_per_vector: float
    build_seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    vectors: FloatArray,
    queries: FloatArray,
    folder: Path,
    *,
    metric: Metric,
    threads: int,
    kinds: Sequence[IndexKind] = KINDS,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[KindReport]:
    """Builds each kind over vectors (m, dim) in ``folder`` and asks it queries (n, dim).

    ``threads`` are those of the builds; searches use one.
    """
    exact: IdArray | None = None
    reports = []
    for number, kind in enumerate((IndexKind.FLAT, *(k for k in kinds if k != IndexKind.FLAT))):
        progress("index kinds", number, len(kinds))
        index, factory, seconds = _build(vectors, folder, kind, metric, threads)
        found, ms_per_query = _ask(index, queries)
        exact = found if exact is None else exact
        reports.append(
            KindReport(
                kind=kind.value,
                factory=factory,
                recall=recall_at_k(found, exact),
                ms_per_query=ms_per_query,
                bytes_per_vector=index.bytes_per_vector,
                build_seconds=seconds,
            )
        )
    progress("index kinds", len(kinds), len(kinds))
    return reports


def table_rows(reports: Sequence[KindReport]) -> list[tuple[str, ...]]:
    """Rows for HEADER; the first report is the baseline of the column "of flat"."""
    flat_ms = reports[0].ms_per_query
    return [
        (
            report.kind,
            f"{report.recall:.3f}",
            f"{report.ms_per_query:.3f}",
            f"{report.ms_per_query / flat_ms:.3f}",
            f"{report.bytes_per_vector:.0f}",
            f"{report.build_seconds:.1f}",
            report.factory,
        )
        for report in reports
    ]


def _build(
    vectors: FloatArray, folder: Path, kind: IndexKind, metric: Metric, threads: int
) -> tuple[MainIndex, str, float]:
    """The index, its factory string, and the seconds of training and adding."""
    started = time.perf_counter()
    rows, dim = vectors.shape
    resolved = resolve(IndexSpec(kind=kind), rows=rows, dim=dim, metric=metric)
    chosen = np.random.default_rng(0).permutation(rows)[: max(resolved.train_rows, 1)]
    template, path = folder / f"{kind}-template.faiss", folder / f"{kind}.faiss"
    trained = train_template(resolved, vectors[chosen], metric=metric, seed=0, threads=threads)
    write_index(trained, template)
    build_shard_index(template, vectors, path, metric=metric, threads=threads)
    seconds = time.perf_counter() - started
    index = MainIndex.load(path, metric=metric, defaults=resolved.search_params)
    template.unlink()
    path.unlink()
    return index, resolved.factory, seconds


def _ask(index: MainIndex, queries: FloatArray) -> tuple[IdArray, float]:
    """(n, K) rows found, and the median milliseconds of one query."""
    set_search_threads(1)
    found, samples = [], []
    for query in queries:
        started = time.perf_counter()
        _, rows = index.search(query[None], K, SearchParams())
        samples.append((time.perf_counter() - started) * 1e3)
        found.append(rows)
    return np.concatenate(found), float(np.median(samples))
