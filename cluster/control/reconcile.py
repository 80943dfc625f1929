"""Rules that bring what is placed to what is wanted: pure, applied after every event.

A replica is never stopped for our own reasons before another serves in its stead, and only one is
replaced at a time: another is placed beside it, both are in the table for a second, then the old
one leaves the table, and its process ends when no query can be under way on it any more. What
happens meanwhile, a failure or a restart of the controller, leaves a state from which the same
rules go on.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from shardline.cluster.control.events import (
    Instruction,
    Place,
)
from shardline.cluster.control.hosts import Spot, Spread, better_spread
from shardline.cluster.control.leading import is_to_hand_over
from shardline.cluster.control.placement_state import (
    Failure,
    Placement,
    ReplicaState,
    Stage,
)
from shardline.cluster.control.replacing import (
    Outcome,
    at_stage,
    end_of,
    failures_on,
    host_for,
    is_replacing,
    new_replica,
    placed,
    replaced,
    retry_after_s,
)
from shardline.cluster.control.rolling_restart import (
    after_replaced,
    is_restarting,
    put_off,
    restart_next,
)
from shardline.shards.core.errors import Unavailable
from shardline.shards.core.messages import Absence, ReplicaKey

OVERLAP_S = 2.0  # by a clock that ticks once per second; routers connect meanwhile, in milliseconds
# What drains ends when no router is connected to it, or so late: far above the largest deadline
# that routers allow by default.
DRAIN_S = 60.0
STEADY_S = 10.0  # a host that comes and goes gets no replicas moved to it
FORGET_S = 600.0  # a host where a shard could not be loaded is tried again, to spread replicas


def reconcile(placement: Placement) -> Outcome:
    """The next state on the way to what is wanted; nothing without knowledge of hosts."""
    if not placement.hosts:
        return placement, ()
    rules: tuple[Callable[[Placement], Outcome], ...] = (
        *(_drop_dead, _give_up_stuck, _fill, _trim),
        *(restart_next, _move_next, _retire, _end_drained),
    )
    instructions: list[Instruction] = []
    for rule in rules:
        placement, ordered = rule(placement)
        instructions += ordered
    return placement, tuple(instructions)


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
        returned = placement.without(state.key).with_states(at_stage(placement, old, Stage.STAYING))
        return put_off(returned, old.key, reason), ()
    failures = state.failures + 1
    wait_s = retry_after_s(failures)
    node_id = host_for(placement, state.key.shard, without=state) or state.node_id
    if node_id != state.node_id:
        return placed(
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
    return placement.without(state.key), (end_of(state),)


# The rules, in the order in which they are applied


def _drop_dead(placement: Placement) -> Outcome:
    """Replicas on hosts that are gone; ``_fill`` places others."""
    gone = [state for state in placement.replicas.values() if state.node_id not in placement.hosts]
    for state in gone:
        placement = placement.without(state.key)
    return placement, tuple(end_of(state) for state in gone)


def _give_up_stuck(placement: Placement) -> Outcome:
    """Those that do not begin to answer, where the one before them still serves, or another host
    may do better."""
    limit_s = placement.rules.load_limit_s
    instructions: tuple[Instruction, ...] = ()
    late = [
        state
        for state in placement.staying()
        if not state.answers and placement.now_s - state.since_s > limit_s
    ]
    for state in late:
        if _has_predecessor(placement, state) or _is_better_elsewhere(placement, state):
            host = placement.address_of(state.node_id)
            text = f"did not begin to answer on {host} within {limit_s:g} s"
            placement, ordered = after_failure(placement, state, Absence(Unavailable.code, text))
            instructions += (end_of(state), *ordered)
    return placement, instructions


def _fill(placement: Placement) -> Outcome:
    """Each shard has the replicas that are wanted, as far as there are hosts for them."""
    lacking = placement.shards_without_all()
    if not lacking:
        return placement, ()
    filling = _Filling(placement)
    for shard, count in lacking:
        filling.fill(shard, placement.rules.replicas - count)
    return filling.outcome()


class _Filling:
    """One pass over all shards, for there may be thousands of replicas to place."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._numbers = dict(placement.next_numbers)
        self._failures = failures_on(placement)
        self._states: list[ReplicaState] = []
        self._orders: list[Instruction] = []
        self._of: dict[int, list[ReplicaState]] = defaultdict(list)
        for state in placement.replicas.values():
            self._of[state.key.shard].append(state)
        self._spread = Spread(
            placement.room,
            [state.spot for state in placement.replicas.values()],
            num_shards=len(placement.table.shards),
            zones=placement.zones,
        )

    def fill(self, shard: int, missing: int) -> None:
        """Takes back replicas that were to leave and still answer; places others."""
        going = [state for state in self._of[shard] if state.stage is not Stage.STAYING]
        for state in going:  # a host is not barred by what leaves it
            self._spread.remove(state.spot)
        for _ in range(missing):
            if not self._taken_back(shard, going) and not self._placed(shard):
                break
        for state in going:
            self._spread.add(state.spot)

    def outcome(self) -> Outcome:
        counted = replace(self._placement, next_numbers=self._numbers)
        return counted.with_states(*self._states), tuple(self._orders)

    def _taken_back(self, shard: int, going: list[ReplicaState]) -> bool:
        for state in going:
            is_free = not self._spread.holds(state.spot)
            if state.stage is Stage.LEAVING and state.answers and is_free:
                going.remove(state)
                self._spread.add(state.spot)
                self._states.append(at_stage(self._placement, state, Stage.STAYING))
                return True
        return False

    def _placed(self, shard: int) -> bool:
        node_id = self._spread.choose(shard, self._failures.get(shard, {}))
        if node_id is None:
            return False
        number = self._numbers[shard]
        key = ReplicaKey(self._placement.table.generation, shard, number)
        state, order = new_replica(self._placement, key, node_id)
        self._numbers[shard] = number + 1
        self._states.append(state)
        self._orders.append(order)
        self._spread.add(state.spot)
        return True


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
                placement = placement.with_states(at_stage(placement, state, Stage.LEAVING))
            else:
                placement = placement.without(state.key)
                instructions += (end_of(state),)
    return placement, instructions


