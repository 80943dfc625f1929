"""A shard's main index: searches and reads back rows of an immutable faiss index.

Rows are dense local numbers 0..n-1 in ascending item-id order; row -1 with score -inf is an empty
slot. Scores are higher-is-better for every metric: inner products as they are, L2 as *minus the
squared distance*; this is the one place where that sign is turned. Not thread-safe: one thread
searches (a shard has one).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.messages import (
    MAX_EF_SEARCH,
    MAX_NPROBE,
    MAX_RERANK_FACTOR,
    SearchParams,
)
from shardline.shards.core.schema import (
    EMPTY_ID,
    EMPTY_SCORE,
    FloatArray,
    IdArray,
    Metric,
    sort_results,
)
from shardline.shards.index import gpu
from shardline.shards.index.layers import layers_of
from shardline.shards.index.spec import Device
from shardline.shards.index.template import read_index

PARAMETER_CACHE = 64  # distinct (k, params) kept ready; callers use a handful
OVERFETCH_START = 32  # spare candidates of the first try where faiss cannot exclude rows itself


@dataclass(frozen=True, slots=True)
class _Prepared:
    """faiss parameter objects of one kind of request; ``parts`` keeps the inner ones alive."""

    top: Any | None
    parts: tuple[Any, ...]


def set_search_threads(threads: int) -> None:
    """How many threads a search may use. OpenMP keeps the number for each calling thread apart:
    call this in the thread that will search, or it gets one thread a core.
    """
    faiss.omp_set_num_threads(threads)


class MainIndex:
    """One faiss index, on a CPU or a GPU; ``defaults`` fill what a request leaves open.

    rows and dim are its size, which never changes.
    """

    def __init__(
        self,
        index: Any,
        *,
        metric: Metric,
        defaults: SearchParams,
        device: Device = Device.CPU,
    ) -> None:
        self._layers = layers_of(index)
        self.rows = int(self._layers.whole.ntotal)
        self.dim = int(self._layers.whole.d)
        self._metric = metric
        self._defaults = defaults
        self._device = device
        self._searched, self._resources = self._layers.whole, None
        if device is Device.CUDA:
            self._searched, self._resources = gpu.to_gpu(self._layers.whole)
        if self._layers.is_ivf and self._layers.refine is None:
            self._layers.base.make_direct_map()  # reconstruct needs to find a row's list
        if device is Device.CUDA:
            gpu.self_test(self._layers.whole, self._searched)
        self._prepared: dict[tuple[Any, ...], _Prepared] = {}
        self._excluded: IdArray | None = None
        self._live: NDArray[np.bool_] | None = None  # set while something is excluded
        self._selector: Any = None

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        metric: Metric,
        defaults: SearchParams,
        device: Device = Device.CPU,
    ) -> "MainIndex":
        """Reads an index file whose checksum has been verified already.

        Raises:
            CorruptFile: faiss cannot read it.
            ConfigError: device is cuda and there is none.
        """
        return cls(read_index(path), metric=metric, defaults=defaults, device=device)

    @property
    def bytes_per_vector(self) -> float:
        """Stored bytes a row: codes, row numbers, links and re-rank copies; centroids left out."""
        base, refine = self._layers.base, self._layers.refine
        if self._layers.is_hnsw:
            links = base.hnsw.neighbors.size() * 4 / max(self.rows, 1)
            size = faiss.downcast_index(base.storage).code_size + links
        elif self._layers.is_fastscan:
            size = base.M2 / 2  # 4 bits a sub-vector, padded to an even number of them
        else:
            size = base.code_size
        size += 8 if self._layers.is_ivf else 0
        return float(size + (faiss.downcast_index(refine.refine_index).code_size if refine else 0))

    def describe(self) -> dict[str, Any]:
        """What is loaded, for status pages."""
        return {
            "class": type(self._layers.base).__name__,
            "rows": self.rows,
            "dim": self.dim,
            "metric": str(self._metric),
            "device": str(self._device),
            "bytes_per_vector": round(self.bytes_per_vector, 1),
        }

    def search(
        self,
        queries: FloatArray,
        k: int,
        params: SearchParams,
        excluded: IdArray | None = None,
    ) -> tuple[FloatArray, IdArray]:
        """(scores, rows), both (n, k), in answer order, for queries (n, dim) float32.

        ``excluded`` are rows (m,) int64, sorted, that must not come back. Pass the same array
        object while the set is the same, and never change it: what is derived from it is kept.
        Knobs that this kind of index does not have are ignored.

        Raises:
            InvalidInput: wrong dimension, or a search parameter out of range.
        """
        if queries.shape[1] != self.dim:
            raise InvalidInput(
                "wrong dimension",
                field="queries",
                expected=str(self.dim),
                got=str(queries.shape[1]),
            )
        self._set_excluded(excluded)
        if self._live is not None and self._selector is None:
            distances, rows = self._search_and_filter(queries, k, params)
        else:
            distances, rows = self._search(queries, k, params)
        scores = -distances if self._metric is Metric.L2 else distances
        return _in_answer_order(scores, rows)

    def reconstruct(self, rows: IdArray) -> FloatArray:
        """(m, dim) float32 vectors of existing local rows (m,) int64.

        Exact for flat, ivf, hnsw and fp32 re-rank; rounded to half precision for fp16 re-rank;
        approximations for pq, ivfpq, sq8 and pca without a re-rank.
        """
        if rows.size == 0:
            return np.empty((0, self.dim), dtype=np.float32)
        return np.asarray(self._layers.whole.reconstruct_batch(rows), dtype=np.float32)

    def _search(
        self, queries: FloatArray, k: int, params: SearchParams
    ) -> tuple[FloatArray, IdArray]:
        prepared = self._prepare(k, params)
        distances, rows = self._searched.search(queries, k, params=prepared.top)
        return distances, rows

    def _search_and_filter(
        self, queries: FloatArray, k: int, params: SearchParams
    ) -> tuple[FloatArray, IdArray]:
        """For indexes that cannot exclude rows: fetches more, drops them, until k are left."""
        assert self._live is not None and self._excluded is not None
        most = max(k, min(k + self._excluded.size, self.rows))
        if self._device is Device.CUDA:
            most = min(most, gpu.GPU_MAX_K)
        fetch = min(2 * k + OVERFETCH_START, most)
        while True:
            distances, rows = self._search(queries, fetch, params)
            keep = (rows >= 0) & self._live[rows]
            if fetch == most or (keep.sum(axis=1) >= k).all():
                break
            fetch = min(4 * fetch, most)
        order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
        rows = np.take_along_axis(np.where(keep, rows, EMPTY_ID), order, axis=1)
        return np.take_along_axis(distances, order, axis=1), rows

    def _set_excluded(self, excluded: IdArray | None) -> None:
        if excluded is self._excluded:
            return
        self._prepared.clear()
        self._excluded = excluded
        self._live = self._selector = None
        if excluded is not None and excluded.size:
            self._live = np.ones(self.rows, dtype=np.bool_)
            self._live[excluded] = False
            if self._layers.takes_selector and self._device is Device.CPU:
                self._selector = faiss.IDSelectorBitmap(np.packbits(self._live, bitorder="little"))

    def _prepare(self, k: int, params: SearchParams) -> _Prepared:
        """The faiss parameters of a request, made once for each kind of request."""
        key = (k, params.nprobe, params.ef_search, params.rerank_factor)
        prepared = self._prepared.get(key)
        if prepared is None:
            if len(self._prepared) >= PARAMETER_CACHE:
                self._prepared.clear()
            prepared = self._prepared[key] = self._make_parameters(k, params)
        return prepared

    def _make_parameters(self, k: int, params: SearchParams) -> _Prepared:
        _check_params(params)
        layers = self._layers
        factor = params.rerank_factor or self._defaults.rerank_factor or 1
        inner: Any = self._base_parameters(k * factor if layers.refine else k, params)
        outer: Any
        parts = [inner]
        if layers.transform is not None and inner is not None:
            outer = faiss.SearchParametersPreTransform()
            outer.index_params = inner
            parts.append(outer)
            inner = outer
        if layers.refine is not None:
            outer = faiss.IndexRefineSearchParameters()
            outer.k_factor = factor
            if inner is not None:
                outer.base_index_params = inner
            parts.append(outer)
            inner = outer
        return _Prepared(inner, (*parts, self._selector))

    def _base_parameters(self, candidates: int, params: SearchParams) -> Any | None:
        layers = self._layers
        made: Any
        if layers.is_ivf:
            made = faiss.SearchParametersIVF()
            made.nprobe = min(params.nprobe or self._defaults.nprobe or 1, layers.base.nlist)
        elif layers.is_hnsw:
            made = faiss.SearchParametersHNSW()
            made.efSearch = max(params.ef_search or self._defaults.ef_search or 0, candidates)
        elif self._selector is not None:
            made = faiss.SearchParameters()
        else:
            return None
        if self._selector is not None:
            made.sel = self._selector
        return made


def _check_params(params: SearchParams) -> None:
    for name, limit in (
        ("nprobe", MAX_NPROBE),
        ("ef_search", MAX_EF_SEARCH),
        ("rerank_factor", MAX_RERANK_FACTOR),
    ):
        value = getattr(params, name)
        if value is not None and not 1 <= value <= limit:
            raise InvalidInput(
                "out of range", field=f"params.{name}", expected=f"1 to {limit}", got=str(value)
            )


def _in_answer_order(scores: FloatArray, rows: IdArray) -> tuple[FloatArray, IdArray]:
    """faiss sorts by score and pads at the end; only padding and ties need more than a look."""
    if rows[:, -1].min() < 0:
        empty = rows < 0
        scores = np.where(empty, EMPTY_SCORE, scores)
        rows = np.where(empty, EMPTY_ID, rows)
    if (scores[:, 1:] >= scores[:, :-1]).any():
        return sort_results(scores, rows)
    return scores, rows
