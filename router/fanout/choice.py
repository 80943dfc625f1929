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
        self._sample = rng.sample

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
            elif not link.is_lost:
                ready.append((connection, link.owed))
        if len(ready) < 2:
            return ready[0][0] if ready else None
        one, two = ready if len(ready) == 2 else self._sample(ready, 2)
        return self._better(one, two, now)

    def _better(
        self, one: tuple[ShardConnection, int], two: tuple[ShardConnection, int], now: float
    ) -> ShardConnection:
        """Of two replicas and the answers that they owe: fewest owed, then latency, then chance."""
        (best, owed), (other, others_owed) = one, two
        if owed == others_owed:
            latency_s, others_s = best.latency_s, other.latency_s
            if latency_s > SLOWER * others_s + CLOCK_S:
                best.latency_s = latency_s * (1 - FORGOTTEN)
                best, other = other, best
            elif others_s > SLOWER * latency_s + CLOCK_S:
                other.latency_s = others_s * (1 - FORGOTTEN)
            elif self._random() < 0.5:
                best, other = other, best
        elif owed > others_owed:
            best, other = other, best
        new_since = now - SLOW_START_S
        if best.opened_at > new_since >= other.opened_at:
            share = FIRST_SHARE + (1 - FIRST_SHARE) * (now - best.opened_at) / SLOW_START_S
            if self._random() > share:
                return other
        return best


def last_resort(
    replicas: Replicas, besides: Container[ShardConnection] = ()
) -> ShardConnection | None:
    """Any replica not in ``besides``, a connected one first: it says itself why it is not asked."""
    left = [each for each in replicas if each is not None and each not in besides]
    return min(left, key=lambda connection: not connection.connected, default=None)