def _move_next(placement: Placement) -> Outcome:
    """Moves one replica to a host that holds too few, when nothing else is under way."""
    is_steady = all(
        placement.now_s - since_s >= STEADY_S for since_s in placement.seen_since.values()
    )
    is_loading = any(not state.answers and not state.failures for state in placement.staying())
    is_busy = is_loading or is_restarting(placement) or is_replacing(placement)
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
    return replaced(placement, state, move[1])


def _retire(placement: Placement) -> Outcome:
    """Those leave the table whose successors have answered for long enough, and lead in their
    stead."""
    for state in placement.at(Stage.LEAVING):
        staying = placement.staying(state.key.shard)
        can_leave = staying and all(
            other.answers and placement.now_s - other.since_s >= OVERLAP_S for other in staying
        )
        if can_leave and not is_to_hand_over(placement, state):
            placement = placement.with_states(at_stage(placement, state, Stage.DRAINING))
            placement = after_replaced(placement, state.key)
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
    return placement, tuple(end_of(state) for state in drained)


def _has_predecessor(placement: Placement, state: ReplicaState) -> bool:
    """Whether one that is to leave answers in its stead."""
    return any(other.answers for other in placement.at(Stage.LEAVING, state.key.shard))


def _is_better_elsewhere(placement: Placement, state: ReplicaState) -> bool:
    """Whether there is another host where its shard has failed no more often."""
    failures = failures_on(placement).get(state.key.shard, {})
    other = host_for(placement, state.key.shard, without=state, barred=state.node_id)
    return other is not None and failures.get(other, 0) <= failures.get(state.node_id, 0)


def _worth(placement: Placement, state: ReplicaState) -> tuple[bool, bool, bool, int, int]:
    """The lowest is the first to go."""
    staying = placement.staying()
    mates = [other for other in staying if other.key.shard == state.key.shard]
    shares = sum(other.node_id == state.node_id for other in mates) > 1
    is_old = placement.restart is not None and placement.restart.concerns(state.key)
    load = sum(other.node_id == state.node_id for other in staying)
    return not is_old, state.answers, not shares, -load, state.key.replica


def _marked(placement: Placement, state: ReplicaState, reason: Absence) -> Placement:
    known = placement.failed.get(state.spot)
    count = 1 + (known.count if known is not None else 0)
    failure = Failure(count=count, last_s=placement.now_s, reason=reason)
    return replace(placement, failed={**placement.failed, state.spot: failure})
