"""How many inverted lists a query has to visit, to miss few of the best rows of a selection.

Where all rows count, a number of lists that was measured once is right for most queries. Among the
rows of a filter it is not: they may lie in few lists, far from the query, and the best k of them
reach further than the best k of all. So what the lists that were not visited may hold is estimated,
from the score of the k-th result, the scores of their centroids, how many rows of the selection
each has, and how much the scores of rows differ from their centroid's score. The last is measured
on a sample of the index: stored rows are the queries, and the lists near to them count.

Scores are higher-is-better, as everywhere; ``lift`` is a row's score less that of its centroid, in
units of the query's length (inner products) or of its distance from the centroid (L2).
"""

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import FloatArray, IdArray, Metric
from shardline.shards.index.exact_scan import StoredVectors
from shardline.shards.index.layers import Layers

SAMPLE_QUERIES = 64
SAMPLE_ROWS = 8192
NEAR_SHARE = 0.25  # of the lists: rows beyond them are hardly ever among the best
# Shares of rows with more lift than the values that are kept: finest where few have more, because
# there are many rows in all lists together.
SHARES = np.concatenate((np.linspace(1, 0.01, 100), np.geomspace(0.0099, 4e-6, 156)))
# Results that may be missing, of k, by the estimate, where .05 may be missing in all: codes lose
# some, too. The number of lists that follows is right within a factor of three.
MISSED_SHARE = 0.03
TINY = np.float32(1e-12)
LOG_SHARES = np.log(SHARES)
LOWEST = np.float32(-1e30)  # in place of the score of an empty slot


@dataclass(frozen=True, slots=True, kw_only=True)
class NearLists:
    """The lists that have rows of a selection, as some queries see them.

    rows (lists,): how many of the selection each has; scores (n, lists): of the centroids; scales
    (n,): the unit of the lift, of inner products; None under L2, where each list has its own.
    lifts: those that a share SHARES of rows exceeds.
    """

    rows: NDArray[np.int64]
    scores: FloatArray
    scales: FloatArray | None
    lifts: NDArray[np.float64]

    def needed(self, queries: IdArray, k: int, last: FloatArray) -> NDArray[np.int64]:
        """(m,): how many of the lists, nearest first, those ``queries`` (m,) have to visit.
        last (m,): the score of the k-th result, -inf where there are fewer."""
        found = np.empty(len(queries), np.int64)
        floors = np.maximum(last, LOWEST)
        for place, query in enumerate(queries.tolist()):
            scores = self.scores[query]
            lift = floors[place] - scores
            lift /= np.sqrt(-scores) + TINY if self.scales is None else self.scales[query]
            # the lift that a better row needs rises from the nearest list to the farthest, so those
            # out of reach are the last ones
            some = lift < self.lifts[-1]
            order = np.argsort(lift[some])
            shares = np.exp(np.interp(lift[some][order], self.lifts, LOG_SHARES))
            rest = np.cumsum((self.rows[some][order] * shares)[::-1])
            found[place] = np.count_nonzero(rest > MISSED_SHARE * k)
        return found


class Lists:
    """The inverted lists of an index on a CPU, in which list each of its rows lies, and the lift of
    its rows. Takes some milliseconds, and four bytes per row."""

    def __init__(self, layers: Layers, stored: StoredVectors, metric: Metric) -> None:
        self._layers, self._metric = layers, metric
        self.count = int(layers.base.nlist)
        self._centroids = layers.base.quantizer.reconstruct_n(0, self.count)
        self._norms = np.vecdot(self._centroids, self._centroids)
        self.of_row = _list_of_row(layers.base.invlists, stored.rows)
        self._lifts = self._sampled_lifts(stored)

    @staticmethod
    def can_be_read(layers: Layers) -> bool:
        return layers.is_ivf and isinstance(
            faiss.downcast_index(layers.base.quantizer), faiss.IndexFlat
        )

    def rows_of(self, rows: IdArray) -> NDArray[np.int64]:
        """(lists,): how many of rows (m,) lie in each."""
        return np.bincount(self.of_row[rows], minlength=self.count)

    def near(self, queries: FloatArray, rows: NDArray[np.int64]) -> NearLists:
        """Of queries (n, d); rows (lists,): what ``rows_of`` says of a selection."""
        scores, scales = self._scored(queries)
        if not rows.all():
            filled = np.flatnonzero(rows)
            rows, scores = rows[filled], scores[:, filled]
        return NearLists(rows=rows, scores=scores, scales=scales, lifts=self._lifts)

    def _scored(self, queries: FloatArray) -> tuple[FloatArray, FloatArray | None]:
        """(n, lists): the score of every centroid; and the scales of ``NearLists``."""
        inner = self._inner(queries)
        scores = inner @ self._centroids.T
        norms = np.vecdot(inner, inner)
        if self._metric is Metric.L2:
            return np.minimum(2 * scores - self._norms - norms[:, None], 0), None
        return scores, np.sqrt(norms) + TINY

    def _inner(self, vectors: FloatArray) -> FloatArray:
        """As the lists see them."""
        if self._layers.transform is None:
            return vectors
        chain = self._layers.transform.chain
        for place in range(chain.size()):
            vectors = chain.at(place).apply(vectors)
        return vectors

    def _sampled_lifts(self, stored: StoredVectors) -> NDArray[np.float64]:
        """Of SHARES, ascending."""
        rng = np.random.default_rng(0)
        chosen = np.sort(rng.permutation(stored.rows)[:SAMPLE_ROWS])
        rows = np.asarray(self._layers.whole.reconstruct_batch(chosen), np.float32)
        asked = rng.permutation(len(chosen))[:SAMPLE_QUERIES]
        scores, scales = self._scored(rows[asked])
        exact = rows[asked] @ rows.T
        if self._metric is Metric.L2:
            norms = np.vecdot(rows, rows)
            exact = 2 * exact - norms - norms[asked, None]
        lists = self.of_row[chosen]
        lift = exact - scores[:, lists]
        lift /= np.sqrt(-scores[:, lists]) + TINY if scales is None else scales[:, None]
        farthest = int((1 - NEAR_SHARE) * (self.count - 1))
        reach = np.partition(scores, farthest, axis=1)[:, farthest]
        is_near = scores[:, lists] >= reach[:, None]
        is_near[np.arange(len(asked)), asked] = False  # a row is not its own neighbour
        near = np.sort(lift[is_near] if is_near.any() else lift, axis=None)
        places = np.rint((1 - SHARES) * (len(near) - 1)).astype(np.int64)
        return near[places].astype(np.float64)


def _list_of_row(lists: Any, rows: int) -> NDArray[np.int32]:
    found = np.zeros(rows, np.int32)
    for number in range(lists.nlist):
        if size := lists.list_size(number):
            found[faiss.rev_swig_ptr(lists.get_ids(number), size)] = number
    return found
