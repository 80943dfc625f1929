"""What happens to the controller, and what it orders: plain data.

now_s: the time of an event by the controller's clock; 0 counts as that of the last ``HostsSeen``,
which may lie long back while Ray's head is away.
"""

from dataclasses import dataclass
from typing import TypeAlias

from shardline.cluster.control.hosts import Host
from shardline.cluster.control.placement_state import Rules
from shardline.shards.core.messages import Absence, ReplicaKey, RoutingTable

# Events


@dataclass(frozen=True, slots=True, kw_only=True)
class HostsSeen:
    """All living hosts at this time. Comes every second, unless Ray's head is away."""

    hosts: tuple[Host, ...]
    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRegistered:
    """A shard process loaded its range and listens; it is handed the epoch it must announce.

    epoch: the one that it announces until then, 0 for none. leads: the epoch with which it takes
    the writes of its shard; None: it does not.
    """

    key: ReplicaKey
    address: tuple[str, int]
    epoch: int = 0
    leads: int | None = None
    now_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaUnreachable:
    """The process of that epoch is gone; Ray is restarting it."""

    key: ReplicaKey
    epoch: int
    reason: Absence
    now_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFailed:
    """Ray gave up on the actor, or it could not load its range."""

    key: ReplicaKey
    reason: Absence
    now_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaIdle:
    """No router is connected to the replica any more; of interest while it drains."""

    key: ReplicaKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Leading:
    """The replica takes the writes of its shard, as it was asked to; seq: how many it has applied,
    all that were ever acknowledged among them."""

    key: ReplicaKey
    epoch: int
    seq: int
    now_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeadFailed:
    """The replica was asked to lead with that epoch, and refused, or did not answer in time."""

    key: ReplicaKey
    epoch: int
    reason: Absence
    now_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderSeen:
    """What the leader of that epoch says when it is looked at.

    leads: the epoch with which it takes writes; None: it does not any more. refused: why it cannot
    take any now, a full disk for example, from which it recovers by itself.
    """

    key: ReplicaKey
    epoch: int
    leads: int | None
    refused: Absence | None = None
    now_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderSilent:
    """The leader of that epoch did not answer when it was looked at: dead, stopped or slow."""

    key: ReplicaKey
    epoch: int
    now_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberSeen:
    """A router has a table of this version."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartAsked:
    """Every replica is to be replaced, one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartStopped:
    """No more replicas are to be replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SealAsked:
    """No shard of the live generation is to acknowledge a write any more."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SealDropped:
    """The shards of the live generation are to take writes again."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """The replica's shard acknowledges no write any more; seq: how many it has, those acknowledged
    among them."""

    key: ReplicaKey
    epoch: int
    seq: int
    now_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SealFailed:
    """The replica was asked to seal its shard with that epoch, and could not, or not in time."""

    key: ReplicaKey
    epoch: int
    reason: Absence
    now_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideOpened:
    """A generation is to be loaded beside the live one, in place of what is there.

    table: its own, without replicas. role: of ``fleet_state.Role``. found: its replicas that have
    an actor already, and the node id of its host. is_mirrored: writes are brought to it.
    """

    table: RoutingTable
    role: str
    rules: Rules
    now_s: float
    found: tuple[tuple[ReplicaKey, str], ...] = ()
    is_mirrored: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideEnded:
    """The generation beside the live one is to be ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Switched:
    """The generation beside is to be the live one, and the live one to be kept beside it.

    generation: which is expected beside. is_mirrored: writes are brought to the kept one. has: of
    each of its shards, how many writes it has; empty: none were brought to it. has_all: every row
    that was written to the live one was brought to it.
    """

    generation: int
    now_s: float
    is_mirrored: bool = False
    has: tuple[int, ...] = ()
    has_all: bool = False


Event: TypeAlias = (
    HostsSeen
    | ReplicaRegistered
    | ReplicaUnreachable
    | ReplicaFailed
    | ReplicaIdle
    | Leading
    | LeadFailed
    | LeaderSeen
    | LeaderSilent
    | NumberSeen
    | RestartAsked
    | RestartStopped
    | SealAsked
    | SealDropped
    | Sealed
    | SealFailed
)


# Instructions


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Hand this table to the routers."""

    table: RoutingTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Create the replica's actor on that host after a delay, in seconds, or find it alive there."""

    key: ReplicaKey
    node_id: str
    after_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """Have the replica's process register again: its epoch is below numbers given out earlier."""

    key: ReplicaKey


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """End the replica's actor for good."""

    key: ReplicaKey
    node_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """Have the replica take the writes of its shard, with that epoch."""

    key: ReplicaKey
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """Have the replica see to it, with that epoch, that its shard acknowledges no write."""

    key: ReplicaKey
    epoch: int


Instruction: TypeAlias = Publish | Place | Announce | End | Lead | Seal
