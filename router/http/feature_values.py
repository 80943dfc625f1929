"""The features of a request: maps of names to finite scalars or lists of them, within limits.

Which features there are, and of which type, the encoder knows; what it does with a value takes it
up to a microsecond, so how many there are is limited here.
"""

import math
from typing import Any

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


def checked_features(value: list[Any]) -> list[dict[str, Any]]:
    """The maps of a batch, arrays in them made lists.

    Raises:
        InvalidInput: not a map, or a value that is no finite scalar nor a list of them.
        PayloadTooLarge: too many values, or too much text.
    """
    size = characters = 0
    for row, features in enumerate(value):
        if not isinstance(features, dict):
            raise wrong_type(f"features[{row}]", "a map of features", features)
        for name, item in features.items():
            kind = type(item)
            if kind is list:
                size += len(item)
                characters += _check_list(row, name, item)
            elif kind is str:
                characters += _characters(item)
            elif isinstance(item, np.ndarray):
                size += item.size
                _check_sizes(size, characters)  # before each number is an object
                features[name] = item = item.tolist()
                if type(item) is list:
                    _check_list(row, name, item)
                else:  # of an array without dimensions
                    _check_scalar(row, name, item)
            else:
                _check_scalar(row, name, item)
        _check_sizes(size, characters)
    return value


def _check_list(row: int, name: str, values: list[Any]) -> int:
    """How many characters its texts have."""
    types = set(map(type, values))
    if not types <= SCALARS or float in types:
        for value in values:
            _check_scalar(row, name, value)
    return sum([_characters(each) for each in values if type(each) is str]) if str in types else 0


def _characters(text: str) -> int:
    return len(text) if text.isascii() else BEYOND_ASCII * len(text)


def _check_scalar(row: int, name: str, value: Any) -> None:
    if type(value) not in SCALARS:
        expected = "a number, string, boolean or a list of them"
        raise wrong_type(_field(row, name), expected, value)
    if type(value) is float and not math.isfinite(value):
        raise InvalidInput(
            "not finite", field=_field(row, name), expected="a finite number", got=str(value)
        )


def _check_sizes(size: int, characters: int) -> None:
    if size > MAX_VALUES:
        raise _too_large(f"<= {MAX_VALUES} values in lists", size)
    if characters > MAX_CHARACTERS:
        times = f"those of texts beyond ASCII counted {BEYOND_ASCII} times"
        raise _too_large(f"<= {MAX_CHARACTERS} characters, {times}", characters)


def _too_large(expected: str, got: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        "features too large",
        field="features",
        expected=expected,
        got=f"{got} or more",
        hint="send the queries in several requests",
    )


def _field(row: int, name: Any) -> str:
    return f"features[{row}].{short_name(name)}"
