"""Attributes of a shard's items, as answers return them: read from a mapped file, row by row.

Values leave as JSON has them: numbers, booleans, texts, null, lists and maps of these. Dates and
times are ISO 8601 texts, of nine digits where nanoseconds need them; times of day and durations
seconds. These and decimals are floats or, where a float does not hold them, their digits as a text;
bytes are text where they are UTF-8 and hexadecimal digits elsewhere.
"""

from collections.abc import Callable, Iterable
from datetime import date
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from shardline.shards.core.attribute_kinds import AttributeKind
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.moments import moment_text
from shardline.shards.core.schema import ORIGINAL_ID, IdArray
from shardline.shards.filters.column_kinds import PER_SECOND, decoded_type, is_list

Reader: TypeAlias = Callable[[Any], Any]  # a scalar of Arrow that is not null, as JSON has it

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
        if pa.types.is_dictionary(column.type) and _is_plain(column.type.value_type):
            return _dictionary_values(column, rows)
        is_plain = _is_plain(column.type)
        # one by one: rows lie scattered, and ``take`` costs as much as some hundreds of them
        scalars = [column[row] for row in rows.tolist()]
        if is_plain:
            return [scalar.as_py() for scalar in scalars]
        read = _reader_of(column.type) or _read_any
        return [read(scalar) if scalar.is_valid else None for scalar in scalars]


def _is_plain(kind: pa.DataType) -> bool:
    return any(check(kind) for check in _PLAIN)


def _dictionary_values(column: pa.ChunkedArray, rows: IdArray) -> list[Any]:
    """Of plain values: chunk by chunk, as a scalar of a dictionary takes 6 us, ten times as long as
    one of texts."""
    starts = np.cumsum([0, *map(len, column.chunks)])
    chunk_of = np.searchsorted(starts, rows, side="right") - 1
    values: list[Any] = [None] * len(rows)
    for number in np.unique(chunk_of).tolist():
        places = np.flatnonzero(chunk_of == number)
        part = column.chunk(number).take(pa.array(rows[places] - starts[number]))
        found = part.dictionary.take(part.indices).to_pylist()
        for place, value in zip(places.tolist(), found, strict=True):
            values[place] = value
    return values


def kind_of_values(kind: pa.DataType) -> AttributeKind:
    """What values of a type are to a router."""
    plain = decoded_type(kind)
    return next((name for check, name in _KINDS if check(plain)), AttributeKind.OTHER)


def column_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Of a column of moments, times, durations or decimals, or of lists of these: its values as
    answers have them, which a write takes. Of any other as Arrow gives them."""
    kind = decoded_type(column.type)
    element = decoded_type(kind.value_type) if is_list(kind) else kind
    is_exact = pa.types.is_temporal(element) or pa.types.is_decimal(element)
    read = _reader_of(column.type) if is_exact else None
    if read is None:
        return list(column.to_pylist())
    return [_read(read, scalar) for scalar in column]


def _reader_of(kind: pa.DataType) -> Reader | None:
    """Of a type whose values, or parts of them, Python's own types do not hold exactly; None: of
    any other."""
    if decoded_type(kind) != kind:
        inner = _reader_of(kind.value_type)
        return None if inner is None else lambda scalar: _read(inner, scalar.value)
    if pa.types.is_timestamp(kind):
        return _read_nanoseconds if kind.unit == "ns" else None
    if pa.types.is_time(kind) or pa.types.is_duration(kind):
        per_second = PER_SECOND[kind.unit]
        return lambda scalar: _seconds(scalar.value, per_second)
    if pa.types.is_decimal(kind):
        return lambda scalar: _decimal(scalar.as_py())
    if is_list(kind):
        return _list_reader(kind)
    if pa.types.is_struct(kind) or pa.types.is_map(kind):
        return _fields_reader(kind)
    return None


def _list_reader(kind: pa.DataType) -> Reader | None:
    if pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type):
        return _read_vector
    inner = _reader_of(kind.value_type)
    return None if inner is None else lambda scalar: [_read(inner, each) for each in scalar.values]


def _fields_reader(kind: pa.DataType) -> Reader | None:
    """Of maps as their lists of keys and values, and of structs as their fields by name."""
    is_map = pa.types.is_map(kind)
    fields = (kind.key_field, kind.item_field) if is_map else tuple(kind)
    found = [_reader_of(field.type) for field in fields]
    if not any(found):
        return None
    readers = [reader or _read_any for reader in found]

    def parts(scalar: Any) -> list[Any]:
        return [_read(read, scalar[place]) for place, read in enumerate(readers)]

    if is_map:
        return lambda scalar: [parts(pair) for pair in scalar.values]
    names = [field.name for field in fields]
    return lambda scalar: dict(zip(names, parts(scalar), strict=True))


def _read(read: Reader, scalar: Any) -> Any:
    return read(scalar) if scalar.is_valid else None


def _read_any(scalar: Any) -> Any:
    """As Arrow gives it; None where Python has no such value, a time of the year 300,000 say."""
    try:
        return _json_value(scalar.as_py())
    except (pa.ArrowException, ValueError, OverflowError):
        return None


def _read_vector(scalar: Any) -> Any:
    """By Arrow's own way it takes a microsecond for each of its numbers."""
    values = scalar.values
    if values.null_count:
        return _read_any(scalar)
    return values.to_numpy(zero_copy_only=False).tolist()


def _read_nanoseconds(scalar: Any) -> str | None:
    microseconds, nanoseconds = divmod(scalar.value, 1000)
    try:
        moment = pa.scalar(microseconds, pa.timestamp("us", scalar.type.tz)).as_py()
    except (pa.ArrowException, ValueError, OverflowError):  # as of ``_read_any``
        return None
    return moment_text(moment, nanoseconds)


def _seconds(units: int, per_second: int) -> float | str:
    seconds = units / per_second
    if Fraction(repr(seconds)) * per_second == units:
        return seconds
    digits = len(str(per_second)) - 1
    return format(Decimal(units).scaleb(-digits), "f")


def _decimal(value: Decimal) -> float | str:
    number = float(value)
    return number if Decimal(repr(number)) == value else format(value, "f")


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
    return str(value)  # a UUID, say
