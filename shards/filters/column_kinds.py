"""Types of columns as filters see them: which values they are compared with, and how.

Integers, decimals, dates, timestamps, times and durations are compared exactly, as whole numbers
of units; a bound between two of them, or beyond what the type holds, is moved to the next one.
Floats are compared in the width of their type, so that an item is found by the number that it was
written with. Texts and bytes are compared by their bytes.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shardline.shards.core.filter_language import Operator, Scalar
from shardline.shards.core.moments import read_moment
from shardline.shards.filters.column_tests import Compared, Every, No, OneOf, Substring, Test

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
DAY_SECONDS = 86_400
DAY_MS = DAY_SECONDS * 1000
MICROSECOND = timedelta(microseconds=1)
MAX_DECIMAL_DIGITS = 200  # of a decimal as a text: twice as many as any type of decimals has
DECIMAL_TEXT = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
# of a second's value: what the fraction of a float may be off a whole number of units
FRACTION = Fraction(1, 10**9)
RANGES = (Operator.LT, Operator.LTE, Operator.GT, Operator.GTE)
_FUNCTIONS = {
    Operator.EQ: "equal",
    Operator.LT: "less",
    Operator.LTE: "less_equal",
    Operator.GT: "greater",
    Operator.GTE: "greater_equal",
}
_FLOATS: dict[int, type[np.floating[Any]]] = {16: np.float16, 32: np.float32, 64: np.float64}
_LISTS: tuple[Callable[[pa.DataType], bool], ...] = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BYTES = (
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
    pa.types.is_fixed_size_binary,
)

Exact: TypeAlias = int | Fraction


class WrongValue(Exception):
    """A value that a column is not compared with; ``expected`` says which are. All of ``Kind``
    raise it."""

    def __init__(self, expected: str) -> None:
        super().__init__(expected)
        self.expected = expected


_ANY = frozenset({Operator.EQ, Operator.NE, Operator.IN, Operator.NIN, Operator.EXISTS})
_ORDERED = _ANY | frozenset(RANGES)
NONE = frozenset({Operator.EXISTS})  # of types whose values are not compared


@dataclass(frozen=True, slots=True)
class ExactNumbers:
    """Whole numbers of units from low to high; ``units`` converts a value, ``array`` makes columns
    of them as ``compared_type`` has it."""

    low: int
    high: int
    units: Callable[[Scalar], Exact]
    array: Callable[[list[int]], pa.Array]
    operators: frozenset[Operator] = _ORDERED

    def compared(self, operator: Operator, value: Scalar) -> Test:
        """The test of $eq or of a range, as of each kind; ``value`` is not null."""
        exact = self.units(value)
        if operator == Operator.EQ:
            whole = self._whole((exact,))
            return Compared("equal", self.array(whole)[0]) if whole else No()
        if operator in (Operator.LT, Operator.LTE):
            bound = math.ceil(exact) - 1 if operator == Operator.LT else math.floor(exact)
            is_all, is_none, function = bound >= self.high, bound < self.low, "less_equal"
        else:
            bound = math.floor(exact) + 1 if operator == Operator.GT else math.ceil(exact)
            is_all, is_none, function = bound <= self.low, bound > self.high, "greater_equal"
        if is_all or is_none:
            return Every() if is_all else No()
        return Compared(function, self.array([bound])[0])

    def one_of(self, values: Sequence[Scalar]) -> Test:
        """The test of $in, as of each kind; no nulls among the values."""
        whole = self._whole([self.units(value) for value in values])
        return OneOf(self.array(whole)) if whole else No()

    def _whole(self, exact: Sequence[Exact]) -> list[int]:
        return [int(x) for x in exact if x.denominator == 1 and self.low <= x <= self.high]


@dataclass(frozen=True, slots=True)
class Floats:
    """Floats of a width; ``stored`` is the type that they are compared in."""

    width: type[np.floating[Any]]
    stored: pa.DataType
    operators: frozenset[Operator] = _ORDERED

    def compared(self, operator: Operator, value: Scalar) -> Test:
        (rounded,) = self._rounded([value])
        if math.isfinite(rounded):
            return Compared(_FUNCTIONS[operator], self._scalar(rounded))
        # between the largest number and infinity
        if operator == Operator.EQ:
            return No()
        is_below = operator in (Operator.LT, Operator.LTE)
        largest = float(np.finfo(self.width).max)
        if rounded > 0:
            return Compared("less_equal" if is_below else "greater", self._scalar(largest))
        return Compared("less" if is_below else "greater_equal", self._scalar(-largest))

    def one_of(self, values: Sequence[Scalar]) -> Test:
        rounded = self._rounded(values)
        numbers = rounded[np.isfinite(rounded)]
        if not len(numbers):
            return No()
        stored = numbers.astype(_FLOATS[self.stored.bit_width])
        # by its bits, -0.0 is none of a list with 0.0
        return OneOf(pa.array(np.append(stored, -stored[stored == 0])))

    def _rounded(self, values: Sequence[Scalar]) -> NDArray[np.floating[Any]]:
        """(values,) in the width; infinite where that has no number as large."""
        with np.errstate(over="ignore"):
            return np.array([float(_number(value)) for value in values]).astype(self.width)

    def _scalar(self, number: float) -> pa.Scalar:
        return pa.scalar(float(number), self.stored)


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts, or bytes given as texts."""

    stored: pa.DataType
    is_bytes: bool
    operators: frozenset[Operator] = _ORDERED | {Operator.CONTAINS}

    def compared(self, operator: Operator, value: Scalar) -> Test:
        return Compared(_FUNCTIONS[operator], pa.scalar(self._text(value), self.stored))

    def one_of(self, values: Sequence[Scalar]) -> Test:
        return OneOf(pa.array(list(map(self._text, values)), self.stored))

    def containing(self, value: Scalar) -> Test:
        """The test of $contains."""
        return Substring(self._text(value))

    def _text(self, value: Scalar) -> str | bytes:
        text = _text(value, "bytes, as a text in UTF-8" if self.is_bytes else "a text")
        return text.encode() if self.is_bytes else text


