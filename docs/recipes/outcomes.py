"""What a recipe must show: measured values beside their bounds, as the rows of a Markdown table.

A bound is written as it is read: ``= 0``, ``<= 2``, ``>= 0.9``, ``= 100 %``. The test of the
recipes reads the same rows from what a recipe prints and from the table in README.md.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

HEADER = ("outcome", "must be", "measured")
BOUND = re.compile(r"(=|<=|>=) (-?[0-9.]+)( %)?")
ROW = re.compile(r"^\| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
COMPARED = {
    "=": lambda value, limit: value == limit,
    "<=": lambda value, limit: value <= limit,
    ">=": lambda value, limit: value >= limit,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """``measured`` in the unit of its bound, as it is shown: a percentage where that is one."""

    name: str
    must_be: str
    measured: str

    @property
    def holds(self) -> bool:
        """Whether the value that is shown is within the bound."""
        match = BOUND.fullmatch(self.must_be)
        assert match is not None, f"not a bound: {self.must_be}"
        value = float(self.measured.removesuffix(" %"))
        return bool(COMPARED[match[1]](value, float(match[2])))

    @property
    def is_exact(self) -> bool:
        """Whether only one value is allowed."""
        return self.must_be.startswith("=")


def measured(name: str, must_be: str, value: float) -> Outcome:
    """``value``: of a percentage the share, 0 to 1. Shown with four digits, a share as a percentage
    with one decimal."""
    if must_be.endswith("%"):
        percent = round(value * 100, 1)
        if 0 < value < 1:  # nearly all is not all
            percent = min(max(percent, 0.1), 99.9)
        return Outcome(name, must_be, f"{percent:.4g} %")
    return Outcome(name, must_be, f"{value:.4g}")


def table(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield f"| {' | '.join(HEADER)} |"
    yield "|---|---|---|"
    for each in outcomes:
        yield f"| {each.name} | {each.must_be} | {each.measured} |"


def read_table(text: str) -> list[Outcome]:
    """The rows of the tables of outcomes in ``text``, in order."""
    return [Outcome(*row) for row in ROW.findall(text) if row != HEADER]
