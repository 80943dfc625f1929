"""The input rows of items that were written since the export, as histories use them: a cache.

Pure: who fetches them, and time, are others'. A row may be as old as PRESENT_S when an item is
written again, and an item that is new counts after ABSENT_S at the latest.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import FloatArray, IdArray

PRESENT_S = 30.0
# Of an id that no shard has, or that says nothing. Most are of items deleted long ago, which would
# cost every query a question to the shards; an id is seldom in a history before its item is written
ABSENT_S = 10.0
CACHE_BYTES = 16 << 20
ENTRY_BYTES = 400  # of an entry besides the row's numbers: keys, tuples and the array's head


class NewItem(NamedTuple):
    """row (width,) float32, None where the item has none; score where attention pools histories."""

    row: FloatArray | None
    score: float | None


NOTHING = NewItem(None, None)


@dataclass(slots=True)
class NewItemCache:
    """``put`` runs in one thread; look-ups may run in others meanwhile."""

    max_bytes: int = CACHE_BYTES
    _entries: dict[int, tuple[float, NewItem]] = field(default_factory=dict)
    _bytes: int = 0

    def get(self, item_id: int, now: float) -> NewItem | None:
        """None where nothing is known by now. now: seconds, on the clock of ``put``."""
        entry = self._entries.get(item_id)
        return None if entry is None or entry[0] <= now else entry[1]

    def put(self, item_id: int, item: NewItem, now: float) -> None:
        """The oldest entries make room."""
        old = self._entries.pop(item_id, None)
        if old is not None:
            self._bytes -= _bytes_of(old[1])
        until = now + (ABSENT_S if item.row is None else PRESENT_S)
        self._entries[item_id] = until, item
        self._bytes += _bytes_of(item)
        while self._bytes > self.max_bytes:
            _, oldest = self._entries.pop(next(iter(self._entries)))
            self._bytes -= _bytes_of(oldest)


class NewItemLookup:
    """``NewItems`` of one request: from the cache and, after it was asked once, from ``found``.

    missed: the ids that the cache lacks, in the order they were asked for.
    """

    def __init__(self, cache: NewItemCache, now: float, *, is_fresh: bool = False) -> None:
        """is_fresh: nothing that was fetched before this request will do."""
        self._cache = cache
        self._now = now
        self._is_fresh = is_fresh
        self.found: dict[int, NewItem] = {}
        self.missed: dict[int, None] = {}

    def find(
        self, item_ids: IdArray
    ) -> tuple[NDArray[np.bool_], FloatArray | None, FloatArray | None]:
        items = [self._of(item_id) for item_id in item_ids.tolist()]
        is_found = np.array([item.row is not None for item in items], dtype=bool)
        rows = [item.row for item in items if item.row is not None]
        if not rows:
            return is_found, None, None
        scores = [item.score for item in items if item.score is not None]
        return is_found, np.stack(rows), np.array(scores, np.float32) if scores else None

    def _of(self, item_id: int) -> NewItem:
        item = self.found.get(item_id)
        if item is None and not self._is_fresh:
            item = self._cache.get(item_id, self._now)
        if item is None:
            self.missed[item_id] = None
            return NOTHING
        return item


def _bytes_of(item: NewItem) -> int:
    return ENTRY_BYTES + (0 if item.row is None else item.row.nbytes)
