"""How much of the last seconds something took. Pure: the time is an argument."""

WINDOW_S = 2.0
SLOTS = 20


class RecentShare:
    """Seconds that were spent in the last WINDOW_S, in SLOTS slots of equal length; used by one
    thread at a time. Times are on any one clock, and do not go back."""

    def __init__(self) -> None:
        self._spent = [0.0] * SLOTS
        self._newest = 0

    def add(self, seconds: float, now: float) -> None:
        """So many were spent until ``now``."""
        self._forget(now)
        self._spent[self._newest % SLOTS] += seconds

    def at(self, now: float) -> float:
        """The share of the window before ``now`` that was spent, 0 to 1; above 0 if any was."""
        self._forget(now)
        return min(1.0, sum(self._spent) / WINDOW_S)

    def _forget(self, now: float) -> None:
        """Empties the slots of times that are over."""
        newest = int(now * SLOTS / WINDOW_S)
        for slot in range(max(self._newest, newest - SLOTS) + 1, newest + 1):
            self._spent[slot % SLOTS] = 0.0
        self._newest = newest
