"""Rules that bring what is placed to what is wanted: pure, applied after every event.

A replica is never stopped for our own reasons before another serves in its stead, and only one is
replaced at a time: another is placed beside it, both are in the table for a second, then the old
one leaves the table, and its process ends when no query can be under way on it any more. What
happens meanwhile, a failure or a restart of the controller, leaves a state from which the same
rules go on.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from shardline.cluster.control.hosts import Spot, better_spread, choose_host
from shardline.cluster.control.placement_state import (
    End,
    Failure,
    Instruction,
    Place,
    Placement,
    ReplicaState,
    Restart,
    Stage,
)
from shardline.shards.core.errors import Unavailable
from shardline.shards.core.messages import Absence, ReplicaKey, ReplicaRoute

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 30.0
OVERLAP_S = 2.0  # by a clock that ticks once per second; routers connect meanwhile, in milliseconds
# What drains ends when no router is connected to it, or so late: far above the largest deadline
# that routers allow by default.
DRAIN_S = 60.0
STEADY_S = 10.0  # a host that comes and goes gets no replicas moved to it
FORGET_S = 600.0  # a host where a shard could not be loaded is tried again, to spread replicas

Outcome: TypeAlias = tuple[Placement, tuple[Instruction, ...]]


def reconcile(placement: Placement) -> Outcome:
    """The next state on the way to what is wanted; nothing without knowledge of hosts."""
    if not placement.hosts:
        return placement, ()
    rules: tuple[Callable[[Placement], Outcome], ...] = (
        *(_drop_dead, _give_up_stuck, _fill, _trim),
        *(_restart_next, _move_next, _retire, _end_drained),
    )
    instructions: list[Instruction] = []
    for rule in rules:
        placement, ordered = rule(placement)
        instructions += ordered
    return placement, tuple(instructions)


def retry_after_s(failures: int) -> float:
    """1, 2, 4 ... 30 seconds: a range that cannot load must not be loaded in a tight loop."""
    return float(min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** max(0, min(failures, 10) - 1)))


def after_failure(placement: Placement, state: ReplicaState, reason: Absence) -> Outcome:
    """The replica has no process any more, and Ray starts none.

    It is placed again later: on a host where its shard has failed less often, under a new number,
    or on its own. One that was to take over from another is given up, and the other stays.
    """
    placement = _marked(placement, state, reason)
    if state.stage is not Stage.STAYING:
        return placement.without(state.key), ()
    old = next((s for s in placement.at(Stage.LEAVING, state.key.shard) if s.answers), None)
    if old is not None:
        returned = placement.without(state.key).with_states(_at_stage(placement, old, "staying"))
        return _put_off(returned, old.key, reason), ()
    failures = state.failures + 1
    wait_s = retry_after_s(failures)
    node_id = _host_for(placement, state.key.shard, without=state) or state.node_id
    if node_id != state.node_id:
        return _placed(
            placement.without(state.key),
            state.key.shard,
            node_id,
            after_s=wait_s,
            failures=failures,
            absence=reason,
        )
    route = replace(state.route, address=None, absence=reason)
    since_s = placement.now_s + wait_s
    lost = ReplicaState(route=route, node_id=node_id, failures=failures, since_s=since_s)
    return placement.with_states(lost), (Place(key=state.key, node_id=node_id, after_s=wait_s),)


def after_idle(placement: Placement, state: ReplicaState) -> Outcome:
    """A replica that drains ends once no router is connected to it."""
    if state.stage is not Stage.DRAINING or placement.now_s - state.since_s < OVERLAP_S:
        return placement, ()
    return placement.without(state.key), (_end(state),)


def hopeless(placement: Placement) -> list[ReplicaState]:
    """Those that failed wherever they could be: who waits for the start need not wait longer."""
    marked = {spot for spot in placement.failed if spot.node_id in placement.hosts}
    found = []
    for state in placement.staying():
        shard = state.key.shard
        others = {other.node_id for other in placement.staying(shard) if other is not state}
        untried = [
            node_id
            for node_id, room in placement.room.items()
            if room and node_id not in others and Spot(shard, node_id) not in marked
        ]
        if state.failures and not state.answers and not untried:
            found.append(state)
    return found


# The rules, in the order in which they are applied


def _drop_dead(placement: Placement) -> Outcome:
    """Replicas on hosts that are gone; ``_fill`` places others."""
    gone = [state for state in placement.replicas.values() if state.node_id not in placement.hosts]
    for state in gone:
        placement = placement.without(state.key)
    return placement, tuple(_end(state) for state in gone)


def _give_up_stuck(placement: Placement) -> Outcome:
    """Those that do not begin to answer, where another host may do better."""
    limit_s = placement.rules.load_limit_s
    instructions: tuple[Instruction, ...] = ()
    late = [
        state
        for state in placement.staying()
        if not state.answers and placement.now_s - state.since_s > limit_s
    ]
    for state in late:
        failures = _failures_on(placement, state.key.shard)
        other = _host_for(placement, state.key.shard, without=state, barred=state.node_id)
        if other is not None and failures.get(other, 0) <= failures.get(state.node_id, 0):
            host = placement.address_of(state.node_id)
            text = f"did not begin to answer on {host} within {limit_s:g} s"
            placement, ordered = after_failure(placement, state, Absence(Unavailable.code, text))
            instructions += (_end(state), *ordered)
    return placement, instructions


def _fill(placement: Placement) -> Outcome:
    """Each shard has the replicas that are wanted, as far as there are hosts for them."""
    instructions: tuple[Instruction, ...] = ()
    for shard, _ in placement.shards_without_all():
        while len(placement.staying(shard)) < placement.rules.replicas:
            nodes = {state.node_id for state in placement.staying(shard)}
            leaving = placement.at(Stage.LEAVING, shard)
            back = next((s for s in leaving if s.answers and s.node_id not in nodes), None)
            node_id = _host_for(placement, shard)
            if back is not None:
                placement = placement.with_states(_at_stage(placement, back, "staying"))
            elif node_id is not None:
                placement, ordered = _placed(placement, shard, node_id)
                instructions += ordered
            else:
                break
    return placement, instructions


def _trim(placement: Placement) -> Outcome:
    """There is one too many where a controller was restarted, or a host was lost, in the middle
    of a replacement."""
    instructions: tuple[Instruction, ...] = ()
    if not placement.settled:
        return placement, instructions
    for shard, count in placement.shards_with_more():
        staying = sorted(placement.staying(shard), key=lambda state: _worth(placement, state))
        for state in staying[: count - placement.attainable]:
            if state.answers:
                placement = placement.with_states(_at_stage(placement, state, "leaving"))
            else:
                placement = placement.without(state.key)
                instructions += (_end(state),)
    return placement, instructions


def _restart_next(placement: Placement) -> Outcome:
    """Replaces the next replica of a rolling restart, on its own host if that has room for two."""
    restart = placement.restart
    if restart is None or restart.is_over:
        return placement, ()
    waiting = [state for state in placement.replicas.values() if restart.concerns(state.key)]
    if not waiting:
        return replace(placement, restart=replace(restart, is_over=True, trouble=None)), ()
    if _is_replacing(placement) or placement.now_s < restart.not_before_s:
        return placement, ()
    calm_shards = placement.calm_shards() if placement.settled else set()
    calm = [state for state in waiting if state.key.shard in calm_shards]
    if not calm:
        text = f"waits until all replicas of shard {waiting[0].key.shard} answer"
        return _in_trouble(placement, restart, text), ()
    node_id = _host_beside(placement, calm[0])
    if node_id is None:
        text = f"no host has room for one more replica of shard {calm[0].key.shard}"
        return _in_trouble(placement, restart, text), ()
    return _replaced(placement, calm[0], node_id)


def _move_next(placement: Placement) -> Outcome:
    """Moves one replica to a host that holds too few, when nothing else is under way."""
    is_steady = all(
        placement.now_s - since_s >= STEADY_S for since_s in placement.seen_since.values()
    )
    is_loading = any(not state.answers and not state.failures for state in placement.staying())
    is_restarting = placement.restart is not None and not placement.restart.is_over
    is_busy = is_loading or is_restarting or _is_replacing(placement)
    if not placement.settled or not is_steady or is_busy:
        return placement, ()
    others = {route.shard for route in placement.table.shards} - placement.calm_shards()
    barred = {Spot(shard, node_id) for shard in others for node_id in placement.hosts}
    barred |= placement.failed.keys()
    spots = [state.spot for state in placement.staying()]
    move = better_spread(
        placement.room,
        spots,
        barred=barred,
        num_shards=len(placement.table.shards),
        zones=placement.zones,
    )
    if move is None:
        return placement, ()
    state = next(state for state in placement.staying() if state.spot == move[0])
    return _replaced(placement, state, move[1])


def _retire(placement: Placement) -> Outcome:
    """Those whose successors have answered for long enough leave the table."""
    for state in placement.at(Stage.LEAVING):
        staying = placement.staying(state.key.shard)
        if staying and all(
            other.answers and placement.now_s - other.since_s >= OVERLAP_S for other in staying
        ):
            placement = placement.with_states(_at_stage(placement, state, "draining"))
            restart = placement.restart
            if restart is not None and restart.concerns(state.key):
                done = replace(restart, failures=0, not_before_s=0.0, trouble=None)
                placement = replace(placement, restart=done)
    return placement, ()


def _end_drained(placement: Placement) -> Outcome:
    """Those on which no query can be under way any more."""
    drained = [
        state
        for state in placement.at(Stage.DRAINING)
        if placement.now_s - state.since_s >= DRAIN_S
    ]
    for state in drained:
        placement = placement.without(state.key)
    return placement, tuple(_end(state) for state in drained)


# What the rules share


def _host_for(
    placement: Placement,
    shard: int,
    without: ReplicaState | None = None,
    barred: str | None = None,
) -> str | None:
    room = {node_id: room for node_id, room in placement.room.items() if node_id != barred}
    spots = [
        state.spot
        for state in placement.replicas.values()
        if state is not without and (state.stage is Stage.STAYING or state.key.shard != shard)
    ]
    return choose_host(
        shard,
        room,
        spots,
        failures=_failures_on(placement, shard),
        num_shards=len(placement.table.shards),
        zones=placement.zones,
    )


def _host_beside(placement: Placement, state: ReplicaState) -> str | None:
    """The replica's own host if it has room for one more, else another that has."""
    held = sum(other.node_id == state.node_id for other in placement.replicas.values())
    if held < placement.room[state.node_id]:
        return state.node_id
    return _host_for(placement, state.key.shard)


