"""Faults of processes: killed, stopped, starved of CPU; and what each may cost callers.

A fault is made anew each time, from a whole cluster, in which it finds its victim, and a generator
of random numbers. ``inject`` does it, ``undo`` takes its cause away after ``held_s``, ``is_whole``
says whether the processes that it hit are replaced; the runner looks at everything else.
"""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import psutil

from shardline.shards.core.errors import NotPrimary
from tests.chaos.oracle import Finding, FindingKind
from tests.chaos.served import Served
from tests.chaos.windows import DEADLINE, GONE, TIMED_OUT, UNAVAILABLE, Allowance


class Fault(Protocol):
    """See the module's text. findings: what the fault itself saw that must not be."""

    held_s: float
    findings: list[Finding]

    def inject(self) -> None: ...

    def undo(self) -> None: ...

    def is_whole(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of fault. meanwhile: what a restart that is part of it may cost for the time that the
    allowance gives, at its beginning and at its end."""

    name: str
    allowance: Allowance
    make: Callable[[Served, random.Random], Fault]
    meanwhile: Allowance | None = None


@dataclass(slots=True, kw_only=True)
class Killed:
    """SIGKILL."""

    victim: psutil.Process
    held_s: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    def inject(self) -> None:
        self.victim.kill()

    def undo(self) -> None:
        """A kill cannot be undone."""

    def is_whole(self) -> bool:
        return is_gone(self.victim)


@dataclass(slots=True, kw_only=True)
class Stopped:
    """SIGSTOP, SIGCONT at the end."""

    victim: psutil.Process
    held_s: float
    findings: list[Finding] = field(default_factory=list)

    def inject(self) -> None:
        self.victim.suspend()

    def undo(self) -> None:
        with suppress(psutil.NoSuchProcess):  # who watches it may have killed it
            self.victim.resume()

    def is_whole(self) -> bool:
        return True


@dataclass(slots=True, kw_only=True)
class AllStopped:
    """Every shard stopped: after a while ``/readyz`` has to say that nothing can be answered."""

    served: Served
    held_s: float
    findings: list[Finding] = field(default_factory=list)
    _victims: list[psutil.Process] = field(default_factory=list)

    def inject(self) -> None:
        self._victims = self.served.processes("shard")
        for victim in self._victims:
            victim.suspend()

    def undo(self) -> None:
        is_ready = self.served.is_ready()
        for victim in self._victims:
            victim.resume()
        if is_ready:
            text = f"/readyz says ready with all shards stopped for {self.held_s:.1f} s"
            self.findings.append(Finding(kind=FindingKind.UNTRUTHFUL, text=text))

    def is_whole(self) -> bool:
        return True


@dataclass(slots=True, kw_only=True)
class AllKilled:
    """SIGKILL to every shard."""

    victims: list[psutil.Process]
    held_s: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    def inject(self) -> None:
        for victim in self.victims:
            victim.kill()

    def undo(self) -> None:
        """A kill cannot be undone."""

    def is_whole(self) -> bool:
        return all(map(is_gone, self.victims))


BURN = "import os, sys, time\nend = time.time() + float(sys.argv[1])\nwhile time.time() < end: pass"


@dataclass(slots=True, kw_only=True)
class Starved:
    """Twice as many busy processes as there are cores. They end by themselves, too."""

    held_s: float
    findings: list[Finding] = field(default_factory=list)
    _burners: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def inject(self) -> None:
        command = [sys.executable, "-I", "-c", BURN, str(self.held_s + 5)]
        count = 2 * len(os.sched_getaffinity(0))
        self._burners = [subprocess.Popen(command) for _ in range(count)]

    def undo(self) -> None:
        for burner in self._burners:
            burner.kill()
            burner.wait()

    def is_whole(self) -> bool:
        return True


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def one_of(served: Served, role: str, rng: random.Random) -> psutil.Process:
    """One of the processes of a role."""
    return rng.choice(served.processes(role))


def killed(role: str) -> Callable[[Served, random.Random], Fault]:
    return lambda served, rng: Killed(victim=one_of(served, role, rng))


def stopped(role: str, longest_s: float) -> Callable[[Served, random.Random], Fault]:
    return lambda served, rng: Stopped(
        victim=one_of(served, role, rng), held_s=rng.uniform(0.5, longest_s)
    )


# of writes to a shard without a process that takes them; whether they were applied is not known
NO_PRIMARY = frozenset({NotPrimary.code, UNAVAILABLE, DEADLINE})
# nothing that callers notice, but for a while nobody repairs anything
UNNOTICED = Allowance(whole_within_s=60)
# a router that is gone: 3 s or more of imports, on a busy machine three times as long
NO_ROUTER = Allowance(
    whole_within_s=40, errors=GONE, errors_for_s=25, partial=True, writes=NO_PRIMARY
)
NO_HAPROXY = Allowance(
    whole_within_s=60, errors=GONE, errors_for_s=2, writes=frozenset({UNAVAILABLE})
)

NO_SHARDS = Allowance(
    whole_within_s=40,
    errors=frozenset({UNAVAILABLE, DEADLINE}),
    partial=True,
    writes=NO_PRIMARY,
    answer_within_s=8,
)

PROCESS_KINDS = (
    Kind(
        name="shard killed",
        allowance=Allowance(whole_within_s=30, partial=True, writes=NO_PRIMARY),
        make=killed("shard"),
    ),
    Kind(
        name="shard stopped",
        allowance=Allowance(whole_within_s=15, partial=True, writes=NO_PRIMARY),
        make=stopped("shard", 8),
    ),
    Kind(
        name="all shards killed",
        allowance=NO_SHARDS,
        make=lambda served, rng: AllKilled(victims=served.processes("shard")),
    ),
    Kind(
        name="all shards stopped",
        allowance=NO_SHARDS,
        make=lambda served, rng: AllStopped(served=served, held_s=rng.uniform(2.5, 6)),
    ),
    Kind(name="router killed", allowance=NO_ROUTER, make=killed("router")),
    Kind(
        name="router stopped",
        # it may be killed by Serve, whose health checks it does not answer
        allowance=Allowance(
            whole_within_s=40,
            errors=GONE | {DEADLINE, TIMED_OUT},
            errors_for_s=25,
            partial=True,
            writes=NO_PRIMARY,
            answer_within_s=16,  # HAProxy gives up on it a little after router.max_timeout_ms
        ),
        make=stopped("router", 12),
    ),
    Kind(name="controller killed", allowance=UNNOTICED, make=killed("controller")),
    Kind(name="controller stopped", allowance=UNNOTICED, make=stopped("controller", 10)),
    Kind(name="serve itself stopped", allowance=UNNOTICED, make=stopped("driver", 10)),
    Kind(
        name="HAProxy stopped",
        allowance=Allowance(whole_within_s=5, answer_within_s=10),  # requests wait for it
        make=stopped("haproxy", 4),
    ),
    Kind(name="HAProxy killed", allowance=NO_HAPROXY, make=killed("haproxy")),
    Kind(
        name="HAProxy's manager killed",
        allowance=NO_HAPROXY,
        make=killed("haproxy manager"),
    ),
    Kind(name="Serve's controller killed", allowance=UNNOTICED, make=killed("serve controller")),
    Kind(name="Serve's proxy killed", allowance=UNNOTICED, make=killed("serve proxy")),
    Kind(
        name="full CPU",
        allowance=Allowance(
            whole_within_s=10,
            errors=frozenset({DEADLINE}),
            partial=True,
            writes=frozenset({DEADLINE}),
            answer_within_s=15,
        ),
        make=lambda served, rng: Starved(held_s=rng.uniform(3, 6)),
    ),
)
