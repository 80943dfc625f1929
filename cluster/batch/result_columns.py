"""A block's results as a table: query ids, item ids, scores, and attributes of the items.

Attributes are mapped files, read for the results alone; every process reads what it writes.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import EMPTY_ID, ORIGINAL_ID, IdArray, Ranked
from shardline.shards.storage.generation import (
    ITEM_IDS_NAME,
    GenerationManifest,
    read_attributes,
    read_item_ids,
    shard_folder,
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
    """Attributes of a generation's items, looked up by item id; verified once, when opened."""

    def __init__(
        self, folder: Path, manifest: GenerationManifest, names: Sequence[str], original_ids: bool
    ) -> None:
        """Raises InvalidInput: no such attribute. CorruptFile: a file is altered."""
        tables = [
            read_attributes(folder, manifest, entry.shard, verify=bool(names or original_ids))
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
            read_item_ids(folder / shard_folder(entry.shard) / ITEM_IDS_NAME, rows=entry.rows)
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

    def of(self, item_ids: IdArray) -> dict[str, pa.Array]:
        """Each column's values of item_ids (n,) int64, all of this generation."""
        rows = None
        found: dict[str, pa.Array] = {}
        for name, column in self._columns.items():
            if column is None:
                found[name] = pa.array(item_ids)
                continue
            rows = self._rows(item_ids) if rows is None else rows
            found[name] = column.take(pa.array(rows)).combine_chunks()
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
