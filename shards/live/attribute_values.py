"""Values of attributes from the form that answers have (``item_attributes``) to Arrow's types.

Numbers, booleans and texts stand for themselves. Dates and timestamps are ISO 8601 texts, with an
offset where the type has a time zone; times of day, durations (in seconds) and decimals are numbers
or, where a float does not hold them, their digits as a text; bytes are texts, taken as their UTF-8;
structs are maps, maps lists of pairs. What a type does not hold exactly is refused: nothing is
rounded, except floats to the width of their type.
"""

import math
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shardline.shards.core.moments import read_moment
from shardline.shards.filters.column_kinds import DECIMAL_TEXT, MAX_DECIMAL_DIGITS, PER_SECOND

Taker: TypeAlias = Callable[[Any], Any]  # a value of JSON, not null, as pa.array takes it

DAY_SECONDS = 86_400
MICROSECOND = timedelta(microseconds=1)
INT64 = 1 << 63
_FLOATS: dict[int, type[np.floating[Any]]] = {16: np.float16, 32: np.float32, 64: np.float64}
# of a float's last digit: what a sum of two floats may be off the number of units that is meant
NOISE_ULPS = 2
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_LISTS = (
    *(pa.types.is_list, pa.types.is_large_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)


class Unfit(Exception):
    """A value that its type does not take; place is its number among the values given."""

    def __init__(self, expected: str, got: Any, place: int = 0) -> None:
        super().__init__(expected, got, place)
        self.expected, self.got, self.place = expected, got, place

    @property
    def shown(self) -> str:
        """The value, short enough for a message."""
        text = repr(self.got)
        return text if len(text) <= 80 else f"{text[:77]}..."


def arrow_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Values of JSON, None for null, as an array of ``kind``.

    Raises:
        Unfit: a value of another type or out of range; any value, if none can be written.
    """
    if is_encoded(kind):
        return _encoded(arrow_array(values, kind.value_type), kind)
    if all(value is None for value in values):
        return pa.nulls(len(values), kind)
    taken = taken_values(values, kind)
    is_extension = isinstance(kind, pa.BaseExtensionType)
    try:
        made = pa.array(taken, kind.storage_type if is_extension else kind)
    except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
        raise Unfit(str(kind), str(error)) from error
    return pa.ExtensionArray.from_storage(kind, made) if is_extension else made


def taken_values(values: Sequence[Any], kind: pa.DataType) -> list[Any]:
    """Values of JSON as pa.array takes them. Raises as ``arrow_array``."""
    take = taker_of(kind)
    taken = []
    for place, value in enumerate(values):
        try:
            taken.append(None if value is None else take(value))
        except Unfit as error:
            raise Unfit(error.expected, error.got, place) from None
    return taken


def is_encoded(kind: pa.DataType) -> bool:
    """Whether a type is another one, stored in a shorter way."""
    return bool(pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind))


def taker_of(kind: pa.DataType) -> Taker:
    """What checks and converts values of a type; it raises Unfit."""
    if is_encoded(kind):
        return taker_of(kind.value_type)
    for checks, make in _TAKERS:
        if any(check(kind) for check in checks):
            return make(kind)
    return _take_nothing(kind)


def _encoded(plain: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return plain.dictionary_encode().cast(kind)
    return pc.run_end_encode(plain, run_end_type=kind.run_end_type)


def _take_nothing(kind: pa.DataType) -> Taker:
    def take(value: Any) -> Any:
        raise Unfit(f"null, as values of type {kind} cannot be written", value)

    return take


def _take_bool(kind: pa.DataType) -> Taker:
    def take(value: Any) -> bool:
        if not isinstance(value, bool):
            raise Unfit("a boolean", value)
        return value

    return take


def _take_integer(kind: pa.DataType) -> Taker:
    bits = kind.bit_width
    low, high = (-(1 << bits - 1), 1 << bits - 1) if str(kind)[0] == "i" else (0, 1 << bits)

    def take(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < high:
            raise Unfit(f"{kind}: an integer from {low} to {high - 1}", value)
        return value

    return take


def _take_float(kind: pa.DataType) -> Taker:
    to_width = _FLOATS[kind.bit_width]
    largest = float(np.finfo(to_width).max)

    def take(value: Any) -> float:
        number = _number(value, str(kind))
        if abs(number) > largest:
            raise Unfit(f"{kind}: a number within ±{largest:g}", value)
        return float(to_width(number))

    return take


def _number(value: Any, kind: str) -> float:
    """A finite number of JSON."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unfit(f"{kind}: a number", value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Unfit(f"{kind}: a finite number", value)
    return number


def _text(value: Any, expected: str) -> str:
    if not isinstance(value, str):
        raise Unfit(expected, value)
    return value


def _take_text(kind: pa.DataType) -> Taker:
    return lambda value: _text(value, "a text")


def _take_bytes(kind: pa.DataType) -> Taker:
    return lambda value: _text(value, "bytes, as a text in UTF-8").encode()


def _take_fixed_bytes(kind: pa.DataType) -> Taker:
    def take(value: Any) -> bytes:
        expected = f"{kind.byte_width} bytes, as a text in UTF-8"
        taken = _text(value, expected).encode()
        if len(taken) != kind.byte_width:
            raise Unfit(expected, value)
        return taken

    return take


def _take_date(kind: pa.DataType) -> Taker:
    def take(value: Any) -> date:
        expected = f"{kind}: a date as 2026-03-01"
        try:
            return date.fromisoformat(_text(value, expected))
        except ValueError:
            raise Unfit(expected, value) from None

    return take


def _take_timestamp(kind: pa.DataType) -> Taker:
    per_second, has_zone = PER_SECOND[kind.unit], kind.tz is not None
    shown = "2026-03-01T12:30:00+00:00" if has_zone else "2026-03-01T12:30:00, without an offset"
    epoch = datetime(1970, 1, 1, tzinfo=UTC if has_zone else None)

    def take(value: Any) -> int:
        expected = f"{kind}: a time as {shown}"
        text = _text(value, expected)
        try:
            moment, nanoseconds = read_moment(text)
        except ValueError:
            raise Unfit(expected, value) from None
        if (moment.tzinfo is not None) != has_zone:
            raise Unfit(expected, value)
        ns = (moment - epoch) // MICROSECOND * 1000 + nanoseconds
        units, rest = divmod(ns * per_second, PER_SECOND["ns"])
        if rest or not -INT64 <= units < INT64:
            raise Unfit(f"{kind}: a time that fits its unit and range", value)
        return units

    return take


def _take_seconds(kind: pa.DataType) -> Taker:
    is_time = pa.types.is_time(kind)
    expected = f"{kind}: seconds{' of a day' if is_time else ''}, in steps of its unit"
    per_second = PER_SECOND[kind.unit]

    def take(value: Any) -> int:
        seconds = Fraction(_written(value, str(kind)))
        units = round(seconds * per_second)
        noise = NOISE_ULPS * Fraction(math.ulp(value)) if isinstance(value, float) else 0
        is_off = abs(Fraction(units, per_second) - seconds) > noise
        if is_off or not -INT64 <= units < INT64:
            raise Unfit(expected, value)
        if is_time and not 0 <= units < DAY_SECONDS * per_second:
            raise Unfit(expected, value)
        return units

    return take


def _written(value: Any, kind: str) -> Decimal:
    """A finite number of JSON, or its digits as a text, as the decimal that was written: of a float
    that is its shortest text."""
    if isinstance(value, str):
        if len(value) > MAX_DECIMAL_DIGITS or not DECIMAL_TEXT.fullmatch(value):
            raise Unfit(f"{kind}: a number, or its digits as a text", value)
        return Decimal(value)
    _number(value, kind)
    return Decimal(value) if isinstance(value, int) else Decimal(repr(value))


def _take_decimal(kind: pa.DataType) -> Taker:
    def take(value: Any) -> Decimal:
        sign, digits, exponent = _written(value, str(kind)).as_tuple()
        assert isinstance(exponent, int)
        digits = tuple(digits) if any(digits) else ()
        while digits and digits[-1] == 0:
            digits, exponent = digits[:-1], exponent + 1
        while digits and digits[0] == 0:
            digits = digits[1:]
        if digits and (
            -exponent > kind.scale or len(digits) + exponent > kind.precision - kind.scale
        ):
            raise Unfit(f"{kind}: a number with as many digits", value)
        return Decimal((sign, digits, exponent)) if digits else Decimal(0)

    return take


def _take_uuid(kind: pa.DataType) -> Taker:
    def take(value: Any) -> bytes:
        expected = "a UUID as 00000000-0000-0000-0000-000000000007"
        try:
            return uuid.UUID(_text(value, expected)).bytes
        except ValueError:
            raise Unfit(expected, value) from None

    return take


def _take_list(kind: pa.DataType) -> Taker:
    take = taker_of(kind.value_type)
    size = kind.list_size if pa.types.is_fixed_size_list(kind) else None
    expected = "a list" if size is None else f"a list of {size} values"

    def take_list(value: Any) -> list[Any]:
        if not isinstance(value, list) or (size is not None and len(value) != size):
            raise Unfit(expected, value)
        return [None if each is None else take(each) for each in value]

    return take_list


def _take_struct(kind: pa.DataType) -> Taker:
    takers = {field.name: taker_of(field.type) for field in kind}

    def take(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not value.keys() <= takers.keys():
            raise Unfit(f"a map with keys of {', '.join(takers)}", value)
        return {name: None if each is None else takers[name](each) for name, each in value.items()}

    return take


def _take_map(kind: pa.DataType) -> Taker:
    take_key, take_item = taker_of(kind.key_type), taker_of(kind.item_type)

    def take(value: Any) -> list[tuple[Any, Any]]:
        if not isinstance(value, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and pair[0] is not None for pair in value
        ):
            raise Unfit("a list of pairs, each a key and a value", value)
        return [(take_key(key), None if item is None else take_item(item)) for key, item in value]

    return take


def _is_uuid(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.uuid"


_TAKERS: tuple[tuple[Sequence[Callable[[pa.DataType], bool]], Callable[[pa.DataType], Taker]], ...]
_TAKERS = (
    ((pa.types.is_boolean,), _take_bool),
    ((pa.types.is_integer,), _take_integer),
    ((pa.types.is_floating,), _take_float),
    (_TEXTS, _take_text),
    (_BYTES, _take_bytes),
    ((pa.types.is_fixed_size_binary,), _take_fixed_bytes),
    ((pa.types.is_date,), _take_date),
    ((pa.types.is_timestamp,), _take_timestamp),
    ((pa.types.is_time, pa.types.is_duration), _take_seconds),
    ((pa.types.is_decimal,), _take_decimal),
    ((_is_uuid,), _take_uuid),
    ((*_LISTS, pa.types.is_fixed_size_list), _take_list),
    ((pa.types.is_struct,), _take_struct),
    ((pa.types.is_map,), _take_map),
)
