"""The controller's rules as a pure state machine: events in, a new state and instructions out.

No Ray, no clock, no I/O: ``step`` is a function. The controller feeds it what happened and carries
out what it answers. The first table is published once every replica has answered or failed: until
then a restarted controller knows less than the routers do. One counter, which goes on from the last
number that the store has given out, numbers both table versions and epochs: each rises whenever
anything changes, across generations too, and a router that sees a lower number knows it to be old.
Where the store's record is lost, or an older one was restored, shards and routers tell what numbers
they have, and the counter goes on from the largest of all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from shardline.shards.core.messages import (
    Absence,
    ReplicaKey,
    ReplicaRoute,
    RoutingTable,
    ShardRoute,
)

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """Where a replica answers, or why it does not; failures: how many without a success."""

    route: ReplicaRoute
    failures: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The generation being served and the state of each replica of its shards, in key order.

    counter: the largest number given out, as a table version or an epoch.
    settled: every replica has been heard of since this controller opened the generation.
    """

    table: RoutingTable
    replicas: Mapping[ReplicaKey, ReplicaState]
    counter: int
    settled: bool = False

    @property
    def ready(self) -> bool:
        return all(state.route.address is not None for state in self.replicas.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRegistered:
    """A shard process loaded its range and listens; it is handed the epoch it must announce.

    epoch: the one that it announces until then, 0 for none.
    """

    key: ReplicaKey
    address: tuple[str, int]
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaUnreachable:
    """The process of that epoch is gone; Ray is restarting it."""

    key: ReplicaKey
    epoch: int
    reason: Absence


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFailed:
    """Ray gave up on the actor, or it could not load its range."""

    key: ReplicaKey
    reason: Absence


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberSeen:
    """A router has a table of this version."""

    number: int


Event: TypeAlias = ReplicaRegistered | ReplicaUnreachable | ReplicaFailed | NumberSeen


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Hand this table to the routers."""

    table: RoutingTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Create the replica's actor anew after a delay, in seconds."""

    key: ReplicaKey
    after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """Have the replica's process register again: its epoch is below numbers given out earlier."""

    key: ReplicaKey


Instruction: TypeAlias = Publish | Place | Announce


def open_generation(
    table: RoutingTable, *, counter: int, replicas: int = 1
) -> tuple[Placement, tuple[Place, ...]]:
    """The state in which no replica answers yet, and the order to place ``replicas`` per shard.

    table: the generation's; the replicas in its shards are replaced. counter: the number that its
    first version takes.
    """
    shards = tuple(_unplaced(shard, table.generation, replicas) for shard in table.shards)
    states = {route.key: ReplicaState(route=route) for shard in shards for route in shard.replicas}
    opened = replace(table, version=counter, shards=shards)
    placement = Placement(table=opened, replicas=states, counter=counter)
    return placement, tuple(Place(key=key, after_s=0.0) for key in states)


def step(placement: Placement, event: Event) -> tuple[Placement, tuple[Instruction, ...]]:
    """What the event changes: nothing if it is about a replaced epoch or another generation."""
    if isinstance(event, NumberSeen):
        return _seen(placement, event.number)
    state = placement.replicas.get(event.key)
    if state is None:
        return placement, ()
    if isinstance(event, ReplicaRegistered):
        return _registered(placement, state, event)
    if isinstance(event, ReplicaUnreachable):
        return _unreachable(placement, state, event)
    return _failed(placement, state, event)


def retry_after_s(failures: int) -> float:
    """1, 2, 4 ... 30 seconds: a range that cannot load must not be loaded in a tight loop."""
    return float(min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** max(0, failures - 1)))


def _unplaced(shard: ShardRoute, generation: int, replicas: int) -> ShardRoute:
    keys = (ReplicaKey(generation, shard.shard, replica) for replica in range(replicas))
    routes = tuple(ReplicaRoute(key=key, epoch=0, address=None) for key in keys)
    return replace(shard, replicas=routes)


def _registered(
    placement: Placement, state: ReplicaState, event: ReplicaRegistered
) -> tuple[Placement, tuple[Instruction, ...]]:
    placement = replace(placement, counter=max(placement.counter, event.epoch))
    route = replace(state.route, epoch=placement.counter + 1, address=event.address, absence=None)
    return _publish(placement, ReplicaState(route=route))


def _seen(placement: Placement, number: int) -> tuple[Placement, tuple[Instruction, ...]]:
    """Jumps beyond a number that this controller did not know to be given out."""
    if number <= placement.counter:
        return placement, ()
    jumped = replace(placement, counter=number)
    changed, published = _publish(jumped, *placement.replicas.values())
    low = [state.route for state in placement.replicas.values() if state.route.address is not None]
    return changed, (*published, *(Announce(key=route.key) for route in low))


def _unreachable(
    placement: Placement, state: ReplicaState, event: ReplicaUnreachable
) -> tuple[Placement, tuple[Instruction, ...]]:
    if state.route.epoch != event.epoch or state.route.address is None:
        return placement, ()
    route = replace(state.route, address=None, absence=event.reason)
    return _publish(placement, replace(state, route=route))


def _failed(
    placement: Placement, state: ReplicaState, event: ReplicaFailed
) -> tuple[Placement, tuple[Instruction, ...]]:
    failures = state.failures + 1
    route = replace(state.route, address=None, absence=event.reason)
    lost = ReplicaState(route=route, failures=failures)
    changed, published = _publish(placement, lost)
    return changed, (*published, Place(key=event.key, after_s=retry_after_s(failures)))


def _publish(
    placement: Placement, *states: ReplicaState
) -> tuple[Placement, tuple[Instruction, ...]]:
    """The placement with the new states of some replicas, under the next number."""
    counter = placement.counter + 1
    replicas = {**placement.replicas, **{state.route.key: state for state in states}}
    shards = tuple(
        replace(shard, replicas=tuple(replicas[route.key].route for route in shard.replicas))
        for shard in placement.table.shards
    )
    table = replace(placement.table, version=counter, shards=shards)
    settled = placement.settled or all(
        each.route.address is not None or each.failures for each in replicas.values()
    )
    changed = Placement(table=table, replicas=replicas, counter=counter, settled=settled)
    return changed, (Publish(table=table),) if settled else ()
