"""The attributes in bodies of writes: values of JSON, by item or by column, within limits.

Their names and types are the generation's, which shards know and check.
"""

import math
from typing import Any

import numpy as np

from shardline.router.contract import PayloadTooLarge
from shardline.router.http.problems import short_name, wrong_type
from shardline.shards.core.errors import InvalidInput

MAX_NAMES = 1024  # attributes of one request
MAX_CELLS = 1 << 20  # items x attributes: as many slots of lists, however few are filled
MAX_DEPTH = 16  # of lists and maps in an attribute
PLAIN = frozenset({bool, int, str, type(None)})  # both formats have integers of 64 bits only


def attribute_map(attributes: Any, field: str) -> dict[str, Any]:
    """The attributes of one item. Raises InvalidInput."""
    if attributes is None:
        return {}
    if type(attributes) is not dict:
        raise wrong_type(field, "a map of names to values", attributes)
    for name, value in attributes.items():
        _check_name(name, field)
        attributes[name] = _json_value(value, f"{field}.{name}")
    return attributes


def transposed(rows: list[dict[str, Any]], absent: Any = None) -> dict[str, list[Any]]:
    """Of each name its value in every row, ``absent`` where a row lacks it."""
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row)
        _check_names(len(names), len(rows))
    return {name: [row.get(name, absent) for row in rows] for name in names}


def attribute_columns(attributes: Any, count: int) -> dict[str, list[Any]]:
    """Of each attribute a value per item. Raises InvalidInput, PayloadTooLarge."""
    if not isinstance(attributes, dict):
        raise wrong_type("attributes", "a map of names to lists", attributes)
    _check_names(len(attributes), count)
    columns = {}
    for name, values in attributes.items():
        _check_name(name, "attributes")
        field = f"attributes.{short_name(name)}"
        values = listed(values)
        if type(values) is not list:
            raise wrong_type(field, "a list with a value per item", values)
        if len(values) != count:
            raise InvalidInput(
                "not as many values as items",
                field=field,
                expected=f"{count} values",
                got=f"{len(values)} values",
            )
        columns[name] = _json_values(values, field)
    return columns


def _check_name(name: Any, field: str) -> None:
    if type(name) is not str:
        raise wrong_type(f"{field}.{short_name(name)}", "a text as name", name)


def _check_names(names: int, items: int) -> None:
    if names > MAX_NAMES or names * items > MAX_CELLS:
        raise PayloadTooLarge(
            "too many attributes",
            field="attributes",
            expected=f"<= {MAX_NAMES} names, and items x names <= {MAX_CELLS}",
            got=f"{names} names, {items} items",
            hint="send the items in several requests",
        )


def _json_values(values: list[Any], field: str) -> list[Any]:
    if _are_plain(values):
        return values
    return [_json_value(value, f"{field}[{row}]") for row, value in enumerate(values)]


def _json_value(value: Any, field: str, depth: int = 0) -> Any:
    """The value, arrays in it made lists. Raises InvalidInput: it is none of JSON."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is float:
        if not math.isfinite(value):
            raise InvalidInput(
                "not finite", field=field, expected="a finite number, or null", got=str(value)
            )
        return value
    value = listed(value)
    if depth >= MAX_DEPTH or type(value) not in (list, dict):
        expected = f"null, a boolean, number or text, lists and maps of these {MAX_DEPTH} deep"
        raise wrong_type(field, expected, value)
    if type(value) is list:
        if _are_plain(value):
            return value
        return [_json_value(each, field, depth + 1) for each in value]
    for name in value:
        _check_name(name, field)
    return {name: _json_value(each, field, depth + 1) for name, each in value.items()}


def _are_plain(values: list[Any]) -> bool:
    """Whether nothing is wrong with any of them, at a tenth of the cost of a look at each."""
    types = set(map(type, values))
    if types <= PLAIN:
        return True
    if not types <= PLAIN | {float}:
        return False
    return all(map(math.isfinite, [each for each in values if type(each) is float]))


def listed(value: Any) -> Any:
    """An array as the list that JSON would have."""
    return value.tolist() if isinstance(value, np.ndarray) else value
