"""Does the faults one step after another, waits until the cluster is whole, notes the windows.

Whole: every watched role has as many processes as at the start, none of those that were hit among
them; the router is connected to every shard; the fault itself says so; and each honest client has
had a full answer to each kind of query, and each writer an acknowledgement of each kind of write,
since the last that was not one, for ``QUIET_S``.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from tests.chaos.askers import Log
from tests.chaos.durations import Lasted, lasted
from tests.chaos.faults import Fault, Kind
from tests.chaos.oracle import Finding, FindingKind
from tests.chaos.schedule import Step
from tests.chaos.served import Served
from tests.chaos.windows import Window

POLL_S = 0.2
QUIET_S = 1.0
GIVE_UP_S = 150.0  # a cluster that is not whole by then never will be


class NeverWhole(Exception):
    """A fault that lasts: nothing after it would mean anything."""


@dataclass(slots=True)
class Runner:
    """needed: who must have had an answer to what. windows: for judging. lasted: of the steps with
    a single fault."""

    served: Served
    log: Log
    clock: Callable[[], float]
    needed: Set[tuple[str, str]]
    windows: list[Window] = field(default_factory=list)
    lasted: list[Lasted] = field(default_factory=list)
    _census: Counter[str] = field(default_factory=Counter)

    def start(self) -> None:
        """Takes the cluster as it is now for what a whole one looks like."""
        self._wait_for_answers(self.clock())
        self._census = self.served.census()

    def do(self, step: Step, kinds: dict[str, Kind]) -> None:
        """Raises NeverWhole."""
        time.sleep(step.pause_s)
        chosen = [kinds[name] for name in step.names]
        faults = [
            kind.make(self.served, random.Random(seed))
            for kind, seed in zip(chosen, step.seeds, strict=True)
        ]
        place, began = len(self.log.outcomes), self.clock()
        undone = self._inject(faults, chosen)
        whole = self._wait(faults, place, undone)
        for kind in chosen:
            window = Window(
                name=kind.name,
                allowance=kind.allowance,
                began_s=began,
                undone_s=undone,
                whole_s=whole,
            )
            self.windows.append(window)
        if len(chosen) == 1:
            self.lasted.append(lasted(self.windows[-1], self.log.since(place)))
        names = " and ".join(step.names)
        for finding in (each for fault in faults for each in fault.findings):
            self.log.report(replace(finding, at_s=began, during=names))
        after = "never" if whole == math.inf else f"{whole - undone:.1f} s"
        print(f"{began:7.1f} s  {names}: held {undone - began:.1f} s, whole after {after}")
        if whole == math.inf:
            raise NeverWhole(f"{names}: {self._why()}")

    def _inject(self, faults: Sequence[Fault], kinds: Sequence[Kind]) -> float:
        """Does all faults, waits, undoes them; when the last was undone."""
        with ExitStack() as stack:
            for fault, kind in zip(faults, kinds, strict=True):
                stack.callback(self._undo, fault, kind)
                self._meanwhile(kind)
                fault.inject()
            held = max(fault.held_s for fault in faults)
            if held:
                time.sleep(held)
        return self.clock()

    def _undo(self, fault: Fault, kind: Kind) -> None:
        if fault.held_s:
            self._meanwhile(kind)
        fault.undo()

    def _meanwhile(self, kind: Kind) -> None:
        """A restart that is part of the fault begins now, and is granted its whole time."""
        if kind.meanwhile is not None:
            now = self.clock()
            window = Window(
                name=f"a restart in {kind.name}",
                allowance=kind.meanwhile,
                began_s=now,
                undone_s=now,
                whole_s=now + kind.meanwhile.whole_within_s,
            )
            self.windows.append(window)

    def _wait(self, faults: Sequence[Fault], place: int, undone: float) -> float:
        """When the cluster was whole, on the run's clock; inf: it is not."""
        structure: float | None = None
        while self.clock() < undone + GIVE_UP_S:
            looked = self.clock()  # a look at all processes takes a while
            if structure is None and self._is_structured(faults):
                structure = looked
            last_bad = self._last_bad(place)
            if structure is not None:
                whole = max(structure, last_bad, undone)
                if self.clock() > whole + QUIET_S and self._all_full_since(place, last_bad):
                    if self._is_structured(faults):
                        return whole
                    structure = None
            time.sleep(POLL_S)
        return math.inf

    def _is_structured(self, faults: Sequence[Fault]) -> bool:
        return (
            all(fault.is_whole() for fault in faults)
            and not self._census - self.served.census()
            and self.served.is_connected()
        )

    def _last_bad(self, place: int) -> float:
        bad = [each.ended_s for each in self.log.since(place) if not each.is_full]
        return max(bad, default=0.0)

    def _all_full_since(self, place: int, last_bad: float) -> bool:
        seen = {
            (each.asker, each.kind)
            for each in self.log.since(place)
            if each.is_full and each.began_s >= last_bad
        }
        return self.needed <= seen

    def _wait_for_answers(self, since: float) -> None:
        deadline = since + GIVE_UP_S
        while not self._all_full_since(0, max(since, self._last_bad(0))):
            if self.clock() > deadline:
                raise NeverWhole("no full answers before any fault")
            time.sleep(POLL_S)

    def _why(self) -> str:
        missing = dict(self._census - self.served.census())
        recent = [each for each in self.log.since(0)[-300:] if not each.is_full][-3:]
        return f"processes missing {missing}, connected {self.served.is_connected()}, {recent}"

    def left(self) -> list[Finding]:
        """Processes beyond those at the start, once they have had time to end."""
        deadline = time.monotonic() + 30
        while (more := self.served.census() - self._census) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return [
            Finding(kind=FindingKind.LEAK, text=f"{count} more {role} than at the start")
            for role, count in more.items()
        ]
