"""Faults that end ``serve`` itself; a supervisor, here the fault, starts it again.

Raylet or GCS killed: the serving process notices, ends in order with exit code 4, and leaves
nothing. Killed with -9, the next start finds what was left and ends it.
"""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.chaos.faults import NO_PRIMARY, Fault, Kind
from tests.chaos.oracle import Finding, FindingKind
from tests.chaos.served import Served, traces_of
from tests.chaos.windows import DEADLINE, GONE, Allowance

UNAVAILABLE_CODE = 4  # the exit code of shards.core.errors.Unavailable
NOTICED_S = 60.0  # until serve has ended after Ray's own processes died
PORT_FREE_S = 5.0


@dataclass(slots=True, kw_only=True)
class Ended:
    """Kills a process below ``serve`` or ``serve`` itself, role None, and starts it again."""

    served: Served
    role: str | None
    held_s: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    def inject(self) -> None:
        served, pid = self.served, self.served.pid
        if self.role is None:
            served.signal(signal.SIGKILL)
            served.ended(PORT_FREE_S)
        else:
            killed = time.monotonic()
            served.processes(self.role)[0].kill()
            code = served.ended(NOTICED_S)
            after = time.monotonic() - killed
            if code != UNAVAILABLE_CODE:
                text = f"{self.role} killed: serve's exit code is {code} after {after:.1f} s"
                self.findings.append(Finding(kind=FindingKind.NOT_WHOLE, text=text))
            if code is None:
                served.down()
            for trace in traces_of(pid):
                text = f"{self.role} killed: left {trace}"
                self.findings.append(Finding(kind=FindingKind.LEAK, text=text))
        served.start()
        for trace in traces_of(pid):
            text = f"left of the serve before, beside the next: {trace}"
            self.findings.append(Finding(kind=FindingKind.LEAK, text=text))

    def undo(self) -> None:
        """It was started again."""

    def is_whole(self) -> bool:
        return True


def ended(role: str | None) -> Callable[[Served, random.Random], Fault]:
    return lambda served, rng: Ended(served=served, role=role)


# a supervisor's restart: as long as serve takes to end and to start
RESTART = Allowance(
    whole_within_s=120,
    errors=GONE | {DEADLINE},
    partial=True,
    writes=NO_PRIMARY,
    answer_within_s=16,
)
END_KINDS = (
    Kind(name="raylet killed and serve started again", allowance=RESTART, make=ended("raylet")),
    Kind(name="GCS killed and serve started again", allowance=RESTART, make=ended("gcs")),
    Kind(name="serve killed with -9 and started again", allowance=RESTART, make=ended(None)),
)
