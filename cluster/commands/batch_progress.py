"""Progress of ``batch``: the rate of the running search, and the time that it leaves."""

import time
from collections.abc import Callable
from typing import Protocol

from shardline.cluster.batch.job_parts import SEARCH
from shardline.cluster.console import StageProgress


class NotedProgress(Protocol):
    """Progress that can print a line."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...

    def note(self, line: str) -> None: ...


class RateProgress:
    """Progress with the rate of the running search, and the time that it leaves."""

    def __init__(
        self, progress: StageProgress, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress, self._clock = progress, clock
        self._first: tuple[float, int] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._progress(stage, done, total)
        if stage != SEARCH:
            return
        now = self._clock()
        if self._first is None:
            self._first = now, done
        seconds, answered = now - self._first[0], done - self._first[1]
        if seconds > 0 and answered:
            left = (total - done) * seconds / answered
            rate = answered / seconds
            self._progress.detail(f"{rate:,.0f} queries/s, {left:,.0f} s left")

    def note(self, line: str) -> None:
        self._progress.note(line)
