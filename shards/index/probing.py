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

import math
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

    values: those that a share SHARES of rows exceeds, ascending. shares (BINS + 1,): by step.
    """

    def __init__(self, values: NDArray[np.float64]) -> None:
        self.low = np.float32(values[0])
        self.width = np.float32(max(float(values[-1] - values[0]) / BINS, float(TINY)))
        middles = self.low + self.width * (np.arange(BINS) + 0.5)
        shares = np.exp(np.interp(middles, values, LOG_SHARES))
        # by step, from BINS steps below the first one to as many behind the last one
        self._padded = np.concatenate((np.ones(BINS), shares, np.zeros(BINS)))
        self.shares = self._padded[BINS : 2 * BINS + 1]

    def steps(self, lift: FloatArray) -> NDArray[np.int32]:
        """(m,): in which step each of lift (m,) lies; BINS where no row has as much."""
        found = (lift - self.low) / self.width
        # of what has overflowed nothing is known: then many rows may have more
        np.fmin(np.fmax(found, 0, out=found), BINS, out=found)
        return found.astype(np.int32)

    def share(self, lift: float) -> float:
        """Of rows that have more than ``lift``, as ``steps`` counts them."""
        step = (lift - float(self.low)) / float(self.width)
        # a comparison with NaN, of what has overflowed, is False
        return float(self.shares[BINS if step >= BINS else int(step) if step > 0 else 0])

    def above(self, rows: NDArray[np.float64], step: int) -> float:
        """How many rows are above a score. rows (BINS,): by how many steps their centroids are
        below the best one; step: that of the lift which the score is for the best one, from -BINS
        to BINS."""
        return float(rows @ self._padded[BINS + step : 2 * BINS + step])


@dataclass(frozen=True, slots=True)
class FilledLists:
    """The lists that have rows of a selection.

    rows (lists,): how many each has, ``total`` together; numbers (lists,): which of all lists they
    are; None: all.
    """

    rows: NDArray[np.float64]
    total: int
    numbers: IdArray | None


class NearLists:
    """The lists that have rows of a selection, as one query sees them.

    seen (d,): the query as the lists see it; scores (lists,): of the centroids; scale: the unit of
    the lift, of inner products; None under L2, where each list has its own.
    """

    __slots__ = (
        "_first",
        "_lifts",
        "_order",
        "_total",
        "numbers",
        "rows",
        "scale",
        "scores",
        "seen",
    )

    def __init__(
        self,
        seen: FloatArray,
        scores: FloatArray,
        scale: np.float32 | None,
        filled: FilledLists,
        lifts: Lifts,
    ) -> None:
        self.seen, self.scores, self.scale = seen, scores, scale
        self.rows, self.numbers, self._total = filled.rows, filled.numbers, filled.total
        self._lifts = lifts
        self._first: IdArray | None = None
        self._order: IdArray | None = None

    @property
    def can_estimate(self) -> bool:
        """Whether ``likely`` knows anything."""
        return self.scale is not None

    def nearest(self, count: int) -> IdArray:
        """(count,): places of the nearest lists, in no order."""
        if self._order is not None:
            return self._order[:count]
        if count >= len(self.scores):
            return np.arange(len(self.scores))
        if self._first is None or len(self._first) != count:
            self._first = np.argpartition(-self.scores, count - 1)[:count]
        return self._first

    @property
    def order(self) -> IdArray:
        """(lists,): places of all of them, from the nearest to the farthest; first those that
        ``nearest`` has returned last, which may be others of equal scores."""
        if self._order is None:
            rest = -self.scores
            first = self._first if self._first is not None else np.empty(0, np.int64)
            rest[first] = -np.inf
            self._order = np.argsort(rest)
            self._order[: len(first)] = first
        return self._order

    def needed(self, k: int, last: np.float32, visited: IdArray) -> int:
        """How many of the lists, nearest first, have to be visited, if that is more than those at
        the places ``visited``; else 0. last: the score of the k-th result, -inf where there are
        fewer."""
        if self._beyond(last, visited) <= MISSED_SHARE * k:
            return 0
        lift = max(last, LOWEST) - self.scores
        lift /= np.sqrt(-self.scores) + TINY if self.scale is None else self.scale
        # the lift that a better row needs rises from the nearest list to the farthest
        steps = self._lifts.steps(lift)
        better = self.rows * self._lifts.shares[steps]
        if better.sum() - better[visited].sum() <= MISSED_SHARE * k:
            return 0
        rest = np.cumsum(np.bincount(steps, better, BINS + 1)[BINS - 1 :: -1])[::-1]
        last_step = np.count_nonzero(rest > MISSED_SHARE * k)
        return int(np.count_nonzero(steps < last_step))

    def _beyond(self, last: np.float32, visited: IdArray) -> float:
        """At most so many rows of other lists than the nearest ones, at the places ``visited``, are
        better than ``last``: as many as if all lay in the next nearest list. Takes a tenth of the
        time of a look at each list, and says enough where results lie close together."""
        others = self.scores.copy()
        others[visited] = -np.inf
        nearest = float(others.max())
        if nearest == -math.inf:
            return 0.0
        scale = math.sqrt(-nearest) + float(TINY) if self.scale is None else float(self.scale)
        return self._total * self._lifts.share((max(float(last), float(LOWEST)) - nearest) / scale)

    def holding(self, count: int) -> int:
        """How many of the lists, nearest first, have ``count`` rows together; all where they have
        fewer."""
        held = np.cumsum(self.rows[self.order])
        return min(int(np.searchsorted(held, count)) + 1, len(held))

    def likely(self, k: int) -> np.float32:
        """About the score of the k-th best row of all lists; -inf under L2, of which nothing is
        known before a search."""
        if self.scale is None:
            return np.float32(-np.inf)
        lifts, best = self._lifts, self.scores.max()
        below = np.fmin((best - self.scores) / (self.scale * lifts.width), BINS - 1)
        steps = below.astype(np.int32)
        rows = np.bincount(steps, self.rows, BINS).astype(np.float64, copy=False)
        low, high = -BINS, BINS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if lifts.above(rows, middle) >= k else (low, middle)
        return np.float32(best + self.scale * (lifts.low + lifts.width * low))


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

    def filled(self, rows: IdArray) -> FilledLists:
        """Those that have some of rows (m,)."""
        counts = np.bincount(self.of_row[rows], minlength=self.count)
        numbers = np.flatnonzero(counts)
        return FilledLists(
            counts[numbers].astype(np.float64),
            len(rows),
            None if len(numbers) == self.count else numbers,
        )

    def near(self, queries: FloatArray, filled: FilledLists) -> list[NearLists]:
        """Of each of queries (n, d)."""
        seen = np.ascontiguousarray(self._inner(queries))
        scores, scales = self._scored(seen)
        if filled.numbers is not None:
            scores = scores[:, filled.numbers]
        return [
            NearLists(
                seen[query],
                scores[query],
                None if scales is None else scales[query],
                filled,
                self._lifts,
            )
            for query in range(len(queries))
        ]

    def _scored(self, inner: FloatArray) -> tuple[FloatArray, FloatArray | None]:
        """(n, lists): the score of every centroid for ``_inner`` queries (n, d); and the scales of
        ``NearLists``."""
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
        scores, scales = self._scored(self._inner(rows[asked]))
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
