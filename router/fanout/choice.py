"""Which replica of a shard is asked: the better of two that are chosen at random.

Two instead of the best of all, because many routers that all saw the same best one would ask it at
once (Mitzenmacher, "The power of two choices in randomized load balancing", 2001).
"""

import random
from collections.abc import Container
from typing import TypeAlias

from shardline.router.fanout.connection import ShardConnection

# Of a replica whose connection has just come up, beside one that was there before: it has read
# nothing of its index yet, and its share of the requests grows over this time.
SLOW_START_S = 5.0
FIRST_SHARE = 0.1
# Latencies that are not told apart: a factor, and what an event loop's clock cannot see.
SLOWER = 2.0
CLOCK_S = 0.002
# Of the latency of a replica that is not asked because of it: else it would never be measured anew.
FORGOTTEN = 0.02

# The connections to the replicas of one shard, in the table's order; None where no process serves.
Replicas: TypeAlias = tuple[ShardConnection | None, ...]


class Chooser:
    """silent_s: a replica that owes answers and has sent nothing for so long is not chosen."""

    def __init__(self, silent_s: float, rng: random.Random) -> None:
        self._silent_s = silent_s
        self._random = rng.random

    def is_silent(self, connection: ShardConnection, now: float) -> bool:
        """Whether it owes answers and has sent nothing for ``silent_s``; now on its clock."""
        link = connection.link
        since = None if link is None else link.waiting_since
        return since is not None and since <= now - self._silent_s

    def choose(
        self, replicas: Replicas, now: float, besides: Container[ShardConnection] = ()
    ) -> ShardConnection | None:
        """A connected replica that is not silent and not in ``besides``; None without one.

        now: on the clock of the connections.
        """
        silent_since = now - self._silent_s
        ready = []
        for connection in replicas:
            if connection is None or (link := connection.link) is None or connection in besides:
                continue
            since = link.waiting_since
            if since is not None and since <= silent_since:
                connection.drop_if_silent()  # nobody else would, where it is not asked any more
            elif not link.lost.done():
                ready.append(connection)
        if len(ready) > 1:
            return self._better(ready, now)
        return ready[0] if ready else None

    def _better(self, ready: list[ShardConnection], now: float) -> ShardConnection:
        """Of two at random: fewest requests owed, then latency, then chance."""
        count, random = len(ready), self._random
        first = int(random() * count)
        second = (first + 1 + int(random() * (count - 1))) % count if count > 2 else 1 - first
        best, other = ready[first], ready[second]
        assert best.link is not None
        assert other.link is not None
        owed, others_owed = best.link.owed, other.link.owed
        if owed > others_owed:
            best, other = other, best
        elif owed == others_owed:
            if best.latency_s > SLOWER * other.latency_s + CLOCK_S:
                best, other = other, best
                other.latency_s *= 1 - FORGOTTEN
            elif other.latency_s > SLOWER * best.latency_s + CLOCK_S:
                other.latency_s *= 1 - FORGOTTEN
        if best.opened_at + SLOW_START_S > now >= other.opened_at + SLOW_START_S:
            share = FIRST_SHARE + (1 - FIRST_SHARE) * (now - best.opened_at) / SLOW_START_S
            if random() > share:
                return other
        return best


def last_resort(
    replicas: Replicas, besides: Container[ShardConnection] = ()
) -> ShardConnection | None:
    """Any replica not in ``besides``, a connected one first: it says itself why it is not asked."""
    left = [each for each in replicas if each is not None and each not in besides]
    return min(left, key=lambda connection: not connection.connected, default=None)
