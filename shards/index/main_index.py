"""A shard's main index: searches and reads back rows of an immutable faiss index.

Rows are dense local numbers 0..n-1 in ascending item-id order; row -1 with score -inf is an empty
slot. Scores are higher-is-better for every metric: inner products as they are, L2 as *minus the
squared distance*; nothing outside of ``shards.index`` sees another sign. Several threads may search
on a CPU (those of a batch job do), one alone on a GPU.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    NO_PARAMS,
    SearchParams,
)
from shardline.shards.core.schema import (
    EMPTY_ID,
    EMPTY_SCORE,
    FloatArray,
    IdArray,
    Metric,
    Ranked,
    in_order,
)
from shardline.shards.index import gpu
from shardline.shards.index.exact_scan import StoredVectors, scan
from shardline.shards.index.filtered_search import FilteredSearch
from shardline.shards.index.layers import Layers, layers_of
from shardline.shards.index.selection import Selection
from shardline.shards.index.spec import MEASURED_K, Device
from shardline.shards.index.template import FP16_MAX, keeps_fp16, read_index

# Where more rows have the score of the last result than fit, those of the lowest ids belong in the
# answer: the index is asked for more until it has shown all of them, or this many (or 4 k).
MAX_TIED = 16_384
# How what it is asked for grows, at last to that bound: most ties are short, and a long one must
# not cost many searches.
TIE_GROWTHS = (4, 32, MAX_TIED)
# faiss multiplies queries with all centroids at once, but with a few one by one: up to a quarter of
# all that takes less time. Some hundred queries visit so few lists only where each visits very few.
NAMED_SHARE, ALIKE_QUERIES = 4, 8
PARAMETER_CACHE = 64  # (k, params) whose faiss objects are kept; callers use a handful
OVERFETCH_START = 32  # extra candidates of the first attempt where faiss cannot exclude rows itself


@dataclass(slots=True)
class _Prepared:
    """faiss parameter objects of one kind of request; ``parts`` keeps the inner ones alive.

    The innermost, ``parts[0]``, points to what faiss needs of ``selection``.
    """

    top: Any | None
    parts: tuple[Any, ...]
    selection: Selection | None


@dataclass(frozen=True, slots=True)
class ByList:
    """In which order queries (n, dim) are best searched, and which lists they visit.

    order (n,): those of one nearest list follow each other, and find the codes and copies that they
    share in a cache. lists (n, nprobe): of each query; most: of how many lists some are better
    chosen as of all.
    """

    order: IdArray
    lists: IdArray
    most: int

    def of(self, queries: IdArray) -> IdArray | None:
        """The lists that some queries (m,) visit, for ``MainIndex.search``: to choose among these
        takes less time than among all. None where it does not."""
        if not self.most:
            return None
        lists = np.unique(self.lists[queries])
        lists = lists[np.searchsorted(lists, 0) :]  # a query that overflows has none
        return lists if 0 < len(lists) <= self.most else None


class _Selecting(threading.local):
    """The parameters of searches with a selection, of the thread that asks."""

    def __init__(self) -> None:
        self.prepared: dict[tuple[Any, ...], _Prepared] = {}


def set_search_threads(threads: int) -> None:
    """How many threads a search may use. OpenMP keeps this number per calling thread:
    call this in the thread that will search, or it will use one thread per core.
    """
    faiss.omp_set_num_threads(threads)


def search_threads() -> int:
    """How many threads a search of the calling thread uses."""
    return int(faiss.omp_get_max_threads())


class MainIndex:
    """One faiss index, on a CPU or a GPU; ``defaults`` fill what a request leaves open.

    Defaults are good for MEASURED_K results; for other k they are adapted, while what a request
    gives is taken as it is.

    rows and dim are its size, which never changes, and metric how it compares vectors.
    """

    def __init__(
        self,
        index: Any,
        *,
        metric: Metric,
        defaults: SearchParams,
        device: Device = Device.CPU,
        card: int = 0,
    ) -> None:
        self._layers = layers_of(index)
        self.rows = int(self._layers.whole.ntotal)
        self.dim = int(self._layers.whole.d)
        self.metric = metric
        self._defaults = defaults
        self._device = device
        self._on_card: gpu.CardIndex | None = None
        self._from_cpu = 0  # queries that the card's limits kept from an answer
        if device is Device.CUDA:
            self._on_card = gpu.CardIndex(self._layers, metric=metric, card=card)
        if self._layers.is_ivf and self._layers.refine is None:
            self._layers.base.make_direct_map()  # reconstruct needs to find a row's list
        self._stored = StoredVectors(self._layers)
        self._imbalance: float | None = None
        if self._layers.is_ivf and self.rows:
            self._imbalance = float(self._layers.base.invlists.imbalance_factor())
        self._largest_value = FP16_MAX if keeps_fp16(self._layers) else float(np.finfo("f4").max)
        self._prepared: dict[tuple[Any, ...], _Prepared] = {}
        self._selecting = _Selecting()
        self._reaching_params: dict[tuple[SearchParams, int, int], SearchParams] = {}
        # The rows that may be asked for to see whether a tie goes on beyond an answer. Not with the
        # 8-bit scores of FastScan alone: nearly every answer ends in a tie that means nothing.
        can_tie = self._layers.refine is not None or not self._layers.is_fastscan
        most = gpu.GPU_MAX_K if device is Device.CUDA else self.rows
        self._askable = min(self.rows, most) if can_tie else 0
        self._filtered = FilteredSearch(
            self,
            self._layers,
            self._stored,
            metric=metric,
            defaults=defaults,
            has_lists=device is Device.CPU,
            can_tie=can_tie,
            index_of=lambda index: MainIndex(index, metric=metric, defaults=NO_PARAMS),
        )

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        metric: Metric,
        defaults: SearchParams,
        device: Device = Device.CPU,
        card: int = 0,
    ) -> "MainIndex":
        """Reads an index file whose checksum has been verified already; card: its number, of
        those that this process sees, if the device is cuda.

        Raises:
            CorruptFile: faiss cannot read it.
            ConfigError: as ``gpu.CardIndex``.
        """
        return cls(read_index(path), metric=metric, defaults=defaults, device=device, card=card)

    @property
    def layers(self) -> Layers:
        """Of the index on the CPU; nobody else may change it."""
        return self._layers

    @property
    def bytes_per_vector(self) -> float:
        """Stored bytes per row: codes, row numbers, links and re-rank copies, without centroids."""
        return self._layers.bytes_per_vector(self.rows)

    @property
    def imbalance(self) -> float | None:
        """Rows that a search scans per inverted list, by chance, against lists of one length; 1 is
        the best. None: the index has no lists."""
        return self._imbalance

    def describe(self) -> dict[str, Any]:
        """Kind, size and parameters of the loaded index, for `status`."""
        return {
            "class": type(self._layers.base).__name__,
            "rows": self.rows,
            "dim": self.dim,
            "metric": str(self.metric),
            "device": str(self._device),
            "bytes_per_vector": round(self.bytes_per_vector, 1),
            **({} if self._on_card is None else {"queries_from_cpu": self._from_cpu}),
        }

    def search(
        self,
        queries: FloatArray,
        k: int,
        params: SearchParams,
        selection: Selection | None = None,
        beyond: int = 0,
        lists: IdArray | None = None,
        more: int = 0,
    ) -> Ranked:
        """The k best local rows, as ids, of queries (n, dim) float32; of all rows without a
        ``selection``. Parameters that this kind of index does not have are ignored.

        more: k + more results come back, and no more is visited than for k. beyond: how many rows
        that are not selected may be nearer than these; more is visited then, unless the parameters
        say how much. lists: of ``ByList``, without a selection.

        Raises:
            InvalidInput: wrong dimension, or a search parameter out of range.
        """
        assert lists is None or (selection is None and not beyond)
        self._check_dim(queries)
        if beyond:
            params = self._reaching(params, k, beyond)
        width = k + more
        if width >= self._askable:
            return self._ranked(queries, k, width, params, selection, lists)[0]
        (rows, scores), has_ties = self._ranked(queries, k, width + 1, params, selection, lists)
        ranked = Ranked(rows[:, :width], np.ascontiguousarray(scores[:, :width]))
        if has_ties:
            is_cut = (scores[:, width] == scores[:, width - 1]) & (rows[:, width] >= 0)
            self._close_ties(queries, k, params, selection, ranked, is_cut)
        return ranked

    def search_filtered(
        self,
        queries: FloatArray,
        k: int,
        params: SearchParams,
        selection: Selection,
        look: Callable[[], None] = lambda: None,
    ) -> Ranked:
        """As ``search``, with as much visited as it takes to find the best of the rows selected,
        however few they are; k rows if there are so many. What ``params`` give is what would be
        visited if all rows were selected. look: called between steps of a long search; what it
        raises ends the search.

        Raises: as ``search``.
        """
        self._check_dim(queries)
        _check_params(params)
        return self._filtered.search(queries, k, params, selection, look)

    def is_cheap(
        self, selection: Selection, queries: int, k: int, params: SearchParams, others: int
    ) -> bool:
        """Whether ``search_filtered`` of so many queries, with this selection or what was narrowed
        from it, surely takes a millisecond or two at most, with ``others`` rows scored besides."""
        return self._filtered.is_cheap(selection, queries, k, params, others)

    @property
    def is_prepared_for_filters(self) -> bool:
        return self._filtered.is_prepared

    def prepare_for_filters(self) -> None:
        """Done here once, or by the first search whose filter needs it: tens of milliseconds."""
        self._filtered.prepare()

    def search_exactly(
        self, queries: FloatArray, k: int, selection: Selection | None, look: Callable[[], None]
    ) -> Ranked:
        """As ``search``, of every row and without any parameter: exact over the vectors of
        ``reconstruct``, which is what a kind without exact copies has. On the CPU, whatever the
        device. look: called some times per second at least; what it raises ends the search.
        """
        self._check_dim(queries)
        return scan(self._stored, queries, k, self.metric, selection, look)

    def reconstruct(self, rows: IdArray) -> FloatArray:
        """(m, dim) float32 vectors of existing local rows (m,) int64.

        Exact for flat, ivf, hnsw and fp32 re-rank; rounded to half precision for fp16 re-rank;
        approximations for pq, ivfpq, sq8 and pca without a re-rank.
        """
        if rows.size == 0:
            return np.empty((0, self.dim), dtype=np.float32)
        return np.asarray(self._layers.whole.reconstruct_batch(rows), dtype=np.float32)

    def check_rows(self, vectors: FloatArray, rows: int) -> None:
        """Returns if vectors (rows, dim) float32 could be rows of this index, for writes.

        Raises:
            InvalidInput: another shape, not finite, or too large for the index's fp16 copies.
        """
        if vectors.shape != (rows, self.dim):
            raise InvalidInput(
                "wrong shape",
                field="vectors",
                expected=f"{rows} x {self.dim} numbers",
                got=" x ".join(map(str, vectors.shape)),
            )
        largest = float(np.abs(vectors).max(initial=0.0))
        if not largest <= self._largest_value:  # NaN is not
            raise InvalidInput(
                "too large, or not finite",
                field="vectors",
                expected=f"values within ±{self._largest_value:g}",
                got=f"{largest:g}",
            )

    def by_list(self, queries: FloatArray, k: int, params: SearchParams) -> ByList | None:
        """How queries (n, dim) are best cut into searches with k and params; None where the index
        has no lists on a CPU, or transforms queries before it chooses some.

        Raises: as ``search``.
        """
        layers = self._layers
        if not layers.is_ivf or layers.transform is not None or self._device is not Device.CPU:
            return None
        self._check_dim(queries)
        _check_params(params)
        quantizer = faiss.downcast_index(layers.base.quantizer)
        nprobe, most = self._nprobe(params, k), quantizer.ntotal // NAMED_SHARE
        if not isinstance(quantizer, faiss.IndexFlat) or nprobe * ALIKE_QUERIES > most:
            nprobe, most = 1, 0
        _, lists = quantizer.search(queries, nprobe)
        return ByList(np.argsort(lists[:, 0], kind="stable"), lists, most)

    def has_lists_of(self, other: "MainIndex") -> bool:
        """Whether both have inverted lists, with the same centroids."""
        if not self._layers.is_ivf or not other.layers.is_ivf:
            return False
        mine, theirs = (each.base.quantizer for each in (self._layers, other.layers))
        return mine.ntotal == theirs.ntotal and bool(
            (mine.reconstruct_n() == theirs.reconstruct_n()).all()
        )

    def _check_dim(self, queries: FloatArray) -> None:
        if queries.shape[1] != self.dim:
            raise InvalidInput(
                "wrong dimension",
                field="queries",
                expected=str(self.dim),
                got=str(queries.shape[1]),
            )

    def _nprobe(self, params: SearchParams, k: int) -> int:
        """Of an index with lists: how many a search for k visits."""
        nprobe = params.nprobe or math.ceil((self._defaults.nprobe or 1) * _widening(k))
        return min(nprobe, int(self._layers.base.nlist), MAX_NPROBE)

    def _reaching(self, params: SearchParams, k: int, beyond: int) -> SearchParams:
        """With more lists visited, in place of those that ``beyond`` rows that are not selected may
        have emptied: twice as many as these rows fill, because they are not the whole of a list.
        Rounded up, so that few different parameters come of it."""
        if params.nprobe is not None or not self._layers.is_ivf:
            return params  # an index that excludes no rows itself is asked for more results anyway
        rounded = 1 << (beyond - 1).bit_length()
        reaching = self._reaching_params.get((params, k, rounded))
        if reaching is None:
            nlist = int(self._layers.base.nlist)
            usual = math.ceil((self._defaults.nprobe or 1) * _widening(k))
            nprobe = usual + 2 * math.ceil(rounded * nlist / self.rows)
            reaching = replace(params, nprobe=min(nprobe, nlist, MAX_NPROBE))
            if len(self._reaching_params) >= PARAMETER_CACHE:
                self._reaching_params.clear()
            self._reaching_params[params, k, rounded] = reaching
        return reaching

    @property
    def _takes_selector(self) -> bool:
        return self._layers.takes_selector and self._device is Device.CPU

    def _ranked(
        self,
        queries: FloatArray,
        k: int,
        fetch: int,
        params: SearchParams,
        selection: Selection | None,
        lists: IdArray | None = None,
    ) -> tuple[Ranked, bool]:
        """The ``fetch`` best rows, found with the parameters of a search for k, and whether some
        have the same score."""
        if selection is None and self._on_card is not None:
            distances, rows = self._search_card(queries, k, fetch, params)
        elif selection is None or self._takes_selector:
            distances, rows = self._search(queries, k, fetch, params, selection, lists)
        else:
            distances, rows = self._search_and_filter(queries, k, fetch, params, selection)
        scores = -distances if self.metric is Metric.L2 else distances
        return _in_answer_order(rows, scores)

    def _close_ties(
        self,
        queries: FloatArray,
        k: int,
        params: SearchParams,
        selection: Selection | None,
        ranked: Ranked,
        is_cut: NDArray[np.bool_],
    ) -> None:
        """Searches those queries again, as for k results, whose last score (n, m) goes on beyond
        the answer."""
        width = ranked.ids.shape[1]
        cut, fetch = np.flatnonzero(is_cut), width + 1
        most = min(self._askable, max(MAX_TIED, TIE_GROWTHS[0] * width))
        for growth in TIE_GROWTHS:
            if not cut.size or fetch == most:
                break
            fetch = min(growth * fetch, most)
            (rows, scores), _ = self._ranked(queries[cut], k, fetch, params, selection)
            ranked.ids[cut], ranked.scores[cut] = rows[:, :width], scores[:, :width]
            cut = cut[(scores[:, -1] == scores[:, width - 1]) & (rows[:, -1] >= 0)]

    def _search(
        self,
        queries: FloatArray,
        k: int,
        fetch: int,
        params: SearchParams,
        selection: Selection | None,
        lists: IdArray | None = None,
    ) -> tuple[FloatArray, IdArray]:
        """faiss's own distances of the ``fetch`` best, and the rows they belong to."""
        if lists is None:
            prepared = self._prepare(k, fetch, params, selection)
        else:  # nearly every search has others
            prepared = self._make_parameters(k, fetch, params, selection)
            named = faiss.SearchParameters(sel=faiss.IDSelectorArray(lists))
            prepared.parts[0].quantizer_params = named
        distances, rows = self._layers.whole.search(queries, fetch, params=prepared.top)
        return distances, rows

    def _search_card(
        self, queries: FloatArray, k: int, fetch: int, params: SearchParams
    ) -> tuple[FloatArray, IdArray]:
        """As ``_search`` of all rows, on the card, or on the CPU for more rows than it gives."""
        assert self._on_card is not None
        if fetch > gpu.GPU_MAX_K:
            self._from_cpu += len(queries)
            return self._search(queries, k, fetch, params, None)
        _check_params(params)
        return self._on_card.search(
            queries,
            fetch,
            candidates=self._candidates(k, fetch, params),
            nprobe=self._nprobe(params, k) if self._layers.is_ivf else None,
        )

    def _search_and_filter(
        self,
        queries: FloatArray,
        k: int,
        wanted: int,
        params: SearchParams,
        selection: Selection,
    ) -> tuple[FloatArray, IdArray]:
        """For indexes that cannot exclude rows: fetches more rows until ``wanted`` remain."""
        most = max(wanted, min(wanted + selection.num_excluded, self.rows))
        if self._on_card is not None:
            most = max(wanted, min(most, gpu.GPU_MAX_K))
        fetch = min(2 * wanted + OVERFETCH_START, most)
        while True:
            if self._on_card is None:
                distances, rows = self._search(queries, max(k, fetch), fetch, params, None)
            else:
                distances, rows = self._search_card(queries, max(k, fetch), fetch, params)
            keep = (rows >= 0) & selection.are_live(rows)
            if fetch == most or (keep.sum(axis=1) >= wanted).all():
                break
            fetch = min(4 * fetch, most)
        order = np.argsort(~keep, axis=1, kind="stable")[:, :wanted]
        rows = np.take_along_axis(np.where(keep, rows, EMPTY_ID), order, axis=1)
        distances = np.take_along_axis(distances, order, axis=1)
        if self._on_card is not None and selection.num_selected:
            # more may be hidden among the nearest rows than a card gives: the copy on the CPU
            # excludes rows itself
            short = np.flatnonzero(rows[:, min(wanted, selection.num_selected) - 1] == EMPTY_ID)
            if short.size and fetch < self.rows:
                self._from_cpu += short.size
                found = self._search(queries[short], k, wanted, params, selection)
                distances[short], rows[short] = found
        return distances, rows

    def _prepare(
        self, k: int, fetch: int, params: SearchParams, selection: Selection | None
    ) -> _Prepared:
        """The faiss parameters of a request, made once per (k, fetch, params).

        Those of searches with a selection are made for all of them, and point to that of the last:
        new selections come with writes, and making parameters takes as long as half a search.
        """
        cache = self._prepared if selection is None else self._selecting.prepared
        key = (k, fetch, params.nprobe, params.ef_search, params.rerank_factor)
        prepared: _Prepared | None = cache.get(key)
        if prepared is None:
            if len(cache) >= PARAMETER_CACHE:
                cache.clear()
            prepared = cache[key] = self._make_parameters(k, fetch, params, selection)
        elif selection is not None and prepared.selection is not selection:
            prepared.parts[0].sel = selection.selector
            prepared.selection = selection
        return prepared

    def _make_parameters(
        self, k: int, fetch: int, params: SearchParams, selection: Selection | None
    ) -> _Prepared:
        _check_params(params)
        layers = self._layers
        candidates = self._candidates(k, fetch, params)
        inner: Any = self._base_parameters(candidates, k, params, selection)
        outer: Any
        parts = [inner]
        if layers.transform is not None and inner is not None:
            outer = faiss.SearchParametersPreTransform()
            outer.index_params = inner
            parts.append(outer)
            inner = outer
        if layers.refine is not None:
            outer = faiss.IndexRefineSearchParameters()
            outer.k_factor = (candidates + 0.5) / fetch  # faiss cuts the product off
            if inner is not None:
                outer.base_index_params = inner
            parts.append(outer)
            inner = outer
        return _Prepared(inner, tuple(parts), selection)

    def _candidates(self, k: int, fetch: int, params: SearchParams) -> int:
        """Rows that the base finds for a search of k results, of which ``fetch`` come back."""
        if self._layers.refine is None:
            return fetch
        factor: float = params.rerank_factor or self._defaults.rerank_factor or 1
        if params.rerank_factor is None:
            # Of codes that hold the best 100 among their first 100, the first 10 are not the best
            # 10: fewer results than a default was measured with need as many candidates
            factor *= max(k, MEASURED_K) / k
        return max(fetch, round(k * factor))

    def _base_parameters(
        self, candidates: int, k: int, params: SearchParams, selection: Selection | None
    ) -> Any | None:
        layers, widening = self._layers, _widening(k)
        made: Any
        if layers.is_ivf:
            made = faiss.SearchParametersIVF()
            made.nprobe = self._nprobe(params, k)
        elif layers.is_hnsw:
            made = faiss.SearchParametersHNSW()
            ef_search = params.ef_search or math.ceil((self._defaults.ef_search or 0) * widening)
            made.efSearch = max(ef_search, candidates)
        elif selection is not None:
            made = faiss.SearchParameters()
        else:
            return None
        if selection is not None:
            made.sel = selection.selector
        return made


def _widening(k: int) -> float:
    """More results lie in more lists, and behind more links."""
    return max(k / MEASURED_K, 1)


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


def _in_answer_order(rows: IdArray, scores: FloatArray) -> tuple[Ranked, bool]:
    """With whether two rows have the same score.

    faiss sorts by score and pads at the end; only padding and ties need more than a look.
    """
    is_same = scores[:, 1:] >= scores[:, :-1]
    if rows[:, -1].min() < 0:
        empty = rows < 0
        scores = np.where(empty, EMPTY_SCORE, scores)
        rows = np.where(empty, EMPTY_ID, rows)
        is_same = is_same & ~empty[:, 1:]
    has_ties = is_same.any(axis=1)
    if not has_ties.any():
        return Ranked(rows, scores), False
    if has_ties.all():
        return in_order(rows, scores), True
    # in a large batch some queries have ties by chance, and sorting all would cost a third of the
    # search
    tied = in_order(rows[has_ties], scores[has_ties])
    rows, scores = rows.copy(), scores.copy()
    rows[has_ties], scores[has_ties] = tied
    return Ranked(rows, scores), True
