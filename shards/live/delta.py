"""The rows written since a shard's main index was made; ``delta_search`` searches them.

Rows are numbered in the order they were written. A row never changes; when its item is written
again or deleted, the row is dead. Versions of a delta that grew from one another share the memory
of their rows: each sees its own first rows, so that a search under way keeps what it began with.
One thread may append while others search; appending to a version that is not the newest copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import FloatArray, IdArray, Metric
from shardline.shards.index.best_of import flipped

# Vectors lie in tiles, one column per row: scores are a product of matrices whose inner loop runs
# along the tile's memory. With so few rows, and PRODUCT_QUERIES of 128 numbers, OpenBLAS packs
# nothing, and a few queries take a fifth of what they take with a vector in each line.
TILE_ROWS = 512
NOT_HERE = -1


class _Buffer:
    """Memory of rows, shared by versions; ``used`` of them are written, by the newest version.

    squares, of the vectors' lengths, item_ids, and these as ``BestOf`` numbers them, have room for
    whole tiles, which are made as they are needed.
    """

    def __init__(self, tiles: int, dim: int, tile_rows: int) -> None:
        self.dim, self.tile_rows = dim, tile_rows
        self.tiles: list[FloatArray] = []
        self.squares: FloatArray = np.empty(tiles * tile_rows, np.float32)
        self.item_ids: IdArray = np.empty(tiles * tile_rows, np.int64)
        self.numbers: IdArray = np.empty(tiles * tile_rows, np.int64)
        self.attributes: list[bytes] = []
        self.used = 0

    def with_room(self, rows: int, more: int) -> "_Buffer":
        """Itself if ``more`` rows fit behind its first ``rows`` and nobody has written there; else
        a copy of these, which shares the tiles that are full."""
        room = len(self.item_ids)
        if self.used == rows and rows + more <= room:
            return self
        while room < rows + more:
            room *= 2
        made = _Buffer(room // self.tile_rows, self.dim, self.tile_rows)
        for name in ("squares", "item_ids", "numbers"):
            getattr(made, name)[:rows] = getattr(self, name)[:rows]
        full = rows // self.tile_rows
        made.tiles = self.tiles[:full]
        if rows % self.tile_rows:
            made.tiles.append(self.tiles[full].copy())
        made.attributes = self.attributes[:rows]
        made.used = rows
        return made

    def append(self, item_ids: IdArray, vectors: FloatArray, attributes: Sequence[bytes]) -> None:
        """item_ids (n,), vectors (n, dim), attributes one per row; there is room for them."""
        part = slice(self.used, self.used + len(item_ids))
        self.item_ids[part], self.numbers[part] = item_ids, flipped(item_ids)
        with np.errstate(over="ignore"):
            self.squares[part] = np.vecdot(vectors, vectors)
        self.attributes.extend(attributes)
        done = 0
        while done < len(vectors):
            number, column = divmod(self.used + done, self.tile_rows)
            if number == len(self.tiles):
                self.tiles.append(np.zeros((self.dim, self.tile_rows), np.float32))
            some = vectors[done : done + self.tile_rows - column]
            self.tiles[number][:, column : column + len(some)] = some.T
            done += len(some)
        self.used = part.stop


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Delta:
    """One version. item_ids (rows,) int64 by row; num_live of them are live.

    hidden (tiles, rows per tile) bool: True for the dead rows, and behind the last row; hides: for
    each tile whether it has such. ids (num_live,) int64, ascending: the items of the live rows;
    rows_of_ids their rows. largest: of the squares of its vectors' lengths, 0 without rows. tiles:
    (dim, rows per tile) float32 each, a row's vector in each column; behind the last row are zeros,
    or later versions'.
    """

    metric: Metric
    buffer: _Buffer
    tiles: tuple[FloatArray, ...]
    largest: float
    item_ids: IdArray
    hidden: NDArray[np.bool_]
    hides: tuple[bool, ...]
    ids: IdArray
    rows_of_ids: IdArray

    @classmethod
    def empty(cls, dim: int, metric: Metric) -> "Delta":
        none = np.empty(0, np.int64)
        buffer = _Buffer(1, dim, TILE_ROWS)
        return cls(
            metric=metric,
            buffer=buffer,
            tiles=(),
            largest=0.0,
            item_ids=none,
            hidden=np.empty((0, TILE_ROWS), np.bool_),
            hides=(),
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

    def vectors_of(self, rows: IdArray) -> FloatArray:
        """(n, dim) float32, a copy, of rows (n,) int64."""
        found = np.empty((len(rows), self.buffer.dim), np.float32)
        tiles, columns = np.divmod(rows, self.buffer.tile_rows)
        for tile in np.unique(tiles).tolist():
            here = tiles == tile
            found[here] = self.tiles[tile][:, columns[here]].T
        return found

    def attributes_of(self, row: int) -> bytes:
        """As they were appended."""
        return self.buffer.attributes[row]

    def hiding(self, rows: IdArray) -> "Delta":
        """In which ``rows`` (m,) int64, live ones, are not; only to be searched."""
        hidden = self.hidden.copy()
        by_row = hidden.reshape(-1)
        by_row[rows] = True
        hides = list(self.hides)
        for tile in np.unique(rows // self.buffer.tile_rows).tolist():
            hides[tile] = True
        is_live = ~by_row[self.rows_of_ids]
        return replace(
            self,
            hidden=hidden,
            hides=tuple(hides),
            ids=self.ids[is_live],
            rows_of_ids=self.rows_of_ids[is_live],
        )

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
        tiles = tuple(buffer.tiles[: -(-end // buffer.tile_rows)])
        hidden = np.zeros((len(tiles), buffer.tile_rows), np.bool_)
        by_row = hidden.reshape(-1)
        by_row[:start] = self.hidden.reshape(-1)[:start]
        by_row[dead] = True
        by_row[end:] = True
        ids, rows_of_ids = self._looked_up(rows_of)
        return Delta(
            metric=self.metric,
            buffer=buffer,
            tiles=tiles,
            largest=float(buffer.squares[start:end].max(initial=self.largest)),
            item_ids=buffer.item_ids[:end],
            hidden=hidden,
            hides=tuple(bool(tile.any()) for tile in hidden),
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
