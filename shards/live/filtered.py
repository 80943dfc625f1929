"""Which rows of a shard match a filter: evaluated once, and kept for the next search that has it.

What the rows of a main index have does not change: a write hides rows of it, and adds rows to the
delta. So a filter's rows of main are found once per main index and narrowed to those that are not
hidden, and of a delta only the rows are looked at that came since the last search. What is kept is
bounded in bytes; what was least recently used goes first.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shardline.shards.core.filter_language import Condition, Filter, Negation, read_filter
from shardline.shards.core.schema import IdArray
from shardline.shards.filters.bound import Bound, bind
from shardline.shards.filters.matching import matches
from shardline.shards.index.selection import Selection
from shardline.shards.live.delta import Delta
from shardline.shards.live.item_attributes import ItemAttributes
from shardline.shards.live.written_columns import WrittenColumns

MAX_KEPT_BYTES = 32 << 20  # of a shard: 250 filters of 1M rows each
# A filter's values as Python has them, and as Arrow, against their bytes as they travel
VALUES_FACTOR = 16
ENTRY_BYTES = 2000  # of a filter beside its rows and values
DELTA_ROW_BYTES = 36  # two versions of ``hidden``, ``ids`` and ``rows_of_ids``
AT_ONCE_ROWS = 512  # of a delta, evaluated in a millisecond or so


@dataclass(frozen=True, slots=True, eq=False)
class Matching:
    """Of one state: the rows of main that match and may come back, and the delta in which only
    rows that match are live."""

    selection: Selection
    delta: Delta

    @property
    def rows(self) -> int:
        """Live rows that match."""
        return self.selection.num_selected + self.delta.num_live


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """A filter, for tables of ``columns``. of_main: rows of main that match, hidden ones included.
    in_delta (rows,) bool: which of the first rows of ``buffer`` match. What the last search had is
    in the other fields."""

    bound: Bound
    columns: tuple[str, ...]
    of_main: Selection
    buffer: object = None
    in_delta: NDArray[np.bool_] | None = None
    hidden: Selection | None = None
    delta: Delta | None = None
    matching: Matching | None = None

    def size(self, packed: bytes) -> int:
        """Bytes, roughly."""
        in_delta = 0 if self.delta is None else DELTA_ROW_BYTES * self.delta.rows
        return 2 * self.of_main.bits.nbytes + in_delta + VALUES_FACTOR * len(packed) + ENTRY_BYTES


class FilterRows:
    """Of one main index and its attributes, and of the deltas over it.

    Any thread may ask, and none waits for what another evaluates: what is kept are values that are
    replaced. Two threads that need the same filter at once may both evaluate it.
    """

    def __init__(
        self, item_ids: IdArray, attributes: ItemAttributes, max_bytes: int = MAX_KEPT_BYTES
    ) -> None:
        """item_ids (n,) int64: of the rows of main; attributes: of these."""
        self._item_ids = item_ids
        self._schema = attributes.schema
        self._table = pa.table({}) if attributes.table is None else attributes.table
        self._max_bytes = max_bytes
        self._lock = threading.Lock()  # to look up and to keep, never to evaluate
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._bytes = 0
        self._written = WrittenColumns(attributes.schema)

    def known(self, packed: bytes, delta: Delta) -> Selection | None:
        """The rows of main that match a filter, hidden ones included, if ``matching`` would return
        within a millisecond or so; else None. Counts as a use."""
        kept = self._look_up(packed)
        if kept is None:
            return None
        known = kept.in_delta if kept.buffer is delta.buffer else None
        left = delta.rows - (0 if known is None else len(known))
        return kept.of_main if left <= AT_ONCE_ROWS else None

    def matching(
        self,
        packed: bytes,
        hidden: Selection | None,
        delta: Delta,
        look: Callable[[], None] = lambda: None,
    ) -> Matching:
        """The rows that match a filter, as ``check_filter`` packs it, in the state that has these.

        look: as of ``matches``; of what it ends nothing is kept.

        Raises:
            InvalidInput: no filter, an unknown column, or a value that is none of its column's.
        """
        kept = self._look_up(packed)
        if kept is None:
            evaluated = self._evaluated(packed, look)
            # what another thread has kept meanwhile goes first: copies may have been made for it
            kept = self._look_up(packed) or evaluated
        kept, found = self._found(kept, hidden, delta, look)
        self._keep(packed, kept)
        return found

    def _look_up(self, packed: bytes) -> _Kept | None:
        with self._lock:
            kept = self._kept.get(packed)
            if kept is not None:
                self._kept.move_to_end(packed)
            return kept

    def _keep(self, packed: bytes, kept: _Kept) -> None:
        with self._lock:
            replaced = self._kept.pop(packed, None)
            if replaced is not None:
                self._bytes -= replaced.size(packed)
            self._kept[packed] = kept
            self._bytes += kept.size(packed)
            while self._bytes > self._max_bytes and len(self._kept) > 1:
                oldest, dropped = self._kept.popitem(last=False)
                self._bytes -= dropped.size(oldest)

    def _evaluated(self, packed: bytes, look: Callable[[], None]) -> _Kept:
        given = read_filter(packed)
        mask = matches(bind(given, self._schema), self._table, self._item_ids, look)
        columns = self._written.known(columns_of(given))
        bound = bind(given, pa.schema([self._schema.field(name) for name in columns]))
        return _Kept(bound, columns, Selection.of(mask))

    def _found(
        self, kept: _Kept, hidden: Selection | None, delta: Delta, look: Callable[[], None]
    ) -> tuple[_Kept, Matching]:
        """What matches, and what is to be kept of it."""
        last = kept.matching
        if last is None or kept.hidden is not hidden:
            selection = kept.of_main & hidden
        elif kept.delta is delta:
            return kept, last
        else:
            selection = last.selection
        narrowed = delta
        if delta.num_live:
            in_delta = self._in_delta(kept, delta, look)
            kept = replace(kept, buffer=delta.buffer, in_delta=in_delta)
            narrowed = _narrowed(delta, in_delta[: delta.rows])
        found = Matching(selection, narrowed)
        return replace(kept, hidden=hidden, delta=delta, matching=found), found

    def _in_delta(self, kept: _Kept, delta: Delta, look: Callable[[], None]) -> NDArray[np.bool_]:
        """(rows or more,) bool: which rows of the delta match, dead ones included."""
        known = kept.in_delta if kept.buffer is delta.buffer else None
        done = 0 if known is None else len(known)
        if known is None or done < delta.rows:
            table = self._written.table(delta, kept.columns, done)
            more = matches(kept.bound, table, delta.item_ids[done:], look)
            known = more if known is None else np.concatenate((known, more))
        return known


def _narrowed(delta: Delta, mask: NDArray[np.bool_]) -> Delta:
    """The delta in which only rows that match, mask (rows,) bool, are live."""
    matching = np.zeros(delta.hidden.size, np.bool_)
    matching[: delta.rows] = mask
    hidden = delta.hidden | ~matching.reshape(delta.hidden.shape)
    is_live = mask[delta.rows_of_ids]
    return replace(
        delta,
        hidden=hidden,
        hides=tuple(np.any(hidden, axis=1).tolist()),
        ids=delta.ids[is_live],
        rows_of_ids=delta.rows_of_ids[is_live],
    )


def columns_of(given: Filter) -> set[str]:
    """The names of the columns that a filter has conditions on."""
    if isinstance(given, Condition):
        return {given.column}
    parts = (given.part,) if isinstance(given, Negation) else given.parts
    return set().union(*map(columns_of, parts))
