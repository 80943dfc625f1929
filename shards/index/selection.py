"""Which rows of a main index may come back: all but those that are excluded.

An immutable value, passed with every search. What faiss needs of it is made once, with the value,
so a search costs the same with a selection as without. A selection that excludes further rows is
made from a copy of the bits, one per row, not from a list of all that are excluded.

Rows are excluded for two reasons: they are hidden, because their items were deleted or written
anew, or they do not match a filter. Hidden rows change with every write, what matches a filter does
not. So a filter's selection is made once, and ``filter & hidden`` for every state.
"""

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import IdArray


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """bits (rows / 8,) uint8, rounded up: bit ``row % 8`` of byte ``row // 8`` is 1 where the row
    may come back; num_excluded rows may not. ``selector`` is faiss's form of it, over the same
    memory. origin: the selection that this one was narrowed from with ``&``, which has all of its
    rows; None: itself. base: the selection that this one was made from with ``less``, and less_rows
    (m,) the rows that it lacks of that one, ascending.
    """

    bits: NDArray[np.uint8]
    rows: int
    num_excluded: int
    selector: Any
    origin: "Selection | None" = None
    base: "Selection | None" = None
    less_rows: IdArray | None = None

    @classmethod
    def without(cls, excluded: IdArray, *, rows: int) -> "Selection | None":
        """All of ``rows`` local rows but ``excluded`` (m,) int64; None where nothing is excluded,
        which is searched without a selector."""
        if excluded.size == 0:
            return None
        live = np.ones(rows, dtype=np.bool_)
        live[excluded] = False
        bits = np.packbits(live, bitorder="little")
        return cls(bits, rows, rows - int(live.sum()), _selector(bits))

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> "Selection":
        """The rows where mask (rows,) bool is True; they may be all, or none."""
        bits = np.packbits(mask, bitorder="little")
        excluded = mask.size - int(np.count_nonzero(mask))
        return cls(bits, mask.size, excluded, _selector(bits))

    @classmethod
    def whole(cls, rows: int) -> "Selection":
        """All of ``rows`` local rows."""
        bits = np.full((rows + 7) // 8, 255, np.uint8)
        if rows % 8:
            bits[-1] = (1 << rows % 8) - 1
        return cls(bits, rows, 0, _selector(bits))

    def __and__(self, hidden: "Selection | None") -> "Selection":
        """The rows of both; None stands for all rows. What a main index has derived from this one
        serves the result too: take the one that changes less often on the left."""
        if hidden is None:
            return self
        assert hidden.rows == self.rows
        bits = self.bits & hidden.bits
        excluded = self.rows - int(np.bitwise_count(bits).sum())
        if excluded == self.num_excluded:
            return self
        return Selection(bits, self.rows, excluded, _selector(bits), origin=self.origin or self)

    @property
    def num_selected(self) -> int:
        """Rows that may come back."""
        return self.rows - self.num_excluded

    def selected(self) -> IdArray:
        """(num_selected,) int64: the rows that may come back, ascending."""
        return np.flatnonzero(np.unpackbits(self.bits, count=self.rows, bitorder="little"))

    def excluding(self, more: IdArray) -> "Selection":
        """Without ``more`` (m,) int64 as well, rows that may come back, each once."""
        bits = self._bits_without(more)
        return Selection(bits, self.rows, self.num_excluded + more.size, _selector(bits))

    def less(self, more: IdArray) -> "Selection":
        """As ``excluding``, for the search of one query: what a main index has derived from this
        selection, or for it, serves the result too. more: ascending."""
        bits = self._bits_without(more)
        return Selection(
            bits,
            self.rows,
            self.num_excluded + more.size,
            _selector(bits),
            origin=self.origin or self,
            base=self,
            less_rows=more,
        )

    def _bits_without(self, more: IdArray) -> NDArray[np.uint8]:
        bits = self.bits.copy()
        np.bitwise_and.at(bits, more >> 3, _without_bit(more))
        return bits

    def are_live(self, rows: IdArray) -> NDArray[np.bool_]:
        """(m,) bool: which of rows (m,) int64 may come back."""
        live: NDArray[np.bool_] = (self.bits[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 != 0
        return live

    @property
    def live(self) -> NDArray[np.bool_]:
        """(rows,) bool, made anew each time."""
        return np.unpackbits(self.bits, count=self.rows, bitorder="little").view(np.bool_)


def _selector(bits: NDArray[np.uint8]) -> Any:
    return faiss.IDSelectorBitmap(bits)


def _without_bit(rows: IdArray) -> NDArray[np.uint8]:
    """For each row the byte that has all bits but the row's."""
    return ~np.left_shift(np.uint8(1), (rows & 7).astype(np.uint8))
