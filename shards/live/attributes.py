"""Attributes of written items: checked before they are logged, packed by item, made columns again.

A write brings them as columns, a map from names to lists of one value per item, in msgpack. A
state keeps them by item, as a list of values in the order of the shard's attribute names. The names
and types are those of the generation: writes add no columns. A name that is left out is null.

Columns of written items have the values of dictionaries and runs themselves: there may be more
different ones than the index of a dictionary, made for those of a generation, can count.
"""

from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import IdArray
from shardline.shards.filters.column_kinds import decoded_type
from shardline.shards.live.attribute_values import (
    Unfit,
    arrow_array,
    is_encoded,
    taken_values,
)
from shardline.shards.live.item_attributes import ItemAttributes

# types of which answers have what Arrow takes
_AS_TAKEN = (
    *(pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating),
    *(pa.types.is_string, pa.types.is_large_string),
)


def check_attributes(attributes: bytes, item_ids: IdArray, schema: pa.Schema) -> bytes:
    """``UpsertRequest.attributes`` of item_ids (n,) as they are logged: every value in the form
    that answers give it, so that it reads the same before and after it becomes part of a column.
    b"" where all are null.

    Raises:
        InvalidInput: not such a map, a name that ``schema`` lacks, or a value of another type than
            its column's; with column, type and item.
    """
    if not attributes:
        return b""
    columns = unpacked(attributes, len(item_ids), schema.names)
    checked = {}
    for name, values in columns.items():
        if all(value is None for value in values):
            continue
        try:
            checked[name] = as_answered(values, schema.field(name).type)
        except Unfit as error:
            raise InvalidInput(
                f"attribute of item {item_ids[error.place]}",
                field=f"attributes.{name}",
                expected=error.expected,
                got=error.shown,
            ) from error
    packed: bytes = msgpack.packb(checked) if checked else b""
    return packed


def as_answered(values: list[Any], kind: pa.DataType) -> list[Any]:
    """Values of one column, None for null, in the form that answers give them.

    Raises:
        Unfit: a value that the type does not take.
    """
    kind = decoded_type(kind)
    if any(check(kind) for check in _AS_TAKEN):
        return taken_values(values, kind)
    made = arrow_array(values, kind)
    return ItemAttributes(pa.table({"values": made})).values("values", np.arange(len(values)))


def written_table(packed: Sequence[bytes], schema: pa.Schema) -> pa.Table:
    """Items as ``packed_rows`` made them, as columns of ``decoded_schema``."""
    schema = decoded_schema(schema)
    rows = [msgpack.unpackb(each) if each else [None] * len(schema) for each in packed]
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    arrays = [
        arrow_array(values, field.type) for values, field in zip(columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def with_written(stored: pa.Table, packed: Sequence[bytes]) -> pa.Table:
    """The rows of ``stored`` and behind them those of ``written_table``, in its types."""
    columns = [_decoded(column) for column in stored.columns]
    kept = pa.Table.from_arrays(columns, schema=decoded_schema(stored.schema))
    return pa.concat_tables((kept, written_table(packed, stored.schema)))


def decoded_schema(schema: pa.Schema) -> pa.Schema:
    """With the types of the values for dictionaries and runs."""
    fields = [field.with_type(decoded_type(field.type)) for field in schema]
    return pa.schema(fields, schema.metadata)


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    while is_encoded(column.type):
        is_runs = pa.types.is_run_end_encoded(column.type)
        chunks = [
            pc.run_end_decode(chunk) if is_runs else chunk.dictionary_decode()
            for chunk in column.chunks
        ]
        column = pa.chunked_array(chunks, column.type.value_type)
    return column


def packed_rows(attributes: bytes, rows: int, names: Sequence[str]) -> list[bytes]:
    """Of each of ``rows`` items its values of ``names``, a list in msgpack; b"" where all are null.

    Raises:
        InvalidInput: as ``check_attributes``; not for what it has let pass.
    """
    if not attributes:
        return [b""] * rows
    columns = unpacked(attributes, rows, names)
    if not columns:
        return [b""] * rows
    nulls = [None] * rows
    by_row = zip(*(columns.get(name, nulls) for name in names), strict=True)
    return [
        msgpack.packb(values) if any(v is not None for v in values) else b"" for values in by_row
    ]


def unpacked(attributes: bytes, rows: int, names: Sequence[str]) -> dict[str, list[Any]]:
    """The columns of a write of ``rows`` items to a shard with attributes ``names``.

    Raises:
        InvalidInput: not such a map, a list of another length, or a name that is none of ``names``.
    """
    try:
        columns = msgpack.unpackb(attributes)
    except (ValueError, msgpack.UnpackException) as error:
        raise InvalidInput(
            "not readable", field="attributes", expected="msgpack", got=str(error)
        ) from error
    if not isinstance(columns, dict):
        raise InvalidInput(
            "not a map",
            field="attributes",
            expected="names and lists of values",
            got=type(columns).__name__,
        )
    for name, values in columns.items():
        field = f"attributes.{name}"
        if name not in names:
            known = ", ".join(names) or "none, as this generation has none"
            raise InvalidInput(
                "no such attribute", field=field, expected=f"one of {known}", got=str(name)
            )
        if not isinstance(values, list) or len(values) != rows:
            got = f"{len(values)}" if isinstance(values, list) else type(values).__name__
            raise InvalidInput(
                "wrong number of values", field=field, expected=f"a list of {rows}", got=got
            )
    return columns