@dataclass(frozen=True, slots=True)
class Booleans:
    """True and false, which have no order."""

    operators: frozenset[Operator] = _ANY

    def compared(self, operator: Operator, value: Scalar) -> Test:
        assert operator == Operator.EQ
        if not isinstance(value, bool):
            raise WrongValue("true or false")
        return Compared("equal", pa.scalar(value))

    def one_of(self, values: Sequence[Scalar]) -> Test:
        if not all(isinstance(value, bool) for value in values):
            raise WrongValue("true or false")
        return OneOf(pa.array(values, pa.bool_()))


@dataclass(frozen=True, slots=True)
class Nulls:
    """A column without a single value: a catalogue in which all are missing has this type."""

    operators: frozenset[Operator] = frozenset(Operator)

    def compared(self, operator: Operator, value: Scalar) -> Test:
        return No()

    def one_of(self, values: Sequence[Scalar]) -> Test:
        return No()


Kind: TypeAlias = ExactNumbers | Floats | Texts | Booleans | Nulls


def is_list(kind: pa.DataType) -> bool:
    """Whether a column's values are lists, of whatever layout."""
    return any(check(kind) for check in _LISTS)


def decoded_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary or of runs; any other as it is."""
    while pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        kind = kind.value_type
    return kind


def compared_type(kind: pa.DataType) -> pa.DataType:
    """The type that Arrow compares values of a type in: whole numbers of units for times."""
    if pa.types.is_date32(kind) or pa.types.is_time32(kind):
        return pa.int32()
    if pa.types.is_temporal(kind):
        return pa.int64()
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    return pa.binary() if pa.types.is_fixed_size_binary(kind) else kind


def kind_of(kind: pa.DataType) -> Kind | None:
    """How values of a type are compared; None if they are not. Lists and encodings are not types
    of values."""
    makers: tuple[tuple[Callable[[pa.DataType], bool], Callable[[pa.DataType], Kind]], ...] = (
        (pa.types.is_integer, _integers),
        (pa.types.is_floating, lambda kind: Floats(_FLOATS[kind.bit_width], compared_type(kind))),
        *((check, lambda kind: Texts(compared_type(kind), False)) for check in _TEXTS),
        (pa.types.is_boolean, lambda kind: Booleans()),
        (pa.types.is_date, _dates),
        (pa.types.is_timestamp, _timestamps),
        (pa.types.is_time, _seconds),
        (pa.types.is_duration, _seconds),
        (pa.types.is_decimal, _decimals),
        # decimals are bytes of a fixed size to Arrow, too
        *((check, lambda kind: Texts(compared_type(kind), True)) for check in _BYTES),
        (pa.types.is_null, lambda kind: Nulls()),
    )
    return next((make(kind) for check, make in makers if check(kind)), None)


def _integers(kind: pa.DataType) -> Kind:
    info = np.iinfo(kind.to_pandas_dtype())
    return ExactNumbers(int(info.min), int(info.max), _exact, lambda units: pa.array(units, kind))


def _decimals(kind: pa.DataType) -> Kind:
    unit: Fraction = Fraction(10) ** -kind.scale
    stored, largest = compared_type(kind), 10**kind.precision - 1

    def array(units: list[int]) -> pa.Array:
        return pa.array([_decimal(each, kind.scale) for each in units], stored)

    return ExactNumbers(-largest, largest, lambda value: _written(value) / unit, array)


def _decimal(units: int, scale: int) -> Decimal:
    return Decimal((int(units < 0), tuple(map(int, str(abs(units)))), -scale))


def _dates(kind: pa.DataType) -> Kind:
    per_day = 1 if pa.types.is_date32(kind) else DAY_MS
    stored = compared_type(kind)

    def units(value: Scalar) -> Exact:
        expected = "a date as 2026-03-01"
        try:
            day = date.fromisoformat(_text(value, expected))
        except ValueError:
            raise WrongValue(expected) from None
        return (day - date(1970, 1, 1)).days * per_day

    return _units_of(stored, units)


def _timestamps(kind: pa.DataType) -> Kind:
    per_second, has_zone = PER_SECOND[kind.unit], kind.tz is not None
    shown = "2026-03-01T12:30:00+00:00" if has_zone else "2026-03-01T12:30:00, without an offset"
    epoch = datetime(1970, 1, 1, tzinfo=UTC if has_zone else None)

    def units(value: Scalar) -> Exact:
        expected = f"a time as {shown}, with at most 9 digits of a second's fraction"
        try:
            moment, nanoseconds = read_moment(_text(value, expected))
        except ValueError:
            raise WrongValue(expected) from None
        if (moment.tzinfo is not None) != has_zone:
            raise WrongValue(expected)
        ns = (moment - epoch) // MICROSECOND * 1000 + nanoseconds
        return Fraction(ns * per_second, 10**9)

    return _units_of(compared_type(kind), units)


def _seconds(kind: pa.DataType) -> Kind:
    per_second = PER_SECOND[kind.unit]

    def units(value: Scalar) -> Exact:
        seconds = _written(value)
        if isinstance(value, str):
            return seconds * per_second
        whole = round(seconds * per_second)
        # a float near a whole number of units is what answers give for it
        off = abs(Fraction(whole, per_second) - seconds)
        return whole if off <= FRACTION * max(Fraction(1), abs(seconds)) else seconds * per_second

    return _units_of(compared_type(kind), units)


def _units_of(stored: pa.DataType, units: Callable[[Scalar], Exact]) -> Kind:
    info = np.iinfo(stored.to_pandas_dtype())
    low, high = int(info.min), int(info.max)
    return ExactNumbers(low, high, units, lambda whole: pa.array(whole, stored))


def _number(value: Scalar) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongValue("a number")
    return value


def _exact(value: Scalar) -> Exact:
    number = _number(value)
    return number if isinstance(number, int) else Fraction(number)


def _written(value: Scalar) -> Fraction:
    """The decimal that was written: of a float that is its shortest text, .1 is a tenth. A text
    says its digits."""
    if not isinstance(value, str):
        return Fraction(repr(_number(value)))
    if len(value) > MAX_DECIMAL_DIGITS or not DECIMAL_TEXT.fullmatch(value):
        raise WrongValue("a number, or its digits as a text")
    return Fraction(value)


def _text(value: Scalar, expected: str) -> str:
    if not isinstance(value, str):
        raise WrongValue(expected)
    return value
