"""``cap``, ``boost`` and ``diversify`` of a body: checked, and made what is done to the results.

Whatever is wrong is refused by its path. Columns and sizes of pools are checked later.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

from shardline.router.http.problems import unknown_field, wrong_type
from shardline.router.rearrange.rearrangement import (
    MAX_BOOSTS,
    MAX_CAPS,
    MAX_NAME_CHARACTERS,
    Boost,
    Cap,
    Rearrangement,
)
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.filter_language import shown
from shardline.shards.core.schema import MAX_K

CAP_FIELDS = ("column", "max")
BOOST_FIELDS = ("column", "weight", "half_life_days", "pool")
DIVERSIFY_FIELDS = ("lambda", "pool")

Read = TypeVar("Read")


def read_rearrangement(cap: Any, boost: Any, diversify: Any) -> Rearrangement | None:
    """None where nothing is asked for: all three are None, or empty lists.

    Raises:
        InvalidInput: not of the form that docs/RESULTS.md gives.
    """
    if cap is None and boost is None and diversify is None:
        return None
    pools: list[tuple[str, int]] = []
    caps = _each("cap", cap, MAX_CAPS, _cap)
    _refuse_twice([each.column for each in caps])
    boosts = _each("boost", boost, MAX_BOOSTS, lambda value, path: _boost(value, path, pools))
    relevance = None if diversify is None else _relevance(diversify, pools)
    if not caps and not boosts and relevance is None:
        return None
    return Rearrangement(
        caps=tuple(caps), boosts=tuple(boosts), relevance=relevance, named_pools=tuple(pools)
    )


def _each(field: str, given: Any, most: int, read: Callable[[Any, str], Read]) -> list[Read]:
    """One map, or a list of up to ``most``."""
    if given is None:
        return []
    if not isinstance(given, list):
        return [read(given, field)]
    if len(given) > most:
        raise InvalidInput("too many", field=field, expected=f"at most {most}", got=str(len(given)))
    return [read(value, f"{field}[{place}]") for place, value in enumerate(given)]


def _cap(value: Any, path: str) -> Cap:
    given = _map(value, path, CAP_FIELDS, ("column", "max"))
    most, field = given["max"], f"{path}.max"
    if type(most) is not int:
        raise wrong_type(field, "an integer", most)
    if not 1 <= most <= MAX_K:
        raise InvalidInput("out of range", field=field, expected=f"1 to {MAX_K}", got=shown(most))
    column = _column(given, path)
    if column.startswith("$"):
        expected = "a column that filters can name: none that begins with $"
        raise InvalidInput(
            "not to be capped", field=f"{path}.column", expected=expected, got=shown(column)
        )
    return Cap(column=column, most=most, field=path)


def _boost(value: Any, path: str, pools: list[tuple[str, int]]) -> Boost:
    given = _map(value, path, BOOST_FIELDS, ("column", "weight"))
    half_life = given.get("half_life_days")
    if half_life is not None:
        half_life = _number(half_life, f"{path}.half_life_days")
        if half_life <= 0:
            raise InvalidInput(
                "out of range",
                field=f"{path}.half_life_days",
                expected="a number above 0",
                got=shown(half_life),
            )
    _take_pool(given, path, pools)
    return Boost(
        column=_column(given, path),
        weight=_number(given["weight"], f"{path}.weight"),
        half_life_days=half_life,
        field=path,
    )


def _relevance(value: Any, pools: list[tuple[str, int]]) -> float:
    given = _map(value, "diversify", DIVERSIFY_FIELDS, ("lambda",))
    relevance = _number(given["lambda"], "diversify.lambda")
    if not 0 <= relevance <= 1:
        raise InvalidInput(
            "out of range", field="diversify.lambda", expected="0 to 1", got=shown(relevance)
        )
    _take_pool(given, "diversify", pools)
    return relevance


def _map(value: Any, path: str, known: tuple[str, ...], needed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_type(path, f"a map with {' and '.join(needed)}", value)
    for name in value:
        if name not in known:
            text = name if isinstance(name, str) else repr(name)
            raise unknown_field(f"{path}.{text}", known)
    for name in needed:
        if name not in value:
            raise InvalidInput(
                "missing", field=f"{path}.{name}", expected=f"a map with {' and '.join(needed)}"
            )
    return value


def _column(given: dict[str, Any], path: str) -> str:
    column, field = given["column"], f"{path}.column"
    if not isinstance(column, str):
        raise wrong_type(field, "the name of an attribute", column)
    if len(column) > MAX_NAME_CHARACTERS:
        raise InvalidInput(
            "name too long",
            field=field,
            expected=f"at most {MAX_NAME_CHARACTERS} characters",
            got=str(len(column)),
        )
    return column


def _number(value: Any, field: str) -> float:
    if type(value) not in (int, float):
        raise wrong_type(field, "a number", value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidInput(
            "not a finite number", field=field, expected="a finite number", got=shown(value)
        )
    return number


def _take_pool(given: dict[str, Any], path: str, pools: list[tuple[str, int]]) -> None:
    pool = given.get("pool")
    if pool is None:
        return
    if type(pool) is not int:
        raise wrong_type(f"{path}.pool", "an integer", pool)
    pools.append((f"{path}.pool", pool))


def _refuse_twice(columns: list[str]) -> None:
    for place, column in enumerate(columns):
        if column in columns[:place]:
            raise InvalidInput(
                "a column comes twice",
                field=f"cap[{place}].column",
                expected="each column once",
                got=shown(column),
            )
