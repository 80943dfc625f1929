"""How new what a router has cached must be: of every shard, the newest write that it has heard of.

An answer is as new as the sequence numbers of the shards in it. It may be given again while no
newer number is known, and only while all of them have been confirmed within the last FRESH_S: what
other routers write is heard of in replies, and while every query is answered from the cache there
are none. So once in FRESH_S a query goes to the shards though its answer is cached, and confirms
the numbers for all others. A cached answer lacks no write of this router's, and none of another's
that was acknowledged more than FRESH_S before it, but for what the replicas that were asked were
behind by.
"""

from typing import TypeAlias

FRESH_S = 1.0

Seq: TypeAlias = tuple[int | None, ...]  # by shard; None: not known


class Freshness:
    """Of one generation; None: none is served yet. Times are seconds of any one clock."""

    def __init__(self, generation: int | None) -> None:
        self.generation = generation
        self._newest: Seq = ()
        self._confirmed_at = float("-inf")

    def heard(self, seq: Seq, asked_at: float) -> bool:
        """Takes the numbers of an answer that was asked for then; whether it is as new as any."""
        if seq != self._newest:
            self._newest = _newer(self._newest, seq)
            if seq != self._newest:  # it lacks a shard, or a replica that answered is behind
                return False
        if None in seq:
            return False
        self._confirmed_at = max(self._confirmed_at, asked_at)
        return True

    def wrote(self, shard: int, seq: int) -> None:
        """A write was acknowledged."""
        self._newest = _newer(self._newest, (*(None,) * shard, seq))

    def seq_at(self, now: float) -> Seq | None:
        """What a cached answer must have to be given now; None: none may be."""
        return self._newest if now - self._confirmed_at <= FRESH_S else None


def _newer(one: Seq, other: Seq) -> Seq:
    """The higher number of each shard, where one is known."""
    longest = max(len(one), len(other))
    return tuple(
        max((each for each in both if each is not None), default=None)
        for both in zip(_padded(one, longest), _padded(other, longest), strict=True)
    )


def _padded(seq: Seq, length: int) -> Seq:
    return seq + (None,) * (length - len(seq))
