"""What is asked of one column's values, in the column's own type: plain data, compiled by ``bind``.

A test says which of the values that are not missing satisfy it. Missing ones, list elements and
negation are up to ``ColumnTest``.
"""

from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class No:
    """No value: 2.5 among integers, say."""


@dataclass(frozen=True, slots=True)
class Every:
    """Every value: integers below a number that their type does not reach, say."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Values for which Arrow's ``function`` (equal, less, ...) of them and ``value`` is true."""

    function: str
    value: pa.Scalar


@dataclass(frozen=True, slots=True)
class OneOf:
    """Values that ``values`` has."""

    values: pa.Array


@dataclass(frozen=True, slots=True)
class Substring:
    """Texts, or bytes, in which ``pattern`` occurs."""

    pattern: str | bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """Rows that have a value at all, if an empty list or NaN."""


Test: TypeAlias = No | Every | Compared | OneOf | Substring | Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnTest:
    """A test of the column at ``place`` of a table; of the item ids where it is None.

    or_missing: it holds for missing values, too, and for lists with a null among their elements.
    negated: it holds where it otherwise would not.
    """

    place: int | None
    test: Test
    or_missing: bool = False
    negated: bool = False
