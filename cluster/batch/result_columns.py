"""A block's results as a table: query ids, item ids, scores, and attributes of the items.

Attributes are mapped files, read for the results alone; every process reads what it writes.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import EMPTY_ID, ORIGINAL_ID, IdArray, Ranked
from shardline.shards.storage.column_types import first_line
from shardline.shards.storage.generation import (
    ITEM_IDS_NAME,
    GenerationManifest,
    read_attributes,
    read_item_ids,
)

QUERY_ID, IDS, SCORES, ORIGINAL_IDS = "query_id", "ids", "scores", "original_ids"
OWN_COLUMNS = (QUERY_ID, IDS, SCORES, ORIGINAL_IDS)


class Columns(Protocol):
    """What a table has beside ids and scores."""

    def of(self, item_ids: IdArray) -> dict[str, pa.Array]:
        """Each column's values for the results item_ids (n,) int64 of a block."""


def title_of(attribute: str) -> str:
    """The column of an attribute."""
    return f"attribute.{attribute}" if attribute in OWN_COLUMNS else attribute


class ItemColumns:
    """Attributes of a generation's items, looked up by item id."""

    def __init__(
        self,
        folder: Path,
        manifest: GenerationManifest,
        names: Sequence[str],
        original_ids: bool,
        *,
        verify: bool,
    ) -> None:
        """verify: read all of their files, which whoever looks values up must have done once.

        Raises:
            InvalidInput: no such attribute. CorruptFile: a file is altered.
        """
        tables = [
            read_attributes(folder, manifest, entry.shard, verify=verify)
            for entry in manifest.shards
        ]
        known = [] if tables[0] is None else tables[0].column_names
        for name in names:
            if name not in known:
                raise InvalidInput(
                    "no such attribute",
                    field="--return",
                    expected=f"one of {', '.join(known) or 'none: this generation has none'}",
                    got=name,
                )
        self._ids = [
            read_item_ids(folder / entry.folder / ITEM_IDS_NAME, rows=entry.rows)
            for entry in manifest.shards
        ]
        self._starts = [0, *accumulate(len(ids) for ids in self._ids)]
        # an item whose id was kept at its import is its own original id
        self._columns: dict[str, pa.ChunkedArray | None] = {}
        if original_ids:
            self._columns[ORIGINAL_IDS] = (
                _column(tables, ORIGINAL_ID) if ORIGINAL_ID in known else None
            )
        for name in names:
            self._columns[title_of(name)] = _column(tables, name)

    @property
    def bytes_per_item(self) -> float:
        """Of all columns together, on average over the items."""
        sizes = (8 * self._starts[-1] if c is None else c.nbytes for c in self._columns.values())
        return sum(sizes) / self._starts[-1]

    def of(self, item_ids: IdArray) -> dict[str, pa.Array]:
        """Each column's values of item_ids (n,) int64, all of this generation.

        Raises:
            InvalidInput: the values of a column are more than one block can hold, 2 GiB.
        """
        rows = None
        found: dict[str, pa.Array] = {}
        for name, column in self._columns.items():
            if column is None:
                found[name] = pa.array(item_ids)
                continue
            rows = self._rows(item_ids) if rows is None else rows
            found[name] = _taken(column, rows, name)
        return found

    def _rows(self, item_ids: IdArray) -> IdArray:
        rows = np.full(len(item_ids), EMPTY_ID)
        for ids, start in zip(self._ids, self._starts, strict=False):
            places = np.minimum(np.searchsorted(ids, item_ids), len(ids) - 1)
            is_here = ids[places] == item_ids
            rows[is_here] = start + places[is_here]
        assert (rows >= 0).all()
        return rows


def result_table(query_ids: pa.Array, ranked: Ranked, columns: Columns | None) -> pa.Table:
    """One row per query: lists of what was found, best first; empty slots are left out."""
    kept = ranked.ids != EMPTY_ID
    if kept.all():
        flat_ids, flat_scores = ranked.ids.ravel(), ranked.scores.ravel()
        lengths = np.full(len(ranked.ids), ranked.ids.shape[1])
    else:
        flat_ids, flat_scores, lengths = ranked.ids[kept], ranked.scores[kept], kept.sum(axis=1)
    values: dict[str, Any] = {IDS: pa.array(flat_ids), SCORES: pa.array(flat_scores)}
    if columns is not None:
        values |= columns.of(flat_ids)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    lists = {name: pa.ListArray.from_arrays(offsets, each) for name, each in values.items()}
    return pa.table({QUERY_ID: query_ids, **lists})


def _column(tables: Sequence[pa.Table | None], name: str) -> pa.ChunkedArray:
    """An attribute of all shards, in their order."""
    parts = [table.column(name) for table in tables if table is not None]
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], parts[0].type)


def _taken(column: pa.ChunkedArray, rows: IdArray, name: str) -> pa.Array:
    """Rows (n,) of a column, in their order.

    Chunk by chunk: ``ChunkedArray.take`` copies the whole column first, and fails above 2 GiB.
    """
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    starts = [0, *accumulate(len(chunk) for chunk in column.chunks)]
    ends = np.searchsorted(ascending, starts)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    try:
        pieces = [
            chunk.take(pa.array(ascending[begin:end] - start))
            for chunk, start, (begin, end) in zip(
                column.chunks, starts, pairwise(ends), strict=False
            )
            if begin < end
        ]
        joined = pa.concat_arrays(pieces) if pieces else pa.array([], column.type)
        return joined.take(pa.array(places))
    except pa.ArrowInvalid as error:  # lengths of texts and lists are counted in 32 bits
        raise InvalidInput(
            "too much to return in one block",
            field=f"--return {name}",
            expected="at most 2 GiB of an attribute's values",
            got=first_line(error),
            hint="take smaller blocks (--block-rows), or fewer results",
        ) from error
