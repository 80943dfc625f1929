"""Moments in which the machine gave this process no time: what is late then proves nothing.

A thread wakes ten times per second and notes by how much it was late. On a machine of its own it
never is; beside other work a search may miss its deadline with no fault of Shardline's. Only missed
deadlines are excused, and the run prints how many such moments there were.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.chaos.watch import Watch
from tests.chaos.windows import DEADLINE, Allowance, Window

TICK_S = 0.1
LATE_S = 0.5  # of being late: with a limit of 2 s per request, enough for a few of them to be
AROUND_S = 2.0  # a request that began as long before may have missed its deadline in it
LATE = frozenset({DEADLINE})
EXCUSED = Allowance(
    whole_within_s=0, errors=LATE, partial_for=LATE, writes=LATE, answer_within_s=15
)


@dataclass(slots=True)
class Pauses(Watch):
    """windows: one per moment, between entering and leaving the block."""

    clock: Callable[[], float]
    windows: list[Window] = field(default_factory=list)

    def _watch(self) -> None:
        slept_at = self.clock()
        while not self._stopped.wait(TICK_S):
            now = self.clock()
            if now - slept_at > TICK_S + LATE_S:
                self.windows.append(pause(slept_at, now))
            slept_at = now


def pause(began_s: float, ended_s: float) -> Window:
    """The machine stood still from began_s to ended_s."""
    return Window(
        name="the machine was held up",
        allowance=EXCUSED,
        began_s=began_s,
        undone_s=ended_s + AROUND_S,
        whole_s=ended_s + AROUND_S,
    )
