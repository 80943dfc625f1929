"""What callers give, in the forms that travel: arrays of numpy, values of JSON, msgpack.

What would change on the way is refused: text for a number, a fraction for an id.
"""

import sys
from collections.abc import Iterable, Mapping
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgpack
import numpy as np

from shardline.router.contract import pack_array
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import FloatArray, IdArray, check_ids

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

MAX_GOT = 100  # characters of a refused value that an error shows


def milliseconds(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            "not to be sent", field="timeout_ms", got=repr(value)[:MAX_GOT]
        ) from error


def packed(value: Any) -> bytes:
    body: bytes = msgpack.packb(value, default=plain)
    return body


def plain(value: Any) -> Any:
    """As ``pack_array``; dates and times as ISO 8601 text, which time features take."""
    if isinstance(value, np.datetime64):
        return None if np.isnat(value) else str(value)
    if isinstance(value, date):  # a pandas Timestamp too, and NaT, which no time is equal to
        return value.isoformat() if value == value else None
    if type(value).__name__ == "NAType":  # pandas.NA
        return None
    if hasattr(value, "to_numpy"):  # a Series
        value = value.to_numpy()
    if isinstance(value, np.ndarray) and value.dtype == object:
        return value.tolist()
    return pack_array(value)


def to_ids(values: "ArrayLike", field: str = "item_ids") -> IdArray:
    refuse_hidden(field, values)
    kinds = set(map(type, values)) if isinstance(values, list | tuple) else set()
    if kinds & {bool, np.bool_}:  # numpy would make them 1
        raise InvalidInput(
            "not an array of integers", field=field, expected="1-d int64", got="a bool"
        )
    return check_ids(values, field=field).astype("<i8", copy=False)


def refuse_hidden(field: str, values: "ArrayLike") -> None:
    """A masked value would be sent as what lies under its mask."""
    # who has a masked array has loaded the module, which takes time that others need not pay
    if "numpy.ma" in sys.modules and np.ma.is_masked(values):
        raise InvalidInput("masked values", field=field, expected="values that are all there")


def to_matrix(values: "ArrayLike") -> FloatArray:
    refuse_hidden("vectors", values)
    try:
        array = np.asarray(values)
        if array.ndim == 1 and array.dtype == object:  # rows of a Series or of an Arrow array
            array = np.array([np.asarray(row) for row in array])
    except (ValueError, OverflowError) as error:
        raise InvalidInput(
            "not a matrix of numbers", field="vectors", expected="rows of equal length"
        ) from error
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise InvalidInput(
            "not a matrix of numbers",
            field="vectors",
            expected="2-d float32, one row per query",
            got=f"{array.ndim}-d {array.dtype}",
        )
    with np.errstate(over="ignore"):  # becomes infinity, which the server refuses by its row
        return array.astype("<f4", copy=False)


def records(rows: Any) -> "Iterable[Mapping[str, Any]]":
    """A map per query; of a frame of polars or pandas, or a table of pyarrow, a map per row."""
    for name, arguments in (("to_dicts", ()), ("to_pylist", ()), ("to_dict", ("records",))):
        if hasattr(rows, name):
            records: list[dict[str, Any]] = getattr(rows, name)(*arguments)
            return records
    found: Iterable[Mapping[str, Any]] = rows
    return found


def listed(values: Any) -> list[Any]:
    found: list[Any] = values.to_pylist() if hasattr(values, "to_pylist") else list(values)
    return found


def to_filter(value: Any) -> Any:
    """A filter, or one per query, with values in the forms that ``to_json`` and ``plain`` give, and
    arrays, sets and Series as lists. NaN stays, and the server refuses it: None would match."""
    if isinstance(value, Mapping):
        return {name: to_filter(each) for name, each in value.items()}
    if hasattr(value, "to_numpy") and not isinstance(value, date):  # a Series
        value = value.to_numpy()
    if isinstance(value, np.ndarray):
        value = list(value) if value.dtype.kind in "mM" else value.tolist()
    if isinstance(value, list | tuple | range | set | frozenset):
        return list(map(to_filter, value))
    return value if isinstance(value, float | np.floating) else to_json(value)


def to_attribute(value: Any) -> Any:
    """As ``to_json``; decimals that a float does not hold as their digits, which a column of
    decimals takes."""
    if isinstance(value, Decimal) and value.is_finite():
        number = float(value)
        return number if Decimal(repr(number)) == value else format(value, "f")
    return to_json(value)


def to_json(value: Any) -> Any:
    """As an import reads it: NaN, which is how frames write a missing number, as None; decimals as
    numbers, times of day and durations as seconds, a UUID as text."""
    if isinstance(value, float | np.floating):
        return None if value != value else value
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, time_of_day):
        return (value.hour * 60 + value.minute) * 60 + value.second + value.microsecond / 1e6
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, np.timedelta64):
        return None if np.isnat(value) else float(value / np.timedelta64(1, "s"))
    return str(value) if isinstance(value, UUID) else value
