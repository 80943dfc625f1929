"""What a part of the check found: timings, checks, memory; as plain data and as JSON.

One file per part, written to a temporary name and renamed, so that an interrupted check goes on
with the parts that are complete.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from shardline.shards.core.errors import DataError


class Status(StrEnum):
    RAN = "ran"
    FAILED = "failed"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One operation, timed on the host's clock, data in and results out included.

    ``floor_ms``: what its bytes or its arithmetic cost at the rates that the card showed in the
    same check. ``bound_by`` says which of the two is larger.
    """

    what: str
    rows: int
    batch: int  # queries, or examples of a training step
    k: int  # 0: not a search
    p50_ms: float
    best_ms: float
    p99_ms: float | None  # None: fewer than 100 samples
    samples: int
    qps: float  # batch / p50
    recall: float | None
    floor_ms: float
    bound_by: str  # "bandwidth" or "arithmetic"

    @property
    def times_floor(self) -> float:
        return self.p50_ms / self.floor_ms if self.floor_ms else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A claim about the card or the library, and what was found."""

    name: str
    passed: bool
    expected: str
    got: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes on the card: as planned before loading, and as the driver counted them after."""

    what: str
    planned: int
    worst: int  # at the worst moment, with headroom: what must be free before it begins
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One part. ``reason`` is empty if it ran and nothing is to be said."""

    part: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    timings: tuple[Timing, ...] = ()
    checks: tuple[Check, ...] = ()
    memory: tuple[MemoryUse, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether a later run need not repeat it."""
        return self.status is Status.RAN

    @property
    def passed(self) -> bool:
        return self.status is not Status.FAILED and all(check.passed for check in self.checks)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome as JSON types; timings with ``times_floor``."""
    plain = asdict(outcome)
    for written, timing in zip(plain["timings"], outcome.timings, strict=True):
        written["times_floor"] = round(timing.times_floor, 3)
    return plain


def from_json(plain: Mapping[str, Any]) -> Outcome:
    """The outcome that ``as_json`` wrote.

    Raises:
        KeyError, TypeError, ValueError: something else.
    """
    names = {each.name for each in fields(Timing)}
    return Outcome(
        part=plain["part"],
        status=Status(plain["status"]),
        reason=plain["reason"],
        seconds=plain["seconds"],
        timings=tuple(
            Timing(**{name: value for name, value in each.items() if name in names})
            for each in plain["timings"]
        ),
        checks=tuple(Check(**each) for each in plain["checks"]),
        memory=tuple(MemoryUse(**each) for each in plain["memory"]),
        notes=dict(plain["notes"]),
    )


def save(folder: Path, outcome: Outcome, setup: Mapping[str, Any]) -> None:
    """Writes ``folder``/PART.json: complete or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{outcome.part}.json", {"setup": dict(setup), **as_json(outcome)})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    with temporary.open("w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def load(folder: Path, part: str, setup: Mapping[str, Any]) -> Outcome | None:
    """The outcome of an earlier run; None if there is none.

    Raises:
        DataError: the file is damaged, or of another card, version or size than ``setup``.
    """
    path = folder / f"{part}.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        found, outcome = dict(content["setup"]), from_json(content)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            "a result of an earlier run cannot be read",
            field=str(path),
            expected="what the check writes",
            got=f"{type(error).__name__}: {error}",
            hint="delete the file, or use another --out",
        ) from error
    different = [name for name in setup if found.get(name) != setup[name]]
    if different:
        raise DataError(
            "a result of an earlier run is of another set-up",
            field=str(path),
            expected=", ".join(f"{name} {setup[name]}" for name in different),
            got=", ".join(f"{name} {found.get(name)}" for name in different),
            hint="use another --out, or --fresh to begin anew",
        )
    return outcome
