"""Searches of a main index among the rows that match a filter, whatever their share.

An index visits a part of its rows that is large enough where all of them count. Of a filter that
few rows match it would find few: what it visits has to grow as the share of matching rows falls.

    few rows match      all of them are scored, with the best vectors that are stored of them
    more                the index is searched with parameters widened by the share of what matches
    still fewer than k  all that match are scored, block by block

What a filter needs is derived from its rows when it is first used, and kept for a bounded number of
bytes. Hidden rows change with every write, so it is kept for ``Selection.origin``, what matches,
and hidden rows are left out of it.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from shardline.shards.core.messages import MAX_EF_SEARCH, MAX_NPROBE, SearchParams
from shardline.shards.core.schema import (
    EMPTY_ID,
    EMPTY_SCORE,
    FloatArray,
    IdArray,
    Metric,
    Ranked,
    in_order,
)
from shardline.shards.index.exact_scan import StoredVectors, best_of, scan
from shardline.shards.index.layers import Layers
from shardline.shards.index.selection import Selection

# Vectors of a filter up to this size are all scored: at 128 dimensions 4,096 rows, 0.15 ms of one
# core, as much as a search of the index.
EXACT_BYTES = 2 << 20
KEPT_BYTES = 64 << 20  # of what is derived from filters, per index; the least recently used goes

# (queries, k, params, selection) -> the k best rows that the index finds with these parameters
Search = Callable[[FloatArray, int, SearchParams, Selection], Ranked]


@dataclass(slots=True)
class _Copies:
    """The rows (m,) int64 of a filter that are not hidden, ascending, and their vectors (m, dim);
    of: the selection with just these rows."""

    of: Selection
    rows: IdArray
    vectors: FloatArray


class FilteredSearch:
    """Of one main index; used by the thread that searches it."""

    def __init__(
        self, layers: Layers, stored: StoredVectors, metric: Metric, defaults: SearchParams
    ) -> None:
        self._layers, self._stored, self._metric = layers, stored, metric
        self._defaults = defaults
        self._exact_rows = max(1, EXACT_BYTES // (4 * stored.dim))
        self._copies: OrderedDict[Selection, _Copies] = OrderedDict()

    def search(
        self, queries: FloatArray, k: int, params: SearchParams, chosen: Selection, search: Search
    ) -> Ranked:
        """The k best of the rows ``chosen`` of queries (n, d), checked. search: of the index."""
        if not chosen.num_selected:
            return _nothing(len(queries), k)
        if chosen.num_selected <= self._exact_rows:
            return self._among_copies(queries, k, chosen)
        ranked = search(queries, k, self._widened(params, chosen), chosen)
        wanted = min(k, chosen.num_selected)
        short = np.flatnonzero(ranked.ids[:, wanted - 1] == EMPTY_ID)
        if short.size:
            ids, scores = ranked.ids.copy(), ranked.scores.copy()
            ids[short], scores[short] = self._all_scored(queries[short], k, chosen)
            ranked = Ranked(ids, scores)
        return ranked

    def _widened(self, params: SearchParams, chosen: Selection) -> SearchParams:
        """With as many times more visited as rows are than rows that match."""
        times = chosen.rows / chosen.num_selected
        nprobe, ef_search = params.nprobe, params.ef_search
        if self._layers.is_ivf:
            nprobe = math.ceil((nprobe or self._defaults.nprobe or 1) * times)
            nprobe = min(nprobe, self._layers.base.nlist, MAX_NPROBE)
        if self._layers.is_hnsw:
            ef_search = math.ceil((ef_search or self._defaults.ef_search or 1) * times)
            ef_search = min(ef_search, MAX_EF_SEARCH)
        return replace(params, nprobe=nprobe, ef_search=ef_search)

    def _all_scored(self, queries: FloatArray, k: int, chosen: Selection) -> Ranked:
        return scan(self._stored, queries, k, self._metric, chosen, lambda: None)

    def _among_copies(self, queries: FloatArray, k: int, chosen: Selection) -> Ranked:
        copies = self._copies_of(chosen)
        queries = self._stored.queries(queries)
        ranked = best_of(queries, copies.rows, copies.vectors, k, self._metric)
        if (ranked.scores[:, 1:] == ranked.scores[:, :-1]).any():
            ranked = in_order(*ranked)
        missing = k - ranked.ids.shape[1]
        if not missing:
            return ranked
        empty = _nothing(len(queries), missing)
        return Ranked(
            np.concatenate((ranked.ids, empty.ids), axis=1),
            np.concatenate((ranked.scores, empty.scores), axis=1),
        )

    def _copies_of(self, chosen: Selection) -> _Copies:
        origin = chosen.origin or chosen
        copies = self._copies.pop(origin, None)
        if copies is None or copies.of is not chosen:
            copies = self._narrowed(copies, chosen)
        self._copies[origin] = copies
        total = sum(each.vectors.nbytes for each in self._copies.values())
        while total > KEPT_BYTES and len(self._copies) > 1:
            total -= self._copies.popitem(last=False)[1].vectors.nbytes
        return copies

    def _narrowed(self, copies: _Copies | None, chosen: Selection) -> _Copies:
        """Those of ``copies`` that are chosen, where all that are chosen are among them: rows are
        hidden for good, but a search may use a state of before."""
        if copies is not None:
            stays = chosen.are_live(copies.rows)
            count = int(np.count_nonzero(stays))
            if count == chosen.num_selected:
                if count == len(stays):
                    return _Copies(chosen, copies.rows, copies.vectors)
                return _Copies(chosen, copies.rows[stays], copies.vectors[stays])
        rows = chosen.selected()
        return _Copies(chosen, rows, self._stored.of(rows))


def _nothing(queries: int, k: int) -> Ranked:
    shape = queries, k
    return Ranked(np.full(shape, EMPTY_ID, np.int64), np.full(shape, EMPTY_SCORE, np.float32))
