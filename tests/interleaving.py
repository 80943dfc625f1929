"""Work of several processes on one fake disk, in an order that a test chooses, call by call."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.fake_disk import FakeDisk, ProcessFiles

WAIT_S = 60.0


class Paused:
    """``work`` in a thread that stops before each of its file calls until it may go on.

    result and error are what it ended with.
    """

    def __init__(self, disk: FakeDisk, work: Callable[[ProcessFiles], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_done = False
        self._may_go = threading.Semaphore(0)
        self._has_stopped = threading.Semaphore(0)
        self._work = work
        self._files = ProcessFiles(disk, self._before)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._await()

    def advance(self, calls: int) -> int:
        """Lets it make so many file calls; returns how many it made before it ended."""
        for made in range(calls):
            if self.is_done:
                return made
            self._may_go.release()
            self._await()
        return calls

    def finish(self) -> int:
        """Lets it go to its end; returns how many calls that took."""
        made = 0
        while not self.is_done:
            made += self.advance(1)
        self._thread.join()
        return made

    def _await(self) -> None:
        assert self._has_stopped.acquire(timeout=WAIT_S), "it hangs outside of file calls"

    def _before(self, call: int, name: str) -> None:
        self._has_stopped.release()
        assert self._may_go.acquire(timeout=WAIT_S)

    def _run(self) -> None:
        try:
            self.result = self._work(self._files)
        except Exception as error:  # noqa: BLE001, the test looks at it
            self.error = error
        finally:
            self.is_done = True
            self._has_stopped.release()


@contextmanager
def paused(disk: FakeDisk, *works: Callable[[ProcessFiles], Any]) -> Iterator[list[Paused]]:
    """Each is before its first file call; whatever has not ended does so at the end."""
    processes = [Paused(disk, work) for work in works]
    try:
        yield processes
    finally:
        for process in processes:
            process.finish()
