"""The controller's rules as a pure state machine: events in, a new state and instructions out.

No Ray, no clock, no I/O: ``step`` is a function. The controller feeds it what happened and carries
out what it answers. The first table is published once every replica that was there has answered or
failed: until then a restarted controller knows less than the routers do. One counter, which goes on
from the last number that the store has given out, numbers both table versions and epochs: each
rises whenever anything changes, across generations too, and a router that sees a lower number knows
it to be old. Where the store's record is lost, or an older one was restored, shards and routers
tell what numbers they have, and the counter goes on from the largest of all.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from shardline.cluster.control.events import (
    Announce,
    Event,
    HostsSeen,
    Instruction,
    LeaderSeen,
    LeaderSilent,
    LeadFailed,
    Leading,
    NumberSeen,
    Place,
    Publish,
    ReplicaIdle,
    ReplicaRegistered,
    ReplicaUnreachable,
    RestartAsked,
    RestartStopped,
    SealAsked,
    SealDropped,
    Sealed,
    SealFailed,
)
from shardline.cluster.control.hosts import Host
from shardline.cluster.control.leading import (
    after_lead_failed,
    after_leader_seen,
    after_leader_silent,
    after_leading,
    after_registered,
    elect,
    primary_epoch_of,
    primary_of,
)
from shardline.cluster.control.notes import notes_of
from shardline.cluster.control.placement_state import (
    Placement,
    ReplicaState,
    Rules,
    Stage,
)
from shardline.cluster.control.reconcile import (
    FORGET_S,
    after_failure,
    after_idle,
    reconcile,
)
from shardline.cluster.control.replacing import Outcome
from shardline.cluster.control.restart_state import Restart
from shardline.cluster.control.rolling_restart import restart_begun, restart_stopped
from shardline.cluster.control.sealing import (
    after_seal_failed,
    after_sealed,
    seal_begun,
    seal_dropped,
)
from shardline.shards.core.errors import Unavailable
from shardline.shards.core.messages import (
    Absence,
    ReplicaKey,
    ReplicaRoute,
    RoutingTable,
    ShardRoute,
)

# A restarted controller publishes without a replica that it has found and not heard of by then,
# if another of that shard answers: its host may have died, which Ray notices late.
HEAR_S = 3.0
# Without news of hosts for so long, many times their interval, Ray's head was away.
GAP_S = 10.0
ABOUT_LEADERS = (
    *(Leading, LeadFailed, LeaderSeen, LeaderSilent),
    *(SealAsked, SealDropped, Sealed, SealFailed),
)


def open_generation(
    table: RoutingTable,
    *,
    counter: int,
    rules: Rules,
    hosts: Sequence[Host],
    found: Mapping[ReplicaKey, str],
    now_s: float = 0.0,
    restart: Restart | None = None,
    reserved: Mapping[str, tuple[float, float]] | None = None,
) -> Outcome:
    """The state in which no replica answers yet, and the order to place those that are wanted.

    table: the generation's; the replicas in its shards are replaced. counter: the number that its
    first version takes. hosts: the living ones. found: replicas that have an actor already, and the
    node id of its host. restart: the newest one that a controller before this began. reserved: as
    of ``Placement``.
    """
    below = restart.below if restart is not None else {}  # a number may be that of one that ended
    numbers = {shard.shard: below.get(shard.shard, 0) for shard in table.shards}
    for key in found:
        numbers[key.shard] = max(numbers[key.shard], key.replica + 1)
    known = {host.node_id: host for host in hosts}
    opened = Placement(
        rules=rules,
        table=replace(table, version=counter),
        replicas={
            key: _found(key, node_id, known, now_s) for key, node_id in sorted(found.items())
        },
        counter=counter,
        next_numbers=numbers,
        hosts=known,
        seen_since=dict.fromkeys(known, now_s),
        store_notes=table.notes,
        # at the first start nothing is served yet, and so nothing is late
        heard_by_s=now_s + HEAR_S if found else math.inf,
        now_s=now_s,
        restart=restart,
        reserved=reserved or {},
    )
    asked = tuple(
        Place(key=state.key, node_id=state.node_id)
        for state in opened.replicas.values()
        if state.node_id in known
    )
    filled, instructions = reconcile(opened)
    if not found:  # the first start: a table with holes would be of no use to anybody
        states = (replace(state, unheard=True) for state in filled.replicas.values())
        filled = filled.with_states(*states)
    shards = _shard_routes(filled)
    notes = (*table.notes, *notes_of(filled))
    return replace(filled, table=replace(filled.table, shards=shards, notes=notes)), (
        *asked,
        *instructions,
    )


def step(placement: Placement, event: Event) -> Outcome:
    """What the event changes: nothing if it is about a replaced epoch or another generation."""
    changed, first = _taken(placement, event)
    if changed is placement:
        return placement, ()
    then: tuple[Instruction, ...] = ()
    if not isinstance(event, ABOUT_LEADERS):  # nothing is placed or moved for those
        changed, then = reconcile(changed)
    if not changed.settled:
        changed = replace(changed, settled=_is_settled(changed))
    changed, asked = elect(changed, _time_of(event))
    return _published(placement, changed, (*first, *then, *asked))


def _taken(placement: Placement, event: Event) -> Outcome:
    """The event itself, without what follows from it."""
    if isinstance(event, HostsSeen):
        return _hosts_seen(placement, event), ()
    if isinstance(event, NumberSeen):
        return _number_seen(placement, event.number)
    if isinstance(event, RestartAsked):
        return restart_begun(placement), ()
    if isinstance(event, RestartStopped):
        return restart_stopped(placement), ()
    if isinstance(event, SealAsked):
        return seal_begun(placement), ()
    if isinstance(event, SealDropped):
        return seal_dropped(placement), ()
    state = placement.replicas.get(event.key)
    if state is None:
        return placement, ()
    if isinstance(event, ReplicaRegistered):
        return _registered(placement, state, event), ()
    if isinstance(event, ReplicaUnreachable):
        return _unreachable(placement, state, event), ()
    if isinstance(event, ReplicaIdle):
        return after_idle(placement, state)
    if isinstance(event, Leading):
        return after_leading(placement, event), ()
    if isinstance(event, LeadFailed):
        return after_lead_failed(placement, event)
    if isinstance(event, LeaderSeen):
        return after_leader_seen(placement, event), ()
    if isinstance(event, LeaderSilent):
        return after_leader_silent(placement, event), ()
    if isinstance(event, Sealed):
        return after_sealed(placement, event), ()
    if isinstance(event, SealFailed):
        return after_seal_failed(placement, event), ()
    return after_failure(placement, state, event.reason)


def _hosts_seen(placement: Placement, event: HostsSeen) -> Placement:
    hosts = {host.node_id: host for host in event.hosts}
    is_gap = event.now_s - placement.now_s > GAP_S
    seen = {} if is_gap else placement.seen_since
    since = {node_id: seen.get(node_id, event.now_s) for node_id in hosts}
    failed = {
        spot: failure
        for spot, failure in placement.failed.items()
        if spot.node_id in hosts and event.now_s - failure.last_s < FORGET_S
    }
    placement = replace(placement, hosts=hosts, seen_since=since, failed=failed, now_s=event.now_s)
    if not is_gap:
        return placement
    # what was to start could not, while Ray's head was away: that time is no sign of being stuck
    late = [state for state in placement.replicas.values() if not state.answers]
    return placement.with_states(*(replace(state, since_s=event.now_s) for state in late))


def _number_seen(placement: Placement, number: int) -> Outcome:
    """Jumps beyond a number that this controller did not know to be given out."""
    if number <= placement.counter:
        return placement, ()
    low = [state.key for state in placement.replicas.values() if state.answers]
    jumped = replace(placement, counter=number + 1)
    return jumped, tuple(Announce(key=key) for key in low)


def _registered(placement: Placement, state: ReplicaState, event: ReplicaRegistered) -> Placement:
    epoch = max(placement.counter, event.epoch, event.leads or 0) + 1
    route = replace(state.route, epoch=epoch, address=event.address, absence=None)
    is_known = state.route.address == event.address
    since_s = state.since_s if is_known else max(placement.now_s, event.now_s)
    heard = replace(state, route=route, failures=0, since_s=since_s, unheard=False)
    failed = {spot: each for spot, each in placement.failed.items() if spot != state.spot}
    placement = replace(placement, counter=epoch, failed=failed).with_states(heard)
    return after_registered(placement, event, is_new=not is_known)


def _unreachable(placement: Placement, state: ReplicaState, event: ReplicaUnreachable) -> Placement:
    if state.route.epoch != event.epoch or not state.answers:
        return placement
    route = replace(state.route, address=None, absence=event.reason)
    since_s = max(placement.now_s, event.now_s)
    return placement.with_states(replace(state, route=route, since_s=since_s))


def _published(
    before: Placement, changed: Placement, instructions: tuple[Instruction, ...]
) -> Outcome:
    """The placement under the next number, if routers are to know of what has changed."""
    shards = _shard_routes(changed)
    notes = (*changed.store_notes, *notes_of(changed))
    was = (before.table.shards, before.table.notes, before.settled, before.counter)
    if was == (shards, notes, changed.settled, changed.counter):
        return changed, instructions
    counter = max(changed.counter, before.counter + 1)
    table = replace(before.table, version=counter, shards=shards, notes=notes)
    changed = replace(changed, table=table, counter=counter)
    return changed, (*((Publish(table=table),) if changed.settled else ()), *instructions)


def _is_settled(placement: Placement) -> bool:
    unheard = {state.key.shard for state in placement.replicas.values() if state.unheard}
    if not unheard:
        return True
    answering = {state.key.shard for state in placement.staying() if state.answers}
    return placement.now_s >= placement.heard_by_s and unheard <= answering


def _time_of(event: Event) -> float:
    """0: that of the last news of hosts."""
    return float(getattr(event, "now_s", 0.0))


def _found(key: ReplicaKey, node_id: str, hosts: Mapping[str, Host], now_s: float) -> ReplicaState:
    host = hosts[node_id].address if node_id in hosts else None
    route = ReplicaRoute(key=key, epoch=0, address=None, host=host)
    return ReplicaState(route=route, node_id=node_id, since_s=now_s, unheard=True)


def _shard_routes(placement: Placement) -> tuple[ShardRoute, ...]:
    """As routers are to know them: without what drains."""
    routes: dict[int, list[ReplicaRoute]] = defaultdict(list)
    for state in placement.replicas.values():
        if state.stage is not Stage.DRAINING:
            routes[state.key.shard].append(state.route)
    return tuple(
        replace(
            shard,
            replicas=tuple(routes[shard.shard] or [_no_replica(placement, shard.shard)]),
            primary=primary_of(placement, shard.shard),
            primary_epoch=primary_epoch_of(placement, shard.shard),
        )
        for shard in placement.table.shards
    )


def _no_replica(placement: Placement, shard: int) -> ReplicaRoute:
    absence = Absence(Unavailable.code, "no living host has room for this shard")
    number = placement.next_numbers[shard]
    key = ReplicaKey(placement.table.generation, shard, number)
    return ReplicaRoute(key=key, epoch=0, address=None, absence=absence)
