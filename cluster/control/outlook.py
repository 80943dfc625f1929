"""What a placement can become: whether who waits for it waits in vain, and what to tell them."""

from shardline.cluster.control.hosts import Spot
from shardline.cluster.control.placement_state import Placement, ReplicaState
from shardline.cluster.control.rolling_restart import shards_without_spare
from shardline.shards.core.errors import Unavailable, error_of
from shardline.shards.core.messages import Absence

NAMED = 8  # replicas that an error lists


def hopeless(placement: Placement) -> list[ReplicaState]:
    """Those that failed wherever they could be: who waits for the start need not wait longer."""
    marked = {spot for spot in placement.failed if spot.node_id in placement.hosts}
    found = []
    for state in placement.staying():
        if state.answers or not state.failures:
            continue
        shard = state.key.shard
        others = {other.node_id for other in placement.staying(shard) if other is not state}
        untried = [
            node_id
            for node_id, room in placement.room.items()
            if room and node_id not in others and Spot(shard, node_id) not in marked
        ]
        if not untried:
            found.append(state)
    return found


def without_room(placement: Placement) -> list[int]:
    """The shards without a replica, not even one that is still loading."""
    return [shard for shard, count in placement.shards_without_all() if count == 0]


def raise_if_hopeless(placement: Placement) -> None:
    """Raises ShardlineError, of the reason's code: a replica cannot load, or has no host."""
    for state in hopeless(placement):
        reason = state.route.absence or Absence(Unavailable.code, "it has failed")
        where = f" on {state.route.host}" if len(placement.hosts) > 1 else ""
        raise error_of(reason.code, f"shard {state.key.shard}{where}: {reason.text}")
    if shards := without_room(placement):
        raise Unavailable(
            f"no host has room for a replica of shards {shards}",
            hint="lower cluster.cpus_per_shard, or add hosts",
        )


def not_ready(placement: Placement, timeout_s: float) -> Unavailable:
    """The error that the time is up; it names the replicas that do not answer, and their hosts."""
    silent = [state for state in placement.staying() if not state.answers]
    told = [
        f"shard {state.key.shard}, replica {state.key.replica} on {state.route.host}"
        + (f" ({state.route.absence.text})" if state.route.absence is not None else "")
        for state in silent[:NAMED]
    ]
    more = f"; and {len(silent) - NAMED} more" if len(silent) > NAMED else ""
    return Unavailable(
        "shards did not become ready",
        expected=f"within {timeout_s:g} s",
        got=f"no answer from {'; '.join(told)}{more}" if told else None,
        hint="give it longer with --set cluster.start_timeout_s=..., or Ray more CPUs",
    )


def refuse_without_spare(placement: Placement) -> None:
    """Raises Unavailable: a rolling restart would never end."""
    if shards := shards_without_spare(placement):
        raise Unavailable(
            f"no host has room for one more replica of shards {shards}",
            expected="room to load each replica anew beside the one that it replaces",
            hint="lower cluster.cpus_per_shard, add a host, or `shardline down` and `serve` again",
        )
