"""The language of filters: a condition on items' columns, as JSON has it, checked and canonical.

    {"price": {"$lt": 20}, "category": {"$in": ["a", "b"]}, "$not": {"tags": "used"}}

A filter is a map. A column stands before a value, null, or a map of operators; ``$and``, ``$or``
and ``$not`` stand before filters; all keys of a map hold together. docs/FILTERS.md says what the
operators mean. Which columns there are and of which types is known to shards: ``filters.bound``.

``check_filter`` takes time linear in what it is given (times the logarithm of a list's length) and
its recursion is bounded, so a router can call it on any body.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import msgpack

from shardline.shards.core.errors import InvalidInput

MAX_FILTER_BYTES = 512 << 10  # of the canonical form
MAX_CLAUSES = 256  # conditions of a filter: each is a pass over a column
MAX_SUBSTRINGS = 16  # conditions with $contains: 90 ms each in a million texts of 55 bytes
MAX_DEPTH = 16  # levels of $and, $or, $not
MAX_IN_VALUES = 10_000  # of a $in or $nin
# a map of several keys becomes an $and of its own in the canonical form
_CANONICAL_DEPTH = 2 * MAX_DEPTH + 1
_INTEGERS = range(-(1 << 63), 1 << 64)  # what columns can hold, and msgpack
_MAX_SHOWN = 60  # characters of a value or a column's name in a message

AND, OR, NOT = "$and", "$or", "$not"
Scalar: TypeAlias = bool | int | float | str | None


class Operator(StrEnum):
    """What stands between a column and a value."""

    EQ = "$eq"
    NE = "$ne"
    IN = "$in"
    NIN = "$nin"
    GT = "$gt"
    GTE = "$gte"
    LT = "$lt"
    LTE = "$lte"
    EXISTS = "$exists"
    CONTAINS = "$contains"


LISTED = (Operator.IN, Operator.NIN)
_OPERATORS = {str(operator): operator for operator in Operator}


@dataclass(frozen=True, slots=True)
class Condition:
    """``value`` is a tuple of distinct values for $in and $nin, true or false for $exists, never
    null for ranges and $contains."""

    column: str
    operator: Operator
    value: Scalar | tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class AllOf:
    """Holds where every part does; without parts, everywhere."""

    parts: tuple["Filter", ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Holds where a part does, of at least two."""

    parts: tuple["Filter", ...]


@dataclass(frozen=True, slots=True)
class Negation:
    """Holds where ``part`` does not."""

    part: "Filter"


Filter: TypeAlias = Condition | AllOf | AnyOf | Negation
EVERYTHING = AllOf(())


def check_filter(value: Any, field: str = "filter") -> bytes:
    """A filter of JSON in its canonical form, msgpack: b"" for {}, which every item matches.

    Filters that differ in the order of keys, parts or listed values, in repetitions of these, in
    ``{"a": 1}`` for ``{"a": {"$eq": 1}}`` or 1.0 for 1 give equal bytes.

    Raises:
        InvalidInput: not a filter, or beyond a limit; ``field`` is the path of what is wrong.
    """
    checked = _Reader(MAX_DEPTH).read(value, field)
    if checked == EVERYTHING:
        return b""
    try:
        packed = _packed(checked, msgpack.Packer())
    except UnicodeEncodeError as error:
        raise InvalidInput(
            "a text that UTF-8 cannot hold", field=field, expected="Unicode", got=error.reason
        ) from error
    if len(packed) > MAX_FILTER_BYTES:
        raise _too_large(len(packed), field)
    return packed


def narrowed(packed: bytes, left_out: Mapping[str, Sequence[Scalar]]) -> bytes:
    """A filter that leaves out, besides, every item that has one of these values in a column; as
    ``check_filter`` packs it.

    Raises:
        InvalidInput: together that is beyond a limit, or a column that no filter can name.
    """
    parts = [read_filter(packed)]
    for column, values in left_out.items():
        field = path_of("filter", column)
        if column.startswith("$"):
            raise _no_operator_of_filters(column, field)
        parts.append(Condition(column, Operator.NIN, _values(list(values), field)))
    together = _all_of(parts)
    if together == EVERYTHING:
        return b""
    made = _packed(together, msgpack.Packer())
    read_filter(made)  # by its limits
    return made


def read_filter(packed: bytes, field: str = "filter") -> Filter:
    """What ``check_filter`` made.

    Raises:
        InvalidInput: not a filter, or beyond a limit.
    """
    if not packed:
        return EVERYTHING
    if len(packed) > MAX_FILTER_BYTES:
        raise _too_large(len(packed), field)
    try:
        value = msgpack.unpackb(packed)
    except (ValueError, msgpack.UnpackException) as error:
        raise InvalidInput(
            "not readable", field=field, expected="a filter in msgpack", got=str(error)
        ) from error
    return _Reader(_CANONICAL_DEPTH).read(value, field)


