"""Which items of a pool an answer has: greedily, under caps, the most relevant or the least alike.

Pure functions over one query's pool, whose items are in the order of the ranking. A cap's values
are numbers from 0 on, NO_VALUE where an item has none.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import FloatArray, IdArray, Metric

Codes = NDArray[np.int64]
Floats = NDArray[np.float64]
NO_VALUE = -1


class Counts:
    """How many items of each value were taken, of each cap. limits: of each cap, one at least."""

    def __init__(self, limits: Sequence[int]) -> None:
        self._limits = limits
        self._taken: list[Counter[int]] = [Counter() for _ in limits]

    def allows(self, codes: Sequence[int]) -> bool:
        """Whether no cap refuses an item of these values, one per cap."""
        for code, taken, most in zip(codes, self._taken, self._limits, strict=True):
            if code != NO_VALUE and taken[code] >= most:
                return False
        return True

    def take(self, codes: Sequence[int]) -> list[tuple[int, int]]:
        """Counts an item; the values, as (cap, value), of which it was the last one allowed."""
        full = []
        for cap, code in enumerate(codes):
            if code != NO_VALUE:
                self._taken[cap][code] += 1
                if self._taken[cap][code] == self._limits[cap]:
                    full.append((cap, code))
        return full

    def full(self) -> list[list[int]]:
        """Of each cap the values of which no more items are allowed, in the order they came."""
        return [
            [code for code, count in taken.items() if count >= most]
            for taken, most in zip(self._taken, self._limits, strict=True)
        ]


def capped(codes: Codes, counts: Counts, k: int) -> IdArray:
    """Places in the pool of the first k items that no cap refuses; codes (caps, m)."""
    if not len(codes):
        return np.arange(min(k, codes.shape[1]))
    taken: list[int] = []
    for place, values in enumerate(codes.T.tolist()):
        if len(taken) == k:
            break
        if counts.allows(values):
            counts.take(values)
            taken.append(place)
    return np.array(taken, dtype=np.int64)


def diverse(
    relevance: Floats,
    vectors: FloatArray,
    codes: Codes,
    counts: Counts,
    k: int,
    share: float,
) -> IdArray:
    """Places in the pool of k items by maximal marginal relevance (Carbonell and Goldstein, SIGIR
    1998, formula 1), in the order they were taken: each is, of those that no cap refuses, the one
    with the largest share * relevance - (1 - share) * the largest similarity to one before it.

    relevance (m,), vectors (m, dim) of unit length, or zero where an item's is not known: it is
    like no other. Where values are equal the item earlier in the pool is taken.
    """
    own = share * relevance
    gain = own.copy()
    closest = np.full(len(own), -np.inf)
    taken: list[int] = []
    while len(taken) < min(k, len(own)):
        place = int(gain.argmax())
        if gain[place] == -np.inf:
            break
        taken.append(place)
        own[place] = -np.inf
        for cap, code in counts.take(codes[:, place].tolist()):
            own[codes[cap] == code] = -np.inf
        # row by row: equal vectors have equal similarities, wherever they stand
        np.maximum(closest, np.vecdot(vectors, vectors[place]), out=closest)
        np.subtract(own, (1 - share) * closest, out=gain)
    return np.array(taken, dtype=np.int64)


def comparable(scores: Floats, metric: Metric) -> Floats:
    """Scores (m,) beside which a cosine means something: those of the cosine metric as they are,
    others from 0 to 1 within the pool."""
    if metric is Metric.COSINE or not len(scores):
        return scores
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else np.ones_like(scores)
