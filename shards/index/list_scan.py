"""Searches of inverted lists that the caller names, instead of those nearest to a query.

faiss chooses the lists nearest to a query anew with every search, and visits them from the first
one on. Who learns on the way how many lists a query needs has them in order already, and goes on
here where the last search ended.
"""

import threading
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from shardline.shards.core.schema import (
    EMPTY_SCORE,
    FloatArray,
    IdArray,
    Metric,
)
from shardline.shards.index.exact_scan import StoredVectors
from shardline.shards.index.layers import Layers
from shardline.shards.index.probing import NearLists
from shardline.shards.index.selection import Selection


class _Parameters(threading.local):
    """Of the thread that asks: making them takes as long as visiting a list."""

    def __init__(self) -> None:
        self.made: Any = faiss.SearchParametersIVF()


class ListScan:
    """Of an index with inverted lists on a CPU; any thread may search."""

    def __init__(self, layers: Layers, stored: StoredVectors, metric: Metric) -> None:
        self._base, self._refine = layers.base, layers.refine
        self._whole = layers.whole  # keeps the memory of its layers alive
        self._stored, self._metric = stored, metric
        self._parameters = _Parameters()

    def best(
        self,
        query: FloatArray,
        seen: FloatArray,
        lists: IdArray,
        scores: FloatArray,
        selection: Selection,
        candidates: int,
    ) -> tuple[IdArray, FloatArray]:
        """The rows of ``selection``, as many as candidates or fewer, ascending, that a query (d,)
        finds by their codes in lists (w,); and their scores, by exact copies where there are any.

        seen (d',): the query as the lists see it; scores (w,): of the lists' centroids.
        """
        rows, found = np.empty(candidates, np.int64), np.empty(candidates, np.float32)
        is_l2 = self._metric is Metric.L2
        distances = -scores if is_l2 else scores
        parameters = self._parameters.made
        parameters.nprobe, parameters.sel = len(lists), selection.selector
        self._base.search_preassigned_c(
            1,
            faiss.swig_ptr(seen),
            candidates,
            faiss.swig_ptr(lists),
            faiss.swig_ptr(distances),
            faiss.swig_ptr(found),
            faiss.swig_ptr(rows),
            False,
            parameters,
            None,
        )
        if self._refine is None:
            order = np.argsort(rows)
            rows, found = rows[order], -found[order] if is_l2 else found[order]
        else:
            rows.sort()
        empty = np.searchsorted(rows, 0)  # they come first
        rows = rows[empty:]
        if self._refine is None:
            return rows, found[empty:]
        return rows, self._stored.scores(query, rows, self._metric)


class ListWalk:
    """A query (d,) on its way through the lists of ``near``, from the nearest on.

    rows and scores (k or fewer,): the best so far, in the order of an answer; visited: how many
    lists. is_cut: more rows may have the score of the last result than were candidates.
    """

    def __init__(
        self,
        scan: ListScan,
        near: NearLists,
        query: FloatArray,
        k: int,
        selection: Selection,
        look: Callable[[], None],
    ) -> None:
        """look: called before each step; what it raises ends the walk."""
        self._scan, self._near, self._query, self._k = scan, near, query, k
        self._selection, self._look = selection, look
        self.begin()

    def begin(self) -> None:
        """Forgets what was found."""
        self.rows, self.scores = np.empty(0, np.int64), np.empty(0, np.float32)
        self.visited, self.is_cut = 0, False

    def to(self, lists: int, candidates: int) -> None:
        """Goes on to so many lists; of this step up to ``candidates`` rows, more than k, count."""
        if lists <= self.visited:
            return
        self._look()
        near = self._near
        places = near.order[self.visited : lists] if self.visited else near.nearest(lists)
        numbers = places if near.numbers is None else near.numbers[places]
        rows, scores = self._scan.best(
            self._query, near.seen, numbers, near.scores[places], self._selection, candidates
        )
        is_full = len(rows) == candidates
        order = np.argsort(-scores, kind="stable")  # of equal scores the lowest row first
        rows, scores = rows[order], scores[order]
        self.is_cut |= is_full and scores[-1] == scores[self._k - 1]
        if self.visited:
            rows = np.concatenate((self.rows, rows[: self._k]))
            scores = np.concatenate((self.scores, scores[: self._k]))
            order = np.lexsort((rows, -scores))
            rows, scores = rows[order], scores[order]
        self.rows, self.scores = rows[: self._k], scores[: self._k]
        self.visited = lists

    def last(self, depth: int) -> np.float32:
        """The score of the ``depth``-th result; -inf where there are fewer."""
        return self.scores[depth - 1] if len(self.scores) >= depth else EMPTY_SCORE

    @property
    def places(self) -> IdArray:
        """(visited,): of the lists in ``near``."""
        return self._near.nearest(self.visited)