def shown(value: Any) -> str:
    """A value of JSON, or what kind of one it is, short enough for a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        text = repr(value[: _MAX_SHOWN + 1])
        return text if len(value) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
    if isinstance(value, int):
        # Python refuses to write very long ones
        return str(value) if value in _INTEGERS else f"an integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "a list"
    return "a map" if isinstance(value, dict) else type(value).__name__


def path_of(parent: str, name: str) -> str:
    """The path of a key below ``parent``, for a message."""
    return f"{parent}.{name if len(name) <= _MAX_SHOWN else name[:_MAX_SHOWN] + '...'}"


class _Reader:
    """Reads one filter, counting its conditions. ``depth`` is of $and, $or and $not around."""

    def __init__(self, max_depth: int) -> None:
        self._max_depth = max_depth
        self._clauses = 0
        self._substrings = 0

    def read(self, value: Any, path: str, depth: int = 0) -> Filter:
        """A map of columns and logical operators."""
        if not isinstance(value, dict):
            raise _wrong("not a filter", path, "a map of columns and conditions", value)
        if not value:
            self._count(path)
        parts: list[Filter] = []
        for key, inner in value.items():
            below = path_of(path, _name(key, path))
            if not key.startswith("$"):
                parts.append(self._column(key, inner, below, depth))
            elif key == NOT:
                self._check_depth(depth, below)
                parts.append(Negation(self.read(inner, below, depth + 1)))
            elif key in (AND, OR):
                parts.append(self._several(key, inner, below, depth))
            else:
                raise _no_operator_of_filters(key, below)
        return _all_of(parts)

    def _several(self, key: str, value: Any, path: str, depth: int) -> Filter:
        if not isinstance(value, list | tuple) or not value:
            got = "an empty list" if isinstance(value, list | tuple) else shown(value)
            raise InvalidInput("no filters", field=path, expected="a list of filters", got=got)
        self._check_depth(depth, path)
        parts = [self.read(part, f"{path}[{i}]", depth + 1) for i, part in enumerate(value)]
        return _all_of(parts) if key == AND else _any_of(parts)

    def _column(self, column: str, value: Any, path: str, depth: int) -> Filter:
        if isinstance(value, dict):
            return self._operators(column, value, path, depth)
        if isinstance(value, list | tuple):
            raise InvalidInput(
                "a list is no condition",
                field=path,
                expected="a value, null or a map of operators",
                got="a list",
                hint=f"{Operator.IN} takes a list",
            )
        return self._condition(column, Operator.EQ, value, path)

    def _operators(self, column: str, value: Any, path: str, depth: int) -> Filter:
        if not isinstance(value, dict) or not value:
            got = "an empty map" if isinstance(value, dict) else shown(value)
            expected = "a map of operators and values"
            raise InvalidInput("no operator", field=path, expected=expected, got=got)
        parts: list[Filter] = []
        for key, inner in value.items():
            below = path_of(path, _name(key, path))
            if key == NOT:
                self._check_depth(depth, below)
                parts.append(Negation(self._operators(column, inner, below, depth + 1)))
            elif key in _OPERATORS:
                parts.append(self._condition(column, _OPERATORS[key], inner, below))
            else:
                known = ", ".join((*_OPERATORS, NOT))
                got, expected = key[:_MAX_SHOWN], f"one of {known}"
                raise InvalidInput("no such operator", field=below, expected=expected, got=got)
        return _all_of(parts)

    def _condition(self, column: str, operator: Operator, value: Any, path: str) -> Condition:
        self._count(path)
        if operator == Operator.CONTAINS:
            self._count_substring(path)
        if operator in LISTED:
            return Condition(column, operator, _values(value, path))
        if operator == Operator.EXISTS and not isinstance(value, bool):
            raise _wrong("not a boolean", path, "true or false", value)
        may_be_null = operator in (Operator.EQ, Operator.NE)
        if value is None and not may_be_null:
            raise _wrong("no value", path, "a value", value)
        return Condition(column, operator, _scalar(value, path))

    def _count(self, path: str) -> None:
        self._clauses += 1
        if self._clauses > MAX_CLAUSES:
            raise InvalidInput(
                "too many conditions",
                field=path,
                expected=f"at most {MAX_CLAUSES} in a filter",
                hint=f"{Operator.IN} takes up to {MAX_IN_VALUES} values",
            )

    def _count_substring(self, path: str) -> None:
        self._substrings += 1
        if self._substrings > MAX_SUBSTRINGS:
            expected = f"at most {MAX_SUBSTRINGS} with {Operator.CONTAINS} in a filter"
            raise InvalidInput("too many conditions", field=path, expected=expected)

    def _check_depth(self, depth: int, path: str) -> None:
        if depth >= self._max_depth:
            expected = f"at most {MAX_DEPTH} levels of {AND}, {OR} and {NOT}"
            raise InvalidInput("nested too deeply", field=path, expected=expected)


def _no_operator_of_filters(key: str, path: str) -> InvalidInput:
    return InvalidInput(
        "no operator of filters",
        field=path,
        expected=f"a column, {AND}, {OR} or {NOT}",
        got=key[:_MAX_SHOWN],
        hint=f'as in {{"column": {{"{key}": ...}}}}' if key in _OPERATORS else None,
    )


def _name(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise _wrong("a key that is no text", path, "names of columns and operators", key)
    return key


def _scalar(value: Any, path: str) -> Scalar:
    """The value; an integer for a float without a fraction, as JSON does not tell them apart."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        if value not in _INTEGERS:
            expected = f"an integer from {_INTEGERS[0]} to {_INTEGERS[-1]}"
            raise _wrong("out of range", path, expected, value)
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _wrong("not a finite number", path, "a finite number", value)
        return _whole(value)
    raise _wrong("not a value", path, "a text, a number, true, false or null", value)


