"""Binds a filter to the columns of a shard: names to places, values to the columns' types."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.filter_language import (
    LISTED,
    AllOf,
    AnyOf,
    Condition,
    Filter,
    Operator,
    Scalar,
    path_of,
    shown,
)
from shardline.shards.filters.column_kinds import (
    NONE,
    Kind,
    Texts,
    WrongValue,
    decoded_type,
    is_list,
    kind_of,
)
from shardline.shards.filters.column_tests import ColumnTest, No, Stored, Test

ITEM_ID = "item_id"
MAX_LISTED = 50  # columns named in a message
_NEGATED = (Operator.NE, Operator.NIN)
_POSITIVE = {Operator.NE: Operator.EQ, Operator.NIN: Operator.IN}


@dataclass(frozen=True, slots=True)
class AllTests:
    """Holds for rows for which every part does."""

    parts: tuple["Bound", ...]


@dataclass(frozen=True, slots=True)
class AnyTest:
    """Holds for rows for which a part does."""

    parts: tuple["Bound", ...]


@dataclass(frozen=True, slots=True)
class NotTest:
    """Holds for rows for which ``part`` does not."""

    part: "Bound"


Bound: TypeAlias = ColumnTest | AllTests | AnyTest | NotTest


def bind(part: Filter, schema: pa.Schema, field: str = "filter") -> Bound:
    """A filter for tables of ``schema``; ``item_id`` is one more column, unless it has one.

    Raises:
        InvalidInput: a column that there is not, or an operator or a value that its type does not
            take; ``field`` is the path of what is wrong.
    """
    if isinstance(part, Condition):
        return _bound_condition(part, schema, path_of(field, part.column))
    if isinstance(part, AllOf):
        return AllTests(tuple(bind(each, schema, field) for each in part.parts))
    if isinstance(part, AnyOf):
        return AnyTest(tuple(bind(each, schema, field) for each in part.parts))
    return NotTest(bind(part.part, schema, field))


def _bound_condition(condition: Condition, schema: pa.Schema, field: str) -> ColumnTest:
    place, kind = _column(condition.column, schema, field)
    path = f"{field}.{condition.operator}"
    plain = decoded_type(kind)
    elements = decoded_type(plain.value_type) if is_list(plain) else plain
    values = kind_of(elements)
    operators = _operators(values, is_list(plain))
    if condition.operator not in operators:
        known = ", ".join(each for each in Operator if each in operators)
        raise InvalidInput(
            "no operator for this column",
            field=path,
            expected=f"one of {known}, as {condition.column} is of type {kind}",
            got=str(condition.operator),
        )
    if condition.operator == Operator.EXISTS:
        return ColumnTest(place=place, test=Stored(), negated=not condition.value)
    assert values is not None
    given = condition.value if isinstance(condition.value, tuple) else (condition.value,)
    present = [value for value in given if value is not None]
    return ColumnTest(
        place=place,
        test=_test(condition, values, present, _Told(condition.column, kind, path)),
        or_missing=len(present) < len(given),
        negated=condition.operator in _NEGATED,
    )


def _operators(values: Kind | None, of_list: bool) -> frozenset[Operator]:
    if values is None:
        return NONE
    return values.operators | {Operator.CONTAINS} if of_list else values.operators


@dataclass(frozen=True, slots=True)
class _Told:
    """What a message about a value says of its column."""

    column: str
    kind: pa.DataType
    path: str

    def wrong(self, expected: str, values: Sequence[Scalar]) -> InvalidInput:
        return InvalidInput(
            "wrong type of value",
            field=self.path,
            expected=f"{expected}, as {self.column} is of type {self.kind}",
            got=shown(values[0]),
        )


def _test(condition: Condition, values: Kind, present: Sequence[Scalar], told: _Told) -> Test:
    if not present:
        return No()
    operator = _POSITIVE.get(condition.operator, condition.operator)
    try:
        if operator in LISTED:
            return values.one_of(present)
        of_list = is_list(decoded_type(told.kind))
        if operator == Operator.CONTAINS and isinstance(values, Texts) and not of_list:
            return values.containing(present[0])
        compared = Operator.EQ if operator == Operator.CONTAINS else operator
        return values.compared(compared, present[0])
    except WrongValue as error:
        raise told.wrong(error.expected, _first_wrong(values, present)) from None


def _first_wrong(values: Kind, present: Sequence[Scalar]) -> Sequence[Scalar]:
    """From the first value on that is refused."""
    for i, value in enumerate(present):
        try:
            values.one_of([value])
        except WrongValue:
            return present[i:]
    return present


def _column(name: str, schema: pa.Schema, field: str) -> tuple[int | None, pa.DataType]:
    """The place and the type of a column; place None for the item ids."""
    places = schema.get_all_field_indices(name)
    if places:
        return places[0], schema.field(places[0]).type
    if name == ITEM_ID:
        return None, pa.int64()
    names = list(dict.fromkeys((ITEM_ID, *schema.names)))
    listed = ", ".join(names[:MAX_LISTED])
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    raise InvalidInput(
        "no such column", field=field, expected=f"one of {listed}{more}", got=shown(name)
    )
