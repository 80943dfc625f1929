"""How many writes each replica has applied, as the controller's looks at them find it."""

from collections import deque
from dataclasses import dataclass

from shardline.shards.core.messages import ReplicaKey

KEPT = 4  # looks at a replica, one per second: its primary was looked at a moment before or after


@dataclass(frozen=True, slots=True)
class Look:
    """seq is of a moment between the two, in seconds of the controller's clock."""

    asked_s: float
    answered_s: float
    seq: int


class Applied:
    """By replica; one that is not looked at any more is forgotten by ``forget``."""

    def __init__(self) -> None:
        self._looks: dict[ReplicaKey, deque[Look]] = {}

    def saw(self, key: ReplicaKey, look: Look) -> None:
        self._looks.setdefault(key, deque(maxlen=KEPT)).append(look)

    def forget(self, key: ReplicaKey) -> None:
        self._looks.pop(key, None)

    def seq(self, key: ReplicaKey) -> int | None:
        """By the last look; None: there was none."""
        looks = self._looks.get(key)
        return looks[-1].seq if looks else None

    def lag(self, key: ReplicaKey, primary: ReplicaKey) -> int | None:
        """Writes that the primary had applied before the replica was asked, and the replica had not
        when it answered. None: not known.

        So one that is level with its primary has a lag of 0, however many writes there are.
        """
        looks = self._looks.get(key)
        if not looks:
            return None
        before = [
            look.seq
            for look in self._looks.get(primary, ())
            if look.answered_s <= looks[-1].asked_s
        ]
        return max(0, before[-1] - looks[-1].seq) if before else None
