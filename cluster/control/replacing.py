"""What the rules share: the host for one more replica, and a replica put in another's stead."""

from collections import defaultdict
from dataclasses import replace
from typing import TypeAlias

from shardline.cluster.control.events import (
    End,
    Instruction,
    Place,
)
from shardline.cluster.control.hosts import choose_host
from shardline.cluster.control.placement_state import (
    Placement,
    ReplicaState,
    Stage,
)
from shardline.shards.core.messages import Absence, ReplicaKey, ReplicaRoute

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 30.0

Outcome: TypeAlias = tuple[Placement, tuple[Instruction, ...]]


def retry_after_s(failures: int) -> float:
    """1, 2, 4 ... 30 seconds: a range that cannot load must not be loaded in a tight loop."""
    return float(min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** max(0, min(failures, 10) - 1)))


def host_for(
    placement: Placement,
    shard: int,
    without: ReplicaState | None = None,
    barred: str | None = None,
) -> str | None:
    """The host for one more replica of the shard, as if ``without`` were not there; never
    ``barred``. None: no host without one has room."""
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
        failures=failures_on(placement).get(shard, {}),
        num_shards=len(placement.table.shards),
        zones=placement.zones,
    )


def host_beside(placement: Placement, state: ReplicaState) -> str | None:
    """The replica's own host, or another that has room for one more: where its shard has failed
    less often, else its own. None: no host has room."""
    own, shard = state.node_id, state.key.shard
    held = sum(other.node_id == own for other in placement.replicas.values())
    other = host_for(placement, shard)
    if held >= placement.room.get(own, 0):
        return other
    failures = failures_on(placement).get(shard, {})
    if other is not None and failures.get(other, 0) < failures.get(own, 0):
        return other
    return own


def failures_on(placement: Placement) -> dict[int, dict[str, int]]:
    """Of each shard's replicas lately, by shard and node id."""
    counts: dict[int, dict[str, int]] = defaultdict(dict)
    for spot, failure in placement.failed.items():
        counts[spot.shard][spot.node_id] = failure.count
    return counts


def new_replica(
    placement: Placement,
    key: ReplicaKey,
    node_id: str,
    *,
    after_s: float = 0.0,
    failures: int = 0,
    absence: Absence | None = None,
) -> tuple[ReplicaState, Place]:
    """One that is to be placed in ``after_s`` seconds, and the order to do so."""
    host = placement.address_of(node_id)
    state = ReplicaState(
        route=ReplicaRoute(key=key, epoch=0, address=None, absence=absence, host=host),
        node_id=node_id,
        failures=failures,
        since_s=placement.now_s + after_s,
    )
    return state, Place(key=key, node_id=node_id, after_s=after_s)


def placed(
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
    state, order = new_replica(
        placement, key, node_id, after_s=after_s, failures=failures, absence=absence
    )
    counted = replace(placement, next_numbers={**placement.next_numbers, shard: number + 1})
    return counted.with_states(state), (order,)


def replaced(placement: Placement, state: ReplicaState, node_id: str) -> Outcome:
    """With another replica beside this one, which leaves once the other answers."""
    leaving = placement.with_states(at_stage(placement, state, Stage.LEAVING))
    return placed(leaving, state.key.shard, node_id)


def at_stage(placement: Placement, state: ReplicaState, stage: Stage) -> ReplicaState:
    """The replica, from now on at that stage."""
    return replace(state, stage=stage, since_s=placement.now_s)


def is_replacing(placement: Placement) -> bool:
    """Whether the replacement of some replica is under way."""
    return any(state.stage is not Stage.STAYING for state in placement.replicas.values())


def end_of(state: ReplicaState) -> End:
    """The order to end it."""
    return End(key=state.key, node_id=state.node_id)
