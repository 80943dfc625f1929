"""What filters mean, one row after the other in plain Python; random tables and filters to compare.

Slow and obvious on purpose: it takes filters as they are sent, and values as Arrow gives them.
"""

import math
import random
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

WORDS = ("", "a", "b", "ab", "abc", "B", "é", "日本", "a b", "z")
NUMBERS = (-3, -2, -1, 0, 1, 2, 3, 7, 100, 2**53, 2**53 + 1, -0.5, 0.1, 0.5, 1.5, 2.5, 1e30)
EPOCH = datetime(2026, 1, 1)
DAYS = tuple(date(2026, 1, 1) + timedelta(days=days) for days in range(-2, 3))
MOMENTS = tuple(EPOCH + timedelta(milliseconds=500 * steps) for steps in range(-4, 5))
# spans of time that are whole microseconds: as seconds, in JSON
SECONDS = (0, 1, 2, 0.5, 1.25, 0.000001, 86399)
ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": lambda value, bound: value > bound,
    "$gte": lambda value, bound: value >= bound,
    "$lt": lambda value, bound: value < bound,
    "$lte": lambda value, bound: value <= bound,
}


def holds(item_filter: dict[str, Any], row: dict[str, Any], schema: pa.Schema) -> bool:
    """Whether a filter holds for a row, a map from names to values as ``to_pylist`` has them."""
    return all(_part_holds(key, value, row, schema) for key, value in item_filter.items())


def _part_holds(key: str, value: Any, row: dict[str, Any], schema: pa.Schema) -> bool:
    if key == "$and":
        return all(holds(part, row, schema) for part in value)
    if key == "$or":
        return any(holds(part, row, schema) for part in value)
    if key == "$not":
        return not holds(value, row, schema)
    conditions = value if isinstance(value, dict) else {"$eq": value}
    return _column_holds(conditions, row[key], schema.field(key).type)


def _column_holds(conditions: dict[str, Any], stored: Any, kind: pa.DataType) -> bool:
    return all(_condition(name, value, stored, kind) for name, value in conditions.items())


def _condition(name: str, given: Any, stored: Any, kind: pa.DataType) -> bool:
    if name == "$not":
        return not _column_holds(given, stored, kind)
    if name == "$ne":
        return not _condition("$eq", given, stored, kind)
    if name == "$nin":
        return not _condition("$in", given, stored, kind)
    if name == "$exists":
        return bool((stored is not None) == given)
    if name == "$in":
        return any(_condition("$eq", each, stored, kind) for each in given)
    if isinstance(stored, list):
        element = kind.value_type
        name = "$eq" if name == "$contains" else name
        return any(_condition(name, given, each, element) for each in stored)
    if stored is None:
        return name == "$eq" and given is None
    if given is None:
        return False
    return _compared(name, literal(given, kind), stored)


def _compared(name: str, given: Any, stored: Any) -> bool:
    if name == "$contains":
        return given in stored
    if isinstance(stored, float) and math.isnan(stored):
        return False
    return bool(stored == given) if name == "$eq" else ORDERS[name](stored, given)


def literal(given: Any, kind: pa.DataType) -> Any:
    """A value of a filter as Arrow's Python values of a type are compared with it."""
    while pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        kind = kind.value_type
    if pa.types.is_date(kind):
        return date.fromisoformat(given)
    if pa.types.is_timestamp(kind):
        return datetime.fromisoformat(given)
    if pa.types.is_time(kind):
        return (datetime.min + timedelta(seconds=given)).time()
    if pa.types.is_duration(kind):
        return timedelta(seconds=given)
    if pa.types.is_decimal(kind):
        return Decimal(repr(given))
    if pa.types.is_floating(kind):
        with np.errstate(over="ignore"):
            rounded = float(kind.to_pandas_dtype()(given))
        return rounded if math.isfinite(rounded) else given
    is_text = isinstance(given, str)
    is_bytes = is_text and not (pa.types.is_string(kind) or pa.types.is_large_string(kind))
    return given.encode() if is_bytes and not pa.types.is_string_view(kind) else given


