"""One fact about this machine, and whether a command can work with it.

A check is a value: functions here and beside this module find facts and judge them, ``enforce``
refuses with the first that failed, and `shardline doctor` prints all of them. So a command never
refuses what doctor accepts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from shardline.shards.core.errors import ShardlineError


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was found; ``error`` is what a command that needs it ends with, None unless it failed.

    ``text`` of a warning says what will be different, and what to do.
    """

    name: str
    verdict: Verdict
    text: str
    error: ShardlineError | None = None

    def __str__(self) -> str:
        return f"{self.verdict:<5} {self.name}: {self.text}"


def passed(name: str, text: str) -> Check:
    return Check(name=name, verdict=Verdict.OK, text=text)


def warned(name: str, text: str) -> Check:
    return Check(name=name, verdict=Verdict.WARN, text=text)


def failed(name: str, error: ShardlineError) -> Check:
    return Check(name=name, verdict=Verdict.FAIL, text=str(error), error=error)


def enforce(checks: Iterable[Check]) -> list[str]:
    """The texts of the warnings. Raises the error of the first check that failed."""
    warnings = []
    for check in checks:
        if check.error is not None:
            raise check.error
        if check.verdict is Verdict.WARN:
            warnings.append(check.text)
    return warnings


def mib(size: int) -> str:
    """Bytes for people: MiB below 10 GiB, GiB above; rounded down, so that no room is invented."""
    return f"{size >> 20:,} MiB" if size < 10 << 30 else f"{size >> 30:,} GiB"
