"""The features of a request: maps of names to finite scalars or lists of them, within limits.

Which features there are, and of which type, the encoder knows; what it does with a value takes it
up to a microsecond, so how many there are is limited here.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from shardline.router.contract import PayloadTooLarge
from shardline.router.http.problems import short_name, wrong_type
from shardline.shards.core.errors import InvalidInput

SCALARS = frozenset({int, float, bool, str, type(None)})
MAX_VALUES = 1 << 19  # in all lists of a request: 512 past items of each of 1024 users
MAX_CHARACTERS = 1 << 21  # in all texts of a request
# A text is cut into words in its compatibility form, in which a character may become 18, of two
# bytes each and more while it is made; ASCII stays as it is.
BEYOND_ASCII = 10

# Which field of the body a value is: of its row, its name, "" for all that the row has
FieldOf: TypeAlias = Callable[[int, Any], str]


def feature_maps(value: list[Any]) -> list[dict[str, Any]]:
    """The features of written items, a map for each. Raises as ``checked_features``."""
    return checked_features(value, _field_of_item, "items")


def feature_columns(value: Any, count: int) -> list[dict[str, Any]]:
    """The features of ``count`` written items, a map for each, of a list or an array per feature.

    Raises:
        InvalidInput: no such map, or as ``checked_features``. PayloadTooLarge: as there.
    """
    if not isinstance(value, dict):
        raise wrong_type("features", "a map of names to lists", value)
    if len(value) * count > MAX_VALUES:
        raise _too_large(f"items x features <= {MAX_VALUES}", len(value) * count, "items")
    for name, values in value.items():
        field = f"features.{short_name(name)}"
        if not isinstance(values, list | np.ndarray) or (
            isinstance(values, np.ndarray) and not values.ndim
        ):
            raise wrong_type(field, "a list with a value per item", values)
        if len(values) != count:
            raise InvalidInput(
                "not as many values as items",
                field=field,
                expected=f"{count} values",
                got=f"{len(values)} values",
            )
    lists = [each.tolist() if isinstance(each, np.ndarray) else each for each in value.values()]
    if not lists:
        return [{} for _ in range(count)]
    rows = [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]
    return checked_features(rows, _field_of_column, "items")


def checked_features(
    value: list[Any], field_of: FieldOf | None = None, what: str = "queries"
) -> list[dict[str, Any]]:
    """The maps of a batch, arrays in them made lists. what: how errors call the rows.

    Raises:
        InvalidInput: not a map, or a value that is no finite scalar nor a list of them.
        PayloadTooLarge: too many values, or too much text.
    """
    field_of = field_of or _field
    size = characters = 0
    for row, features in enumerate(value):
        if not isinstance(features, dict):
            raise wrong_type(field_of(row, ""), "a map of features", features)
        for name, item in features.items():
            kind = type(item)
            if kind is list:
                size += len(item)
                characters += _check_list(row, name, item, field_of)
            elif kind is str:
                characters += _characters(item)
            elif isinstance(item, np.ndarray):
                size += item.size
                _check_sizes(size, characters, what)  # before each number is an object
                features[name] = item = item.tolist()
                if type(item) is list:
                    _check_list(row, name, item, field_of)
                else:  # of an array without dimensions
                    _check_scalar(row, name, item, field_of)
            else:
                _check_scalar(row, name, item, field_of)
        _check_sizes(size, characters, what)
    return value


def _check_list(row: int, name: str, values: list[Any], field_of: FieldOf) -> int:
    """How many characters its texts have."""
    types = set(map(type, values))
    if not types <= SCALARS or float in types:
        for value in values:
            _check_scalar(row, name, value, field_of)
    return sum([_characters(each) for each in values if type(each) is str]) if str in types else 0


def _characters(text: str) -> int:
    return len(text) if text.isascii() else BEYOND_ASCII * len(text)


def _check_scalar(row: int, name: str, value: Any, field_of: FieldOf) -> None:
    if type(value) not in SCALARS:
        expected = "a number, string, boolean or a list of them"
        raise wrong_type(field_of(row, name), expected, value)
    if type(value) is float and not math.isfinite(value):
        raise InvalidInput(
            "not finite", field=field_of(row, name), expected="a finite number", got=str(value)
        )


def _check_sizes(size: int, characters: int, what: str) -> None:
    if size > MAX_VALUES:
        raise _too_large(f"<= {MAX_VALUES} values in lists", size, what)
    if characters > MAX_CHARACTERS:
        times = f"those of texts beyond ASCII counted {BEYOND_ASCII} times"
        raise _too_large(f"<= {MAX_CHARACTERS} characters, {times}", characters, what)


def _too_large(expected: str, got: int, what: str) -> PayloadTooLarge:
    return PayloadTooLarge(
        "features too large",
        field="features",
        expected=expected,
        got=f"{got} or more",
        hint=f"send the {what} in several requests",
    )


def _field(row: int, name: Any) -> str:
    return f"features[{row}].{short_name(name)}" if name else f"features[{row}]"


def _field_of_item(row: int, name: Any) -> str:
    return f"items[{row}].features.{short_name(name)}" if name else f"items[{row}].features"


def _field_of_column(row: int, name: Any) -> str:
    return f"features.{short_name(name)}[{row}]"
