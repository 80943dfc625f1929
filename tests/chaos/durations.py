"""How long each kind of fault lasted, as a table for docs/OPERATIONS.md and as JSON. Pure."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.chaos.windows import OK, Outcome, Window

HEAD = (
    "fault",
    "times",
    "held for",
    "requests without an answer",
    "partial answers",
    "writes without an acknowledgement",
    "whole after",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lasted:
    """One fault. held_s: from its beginning until its cause was gone; 0 for a kill.

    errors_s, partial_s, refused_s: from its beginning to the last query without an answer, partial
    answer and write without an acknowledgement, 0 without any; errors, partial, refused: how many.
    whole_s: from when the cause was gone.
    """

    name: str
    held_s: float
    errors_s: float
    partial_s: float
    refused_s: float
    whole_s: float
    errors: int
    partial: int
    refused: int


def lasted(window: Window, outcomes: Iterable[Outcome]) -> Lasted:
    """What callers saw of one fault; ``outcomes`` of the whole run."""
    inside = [each for each in outcomes if window.overlaps(each)]
    errors = [each.ended_s for each in inside if each.code != OK and not each.is_write]
    refused = [each.ended_s for each in inside if each.code != OK and each.is_write]
    partial = [each.ended_s for each in inside if each.code == OK and each.missing]
    return Lasted(
        name=window.name,
        held_s=window.undone_s - window.began_s,
        errors_s=max(errors, default=window.began_s) - window.began_s,
        partial_s=max(partial, default=window.began_s) - window.began_s,
        refused_s=max(refused, default=window.began_s) - window.began_s,
        whole_s=window.whole_s - window.undone_s,
        errors=len(errors),
        partial=len(partial),
        refused=len(refused),
    )


def table(rows: Sequence[Lasted]) -> str:
    """Markdown, a row per kind in the order of their names: medians, the largest in brackets."""
    by_name: dict[str, list[Lasted]] = defaultdict(list)
    for row in rows:
        by_name[row.name].append(row)
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for name, same in sorted(by_name.items()):
        cells = [_seconds([getattr(row, each) for row in same]) for each in FIGURES]
        lines.append(f"| {name} | {len(same)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


FIGURES = ("held_s", "errors_s", "partial_s", "refused_s", "whole_s")


def as_json(rows: Sequence[Lasted]) -> list[dict[str, Any]]:
    """A record per fault, in the order they came; null for what never ended."""
    return [{name: _plain(value) for name, value in asdict(row).items()} for row in rows]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3) if math.isfinite(value) else None
    return value


def _seconds(values: Sequence[float]) -> str:
    middle, largest = statistics.median(values), max(values)
    if largest < 0.05:
        return "none"
    if math.isinf(middle):
        return "never"
    return f"{middle:.1f} s" if len(values) == 1 else f"{middle:.1f} s ({largest:.1f})"
