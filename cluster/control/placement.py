"""The controller's rules as a pure state machine: events in, a new state and instructions out.

No Ray, no clock, no I/O: ``step`` is a function. The controller feeds it what happened and carries
out what it answers. The first table is published once every shard has answered or failed: until
then a restarted controller knows less than the routers do. One counter numbers both table versions
and shard epochs, so each rises whenever anything changes, and a router that sees a lower number
knows it to be old.
"""

from dataclasses import dataclass, replace
from typing import TypeAlias

from shardline.shards.core.messages import RoutingTable, ShardRoute

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlace:
    """One shard: where it answers (address None: nowhere), and how often in a row it failed."""

    route: ShardRoute
    failures: int = 0
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The generation being served and the place of each of its shards, by shard number.

    settled: every shard has been heard of since this controller opened the generation.
    """

    table: RoutingTable
    places: tuple[ShardPlace, ...]
    counter: int
    settled: bool = False

    @property
    def ready(self) -> bool:
        return all(place.route.address is not None for place in self.places)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRegistered:
    """A shard process loaded its range and listens; it is handed the epoch it must announce."""

    shard: int
    address: tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardUnreachable:
    """The process of that epoch is gone; Ray is restarting it."""

    shard: int
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFailed:
    """Ray gave up on the actor, or it could not load its range."""

    shard: int
    reason: str


Event: TypeAlias = ShardRegistered | ShardUnreachable | ShardFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Hand this table to the routers."""

    table: RoutingTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Create the shard's actor anew after a delay, in seconds."""

    shard: int
    after_s: float


Instruction: TypeAlias = Publish | Place


def open_generation(table: RoutingTable, *, counter: int) -> tuple[Placement, tuple[Place, ...]]:
    """The state in which no shard answers yet, and the order to place them all."""
    routes = tuple(replace(route, address=None) for route in table.shards)
    placement = Placement(
        table=replace(table, version=counter, shards=routes),
        places=tuple(ShardPlace(route=route) for route in routes),
        counter=counter,
    )
    return placement, tuple(Place(shard=route.shard, after_s=0.0) for route in routes)


def step(placement: Placement, event: Event) -> tuple[Placement, tuple[Instruction, ...]]:
    """What the event changes. An event about an epoch that has been replaced changes nothing."""
    if isinstance(event, ShardRegistered):
        return _registered(placement, event)
    if isinstance(event, ShardUnreachable):
        return _unreachable(placement, event)
    return _failed(placement, event)


def retry_after_s(failures: int) -> float:
    """1, 2, 4 ... 30 seconds: a range that cannot load must not be loaded in a tight loop."""
    return float(min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** max(0, failures - 1)))


def _registered(
    placement: Placement, event: ShardRegistered
) -> tuple[Placement, tuple[Instruction, ...]]:
    counter = placement.counter + 1
    route = replace(placement.places[event.shard].route, epoch=counter, address=event.address)
    return _publish(placement, ShardPlace(route=route), counter)


def _unreachable(
    placement: Placement, event: ShardUnreachable
) -> tuple[Placement, tuple[Instruction, ...]]:
    place = placement.places[event.shard]
    if place.route.epoch != event.epoch or place.route.address is None:
        return placement, ()
    route = replace(place.route, address=None)
    lost = replace(place, route=route, reason=event.reason)
    return _publish(placement, lost, placement.counter + 1)


def _failed(placement: Placement, event: ShardFailed) -> tuple[Placement, tuple[Instruction, ...]]:
    place = placement.places[event.shard]
    failures = place.failures + 1
    lost = ShardPlace(
        route=replace(place.route, address=None), failures=failures, reason=event.reason
    )
    changed, published = _publish(placement, lost, placement.counter + 1)
    return changed, (*published, Place(shard=event.shard, after_s=retry_after_s(failures)))


def _publish(
    placement: Placement, place: ShardPlace, counter: int
) -> tuple[Placement, tuple[Instruction, ...]]:
    shard = place.route.shard
    places = (*placement.places[:shard], place, *placement.places[shard + 1 :])
    table = replace(placement.table, version=counter, shards=tuple(each.route for each in places))
    settled = placement.settled or all(
        each.route.address is not None or each.failures for each in places
    )
    changed = replace(placement, table=table, places=places, counter=counter, settled=settled)
    return changed, (Publish(table=table),) if settled else ()
