"""Which replica leads a shard, that is, takes its writes: plain data; ``leading`` has the rules."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardline.shards.core.messages import Absence, ReplicaKey


@dataclass(frozen=True, slots=True)
class Term:
    """A replica, and the epoch that it was given to lead its shard with."""

    key: ReplicaKey
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leadership:
    """Of one shard.

    leader: who has said that it leads; it need not answer any more. is_silent: it did not when it
    was last looked at. asked: who was asked to lead and has not said yet whether it does. failures:
    of each replica, how often it could not lead, or lost the lead, lately. not_before_s: until then
    nobody with failures is asked again. failed: why the newest attempt failed. refused: why the
    leader takes no writes now.
    """

    leader: Term | None = None
    is_silent: bool = False
    asked: Term | None = None
    failures: Mapping[ReplicaKey, int] = field(default_factory=dict)
    not_before_s: float = 0.0
    failed: Absence | None = None
    refused: Absence | None = None


NOBODY = Leadership()
