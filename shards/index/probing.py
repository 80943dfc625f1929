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
BINS = 1024  # steps of the lift
TINY = np.float32(1e-12)
LOG_SHARES = np.log(SHARES)
LOWEST = np.float32(-1e30)  # in place of the score of an empty slot


class Lifts:
    """How rows' lift is spread: which share of rows has more, in BINS steps of equal width.

    values: those that a share SHARES of rows exceeds, ascending.
    """

    def __init__(self, values: NDArray[np.float64]) -> None:
        self.low = np.float32(values[0])
        self.width = np.float32(max(float(values[-1] - values[0]) / BINS, float(TINY)))
        middles = self.low + self.width * (np.arange(BINS) + 0.5)
        self.shares = np.exp(np.interp(middles, values, LOG_SHARES))
        # by step, from BINS steps below the first one to as many behind the last one
        self._padded = np.concatenate((np.ones(BINS), self.shares, np.zeros(BINS)))

    def steps(self, lift: FloatArray) -> NDArray[np.int32]:
        """(m,): in which step each of lift (m,) lies; BINS where no row has as much."""
        found: NDArray[np.int32] = np.clip((lift - self.low) / self.width, 0, BINS).astype(np.int32)
        return found

    def above(self, rows: NDArray[np.float64], step: int) -> float:
        """How many rows are above a score. rows (BINS,): by how many steps their centroids are
        below the best one; step: that of the lift which the score is for the best one, from -BINS
        to BINS."""
        return float(rows @ self._padded[BINS + step : 2 * BINS + step])


@dataclass(frozen=True, slots=True, kw_only=True)
class NearLists:
    """The lists that have rows of a selection, as some queries see them.

    rows (lists,): how many of the selection each has; scores (n, lists): of the centroids; scales
    (n,): the unit of the lift, of inner products; None under L2, where each list has its own.
    """

    rows: NDArray[np.float64]
    scores: FloatArray
    scales: FloatArray | None
    lifts: Lifts

    def needed(self, queries: IdArray, k: int, last: FloatArray) -> NDArray[np.int64]:
        """(m,): how many of the lists, nearest first, those ``queries`` (m,) have to visit.
        last (m,): the score of the k-th result, -inf where there are fewer."""
        found = np.empty(len(queries), np.int64)
        floors = np.maximum(last, LOWEST)
        for place, query in enumerate(queries.tolist()):
            scores = self.scores[query]
            lift = floors[place] - scores
            lift /= np.sqrt(-scores) + TINY if self.scales is None else self.scales[query]
            # the lift that a better row needs rises from the nearest list to the farthest
            steps = self.lifts.steps(lift)
            better = np.bincount(steps, self.rows, BINS + 1)[:BINS] * self.lifts.shares
            rest = np.cumsum(better[::-1])[::-1]
            last_step = np.count_nonzero(rest > MISSED_SHARE * k)
            found[place] = np.count_nonzero(steps < last_step)
        return found

    def holding(self, queries: IdArray, count: int) -> NDArray[np.int64]:
        """(m,): how many of the lists, nearest first, have ``count`` rows together, for those
        ``queries`` (m,); all where they have fewer."""
        found = np.empty(len(queries), np.int64)
        for place, query in enumerate(queries.tolist()):
            held = np.cumsum(self.rows[np.argsort(-self.scores[query])])
            found[place] = min(int(np.searchsorted(held, count)) + 1, len(held))
        return found

    def likely(self, queries: IdArray, k: int) -> FloatArray:
        """(m,): about the score of the k-th best row of all lists, for those ``queries`` (m,); -inf
        under L2, of which nothing is known before a search."""
        found = np.full(len(queries), -np.inf, np.float32)
        if self.scales is None:
            return found
        lifts = self.lifts
        for place, query in enumerate(queries.tolist()):
            scores, scale = self.scores[query], self.scales[query]
            best = scores.max()
            below = np.minimum((best - scores) / (scale * lifts.width), BINS - 1).astype(np.int32)
            rows = np.bincount(below, self.rows, BINS).astype(np.float64, copy=False)
            low, high = -BINS, BINS
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if lifts.above(rows, middle) >= k else (low, middle)
            found[place] = best + scale * (lifts.low + lifts.width * low)
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
        self._lifts = Lifts(self._sampled_lifts(stored))

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
        return NearLists(
            rows=rows.astype(np.float64), scores=scores, scales=scales, lifts=self._lifts
        )

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
