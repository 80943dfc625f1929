"""The rules of a rolling restart: every replica is replaced, one after the other.

One that cannot be replaced is put off, each time for longer, and the next one has its turn. A
restart that nothing helps waits for ever; whoever asked for it may stop it.
"""

from dataclasses import replace

from shardline.cluster.control.placement_state import Placement, ReplicaState
from shardline.cluster.control.replacing import (
    Outcome,
    host_beside,
    is_replacing,
    replaced,
    retry_after_s,
)
from shardline.cluster.control.restart_state import PutOff, Restart
from shardline.shards.core.errors import Unavailable
from shardline.shards.core.messages import Absence, ReplicaKey


def restart_begun(placement: Placement) -> Placement:
    """Begins one with the replicas of now; one that is under way goes on."""
    if is_restarting(placement):
        return placement
    begun = Restart(
        number=placement.counter + 1,
        below=placement.next_numbers,
        total=len(placement.staying()),
    )
    return replace(placement, restart=begun, counter=placement.counter + 1)


def restart_stopped(placement: Placement) -> Placement:
    """Begins no further replacement; one that is under way is brought to its end."""
    restart = placement.restart
    if restart is None or restart.is_over:
        return placement
    over = replace(restart, is_over=True, is_stopped=True, waits_for=None, put_off={})
    return replace(placement, restart=over)


def is_restarting(placement: Placement) -> bool:
    return placement.restart is not None and not placement.restart.is_over


def shards_without_spare(placement: Placement) -> list[int]:
    """Those with a replica that could not be replaced: no host has room for one more of them.

    What is about to end does not count, because its room is free soon.
    """
    staying = {state.key: state for state in placement.staying()}
    later = replace(placement, replicas=staying)
    full = {state.key.shard for state in staying.values() if host_beside(later, state) is None}
    return sorted(full)


def restart_next(placement: Placement) -> Outcome:
    """Replaces the next replica, if all of its shard answer: on its own host if that has room for
    two and its shard has not failed there."""
    restart = placement.restart
    if restart is None or restart.is_over:
        return placement, ()
    waiting = [state for state in placement.replicas.values() if restart.concerns(state.key)]
    if not waiting:
        over = replace(restart, is_over=True, waits_for=None, put_off={})
        return replace(placement, restart=over), ()
    if is_replacing(placement):
        return placement, ()
    calm_shards = placement.calm_shards() if placement.settled else set()
    calm = [state for state in waiting if state.key.shard in calm_shards]
    if not calm:
        shard = waiting[0].key.shard
        return _waiting_for(placement, f"waits until all replicas of shard {shard} answer"), ()
    return _one_replaced(placement, restart, calm)


def after_replaced(placement: Placement, key: ReplicaKey) -> Placement:
    """The replica is out of the table, and another one in."""
    restart = placement.restart
    if restart is None or not restart.concerns(key):
        return placement
    left = {other: each for other, each in restart.put_off.items() if other != key}
    return replace(placement, restart=replace(restart, put_off=left, waits_for=None))


def put_off(placement: Placement, key: ReplicaKey, reason: Absence) -> Placement:
    """The replica could not be replaced: the restart goes on with the others, and tries this one
    again later."""
    restart = placement.restart
    if restart is None or not restart.concerns(key):
        return placement
    known = restart.put_off.get(key)
    failures = 1 + (known.failures if known is not None else 0)
    waits = PutOff(
        failures=failures,
        not_before_s=placement.now_s + retry_after_s(failures),
        reason=Absence(reason.code, f"shard {key.shard}: {reason.text}"),
    )
    return replace(placement, restart=replace(restart, put_off={**restart.put_off, key: waits}))


def _one_replaced(placement: Placement, restart: Restart, calm: list[ReplicaState]) -> Outcome:
    """The one that has failed least often, of those whose turn it may be and that have a host."""
    tries = {key: each for key, each in restart.put_off.items() if key in placement.replicas}
    due = [
        state
        for state in calm
        if state.key not in tries or placement.now_s >= tries[state.key].not_before_s
    ]
    due.sort(key=lambda state: tries[state.key].failures if state.key in tries else 0)
    for state in due:
        node_id = host_beside(placement, state)
        if node_id is not None:
            going = replace(restart, put_off=tries, waits_for=None)
            return replaced(replace(placement, restart=going), state, node_id)
    if not due:
        return replace(placement, restart=replace(restart, put_off=tries, waits_for=None)), ()
    text = (
        f"no host has room for one more replica of shard {due[0].key.shard}: "
        "`shardline restart --stop` ends the restart"
    )
    return _waiting_for(placement, text), ()


def _waiting_for(placement: Placement, text: str) -> Placement:
    assert placement.restart is not None
    waits = replace(placement.restart, waits_for=Absence(Unavailable.code, text))
    return replace(placement, restart=waits)
