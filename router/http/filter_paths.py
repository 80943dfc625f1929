"""Where in the filter of a request a condition stands that a shard refused.

Shards get filters in a canonical form, in which conditions stand elsewhere, and name the column and
the operator alone. The request has both too, and the value that the shard shows.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.filter_language import AND, NOT, OR, Operator, path_of, shown

_FIELD = re.compile(r"(filter(?:\[([0-9]+)\])?)\..+", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Given:
    """A condition as it was given. below: the path of its column; path: its own."""

    column: str
    operator: str
    value: Any
    below: str
    path: str


def at_its_place(error: InvalidInput, given: Any) -> InvalidInput:
    """A shard's complaint with the path of what it is about in ``given``, the ``filter`` of a
    request that was read without a complaint; any other error as it is."""
    found = _FIELD.fullmatch(error.field or "")
    if found is None:
        return error
    root, query = found[1], found[2]
    own = given[int(query)] if query is not None and isinstance(given, list) else given
    if not isinstance(own, dict):
        return error
    path = _path_of(error, root, list(_conditions(own, root)))
    if path is None:
        return error
    return InvalidInput(
        error.message, field=path, expected=error.expected, got=error.got, hint=error.hint
    )


def _path_of(error: InvalidInput, root: str, conditions: list[_Given]) -> str | None:
    """Of conditions alike the first: what is wrong with it is wrong with the others."""
    alike = []
    for each in conditions:
        column = path_of(root, each.column)
        if error.field == column:  # there is no such column
            return each.below
        if error.field == f"{column}.{each.operator}":
            alike.append(each)
    with_value = (each for each in alike if error.got in list(_shown(each.value)))
    chosen = next(with_value, alike[0] if alike else None)
    return None if chosen is None else chosen.path


def _shown(value: Any) -> Iterator[str]:
    for each in value if isinstance(value, list | tuple) else (value,):
        is_whole = isinstance(each, float) and each.is_integer()
        yield shown(int(each) if is_whole else each)  # as the canonical form has it


def _conditions(part: dict[str, Any], path: str) -> Iterator[_Given]:
    for key, inner in part.items():
        below = path_of(path, key)
        if key in (AND, OR):
            for number, each in enumerate(inner):
                yield from _conditions(each, f"{below}[{number}]")
        elif key == NOT:
            yield from _conditions(inner, below)
        elif isinstance(inner, dict):
            yield from _operators(key, inner, below, below)
        else:
            yield _Given(key, Operator.EQ, inner, below, below)


def _operators(column: str, part: dict[str, Any], below: str, path: str) -> Iterator[_Given]:
    for key, inner in part.items():
        inside = path_of(path, key)
        if key == NOT:
            yield from _operators(column, inner, below, inside)
        else:
            yield _Given(column, key, inner, below, inside)
