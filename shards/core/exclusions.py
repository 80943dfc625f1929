"""Items that the queries of a search exclude, as they travel: ids of many queries in two arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import IdArray


class Excluded(NamedTuple):
    """Items that must not come back, of several queries: counts (n,) int32 says how many of ids
    (m,) int64 belong to each, one query after the other; of one query they are ascending, each
    once. Unknown ids do no harm."""

    counts: NDArray[np.int32]
    ids: IdArray

    def rows(self, rows: slice) -> "Excluded | None":
        """Of some of the queries; None where these have none."""
        ends = np.cumsum(self.counts)
        part = ends[rows]
        if not len(part):
            return None
        start = int(part[0]) - int(self.counts[rows][0])
        ids = self.ids[start : int(part[-1])]
        return Excluded(self.counts[rows], ids) if len(ids) else None


def joined_excluded(parts: Sequence[tuple[int, Excluded | None]]) -> Excluded | None:
    """Of the queries of all parts, in order: each the number of its queries, and what they exclude;
    None where none excludes anything."""
    if len(parts) == 1:
        return parts[0][1]
    if all(excluded is None for _, excluded in parts):
        return None
    counts = [
        np.zeros(queries, np.int32) if excluded is None else excluded.counts
        for queries, excluded in parts
    ]
    ids = [excluded.ids for _, excluded in parts if excluded is not None]
    return Excluded(np.concatenate(counts), np.concatenate(ids))
