"""How fast a job asks a cluster that others use: from the times of its own requests. Pure.

One request is in flight at any time, so an online query that meets one waits for that one at most:
what it costs others is bounded by the length of a request, and how often by the share of the time
in which one is under way (the duty cycle). Both follow what the job sees of others:

- its own requests take longer when others are searched at the same time. ``floor`` is what a
  request of a size takes undisturbed: the fastest eighth of those lately, which even a cluster
  at half its capacity leaves alone;
- a request above DISTURBED times its floor has met somebody. After WINDOW requests their share is
  looked at: above MOST_DISTURBED the job halves its requests, and then its duty cycle; below half
  of that it doubles, the duty cycle first.

It starts slow. A job alone on a cluster reaches its full rate within a few seconds.
"""

from bisect import bisect_left, bisect_right
from collections import deque

WINDOW = 20  # requests between two decisions
FLOOR_WINDOW = 200  # requests of a size that its floor is taken from
DISTURBED = 1.5
MOST_DISTURBED = 0.2  # of a window; an undisturbed machine shows about a tenth
SIZES = (1, 2, 4, 8, 16, 32, 64)  # queries per request
LEAST_DUTY = 1 / 64  # a job goes on, however busy the cluster is
MAX_PAUSE_S = 2.0


class Pace:
    """``size``: queries of the next request; ``took`` says how long to wait after one."""

    def __init__(self, most: int = SIZES[-1]) -> None:
        """most: queries that a request may have."""
        self._place, self._last = 0, max(0, bisect_right(SIZES, most) - 1)
        self.duty = LEAST_DUTY * 8
        self._times: dict[int, deque[float]] = {}
        self._window: list[tuple[int, float]] = []

    @property
    def size(self) -> int:
        return SIZES[self._place]

    def took(self, size: int, seconds: float) -> float:
        """Seconds to wait before the next request, after one of ``size`` queries took so long."""
        if size in SIZES:  # the last request of a block may be of any
            self._times.setdefault(size, deque(maxlen=FLOOR_WINDOW)).append(seconds)
            self._window.append((size, seconds))
        if len(self._window) >= WINDOW:
            self._decide()
        return min(MAX_PAUSE_S, seconds * (1 / self.duty - 1))

    def refused(self) -> None:
        """The cluster was overloaded, or did not answer: as slow as it gets."""
        self._place, self.duty = 0, LEAST_DUTY
        self._window.clear()

    def too_large(self, size: int) -> None:
        """A request of ``size`` queries was refused for its size: from here on they are smaller."""
        self._last = max(0, bisect_left(SIZES, size) - 1)
        self._place = min(self._place, self._last)
        self._window.clear()

    def floor(self, size: int) -> float:
        """Seconds of an undisturbed request of a size that was asked before."""
        times = sorted(self._times[size])
        return times[len(times) // 8]

    def _decide(self) -> None:
        disturbed = sum(seconds > DISTURBED * self.floor(size) for size, seconds in self._window)
        share = disturbed / len(self._window)
        self._window.clear()
        if share > MOST_DISTURBED:
            if self._place:
                self._place -= 1
            else:
                self.duty = max(LEAST_DUTY, self.duty / 2)
        elif share <= MOST_DISTURBED / 2:
            if self.duty < 1:
                self.duty = min(1.0, self.duty * 2)
            else:
                self._place = min(self._place + 1, self._last)
