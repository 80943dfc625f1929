"""The rules for two generations at once, as a pure state machine above ``placement``.

Each generation is placed, watched and led by the same rules, for itself; routers are told of the
live one alone. At most one other is loaded: a candidate, or the one that was live before. It takes
the live place in one step, and only if every shard of it answers and the live one has been sealed:
so no write that was acknowledged is missing in it without having been counted. What the live
generation needs comes first: if it lacks room that the other has, the other is ended.
"""

from dataclasses import replace
from typing import TypeAlias

from shardline.cluster.control.events import (
    BesideEnded,
    BesideOpened,
    Event,
    HostsSeen,
    Instruction,
    NumberSeen,
    Publish,
    RestartAsked,
    RestartStopped,
    SealAsked,
    SealDropped,
    Switched,
)
from shardline.cluster.control.fleet_state import Beside, Fleet, Role, reserved_by
from shardline.cluster.control.placement import open_generation, step
from shardline.cluster.control.placement_state import Placement
from shardline.cluster.control.replacing import end_of, host_for
from shardline.cluster.control.sealing import sealed_seqs

FleetOutcome: TypeAlias = tuple[Fleet, tuple[Instruction, ...]]
FleetEvent: TypeAlias = Event | BesideOpened | BesideEnded | Switched

ABOUT_THE_LIVE_ONE = (NumberSeen, RestartAsked, RestartStopped, SealAsked, SealDropped)


def fleet_step(fleet: Fleet, event: FleetEvent) -> FleetOutcome:
    """What the event changes, of the generation that it is about: nothing if that is not loaded."""
    if isinstance(event, BesideOpened):
        changed, orders = _opened(fleet, event)
    elif isinstance(event, BesideEnded):
        changed, orders = _ended(fleet)
    elif isinstance(event, Switched):
        changed, orders = _switched(fleet, event)
    elif isinstance(event, HostsSeen):
        changed, orders = _both_stepped(fleet, event)
    elif _is_about_live(fleet, event):
        changed, orders = _live_stepped(fleet, event)
    else:
        changed, orders = _beside_stepped(fleet, event)
    if changed is fleet:
        return fleet, ()
    return _told_of_model(changed, orders)


def can_switch(fleet: Fleet) -> bool:
    """Whether the generation beside may take the live place now."""
    beside = fleet.beside
    if beside is None or sealed_seqs(fleet.live) is None:
        return False
    return beside.placement.settled and beside.placement.covers


def _is_about_live(fleet: Fleet, event: Event) -> bool:
    if isinstance(event, ABOUT_THE_LIVE_ONE):
        return True
    return not isinstance(event, HostsSeen) and event.key.generation == _number(fleet.live)


def _live_stepped(fleet: Fleet, event: Event) -> FleetOutcome:
    other = None if fleet.beside is None else fleet.beside.placement
    before = _level(fleet.live, fleet.counter, other)
    live, orders = step(before, event)
    return (fleet, ()) if live is before else (replace(fleet, live=live), orders)


def _beside_stepped(fleet: Fleet, event: Event) -> FleetOutcome:
    """Routers hear nothing of it."""
    if fleet.beside is None:
        return fleet, ()
    before = _level(fleet.beside.placement, fleet.counter, fleet.live)
    placement, orders = step(before, event)
    if placement is before:
        return fleet, ()
    return replace(fleet, beside=replace(fleet.beside, placement=placement)), _unpublished(orders)


def _both_stepped(fleet: Fleet, event: HostsSeen) -> FleetOutcome:
    fleet, orders = _live_stepped(fleet, event)
    if _is_in_the_way(fleet):
        fleet, ended = _ended(fleet)
        return fleet, (*orders, *ended)
    fleet, more = _beside_stepped(fleet, event)
    return fleet, (*orders, *more)


def _opened(fleet: Fleet, event: BesideOpened) -> FleetOutcome:
    """Loads a generation beside the live one; what was beside it until then is ended first."""
    assert event.table.generation != fleet.live.table.generation
    fleet, ended = _ended(fleet)
    placement, orders = open_generation(
        event.table,
        counter=fleet.counter + 1,
        rules=event.rules,
        hosts=tuple(fleet.live.hosts.values()),
        found=dict(event.found),
        now_s=event.now_s,
        reserved=reserved_by(fleet.live),
    )
    beside = Beside(placement=placement, role=Role(event.role), is_mirrored=event.is_mirrored)
    return replace(fleet, beside=beside), (*ended, *_unpublished(orders))


def _ended(fleet: Fleet) -> FleetOutcome:
    """Ends every replica of the generation beside; numbers go on above its own."""
    if fleet.beside is None:
        return fleet, ()
    live = replace(fleet.live, counter=fleet.counter)
    ends = tuple(end_of(state) for state in fleet.beside.placement.replicas.values())
    return Fleet(live=live), ends


def _switched(fleet: Fleet, event: Switched) -> FleetOutcome:
    """The two change places; nothing if they must not. The table that routers get next is of the
    one generation, the table before it of the other."""
    beside = fleet.beside
    if beside is None or beside.generation != event.generation or not can_switch(fleet):
        return fleet, ()
    number = fleet.counter + 1
    table = replace(beside.placement.table, version=number, went_live_with=event.has)
    live = replace(beside.placement, table=table, counter=number)
    # a restart of the one before ends with it; it takes writes again, those of the mirror
    before = _level(replace(fleet.live, restart=None, reserved={}), number, live)
    kept, orders = step(before, SealDropped(now_s=event.now_s))
    is_mirrored = event.is_mirrored and live.rules.writes
    switched = Fleet(
        live=live, beside=Beside(placement=kept, role=Role.KEPT, is_mirrored=is_mirrored)
    )
    return switched, (Publish(table=table), *_unpublished(orders))


def _told_of_model(fleet: Fleet, orders: tuple[Instruction, ...]) -> FleetOutcome:
    """Routers know the model of the generation that writes are brought to, if it is another."""
    beside, live = fleet.beside, fleet.live
    other = None
    if beside is not None and beside.is_mirrored:
        model = beside.placement.table.model_version
        other = None if model == live.table.model_version else model
    if other == live.table.other_model:
        return fleet, orders
    number = fleet.counter + 1
    table = replace(live.table, other_model=other, version=number)
    told = replace(fleet, live=replace(live, table=table, counter=number))
    rest = _unpublished(orders)
    return told, (*((Publish(table=table),) if live.settled else ()), *rest)


def _is_in_the_way(fleet: Fleet) -> bool:
    """Whether the live generation lacks a replica that would have a host without the other."""
    if fleet.beside is None or not fleet.live.reserved:
        return False
    alone = replace(fleet.live, reserved={})
    lacking = [shard for shard, _ in fleet.live.shards_without_all()]
    return any(host_for(alone, shard) is not None for shard in lacking)


def _level(placement: Placement, counter: int, other: Placement | None) -> Placement:
    """As it is before an event: with the counter of all, and the room that the other leaves."""
    reserved = {} if other is None else reserved_by(other)
    if placement.counter == counter and placement.reserved == reserved:
        return placement
    return replace(placement, counter=counter, reserved=reserved)


def _number(placement: Placement) -> int:
    return placement.table.generation


def _unpublished(orders: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    return tuple(order for order in orders if not isinstance(order, Publish))
