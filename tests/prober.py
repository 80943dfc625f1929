"""Asks an endpoint all the time, and says how long it was away."""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx

PROBE_S = 0.02


def status_of(url: str, path: str = "/healthz") -> int:
    """0 for a connection refused or broken."""
    try:
        return httpx.get(f"{url}{path}", timeout=30).status_code
    except httpx.TransportError:
        return 0


@dataclass
class Prober:
    """Asks every 20 ms, each time on a connection of its own."""

    url: str
    seen: list[tuple[float, int]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self._stop.wait(PROBE_S):
            self.seen.append((time.monotonic(), status_of(self.url)))

    def changes(self) -> list[tuple[float, int]]:
        """When each run of equal answers began, in seconds, and what they were."""
        start = self.seen[0][0]
        runs = itertools.groupby(self.seen, key=lambda each: each[1])
        return [(round(next(run)[0] - start, 2), status) for status, run in runs]

    def away_s(self) -> float:
        """The longest time without an answer of 200."""
        good = [at for at, status in self.seen if status == 200]
        return max(later - earlier for earlier, later in itertools.pairwise(good))


@contextlib.contextmanager
def probing(url: str) -> Iterator[Prober]:
    prober = Prober(url)
    thread = threading.Thread(target=prober.run)
    thread.start()
    try:
        yield prober
    finally:
        prober._stop.set()
        thread.join(10)
