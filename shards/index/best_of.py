"""The best items of an answer and of further ones, kept in heaps by faiss.

A heap costs what enters it: one comparison in compiled code for an item that does not.
"""

import faiss
import numpy as np

from shardline.shards.core.schema import (
    EMPTY_ID,
    EMPTY_SCORE,
    FloatArray,
    IdArray,
    Ranked,
)

# Where scores are equal, a heap of faiss keeps the larger number, and -1 is its own empty slot. So
# items are numbered downwards from the largest int64 to 0; our empty slot gets the smallest int64,
# which comes behind all of them.
_ALL_BUT_THE_SIGN = np.int64(2**63 - 1)


class BestOf:
    """Starts as an answer; ``add`` items, then ask for the ``result`` once.

    It has one slot more than the answer: where the last two scores of the result are equal, other
    items may have the same score, and lower ids than those that are in it.
    """

    def __init__(self, ranked: Ranked) -> None:
        """ranked (n, k), in the order of answers."""
        queries, k = ranked.ids.shape
        # a heap of minima, which an ascending array is
        self._scores = np.empty((queries, k + 1), np.float32)
        self._scores[:, 0], self._scores[:, 1:] = EMPTY_SCORE, ranked.scores[:, ::-1]
        self._ids = np.empty((queries, k + 1), np.int64)
        self._ids[:, 0], self._ids[:, 1:] = EMPTY_ID, ranked.ids[:, ::-1]
        self._ids = flipped(self._ids)
        self._heaps = faiss.float_minheap_array_t()
        self._heaps.nh, self._heaps.k = self._scores.shape
        self._heaps.val = faiss.swig_ptr(self._scores)
        self._heaps.ids = faiss.swig_ptr(self._ids)

    @property
    def least(self) -> FloatArray:
        """(n,): what an item has to score more than, to enter."""
        return self._scores[:, 0].copy()

    def add(self, scores: FloatArray, numbers: IdArray) -> None:
        """scores (n, m) float32, contiguous, nan for what is not to enter; numbers (m,) int64: of
        the same items for all queries, as ``flipped`` makes them."""
        given = faiss.swig_ptr(scores), faiss.swig_ptr(numbers)
        self._heaps.addn_with_ids(scores.shape[1], *given, 0)

    def result(self) -> Ranked:
        """(n, k + 1), in the order of answers: score descending, then id ascending."""
        self._heaps.reorder()
        return Ranked(flipped(self._ids), self._scores)


def flipped(item_ids: IdArray) -> IdArray:
    """As ``BestOf`` numbers items, int64 of any shape, and back."""
    return item_ids ^ _ALL_BUT_THE_SIGN
