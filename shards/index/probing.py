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
# Results that may be missing, of k, by the estimate: the estimate is right within
# a factor of about three, and codes lose some, too.
MISSED_SHARE = 0.02
TINY = np.float32(1e-12)
LOG_SHARES = np.log(SHARES)
LOWEST = np.float32(-1e30)  # in place of the score of an empty slot


@dataclass(frozen=True, slots=True, kw_only=True)
class NearLists:
    """The lists that have rows of a selection, nearest first, all (n, lists): how many rows of it,
    the score of the centroid for each query, and the unit of the lift; lifts: that a share SHARES
    of rows exceeds. scales: (n, 1) where all lists have the same."""

    rows: NDArray[np.int64]
    scores: FloatArray
    scales: FloatArray
    lifts: NDArray[np.float64]

    def with_rows(self, count: float) -> NDArray[np.int64]:
        """(n,): how many lists have so many rows together, all where they have fewer."""
        enough: NDArray[np.int64] = (np.cumsum(self.rows, axis=1) < count).sum(axis=1)
        return np.minimum(enough + 1, self.rows.shape[1])

    def needed(self, queries: IdArray, k: int, last: FloatArray) -> NDArray[np.int64]:
        """(m,): the lists that those ``queries`` (m,) have to visit; last (m,): the score of the
        k-th result, -inf where there are fewer."""
        lift = np.maximum(last, LOWEST)[:, None] - self.scores[queries]
        lift /= self.scales[queries]
        log_shares = np.interp(lift, self.lifts, LOG_SHARES, right=-np.inf)
        better = self.rows[queries] * np.exp(log_shares)
        # what the lists from each one on hold
        rest = np.cumsum(better[:, ::-1], axis=1)
        needed: NDArray[np.int64] = (rest > MISSED_SHARE * k).sum(axis=1)
        return needed


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

    def near(self, queries: FloatArray, rows: NDArray[np.int64]) -> "NearLists":
        """Of queries (n, d); rows (lists,): what ``rows_of`` says of a selection."""
        filled = np.flatnonzero(rows)
        scores, scales = self._scored(queries)
        if len(filled) < self.count:
            scores = scores[:, filled]
        near_first = np.argsort(-scores, axis=1)
        queried = np.arange(len(queries))[:, None]
        scores = scores[queried, near_first]
        if self._metric is Metric.L2:
            scales = np.sqrt(-scores) + TINY
        return NearLists(
            rows=rows[filled[near_first]], scores=scores, scales=scales, lifts=self._lifts
        )

    def _scored(self, queries: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(n, lists): the score of every centroid; and the unit of the lift there, of inner
        products (n, 1)."""
        inner = self._inner(queries)
        scores = inner @ self._centroids.T
        norms = np.vecdot(inner, inner)[:, None]
        if self._metric is Metric.L2:
            scores = np.minimum(2 * scores - self._norms - norms, 0)
            return scores, np.sqrt(-scores) + TINY
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
        lift /= scales[:, lists] if self._metric is Metric.L2 else scales
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
