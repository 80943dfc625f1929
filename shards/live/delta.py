"""The rows written since a shard's main index was made; ``delta_search`` searches them.

Rows are numbered in the order they were written. A row never changes; when its item is written
again or deleted, the row is dead. Versions of a delta that grew from one another share the memory
of their rows: each sees its own first rows, so that a search under way keeps what it began with.
One thread may append while others search; appending to a version that is not the newest copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import FloatArray, IdArray, Metric

FIRST_ROWS = 256  # room of the first buffer; each further one has twice the room
NOT_HERE = -1


class _Buffer:
    """Memory of rows, shared by versions; ``used`` of them are written, by the newest version."""

    def __init__(self, room: int, dim: int) -> None:
        self.vectors: FloatArray = np.empty((room, dim), np.float32)
        self.squares: FloatArray = np.empty(room, np.float32)  # of their lengths
        self.item_ids: IdArray = np.empty(room, np.int64)
        self.attributes: list[bytes] = []
        self.used = 0

    def with_room(self, rows: int, more: int) -> "_Buffer":
        """Itself if ``more`` rows fit behind its first ``rows`` and nobody has written there; else
        a copy of these."""
        room = len(self.item_ids)
        if self.used == rows and rows + more <= room:
            return self
        while room < rows + more:
            room *= 2
        made = _Buffer(room, self.vectors.shape[1])
        for name in ("vectors", "squares", "item_ids"):
            getattr(made, name)[:rows] = getattr(self, name)[:rows]
        made.attributes = self.attributes[:rows]
        made.used = rows
        return made

    def append(self, item_ids: IdArray, vectors: FloatArray, attributes: Sequence[bytes]) -> None:
        """item_ids (n,), vectors (n, dim), attributes one per row; there is room for them."""
        part = slice(self.used, self.used + len(item_ids))
        self.vectors[part] = vectors
        self.item_ids[part] = item_ids
        with np.errstate(over="ignore"):
            self.squares[part] = np.vecdot(vectors, vectors)
        self.attributes.extend(attributes)
        self.used = part.stop


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Delta:
    """One version. item_ids (rows,) int64 by row; live (rows,) bool, num_live of them True.

    ids (num_live,) int64, ascending: the items of the live rows; rows_of_ids their rows.
    squares (rows,) float32: of the vectors' lengths; largest: of them, 0 without rows.
    """

    metric: Metric
    buffer: _Buffer
    vectors: FloatArray
    squares: FloatArray
    largest: float
    item_ids: IdArray
    live: NDArray[np.bool_]
    ids: IdArray
    rows_of_ids: IdArray

    @classmethod
    def empty(cls, dim: int, metric: Metric) -> "Delta":
        none = np.empty(0, np.int64)
        buffer = _Buffer(FIRST_ROWS, dim)
        return cls(
            metric=metric,
            buffer=buffer,
            vectors=buffer.vectors[:0],
            squares=buffer.squares[:0],
            largest=0.0,
            item_ids=none,
            live=none.astype(np.bool_),
            ids=none,
            rows_of_ids=none,
        )

    @property
    def rows(self) -> int:
        """All rows in memory, dead ones included."""
        return len(self.item_ids)

    @property
    def num_live(self) -> int:
        return len(self.ids)

    def rows_of(self, item_ids: IdArray) -> IdArray:
        """(n,) int64: the live row of each of item_ids (n,) int64, NOT_HERE where there is none."""
        if not len(self.ids):
            return np.full(len(item_ids), NOT_HERE, np.int64)
        at = np.searchsorted(self.ids, item_ids)
        at[at == len(self.ids)] = 0
        return np.where(self.ids[at] == item_ids, self.rows_of_ids[at], NOT_HERE)

    def attributes_of(self, row: int) -> bytes:
        """As they were appended."""
        return self.buffer.attributes[row]

    def changed(
        self,
        written: Sequence[tuple[IdArray, FloatArray, Sequence[bytes]]],
        dead: Sequence[int],
        rows_of: dict[int, int],
    ) -> "Delta":
        """With rows appended: item_ids (n,) int64, vectors (n, dim) and attributes, several times.

        dead: rows, old or appended, that no longer come back. rows_of: the live row of each item
        that was written, NOT_HERE for the deleted ones.
        """
        start, more = self.rows, sum(len(ids) for ids, _, _ in written)
        buffer = self.buffer.with_room(start, more)
        for part in written:
            buffer.append(*part)
        end = start + more
        live = np.ones(end, np.bool_)
        live[:start] = self.live
        live[dead] = False
        ids, rows_of_ids = self._looked_up(rows_of)
        return Delta(
            metric=self.metric,
            buffer=buffer,
            vectors=buffer.vectors[:end],
            squares=buffer.squares[:end],
            largest=float(buffer.squares[start:end].max(initial=self.largest)),
            item_ids=buffer.item_ids[:end],
            live=live,
            ids=ids,
            rows_of_ids=rows_of_ids,
        )

    def _looked_up(self, rows_of: dict[int, int]) -> tuple[IdArray, IdArray]:
        """``ids`` and ``rows_of_ids`` after a change."""
        written = np.fromiter(rows_of, np.int64, len(rows_of))
        rows = np.fromiter(rows_of.values(), np.int64, len(rows_of))
        order = np.argsort(written)
        written, rows = written[order], rows[order]
        at = np.searchsorted(self.ids, written)
        known = np.zeros(len(written), np.bool_)
        inside = at < len(self.ids)
        known[inside] = self.ids[at[inside]] == written[inside]
        ids, rows_of_ids = self.ids, self.rows_of_ids
        if known.any():
            ids, rows_of_ids = np.delete(ids, at[known]), np.delete(rows_of_ids, at[known])
        here = rows != NOT_HERE
        at = np.searchsorted(ids, written[here])
        return np.insert(ids, at, written[here]), np.insert(rows_of_ids, at, rows[here])
