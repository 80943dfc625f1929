"""Attributes of a delta's rows as columns, for filters: made as they are asked for, and kept.

A delta has attributes as they were written, a list of values per row. Only the columns that filters
name are made of them, and of each only the rows that came since it was last asked for.

Dictionaries and runs are made as their values, as in ``attributes``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import pyarrow as pa

from shardline.shards.live.attribute_values import arrow_array
from shardline.shards.live.attributes import decoded_schema
from shardline.shards.live.delta import Delta

MAX_PARTS = 64  # of a column, before they are put together: writes come in small groups


@dataclass(frozen=True, slots=True)
class _Column:
    """Of the first ``rows`` rows, in parts."""

    rows: int = 0
    parts: tuple[pa.Array, ...] = ()


class WrittenColumns:
    """Of one version of a delta after another. schema: of the shard's attributes.

    Any thread may ask, and none waits for another: columns are values that are replaced, and two
    threads that need the same rows at once both make them.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = decoded_schema(schema)
        self._places = {name: schema.get_field_index(name) for name in schema.names}
        # of one memory of deltas, replaced together
        self._made_of: tuple[object, dict[str, _Column]] = (None, {})

    def known(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of names that are columns, in their order."""
        wanted = set(names)
        return tuple(name for name in self._places if name in wanted)

    def table(self, delta: Delta, names: Sequence[str], start: int) -> pa.Table:
        """The columns ``names`` of the delta's rows from ``start`` on."""
        buffer, columns = self._made_of
        if delta.buffer is not buffer:  # rows of another memory may be other rows
            columns = {}
            self._made_of = delta.buffer, columns
        arrays = [
            self._made(name, delta, columns).slice(start, delta.rows - start) for name in names
        ]
        fields = [self._schema.field(name) for name in names]
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

    def _made(self, name: str, delta: Delta, columns: dict[str, _Column]) -> pa.ChunkedArray:
        """A column of at least all rows of the delta, put among ``columns``."""
        column = columns.get(name, _Column())
        kind = self._schema.field(name).type
        if column.rows < delta.rows:
            place = self._places[name]
            rows = range(column.rows, delta.rows)
            values = [_value(delta.attributes_of(row), place) for row in rows]
            parts = (*column.parts, arrow_array(values, kind))
            if len(parts) > MAX_PARTS:
                parts = (pa.concat_arrays(parts),)
            column = columns[name] = _Column(delta.rows, parts)
        return pa.chunked_array(column.parts, kind)


def _value(packed: bytes, place: int) -> Any:
    return msgpack.unpackb(packed, strict_map_key=False)[place] if packed else None
