"""How long frames of one kind and size take, and how many of them may be sent a second time.

A frame that takes longer than its like is sent to another replica as well (a hedged request: Dean
and Barroso, "The tail at scale", 2013). What that may cost is bounded by a token bucket.
"""

from collections import deque

WINDOW = 512  # frames that the percentile is taken over
REFRESH = 64  # frames after which it is computed anew; before so many nothing is hedged
PERCENTILE = 0.95
# On top of the percentile. At the percentile itself one frame in twenty would be sent twice though
# all is well; a slow replica takes many times as long.
HEADROOM = 1.5
MAX_TOKENS = 10.0  # second frames that may leave at once, however long nothing was amiss


class Pace:
    """Of frames that are alike. ``delay_s``: age at which one is hedged; infinite at first."""

    __slots__ = ("_floor_s", "_recent", "_share", "_since_refresh", "_tokens", "delay_s")

    def __init__(self, share: float, floor_s: float) -> None:
        """share: second frames per frame, 0 for none; floor_s: the smallest delay."""
        self.delay_s = float("inf")
        self._share = share
        self._floor_s = floor_s
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._since_refresh = 0
        self._tokens = 0.0

    def sends(self, frames: int) -> None:
        """So many leave for the first time."""
        tokens = self._tokens + self._share * frames
        self._tokens = tokens if tokens < MAX_TOKENS else MAX_TOKENS

    def took(self, seconds: float) -> None:
        """One was answered, so long after it had left for the first time."""
        self._recent.append(seconds)
        self._since_refresh += 1
        if self._since_refresh >= REFRESH:
            self._since_refresh = 0
            if self._share:
                longest = sorted(self._recent)[int(PERCENTILE * len(self._recent))]
                self.delay_s = max(self._floor_s, HEADROOM * longest)

    def may_hedge(self) -> bool:
        """Takes a token, if there is one."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Paces:
    """A ``Pace`` per kind of request and size: frames of up to twice as many rows are alike."""

    def __init__(self, share: float, floor_s: float) -> None:
        self._share = share
        self._floor_s = floor_s
        self._paces: dict[tuple[type, int], Pace] = {}

    def of(self, kind: type, rows: int) -> Pace:
        """Of frames that hold so many rows: queries, or ids to look up."""
        key = kind, rows.bit_length()
        pace = self._paces.get(key)
        if pace is None:
            pace = self._paces[key] = Pace(self._share, self._floor_s)
        return pace
