"""How many lists a store has, without counting all of them each time.

All folders are counted once per process. After that a list that is created has the lists of its own
bucket counted, so that others' lists are missed for about 256 creations at most. Before anything is
refused, all are counted again. Lists that were deleted count until `shardline gc` removes them.
"""

import time
from collections.abc import Callable
from pathlib import Path

from shardline.router.lists.list_paths import BUCKETS, names_in
from shardline.shards.core.errors import InvalidInput

RECOUNT_S = 10.0  # at most so often: a million lists take a second or so


class ListCount:
    """Of the lists below ``root``. Blocks; may be called from any thread."""

    def __init__(self, root: Path, limit: int, now: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._limit = limit
        self._now = now
        self._counts: dict[str, int] = {}
        self._counted_at = -RECOUNT_S

    def make_room(self, bucket: str) -> None:
        """Before a list is created in this bucket, which counts it, whatever becomes of it.

        Raises:
            InvalidInput: there are as many as there may be. OSError: they cannot be counted.
        """
        if not self._counts:
            self._count_all()
        else:
            self._counts[bucket] = len(names_in(self._root / bucket))
        if self._total() >= self._limit and self._now() - self._counted_at >= RECOUNT_S:
            self._count_all()
        if self._total() >= self._limit:
            raise InvalidInput(
                "too many lists in the store",
                field="name",
                expected=f"<= {self._limit}, router.max_lists",
                hint="delete lists that nobody needs, then `shardline gc`",
            )
        self._counts[bucket] += 1

    def _total(self) -> int:
        return sum(list(self._counts.values()))

    def _count_all(self) -> None:
        self._counted_at = self._now()
        self._counts = {bucket: len(names_in(self._root / bucket)) for bucket in BUCKETS}
