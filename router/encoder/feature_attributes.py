"""The features of a written item as attributes: of the catalogue's columns those that are features.

A feature and an attribute take the same values, but for two that only a feature takes: a time in
seconds since 1970, with an offset or without, taken to the microsecond; and an integer that is
written as a float. An answer gives a number as its digits, a text, where a float does not hold it:
that is a value of an attribute only.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from shardline.shards.core.moments import moment_text, read_moment

INTEGERS = ("int", "uint")  # what Arrow calls integer types
IN_DIGITS = ("decimal", "duration", "time32", "time64")  # and those that answers may give as texts
MAX_INTEGER = 1 << 63  # beyond, a column of 64 bits has no such number, nor has msgpack


class FeatureAttributes:
    """columns: of the catalogue, names and Arrow types as text, without the id."""

    def __init__(self, columns: Mapping[str, str], features: Sequence[Mapping[str, Any]]) -> None:
        names = [each["column"] for each in features]
        self._takers = {name: _taker_of(columns[name]) for name in names if name in columns}
        self._in_digits = {
            name for name in self._takers if _element(columns[name]).startswith(IN_DIGITS)
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Features that are attributes too."""
        return tuple(self._takers)

    def column(self, name: str, values: Sequence[Any]) -> list[Any]:
        """Checked values of one of ``names`` as its attribute takes them."""
        take = self._takers[name]
        return [None if value is None else take(value) for value in values]

    def feature(self, name: str, value: Any) -> Any:
        """The feature of an item whose attribute of that name an answer gives as ``value``."""
        return _number(value) if name in self._in_digits else value


def _element(kind: str) -> str:
    """The type of a list's elements; any other as it is."""
    return kind.partition(": ")[2] if "list<" in kind else kind


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(each) for each in value]
    return float(value) if isinstance(value, str) else value


def _taker_of(kind: str) -> Callable[[Any], Any]:
    if kind.startswith("timestamp"):
        return _with_offset if "tz=" in kind else _without_offset
    if "list<" in kind:
        of_element = _whole if _element(kind).startswith(INTEGERS) else _same
        return lambda values: [None if value is None else of_element(value) for value in values]
    return _whole if kind.startswith(INTEGERS) else _same


def _same(value: Any) -> Any:
    return value


def _whole(value: Any) -> Any:
    is_whole = type(value) is float and value.is_integer() and abs(value) < MAX_INTEGER
    return int(value) if is_whole else value


def _with_offset(value: Any) -> Any:
    time = _time(value)
    return value if time is None else moment_text(*time)


def _without_offset(value: Any) -> Any:
    time = _time(value)
    if time is None:
        return value
    return moment_text(time[0].astimezone(UTC).replace(tzinfo=None), time[1])


def _time(value: Any) -> tuple[datetime, int] | None:
    """As ``read_moment``, of what a time feature takes: ISO 8601 text, in UTC where no zone is
    named, or seconds.

    None for one that no calendar has, which the shard refuses.
    """
    try:
        if isinstance(value, str):
            time, nanoseconds = read_moment(value)
            return (time if time.tzinfo else time.replace(tzinfo=UTC)), nanoseconds
        return datetime.fromtimestamp(value, UTC), 0
    except (ValueError, OverflowError, OSError):
        return None