def _placed(
    placement: Placement,
    shard: int,
    node_id: str,
    *,
    after_s: float = 0.0,
    failures: int = 0,
    absence: Absence | None = None,
) -> Outcome:
    """With one more replica of the shard, under its next number."""
    number = placement.next_numbers[shard]
    key = ReplicaKey(placement.table.generation, shard, number)
    host = placement.address_of(node_id)
    state = ReplicaState(
        route=ReplicaRoute(key=key, epoch=0, address=None, absence=absence, host=host),
        node_id=node_id,
        failures=failures,
        since_s=placement.now_s + after_s,
    )
    counted = replace(placement, next_numbers={**placement.next_numbers, shard: number + 1})
    return counted.with_states(state), (Place(key=key, node_id=node_id, after_s=after_s),)


def _replaced(placement: Placement, state: ReplicaState, node_id: str) -> Outcome:
    leaving = placement.with_states(_at_stage(placement, state, "leaving"))
    return _placed(leaving, state.key.shard, node_id)


def _at_stage(placement: Placement, state: ReplicaState, stage: str) -> ReplicaState:
    return replace(state, stage=Stage(stage), since_s=placement.now_s)


def _is_replacing(placement: Placement) -> bool:
    return any(state.stage is not Stage.STAYING for state in placement.replicas.values())


