"""A rolling restart, as the controller keeps it: plain data; ``rolling_restart`` has the rules."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardline.shards.core.messages import Absence, ReplicaKey


@dataclass(frozen=True, slots=True, kw_only=True)
class PutOff:
    """A replica that could not be replaced, how often, why, and when it is tried again."""

    failures: int
    not_before_s: float
    reason: Absence


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """A rolling restart: every replica whose number is below that of its shard is replaced.

    number: which restart it is. total: replicas to replace when it began. is_stopped: it is over
    because somebody stopped it. waits_for: why none of those left can be replaced now. put_off:
    those that could not be replaced when they were last tried.
    """

    number: int
    below: Mapping[int, int]
    total: int
    is_over: bool = False
    is_stopped: bool = False
    waits_for: Absence | None = None
    put_off: Mapping[ReplicaKey, PutOff] = field(default_factory=dict)

    @property
    def trouble(self) -> Absence | None:
        """What holds it up; None: nothing does."""
        return self.waits_for or next((each.reason for each in self.put_off.values()), None)

    def is_old(self, key: ReplicaKey) -> bool:
        """Whether the replica was there before the restart began."""
        return key.replica < self.below.get(key.shard, 0)

    def concerns(self, key: ReplicaKey) -> bool:
        """Whether the replica is to be replaced still."""
        return not self.is_over and self.is_old(key)
