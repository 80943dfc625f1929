"""The features of a written item as attributes: of the catalogue's columns those that are features.

A feature and an attribute take the same values, but for two that only a feature takes: a time in
seconds since 1970, with an offset or without, and an integer that is written as a float.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

INTEGERS = ("int", "uint")  # what Arrow calls integer types
MAX_INTEGER = 1 << 63  # beyond, a column of 64 bits has no such number, nor has msgpack


class FeatureAttributes:
    """columns: of the catalogue, names and Arrow types as text, without the id."""

    def __init__(self, columns: Mapping[str, str], features: Sequence[Mapping[str, Any]]) -> None:
        names = [each["column"] for each in features]
        self._takers = {name: _taker_of(columns[name]) for name in names if name in columns}

    @property
    def names(self) -> tuple[str, ...]:
        """Features that are attributes too."""
        return tuple(self._takers)

    def column(self, name: str, values: Sequence[Any]) -> list[Any]:
        """Checked values of one of ``names`` as its attribute takes them."""
        take = self._takers[name]
        return [None if value is None else take(value) for value in values]


def _taker_of(kind: str) -> Callable[[Any], Any]:
    if kind.startswith("timestamp"):
        return _with_offset if "tz=" in kind else _without_offset
    if "list<" in kind:
        of_element = _whole if kind.partition(": ")[2].startswith(INTEGERS) else _same
        return lambda values: [None if value is None else of_element(value) for value in values]
    return _whole if kind.startswith(INTEGERS) else _same


def _same(value: Any) -> Any:
    return value


def _whole(value: Any) -> Any:
    is_whole = type(value) is float and value.is_integer() and abs(value) < MAX_INTEGER
    return int(value) if is_whole else value


def _with_offset(value: Any) -> Any:
    time = _time(value)
    return value if time is None else time.isoformat()


def _without_offset(value: Any) -> Any:
    time = _time(value)
    return value if time is None else time.astimezone(UTC).replace(tzinfo=None).isoformat()


def _time(value: Any) -> datetime | None:
    """Of what a time feature takes: ISO 8601 text, in UTC where no zone is named, or seconds.

    None for one that no calendar has, which the shard refuses.
    """
    try:
        if isinstance(value, str):
            time = datetime.fromisoformat(value)
            return time if time.tzinfo else time.replace(tzinfo=UTC)
        return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        return None