def _worth(placement: Placement, state: ReplicaState) -> tuple[bool, bool, bool, int, int]:
    """The lowest is the first to go."""
    staying = placement.staying()
    mates = [other for other in staying if other.key.shard == state.key.shard]
    shares = sum(other.node_id == state.node_id for other in mates) > 1
    is_old = placement.restart is not None and placement.restart.concerns(state.key)
    load = sum(other.node_id == state.node_id for other in staying)
    return not is_old, state.answers, not shares, -load, state.key.replica


def _failures_on(placement: Placement, shard: int) -> dict[str, int]:
    return {
        spot.node_id: failure.count
        for spot, failure in placement.failed.items()
        if spot.shard == shard
    }


def _marked(placement: Placement, state: ReplicaState, reason: Absence) -> Placement:
    known = placement.failed.get(state.spot)
    count = 1 + (known.count if known is not None else 0)
    failure = Failure(count=count, last_s=placement.now_s, reason=reason)
    return replace(placement, failed={**placement.failed, state.spot: failure})


def _put_off(placement: Placement, key: ReplicaKey, reason: Absence) -> Placement:
    """A rolling restart waits before it tries the replica again that could not be replaced."""
    restart = placement.restart
    if restart is None or not restart.concerns(key):
        return placement
    failures = restart.failures + 1
    waits = replace(
        restart,
        failures=failures,
        not_before_s=placement.now_s + retry_after_s(failures),
        trouble=Absence(reason.code, f"shard {key.shard}: {reason.text}"),
    )
    return replace(placement, restart=waits)


def _in_trouble(placement: Placement, restart: Restart, text: str) -> Placement:
    trouble = Absence(Unavailable.code, text)
    return replace(placement, restart=replace(restart, trouble=trouble))


def _end(state: ReplicaState) -> End:
    return End(key=state.key, node_id=state.node_id)
