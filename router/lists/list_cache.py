"""Lists that a router has read lately: least recently used out first. Used in one event loop.

What it holds of a list is what a look at the store has found, or what this router has written. The
two may overlap, so each has two moments of time.monotonic: ``seen_at``, since when it is known to
have been the newest, and ``order``, by which the later of two is told. A look has one moment, when
it began: then what a write had linked before is in it. Of a write ``order`` is when the link was
made, and ``seen_at`` just before: others may have changed the list since.
"""

from collections import OrderedDict
from dataclasses import dataclass

from shardline.router.lists.list_file import StoredList

ENTRY_BYTES = 600  # besides the ids: objects of Python, and the name


@dataclass(frozen=True, slots=True)
class CachedList:
    stored: StoredList
    seen_at: float
    order: float

    @property
    def bytes(self) -> int:
        return ENTRY_BYTES + self.stored.ids.nbytes


class ListCache:
    """At most ``max_bytes`` of lists, by name."""

    def __init__(self, max_bytes: int) -> None:
        self.bytes = 0
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, CachedList] = OrderedDict()

    def get(self, name: str) -> CachedList | None:
        entry = self._entries.get(name)
        if entry is not None:
            self._entries.move_to_end(name)
        return entry

    def put(self, name: str, entry: CachedList) -> CachedList:
        """Keeps the later of this one and what there is, and returns it."""
        before = self._entries.pop(name, None)
        if before is not None:
            self.bytes -= before.bytes
            if before.order > entry.order:
                entry = before
        self._entries[name] = entry
        self.bytes += entry.bytes
        while self.bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= oldest.bytes
        return entry
