"""Items per user in compressed sparse rows: the shape of every list of positives or negatives."""

from typing import NamedTuple

import numpy as np

from shardline.shards.core.schema import IdArray


class Csr(NamedTuple):
    """Items of each of n users: ``items[indptr[u]:indptr[u + 1]]``; indptr (n + 1,), both int64."""

    indptr: IdArray
    items: IdArray

    @classmethod
    def of(cls, lengths: IdArray, items: IdArray) -> "Csr":
        """From the number of items of each user, and all items end to end."""
        return cls(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), items)

    @property
    def lengths(self) -> IdArray:
        return np.diff(self.indptr)

    @property
    def owners(self) -> IdArray:
        """(len(items),) int64: the user that each entry of ``items`` belongs to."""
        return np.repeat(np.arange(len(self.indptr) - 1, dtype=np.int64), self.lengths)

    def slice(self, start: int, stop: int) -> "Csr":
        """Users start .. stop - 1; the items are a view."""
        indptr = self.indptr[start : stop + 1]
        return Csr(indptr - indptr[0], self.items[indptr[0] : indptr[-1]])

    def take(self, users: IdArray, newest: int | None = None) -> "Csr":
        """The given users in the given order, each cut to the last ``newest`` items; copied."""
        starts, ends = self.indptr[:-1][users], self.indptr[1:][users]
        if newest is not None:
            starts = np.maximum(starts, ends - newest)
        places = places_of(starts, ends - starts)
        return Csr(places.indptr, self.items[places.items])


def places_of(starts: IdArray, lengths: IdArray) -> Csr:
    """start, start + 1, ... start + length - 1 of each pair."""
    places = Csr.of(lengths, np.arange(lengths.sum()))
    return Csr(places.indptr, places.items + np.repeat(starts - places.indptr[:-1], lengths))
