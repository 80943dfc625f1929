"""What a part has to work with, and where it writes down what it finds, at once."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shardline.bench.gpu.card import Ask, Card, FloatArray, time_calls, timing
from shardline.bench.gpu.floors import GIB, Floor, Plan, Rates
from shardline.bench.gpu.part_outcome import Check, MemoryUse, Outcome, Status, Timing
from shardline.bench.gpu.sizes import Sizes
from shardline.shards.core.errors import ConfigError

STOPPED = "stopped before its end"


@dataclass(slots=True)
class Findings:
    """Collects an Outcome; ``keep`` is called with what there is after each finding, so that a
    part that is killed leaves what it had."""

    part: str
    keep: Callable[[Outcome], None]
    timings: list[Timing] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    memory: list[MemoryUse] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def outcome(self, status: Status = Status.NOT_RUN, reason: str = STOPPED) -> Outcome:
        return Outcome(
            part=self.part,
            status=status,
            reason=reason,
            seconds=round(time.monotonic() - self.started, 2),
            timings=tuple(self.timings),
            checks=tuple(self.checks),
            memory=tuple(self.memory),
            notes=dict(self.notes),
        )

    def time(self, found: Timing) -> None:
        self.timings.append(found)
        self.keep(self.outcome())

    def check(self, name: str, passed: bool, *, expected: str, got: str) -> None:
        self.checks.append(Check(name=name, passed=bool(passed), expected=expected, got=got))
        self.keep(self.outcome())

    def use(self, what: str, plan: Plan, used: int) -> None:
        """Bytes as planned and as used, and a check that the plan holds."""
        self.memory.append(MemoryUse(what=what, planned=plan.bytes, worst=plan.worst, used=used))
        self.check(
            f"{what}: memory within the plan",
            used <= plan.held,
            expected=f"at most {plan.held / GIB:.3f} GiB",
            got=f"{used / GIB:.3f} GiB",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every part is given."""

    card: Card
    sizes: Sizes
    rates: Rates
    seconds_left: Callable[[], float]

    def need(self, plan: Plan) -> None:
        """Refuses what does not fit.

        Raises:
            ConfigError: with the arithmetic.
        """
        refusal = plan.refusal(self.card.free_bytes())
        if refusal is not None:
            raise ConfigError(refusal)

    def need_seconds(self, seconds: float, what: str) -> None:
        """Refuses what would not end in time.

        Raises:
            ConfigError: with the arithmetic.
        """
        left = self.seconds_left()
        if seconds > left:
            raise ConfigError(
                f"{what} needs {seconds:.0f} s more; {left:.0f} s are left; give it more --minutes"
            )


def time_search(
    work: Work,
    findings: Findings,
    ask: Ask,
    queries: FloatArray,
    *,
    what: str,
    rows: int,
    recall: float | None,
    floor_of: Callable[[int], Floor],
) -> None:
    """Times a search for every batch size; each call asks other queries than the one before."""
    for batch in work.sizes.batches:
        batches = [queries[at : at + batch] for at in range(0, len(queries) - batch + 1, batch)]

        def call(number: int, batches: list[FloatArray] = batches) -> object:
            return ask(batches[number % len(batches)])

        taken = time_calls(call, seconds=work.sizes.seconds, fewest=work.sizes.fewest)
        floor = floor_of(batch)
        findings.time(
            timing(
                taken,
                what=what,
                rows=rows,
                batch=batch,
                k=work.sizes.k,
                recall=recall,
                floor_ms=floor.ms,
                bound_by=floor.bound_by,
            )
        )
