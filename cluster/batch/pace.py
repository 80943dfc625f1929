"""How fast a job asks a cluster that others use: from how much the cluster does for them. Pure.

The job's searches are background ones: a shard searches them while no other search waits, and each
answer says which share of the last two seconds the busiest shard has spent on others
(``others_share``). What shards cannot give way in, the job leaves to the others itself: cores that
processes of one machine share, and the event loop of a router, which a large answer holds up.

Nobody else searches: FULL_IN_FLIGHT requests at once of FULL_QUERIES, without a pause.
Others search: one request at a time, of at most SHARED_QUERIES and SHARED_RESULTS, and pauses, so
that one is under way in SHARED_DUTY of the time that the others leave.
"""

from bisect import bisect_left, bisect_right

SIZES = (1, 2, 4, 8, 16, 32, 64)  # queries per request
FULL_IN_FLIGHT = 4  # while some are merged, encoded and decoded, the shards search others
SHARED_QUERIES = 16
SHARED_RESULTS = 2048  # queries x k: merged and encoded by a router in about a millisecond
SHARED_DUTY = 1 / 8
LEAST_DUTY = 1 / 32  # a job goes on, however busy the cluster is
MAX_PAUSE_S = 2.0


class Pace:
    """``size``: queries of the next request; ``in_flight``: requests at once; ``took`` says how
    long to wait after one. Begins as beside others."""

    def __init__(self, k: int, most: int = SIZES[-1]) -> None:
        """k: results per query. most: queries that a request may have."""
        self._last = _place(most)
        self._shared = _place(min(SHARED_QUERIES, SHARED_RESULTS // k))
        self._others_share: float | None = None  # None: not known, as if others searched

    @property
    def is_alone(self) -> bool:
        return self._others_share == 0

    @property
    def in_flight(self) -> int:
        return FULL_IN_FLIGHT if self.is_alone else 1

    @property
    def size(self) -> int:
        return SIZES[self._last if self.is_alone else min(self._last, self._shared)]

    @property
    def duty(self) -> float:
        """The share of the time in which a request is to be under way."""
        if self.is_alone:
            return 1.0
        return max(LEAST_DUTY, SHARED_DUTY * (1 - (self._others_share or 0.0)))

    def took(self, seconds: float, others_share: float | None) -> float:
        """Seconds to wait before the next request, after one took so long; others_share None: no
        shard was asked."""
        self._others_share = others_share
        return min(MAX_PAUSE_S, seconds * (1 / self.duty - 1))

    def refused(self) -> None:
        """The cluster was overloaded, or did not answer: as beside others until it answers."""
        self._others_share = None

    def too_large(self, size: int) -> None:
        """A request of ``size`` queries was refused for its size: from here on they are smaller."""
        self._last = max(0, bisect_left(SIZES, size) - 1)


def _place(most: int) -> int:
    """Of the largest size up to ``most``, or of the smallest."""
    return max(0, bisect_right(SIZES, most) - 1)
