"""A shard's state: an immutable value that searches use and writes replace.

Main index, rows of it that are hidden, the rows written since (``Delta``), attributes, and how many
writes all that contains. ``apply`` makes the next state of a state and some records of the log; the
old one stays as it was, for the searches that use it.

An item is in one of main and delta, never in both: writing it anew, or deleting it, hides the row
that it had. So the newest version of an item is the only one that can be found.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.errors import DeadlineExceeded, too_much_returned
from shardline.shards.core.exclusions import Excluded
from shardline.shards.core.messages import MAX_RETURNED_BYTES, SearchParams
from shardline.shards.core.schema import EMPTY_ID, ORIGINAL_ID, FloatArray, IdArray, Ranked
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.selection import Selection
from shardline.shards.live.attributes import packed_rows
from shardline.shards.live.delta import NOT_HERE, Delta
from shardline.shards.live.delta_search import enter_delta
from shardline.shards.live.excluding import Among, Excluding, rows_of
from shardline.shards.live.filtered import FilterRows, Matching
from shardline.shards.live.item_attributes import ItemAttributes
from shardline.shards.live.records import Record, Upsert

NO_ATTRIBUTES = ItemAttributes()
# Where lists have fewer than k rows, as many are visited as have so many times k besides, because a
# scan of a whole shard takes as long as a hundred searches.
FILLED_FROM = (4, 64)
# A shard finds at least so many times its share of k: so all have k together though some are away,
# and a list with fewer than k rows seldom costs another search.
SHARE_FACTOR = 2
READ_ROWS = 64  # values of an attribute between two looks at the clock


class Applied(NamedTuple):
    """What one write did: rows items were named, and existed of them were there before."""

    rows: int
    existed: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ShardState:
    """All that a search sees of a shard, swapped as one reference: a search uses one of them.

    ids_by_row (rows + 1,) int64: the item of each local row of ``main``, ascending; the last slot
    is the empty id, so that row -1 of an empty result reads it. selection: the rows of ``main``
    that may come back, None for all. seq: how many writes are in it. filter_rows: of which rows it
    is known whether they match a filter; shared by all states of a main index. share: of the rows
    of its generation, as it was built, those that this shard had.
    """

    main: MainIndex
    ids_by_row: IdArray
    delta: Delta
    filter_rows: FilterRows
    selection: Selection | None = None
    seq: int = 0
    attributes: ItemAttributes = NO_ATTRIBUTES
    share: float = 1.0

    @classmethod
    def of(
        cls,
        main: MainIndex,
        item_ids: IdArray,
        attributes: ItemAttributes = NO_ATTRIBUTES,
        *,
        seq: int = 0,
        share: float = 1.0,
    ) -> "ShardState":
        """item_ids (n,) int64, ascending: the item of each local row of ``main``. seq: how many
        writes are in ``main`` already."""
        assert main.rows == item_ids.size
        return cls(
            main=main,
            ids_by_row=np.append(item_ids, EMPTY_ID),
            delta=Delta.empty(main.dim, main.metric),
            seq=seq,
            attributes=attributes,
            share=share,
            filter_rows=FilterRows(item_ids, attributes),
        )

    @property
    def rows(self) -> int:
        """Rows that may come back."""
        return self.main.rows - self.hidden + self.delta.num_live

    @property
    def hidden(self) -> int:
        """Rows of ``main`` whose items have been deleted or written anew."""
        return 0 if self.selection is None else self.selection.num_excluded

    def matching(self, packed: bytes, look: Callable[[], None] = lambda: None) -> Matching:
        """The rows that match a filter, as ``check_filter`` packs it; look: as of
        ``FilterRows.matching``.

        Raises:
            InvalidInput: no filter, an unknown column, or a value that is none of its column's.
        """
        return self.filter_rows.matching(packed, self.selection, self.delta, look)

    def among(self, matching: Matching | None = None) -> Among:
        """What a search looks at: all that may come back, or those of them that match."""
        if matching is None:
            return Among(self.selection, self.delta)
        return Among(matching.selection, matching.delta)

    def search(
        self,
        queries: FloatArray,
        k: int,
        params: SearchParams,
        matching: Matching | None = None,
        look: Callable[[], None] = lambda: None,
    ) -> Ranked:
        """The k best items of queries (n, dim) float32, among those that match where that is given;
        look: as of ``MainIndex.search_filtered``.

        Unless params say how much is visited, there are as many as it takes for all shards to have
        k together, if there are so many.

        Raises:
            InvalidInput: wrong dimension, or a search parameter out of range.
        """
        return self._best(queries, k, params, self.among(matching), matching is not None, look)

    def search_main(
        self, queries: FloatArray, k: int, params: SearchParams, lists: IdArray | None = None
    ) -> Ranked:
        """As ``search``, of a state without writes: local rows, not items. lists: as of
        ``MainIndex.search``."""
        found = self.main.search(queries, k, params, lists=lists)
        self._fill(found, queries, params, None, lambda: None, self._fewest(k))
        return found

    def search_exactly(
        self,
        queries: FloatArray,
        k: int,
        look: Callable[[], None],
        matching: Matching | None = None,
    ) -> Ranked:
        """As ``search``, with every row scored; look: as of ``MainIndex.search_exactly``."""
        return self._best_exactly(queries, k, self.among(matching), look)

    def search_excluding(
        self,
        queries: FloatArray,
        k: int,
        params: SearchParams | None,
        excluded: Excluded,
        matching: Matching | None = None,
        look: Callable[[], None] = lambda: None,
    ) -> tuple[Ranked, NDArray[np.int32]]:
        """As ``search``, without the items that each query excludes, and ``Excluding.search``'s
        counts. params None: as ``search_exactly``."""

        def find(
            queries: FloatArray, k: int, among: Among, more: int = 0, beyond: int = 0
        ) -> Ranked:
            if params is None:
                return self._best_exactly(queries, k + more, among, look)
            is_filtered = matching is not None
            return self._best(queries, k, params, among, is_filtered, look, more, beyond)

        is_fixed = params is not None and (params.nprobe or params.ef_search)
        fewest = 0 if is_fixed else self._fewest(k)
        excluding = Excluding(find, fewest, self.ids_by_row, self.among(matching), look)
        return excluding.search(queries, k, excluded)

    def _best(
        self,
        queries: FloatArray,
        k: int,
        params: SearchParams,
        among: Among,
        is_filtered: bool,
        look: Callable[[], None],
        more: int = 0,
        beyond: int = 0,
    ) -> Ranked:
        """The k best, or k + more of what a search for k visits."""
        selection, delta = among
        if is_filtered:
            assert selection is not None
            in_main = self.main.search_filtered(queries, k + more, params, selection, look)
        else:
            in_main = self.main.search(queries, k, params, selection, beyond, more=more)
            self._fill(in_main, queries, params, selection, look, self._fewest(k))
        return self._with_delta(in_main, queries, delta)

    def _fewest(self, k: int) -> int:
        """Results of this shard that make k with those of the others."""
        return min(k, math.ceil(SHARE_FACTOR * self.share * k))

    def _fill(
        self,
        found: Ranked,
        queries: FloatArray,
        params: SearchParams,
        selection: Selection | None,
        look: Callable[[], None],
        fewest: int,
    ) -> None:
        """Finds more rows of main where what was visited has not ``fewest`` though there are so
        many: in further lists, where there are such, and at last in all rows. However many rows
        the delta has: they are no better for being many. Not if params say how much is visited."""
        if params.nprobe or params.ef_search:
            return
        last = found.ids[:, fewest - 1]
        # one number is looked at in a tenth of the time of an array
        if (last.item() if len(queries) == 1 else last.min(initial=0)) >= 0:
            return
        hidden = 0 if selection is None else selection.num_excluded
        k = found.ids.shape[1]
        wanted = min(fewest, self.main.rows - hidden)
        if not wanted:
            return
        is_short = found.ids[:, wanted - 1] < 0
        is_short &= np.isfinite(queries).all(axis=1)  # others find nothing anyhow
        short = np.flatnonzero(is_short)
        for times in FILLED_FROM if self.main.layers.is_ivf else ():
            if not short.size:
                return
            more = self.main.search(queries[short], k, params, selection, times * k)
            found.ids[short], found.scores[short] = more
            short = short[more.ids[:, wanted - 1] < 0]
        if short.size:
            whole = self.main.search_exactly(queries[short], k, selection, look)
            found.ids[short], found.scores[short] = whole

    def _with_delta(self, in_main: Ranked, queries: FloatArray, delta: Delta) -> Ranked:
        """The best items of rows of main and of the delta."""
        found = Ranked(self.ids_by_row[in_main.ids], in_main.scores)
        return enter_delta(delta, queries, found)

    def _best_exactly(
        self, queries: FloatArray, k: int, among: Among, look: Callable[[], None]
    ) -> Ranked:
        in_main = self.main.search_exactly(queries, k, among.selection, look)
        return self._with_delta(in_main, queries, among.delta)

    def fetch(self, item_ids: IdArray) -> tuple[IdArray, FloatArray]:
        """Those of item_ids (n,) int64 that are here, and their vectors (m, dim) float32.

        As exact as ``MainIndex.reconstruct``: an index without exact copies gives approximations.
        Of items written since it was made the vectors are exact.
        """
        found, rows, in_main = self._found(item_ids)
        if in_main.all():
            return found, self.main.reconstruct(rows)
        vectors = np.empty((len(found), self.main.dim), np.float32)
        vectors[in_main] = self.main.reconstruct(rows[in_main])
        vectors[~in_main] = self.delta.vectors_of(rows[~in_main])
        return found, vectors

    def attributes_of(
        self, item_ids: IdArray, names: Sequence[str], deadline: float, limit: int
    ) -> tuple[IdArray, bytes] | None:
        """Those of item_ids (n,) int64 that are here, and ``AttributesReply.values``; None if
        these would have more than ``limit`` bytes.

        An item whose id was kept at its import is its own ``original_id``. deadline: on
        time.monotonic's clock.

        Raises:
            InvalidInput: no such attribute, or more than MAX_RETURNED_BYTES.
            DeadlineExceeded: it took too long.
        """
        found, rows, in_main = self._found(item_ids)
        packed = bytearray()
        for name in names:
            is_own = name == ORIGINAL_ID and name not in self.attributes.names
            for start in range(0, max(1, len(rows)), READ_ROWS):
                part = slice(start, start + READ_ROWS)
                values = (
                    found[part].tolist()
                    if is_own
                    else self._values(name, rows[part], in_main[part])
                )
                packed += msgpack.packb(values)
                if len(packed) > MAX_RETURNED_BYTES:
                    raise too_much_returned(MAX_RETURNED_BYTES)
                if len(packed) > limit:
                    return None
                if time.monotonic() > deadline:
                    raise DeadlineExceeded("the request's time ran out while attributes were read")
        return found, bytes(packed)

    def _values(self, name: str, rows: IdArray, in_main: NDArray[np.bool_]) -> list[Any]:
        """An attribute of rows (m,) of main, or of the delta where ``in_main`` (m,) is False."""
        stored = iter(self.attributes.values(name, rows[in_main]))
        if in_main.all():
            return list(stored)
        column = self.attributes.names.index(name)
        return [
            next(stored) if is_stored else self._written(row, column)
            for row, is_stored in zip(rows.tolist(), in_main.tolist(), strict=True)
        ]

    def _written(self, row: int, column: int) -> Any:
        packed = self.delta.attributes_of(row)
        return msgpack.unpackb(packed, strict_map_key=False)[column] if packed else None

    def _found(self, item_ids: IdArray) -> tuple[IdArray, IdArray, NDArray[np.bool_]]:
        """Those of item_ids (n,) int64 that are here and may come back, their rows, and whether
        these are rows of main, not of the delta."""
        rows = self.main_rows_of(item_ids)
        in_main = rows != NOT_HERE
        if self.delta.num_live:
            rows = np.where(in_main, rows, self.delta.rows_of(item_ids))
        here = rows != NOT_HERE
        return item_ids[here], rows[here], in_main[here]

    def main_rows_of(self, item_ids: IdArray) -> IdArray:
        """(n,) int64: the row of main of each of item_ids (n,) int64 that may come back, NOT_HERE
        where there is none."""
        rows = rows_of(self.ids_by_row, item_ids)
        if self.selection is not None:
            known = np.flatnonzero(rows != NOT_HERE)
            hidden = ~self.selection.are_live(rows[known])
            rows[known[hidden]] = NOT_HERE
        return rows


def apply(state: ShardState, records: Sequence[Record]) -> tuple[ShardState, list[Applied]]:
    """The state with these records in it, which follow on its ``seq`` without a gap, and what each
    of them did. Attributes must have been checked when they were written (``check_attributes``).
    """
    change = _Change(state)
    applied = [change.add(record) for record in records]
    return (change.result() if applied else state), applied


class _Change:
    """What some records change of a state, collected to be made in one step."""

    def __init__(self, state: ShardState) -> None:
        self._state = state
        self._seq = state.seq
        self._next_row = state.delta.rows
        self._rows_of: dict[int, int] = {}  # of items touched here: row of the delta, or NOT_HERE
        self._hidden: list[int] = []  # rows of main
        self._dead: list[int] = []  # rows of the delta, new ones included
        self._upserts: list[Upsert] = []

    def add(self, record: Record) -> Applied:
        assert record.seq == self._seq + 1, f"record {record.seq} after {self._seq}"
        self._seq = record.seq
        ids = record.change.item_ids
        is_upsert = isinstance(record.change, Upsert)
        existed = 0
        main_rows = self._state.main_rows_of(ids).tolist()
        delta_rows = self._state.delta.rows_of(ids).tolist()
        for place, item in enumerate(ids.tolist()):
            row = self._rows_of.get(item)
            if row is None:
                row = delta_rows[place]
                if main_rows[place] != NOT_HERE:
                    self._hidden.append(main_rows[place])
                    existed += 1
            if row != NOT_HERE:
                self._dead.append(row)
                existed += 1
            self._rows_of[item] = self._next_row + place if is_upsert else NOT_HERE
        if isinstance(record.change, Upsert):
            self._upserts.append(record.change)
            self._next_row += len(ids)
        return Applied(len(ids), existed)

    def result(self) -> ShardState:
        state = self._state
        selection = state.selection
        if self._hidden:
            hidden = np.array(self._hidden, np.int64)
            if selection is None:
                selection = Selection.without(hidden, rows=state.main.rows)
            else:
                selection = selection.excluding(hidden)
        names = state.attributes.names
        written = []
        for each in self._upserts:
            packed = packed_rows(each.attributes, len(each.item_ids), names)
            written.append((each.item_ids, each.vectors, packed))
        delta = state.delta.changed(written, self._dead, self._rows_of)
        return replace(state, delta=delta, selection=selection, seq=self._seq)
