"""How fast a job asks a cluster that others use: from the times of its own requests. Pure.

One request is in flight at any time. What a job costs others is then a matter of the share of the
time in which one is under way, its duty cycle: an online query that meets one shares the cores
with it, or waits for it. Alone on a cluster a job takes all of the time, with large requests;
beside others, LEAST_DUTY of it, with requests that take at most SHARED_LENGTH single queries.

Others are seen by what they add to the job's own requests. ``floor`` is what a request of a size
takes undisturbed: the fastest eighth of those lately. A request has met somebody if it took longer
than its floor by half of a single query's, and by what the floor itself is uncertain. After WINDOW
requests their share is looked at: above MOST_DISTURBED the duty cycle is halved, below half of that
it is doubled, and once it is whole, so is the size.

It starts slow. Others who ask so rarely that a window hardly ever meets one are not seen, and each
of their queries meets the job. Where times scatter by more than UNCERTAIN though nobody else asks,
which is usual on a shared machine, a job stays as slow as beside others: docs/BATCH.md has figures.
"""

from bisect import bisect_left, bisect_right
from collections import deque

WINDOW = 20  # requests between two decisions
FLOOR_WINDOW = 200  # requests of a size that its floor is taken from
MET = 0.5  # of a single query's floor, which a request takes longer that has met another
UNCERTAIN = 0.1  # of a floor: requests that meet nobody differ by that much
MOST_DISTURBED = 0.1  # of a window
SIZES = (1, 2, 4, 8, 16, 32, 64)  # queries per request
LEAST_DUTY = 1 / 16  # a job goes on, however busy the cluster is
SHARED_LENGTH = 2.0  # single queries that a request takes beside others
MAX_PAUSE_S = 2.0


class Pace:
    """``size``: queries of the next request; ``took`` says how long to wait after one."""

    def __init__(self, most: int = SIZES[-1]) -> None:
        """most: queries that a request may have."""
        self._place, self._last = 0, max(0, bisect_right(SIZES, most) - 1)
        self.duty = LEAST_DUTY
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
        met = sum(map(self._has_met, self._window)) / len(self._window)
        self._window.clear()
        if met > MOST_DISTURBED:
            self.duty = max(LEAST_DUTY, self.duty / 2)
            self._place = min(self._place, self._shared_place)
        elif met <= MOST_DISTURBED / 2:
            if self.duty < 1:
                self.duty = min(1.0, self.duty * 2)
            else:
                self._place = min(self._place + 1, self._last)

    @property
    def _single(self) -> float:
        """The floor of a single query, or of the least that was asked."""
        return self.floor(min(self._times))

    @property
    def _shared_place(self) -> int:
        """Of the largest size for beside others, among those that were asked."""
        limit = SHARED_LENGTH * self._single
        fitting = (size for size in self._times if self.floor(size) <= limit)
        return SIZES.index(max(fitting))

    def _has_met(self, request: tuple[int, float]) -> bool:
        size, seconds = request
        return seconds > (1 + UNCERTAIN) * self.floor(size) + MET * self._single