def value_of(rng: random.Random, kind: pa.DataType) -> Any:
    """A random value for a filter on a column of a type, as JSON has it."""
    while pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        kind = kind.value_type
    if pa.types.is_boolean(kind):
        return rng.random() < 0.5
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return rng.choice(NUMBERS)
    if pa.types.is_date(kind):
        return rng.choice(DAYS).isoformat()
    if pa.types.is_timestamp(kind):
        moment = rng.choice(MOMENTS)
        return (moment.replace(tzinfo=UTC) if kind.tz else moment).isoformat()
    if pa.types.is_time(kind) or pa.types.is_duration(kind):
        return rng.choice(SECONDS)
    return rng.choice(WORDS)


def stored_value(rng: random.Random, kind: pa.DataType) -> Any:
    """A random value of a column, None for null, as ``pa.array`` takes it."""
    if rng.random() < 0.15:
        return None
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return stored_value(rng, kind.value_type)
    if pa.types.is_floating(kind) and rng.random() < 0.15:
        return rng.choice((math.nan, math.inf, -math.inf, -0.0))
    if pa.types.is_fixed_size_list(kind):
        return [stored_value(rng, kind.value_type) for _ in range(kind.list_size)]
    if hasattr(kind, "value_type"):
        return [stored_value(rng, kind.value_type) for _ in range(rng.randrange(4))]
    return _fitting(rng, kind)


def _fitting(rng: random.Random, kind: pa.DataType) -> Any:
    """A random value that a scalar type can hold."""
    while True:
        value = literal(value_of(rng, kind), kind)
        if isinstance(value, float) and pa.types.is_integer(kind):
            continue
        try:
            pa.array([value], kind)
        except (pa.ArrowException, OverflowError, ValueError):
            continue
        return value


def filter_of(rng: random.Random, schema: pa.Schema, depth: int = 3) -> dict[str, Any]:
    """A random filter on columns of ``schema``."""
    made: dict[str, Any] = {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key = rng.choice(("$and", "$or", "$not", *schema.names)) if depth else None
        if key == "$not":
            made[key] = filter_of(rng, schema, depth - 1)
        elif key in ("$and", "$or"):
            count = rng.randint(1, 3)
            made[key] = [filter_of(rng, schema, depth - 1) for _ in range(count)]
        else:
            name = rng.choice(schema.names)
            made[name] = condition_of(rng, schema.field(name).type)
    return made


def condition_of(rng: random.Random, kind: pa.DataType) -> Any:
    """What may stand behind a column of a type: a value, or operators."""
    plain = kind
    while pa.types.is_dictionary(plain) or pa.types.is_run_end_encoded(plain):
        plain = plain.value_type
    is_list = hasattr(plain, "value_type")
    element = plain.value_type if is_list else plain
    names = ["$eq", "$ne", "$in", "$nin", "$exists", "$not", "bare"]
    names += [] if pa.types.is_boolean(element) else list(ORDERS)
    is_text = value_of(random.Random(0), element) in WORDS
    names += ["$contains"] if is_list or is_text else []
    made: dict[str, Any] = {}
    for name in rng.sample(names, rng.choice((1, 1, 2))):
        if name == "bare":
            return rng.choice((None, value_of(rng, element), value_of(rng, element)))
        made[name] = _operand(rng, name, kind, element)
    return made


def _operand(rng: random.Random, name: str, kind: pa.DataType, element: pa.DataType) -> Any:
    if name == "$not":
        inner = condition_of(rng, kind)
        return inner if isinstance(inner, dict) else {"$eq": inner}
    if name == "$exists":
        return rng.random() < 0.5
    if name in ("$in", "$nin"):
        values = [value_of(rng, element) for _ in range(rng.randrange(4))]
        return [*values, None] if rng.random() < 0.2 else values
    is_null = name in ("$eq", "$ne") and rng.random() < 0.2
    return None if is_null else value_of(rng, element)
