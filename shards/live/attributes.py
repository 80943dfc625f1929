"""Attributes of written items: unpacked, checked, and packed by item.

A write brings them as columns, a map from names to lists of one value per item, in msgpack. A
state keeps them by item, as a list of values in the order of the shard's attribute names.
"""

from collections.abc import Sequence
from typing import Any

import msgpack

from shardline.shards.core.errors import InvalidInput


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
