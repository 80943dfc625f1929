"""What happens beside the load: faults in their time, undone whatever happens, and a look at the
processes every second."""

import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from shardline.bench.load.changes import DONE, ChangeRunner, another_generation
from shardline.bench.load.processes import Sampler, Usage, router_process, shard_process
from shardline.bench.load.scenarios import CHANGES, Fault, FaultKind, Step
from shardline.bench.load.target import Target
from shardline.bench.load.writing import Writing
from shardline.shards.core.errors import InvalidInput

logger = logging.getLogger(__name__)

SAMPLE_S = 1.0  # between two looks at the processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something that was done, at_s seconds into the measured time."""

    at_s: float
    label: str


def surge_marks(step: Step) -> list[Mark]:
    """Where the rate of a step jumps."""
    marks = []
    for start, stop, factor in step.surges:
        marks.append(Mark(at_s=start * step.seconds, label=f"{factor:g} times the rate"))
        marks.append(Mark(at_s=stop * step.seconds, label="the rate as before"))
    return marks


@dataclass(slots=True, kw_only=True)
class FaultRunner:
    """Carries out the faults of a step when their time comes. ``addresses`` asks the endpoint
    where its shards listen now; ``close`` lets stalled processes go on."""

    pid: int
    shard: int
    addresses: Callable[[], dict[int, str | None]]
    marks: list[Mark] = field(default_factory=list)
    _due: list[tuple[float, Fault]] = field(default_factory=list)
    _stalled: list[tuple[float, psutil.Process]] = field(default_factory=list)
    _victims: list[psutil.Process] = field(default_factory=list)

    def arm(self, faults: tuple[Fault, ...], seconds: float) -> None:
        """Finds the victims before the load begins, so that nothing waits for them under it.

        Raises:
            NotFound: there is no such shard or router on this machine.
            InvalidInput: a stall that would outlast the measured time.
        """
        for fault in faults:
            if fault.at_share * seconds + fault.lasts_s >= seconds:
                raise InvalidInput(
                    "too short for this scenario",
                    field="--seconds",
                    expected=f"more than {fault.lasts_s / (1 - fault.at_share):g}",
                    got=f"{seconds:g}",
                )
            self._due.append((fault.at_share * seconds, fault))
            if fault.kind is FaultKind.RESTART_ROUTER:
                self._victims.append(router_process(self.pid))
            else:
                self._victims.append(shard_process(self.pid, self.addresses(), self.shard))

    def tick(self, at_s: float) -> None:
        """Does what is due at_s seconds into the measured time."""
        while self._due and self._due[0][0] <= at_s:
            _, fault = self._due.pop(0)
            self._do(fault, self._victims.pop(0), at_s)
        for until, process in list(self._stalled):
            if until <= at_s:
                process.send_signal(signal.SIGCONT)
                self._stalled.remove((until, process))
                self.marks.append(Mark(at_s=at_s, label=f"shard {self.shard} goes on"))

    def close(self) -> None:
        """No process is left stopped."""
        for _, process in self._stalled:
            try:
                process.send_signal(signal.SIGCONT)
            except psutil.NoSuchProcess:
                logger.warning("process %d ended while it was stopped", process.pid)
        self._stalled.clear()

    def _do(self, fault: Fault, victim: psutil.Process, at_s: float) -> None:
        if fault.kind is FaultKind.STALL_SHARD:
            victim.send_signal(signal.SIGSTOP)
            self._stalled.append((at_s + fault.lasts_s, victim))
            label = f"shard {self.shard} stalls"
        else:
            victim.send_signal(signal.SIGKILL)
            is_router = fault.kind is FaultKind.RESTART_ROUTER
            label = "router killed" if is_router else f"shard {self.shard} killed"
        self.marks.append(Mark(at_s=at_s, label=label))


class Watch:
    """Of one step. ``tick`` is called all along, ``close`` in any case.

    ``shard`` is the one that faults hit. An endpoint of another machine has nothing to look at.
    """

    def __init__(self, target: Target, step: Step, *, warm_up_s: float, shard: int) -> None:
        self._warm_up_s = warm_up_s
        self._until = step.seconds
        self._address = target.address
        self._sampler = Sampler(target.pid) if target.pid is not None else None
        self._faults: FaultRunner | None = None
        self._changes: ChangeRunner | None = None
        self._next_look = 0.0
        hits = tuple(fault for fault in step.faults if fault.kind not in CHANGES)
        changes = tuple(fault for fault in step.faults if fault.kind in CHANGES)
        if target.pid is not None and hits:
            self._faults = FaultRunner(pid=target.pid, shard=shard, addresses=self._addresses)
            self._faults.arm(hits, step.seconds)
        self.writing: Writing | None = None
        if step.write_rows_per_s:
            self.writing = Writing(
                address=target.write_address or target.address,
                dim=target.manifest.dim,
                model_version=target.manifest.model_version,
                rows_per_s=step.write_rows_per_s,
            )
            self.writing.check()
        if changes:
            other = another_generation(target.store, target.manifest)
            self._changes = ChangeRunner(store=target.store.root, generation=other)
            self._changes.arm(changes, step.seconds)

    @property
    def marks(self) -> list[Mark]:
        hits = self._faults.marks if self._faults is not None else []
        changes = self._changes.marks if self._changes is not None else []
        return [*hits, *(Mark(at_s=at_s, label=label) for at_s, label in changes)]

    def tick(self, elapsed: float) -> None:
        """``elapsed`` seconds since the first request was due, warm-up included."""
        at_s = elapsed - self._warm_up_s
        if at_s < 0 or at_s > self._until + SAMPLE_S:
            return
        if self._faults is not None:
            self._faults.tick(at_s)
        if self.writing is not None:
            self.writing.begin(at_s)
        if self._changes is not None:
            known = len(self._changes.marks)
            self._changes.tick(at_s)
            for _, label in self._changes.marks[known:]:
                if self.writing is not None and label.endswith(DONE):
                    self.writing.look_beside(label)
        if at_s >= self._next_look:
            self.look(at_s)
            self._next_look = at_s + SAMPLE_S

    def look(self, at_s: float) -> None:
        if self._sampler is not None:
            self._sampler.look(at_s)

    def usage(self) -> list[Usage]:
        return self._sampler.usage() if self._sampler is not None else []

    def finish(self) -> None:
        """After the load: every write is acknowledged, looked for, and undone."""
        if self.writing is not None:
            self.writing.end()

    def close(self) -> None:
        if self._faults is not None:
            self._faults.close()
        if self._changes is not None:
            self._changes.close()
        if self.writing is not None:
            self.writing.stop()

    def _addresses(self) -> dict[int, str | None]:
        with self._address.client() as client:
            return {shard["shard"]: shard["address"] for shard in client.status()["shards"]}
