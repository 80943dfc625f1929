"""Memory and open files of routers and shards, looked at all along in a thread."""

from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from shardline.bench.load.processes import tree
from shardline.shards.core.errors import NotFound
from tests.chaos.oracle import Finding, FindingKind
from tests.chaos.served import Served
from tests.chaos.watch import Watch

LOOK_S = 1.0
MIB = 1 << 20
# MiB above what the largest process of that role had in the quiet at the start. A body of 32 MiB
# may cost ten times its size; the router's cache takes 64 MiB
GROWTH_MIB = {"router": 400, "shard": 100, "haproxy": 100, "controller": 100}
OPEN_FILES = 60  # more than at the start, once all is quiet again


@dataclass(slots=True)
class Peaks(Watch):
    """The largest resident memory by role, in MiB, between entering and leaving the block, and when
    it was so large."""

    served: Served
    clock: Callable[[], float]
    mib: dict[str, float] = field(default_factory=dict)
    at_s: dict[str, float] = field(default_factory=dict)

    def _watch(self) -> None:
        while not self._stopped.wait(LOOK_S):
            for role, used in memory(self.served).items():
                if used > self.mib.get(role, 0):
                    self.mib[role], self.at_s[role] = used, self.clock()


def memory(served: Served) -> dict[str, float]:
    """MiB of the largest process by role, now; of none once ``serve`` is gone."""
    found: dict[str, float] = defaultdict(float)
    with suppress(NotFound):
        for role, process in tree(served.pid):
            if role in GROWTH_MIB:
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    found[role] = max(found[role], process.memory_info().rss / MIB)
    return dict(found)


def open_files(served: Served) -> dict[str, int]:
    """Descriptors of the process by role that has most of them."""
    found: dict[str, int] = defaultdict(int)
    for role in GROWTH_MIB:
        for process in served.processes(role):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                found[role] = max(found[role], process.num_fds())
    return dict(found)


def grown(before: dict[str, float], peaks: Peaks) -> list[Finding]:
    """The roles whose memory went beyond ``GROWTH_MIB``."""
    return [
        Finding(
            kind=FindingKind.LEAK,
            text=f"{role}: {peaks.mib[role]:.0f} MiB, {before[role]:.0f} at the start",
            at_s=peaks.at_s[role],
        )
        for role, limit in GROWTH_MIB.items()
        if peaks.mib.get(role, 0) > before.get(role, 0) + limit
    ]


def left_open(before: dict[str, int], after: dict[str, int]) -> list[Finding]:
    """The roles that hold more files and sockets open than at the start."""
    return [
        Finding(
            kind=FindingKind.LEAK, text=f"{role}: {after[role]} open files, {count} at the start"
        )
        for role, count in before.items()
        if after.get(role, 0) > count + OPEN_FILES
    ]
