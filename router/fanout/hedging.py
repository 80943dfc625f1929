"""How long frames of one kind and size take, and how many may be sent to a second replica.

A frame that takes longer than its like is sent to another replica as well (a hedged request: Dean
and Barroso, "The tail at scale", 2013). What that may cost is bounded by a token bucket, counted in
rows: the queries, or ids to look up, of a frame.
"""

import math
from collections import deque

from shardline.shards.core.messages import SearchRequest

WINDOW = 512  # frames that the percentile is taken over
REFRESH = 64  # frames after which it is computed anew; before so many, that of other sizes counts
PERCENTILE = 0.95
# On top of the percentile. At the percentile itself one frame in twenty would be sent twice though
# all is well; a slow replica takes many times as long.
HEADROOM = 1.5
# Rows that may be sent again at once, however long nothing was amiss: one frame of the most queries
# that share one. Larger frames are not sent twice.
MAX_TOKENS = 256.0


class Background:
    """The kind of background searches: they wait as long as others search, and are not hedged."""


class Filtered:
    """The kind of searches with a filter: what they take says nothing of others."""


def kind_of(request: object) -> type:
    """What a request is like, for ``Paces.of``."""
    if isinstance(request, SearchRequest):
        if request.options.background:
            return Background
        if request.options.filter:
            return Filtered
    return type(request)


class Budget:
    """Of one kind of request: so many rows may go to a second replica, per row."""

    __slots__ = ("_tokens", "share")

    def __init__(self, share: float) -> None:
        self.share = share
        self._tokens = 0.0

    def sends(self, rows: int) -> None:
        """So many go to shards for the first time."""
        tokens = self._tokens + self.share * rows
        self._tokens = tokens if tokens < MAX_TOKENS else MAX_TOKENS

    def allows(self, rows: int) -> bool:
        """Takes the tokens for so many rows, if they are there."""
        if self._tokens < rows:
            return False
        self._tokens -= rows
        return True


class Pace:
    """Of frames that are alike. ``delay_s``: age at which one is hedged; infinite at first."""

    __slots__ = ("_floor_s", "_recent", "_since_refresh", "budget", "delay_s")

    def __init__(self, budget: Budget, floor_s: float) -> None:
        """floor_s: the smallest delay."""
        self.budget = budget
        self.delay_s = math.inf
        self._floor_s = floor_s
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._since_refresh = 0

    def took(self, seconds: float) -> None:
        """One was answered, so long after it had left for the first time."""
        self._recent.append(seconds)
        self._since_refresh += 1
        if self._since_refresh >= REFRESH:
            self._since_refresh = 0
            if not self.budget.share:
                return
            longest = sorted(self._recent)[int(PERCENTILE * len(self._recent))]
            self.delay_s = max(self._floor_s, HEADROOM * longest)


class Paces:
    """A ``Pace`` per kind of request and size: frames of up to twice as many rows are alike."""

    def __init__(self, share: float, floor_s: float) -> None:
        """share: rows that may go to a second replica, per row; 0 for none."""
        self._share = share
        self._floor_s = floor_s
        self._budgets: dict[type, Budget] = {}
        self._paces: dict[tuple[type, int], Pace] = {}

    def of(self, kind: type, rows: int) -> Pace:
        """Of frames that hold so many rows."""
        key = kind, rows.bit_length()
        pace = self._paces.get(key)
        if pace is None:
            share = 0.0 if kind is Background else self._share
            budget = self._budgets.setdefault(kind, Budget(share))
            pace = self._paces[key] = Pace(budget, self._floor_s)
        return pace

    def guess_s(self, kind: type, rows: int) -> float:
        """The delay while too little is known of frames of that size: that of the nearest known
        size, in proportion where that one is smaller; infinite without one."""
        known = {
            size: pace.delay_s
            for (each, size), pace in self._paces.items()
            if each is kind and pace.delay_s < math.inf
        }
        if not known:
            return math.inf
        size = rows.bit_length()
        nearest = min(known, key=lambda other: abs(other - size))
        return math.ldexp(known[nearest], max(0, size - nearest))
