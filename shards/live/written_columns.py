"""Attributes of a delta's rows as columns, for filters: made as they are asked for, and kept.

A delta has attributes as they were written, a list of values per row. Only the columns that filters
name are made of them, and of each only the rows that came since it was last asked for.

Dictionaries and runs are made as their values, as in ``attributes``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import pyarrow as pa

from shardline.shards.live.attribute_values import arrow_array
from shardline.shards.live.attributes import decoded_schema
from shardline.shards.live.delta import Delta

MAX_PARTS = 64  # of a column, before they are put together: writes come in small groups


@dataclass(slots=True)
class _Column:
    """Of the first ``rows`` rows, in parts."""

    rows: int = 0
    parts: list[pa.Array] = field(default_factory=list)


class WrittenColumns:
    """Of one version of a delta after another; not for several threads at once. schema: of the
    shard's attributes."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = decoded_schema(schema)
        self._places = {name: schema.get_field_index(name) for name in schema.names}
        self._buffer: object = None
        self._columns: dict[str, _Column] = {}

    def known(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of names that are columns, in their order."""
        wanted = set(names)
        return tuple(name for name in self._places if name in wanted)

    def table(self, delta: Delta, names: Sequence[str], start: int) -> pa.Table:
        """The columns ``names`` of the delta's rows from ``start`` on."""
        if delta.buffer is not self._buffer:  # rows of another memory may be other rows
            self._buffer, self._columns = delta.buffer, {}
        arrays = [self._made(name, delta).slice(start, delta.rows - start) for name in names]
        fields = [self._schema.field(name) for name in names]
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

    def _made(self, name: str, delta: Delta) -> pa.ChunkedArray:
        """A column of at least all rows of the delta."""
        column = self._columns.setdefault(name, _Column())
        kind = self._schema.field(name).type
        if column.rows < delta.rows:
            place = self._places[name]
            rows = range(column.rows, delta.rows)
            values = [_value(delta.attributes_of(row), place) for row in rows]
            column.parts.append(arrow_array(values, kind))
            column.rows = delta.rows
        if len(column.parts) > MAX_PARTS:
            column.parts = [pa.concat_arrays(column.parts)]
        return pa.chunked_array(column.parts, kind)


def _value(packed: bytes, place: int) -> Any:
    return msgpack.unpackb(packed, strict_map_key=False)[place] if packed else None
