"""Attributes of a shard's items, as answers return them: read from a mapped file, row by row.

Values leave as JSON has them: numbers, booleans, texts, null, lists and maps of these. Dates and
times are ISO 8601 texts, times of day and durations seconds, decimals floats, bytes text where
they are UTF-8 and hexadecimal digits elsewhere.
"""

from collections.abc import Callable, Iterable
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa

from shardline.shards.core.attribute_kinds import AttributeKind
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import ORIGINAL_ID, IdArray
from shardline.shards.filters.column_kinds import decoded_type

# types whose Python values are JSON's already
_PLAIN: tuple[Callable[[pa.DataType], bool], ...] = (
    *(pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_null),
    *(pa.types.is_string, pa.types.is_large_string),
)
# of values without their encoding; the first that fits
_KINDS: tuple[tuple[Callable[[pa.DataType], bool], AttributeKind], ...] = (
    (pa.types.is_boolean, AttributeKind.BOOLEAN),
    (pa.types.is_integer, AttributeKind.INTEGER),
    (pa.types.is_floating, AttributeKind.NUMBER),
    (pa.types.is_decimal, AttributeKind.NUMBER),
    (pa.types.is_time, AttributeKind.NUMBER),
    (pa.types.is_duration, AttributeKind.NUMBER),
    (pa.types.is_date, AttributeKind.DATE),
    (pa.types.is_timestamp, AttributeKind.TIMESTAMP),
    (pa.types.is_string, AttributeKind.TEXT),
    (pa.types.is_large_string, AttributeKind.TEXT),
    (pa.types.is_string_view, AttributeKind.TEXT),
    (pa.types.is_null, AttributeKind.NOTHING),
)


class ItemAttributes:
    """The attribute columns of a shard's rows, none where ``table`` is None.

    names and types of them are in ``schema``.
    """

    def __init__(self, table: pa.Table | None = None) -> None:
        self.table = table
        self.names: tuple[str, ...] = () if table is None else tuple(table.column_names)
        self.schema: pa.Schema = pa.schema([]) if table is None else table.schema

    def kinds(self, names: Iterable[str]) -> tuple[AttributeKind, ...]:
        """Of each of names, the kind of its values.

        Raises:
            InvalidInput: no such attribute.
        """
        return tuple(map(self._kind, names))

    def _kind(self, name: str) -> AttributeKind:
        if name in self.names:
            return kind_of_values(self.schema.field(name).type)
        if name == ORIGINAL_ID:  # each item's own id: every shard has that
            return AttributeKind.OTHER
        raise self._unknown(name)

    def _unknown(self, name: str) -> InvalidInput:
        return InvalidInput(
            "no such attribute",
            field="return",
            expected=f"one of {', '.join(self.names) or 'none, as this generation has none'}",
            got=name,
        )

    def values(self, name: str, rows: IdArray) -> list[Any]:
        """The attribute of each of rows (m,) int64, in their order.

        Raises:
            InvalidInput: no such attribute.
        """
        if self.table is None or name not in self.names:
            raise self._unknown(name)
        column = self.table.column(name)
        is_plain = any(check(column.type) for check in _PLAIN)
        # one by one: rows lie scattered, and ``take`` costs as much as some hundreds of them
        scalars = [column[row] for row in rows.tolist()]
        if is_plain:
            return [scalar.as_py() for scalar in scalars]
        return [_json_value(_python_value(scalar)) for scalar in scalars]


def kind_of_values(kind: pa.DataType) -> AttributeKind:
    """What values of a type are to a router."""
    plain = decoded_type(kind)
    return next((name for check, name in _KINDS if check(plain)), AttributeKind.OTHER)


def _python_value(scalar: Any) -> Any:
    """As Arrow gives it; None where Python has no such value, a time of the year 300,000 say."""
    kind = scalar.type
    try:
        if pa.types.is_timestamp(kind) and kind.unit == "ns":
            scalar = scalar.cast(pa.timestamp("us", kind.tz), safe=False)
        if pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type):
            # a vector by Arrow's way takes a microsecond for each of its numbers
            values = scalar.values
            if values is not None and not values.null_count:
                return values.to_numpy(zero_copy_only=False).tolist()
        return scalar.as_py()
    except (pa.ArrowException, ValueError, OverflowError):
        return None


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.hex()
    if isinstance(value, list | tuple):
        return list(map(_json_value, value))
    if isinstance(value, dict):
        return {str(key): _json_value(each) for key, each in value.items()}
    if isinstance(value, date):  # a datetime too
        return value.isoformat()
    if isinstance(value, time):
        seconds = (value.hour * 60 + value.minute) * 60 + value.second
        return seconds + value.microsecond / 1e6
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value)
    return str(value)  # a UUID, say