def _whole(value: int | float) -> int | float:
    is_whole = isinstance(value, float) and value.is_integer() and int(value) in _INTEGERS
    return int(value) if is_whole else value


def _values(value: Any, path: str) -> tuple[Scalar, ...]:
    """The values of a list, each once, in an order that does not depend on the list's."""
    if not isinstance(value, list | tuple):
        raise _wrong("not a list", path, "a list of values", value)
    if len(value) > MAX_IN_VALUES:
        expected = f"at most {MAX_IN_VALUES}"
        raise InvalidInput("too many values", field=path, expected=expected, got=str(len(value)))
    kinds = set(map(type, value))
    if kinds == {str}:
        return tuple(sorted(set(value)))
    if kinds <= {int, float} and all(_INTEGERS[0] <= each <= _INTEGERS[-1] for each in value):
        return tuple(sorted({_whole(each) for each in value}))
    checked = [_scalar(each, f"{path}[{i}]") for i, each in enumerate(value)]
    # by kind, as Python takes true for 1
    unique = {(_rank(each), each) for each in checked if each is not None}
    nulls = (None,) if None in checked else ()
    return (*nulls, *(each for _, each in sorted(unique)))


def _rank(value: Scalar) -> int:
    return 0 if isinstance(value, bool) else 2 if isinstance(value, str) else 1


def _all_of(parts: Sequence[Filter]) -> Filter:
    flat: list[Filter] = []
    for part in parts:
        flat += part.parts if isinstance(part, AllOf) else (part,)
    return flat[0] if len(flat) == 1 else AllOf(tuple(flat))


def _any_of(parts: Sequence[Filter]) -> Filter:
    flat: list[Filter] = []
    for part in parts:
        flat += part.parts if isinstance(part, AnyOf) else (part,)
    return flat[0] if len(flat) == 1 else AnyOf(tuple(flat))


def _packed(part: Filter, packer: msgpack.Packer) -> bytes:
    """In msgpack; parts that hold together are sorted by their bytes, each once."""
    if isinstance(part, Condition):
        packed: bytes = packer.pack({part.column: {str(part.operator): part.value}})
        return packed
    if part == EVERYTHING:
        return bytes(packer.pack_map_header(0))
    head = bytes(packer.pack_map_header(1))
    if isinstance(part, Negation):
        return b"".join((head, packer.pack(NOT), _packed(part.part, packer)))
    each = sorted({_packed(inner, packer) for inner in part.parts})
    if len(each) == 1:
        return each[0]
    key = packer.pack(AND if isinstance(part, AllOf) else OR)
    return b"".join((head, key, packer.pack_array_header(len(each)), *each))


def _wrong(message: str, path: str, expected: str, got: Any) -> InvalidInput:
    return InvalidInput(message, field=path, expected=expected, got=shown(got))


def _too_large(size: int, field: str) -> InvalidInput:
    expected = f"at most {MAX_FILTER_BYTES >> 10} KiB in msgpack"
    return InvalidInput("too large", field=field, expected=expected, got=f"{size} bytes")
