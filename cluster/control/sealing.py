"""The rules by which the shards of a generation are sealed: no write is acknowledged any more.

A sealed shard has an epoch above all that were given out to lead it, and nobody leads with that
one. So whoever led until then cannot acknowledge what comes later, be it paused and wake up, and
the number of writes that the shard had when it was sealed is final. Nobody is asked to lead until
the seal is dropped. Pure, as ``leading``.
"""

from collections.abc import Mapping
from dataclasses import replace

from shardline.cluster.control.events import Instruction, Seal, Sealed, SealFailed
from shardline.cluster.control.leading_state import Term
from shardline.cluster.control.placement_state import (
    Placement,
    ReplicaState,
    Sealing,
    Stage,
)
from shardline.cluster.control.replacing import Outcome
from shardline.shards.core.messages import ReplicaKey

RETRY_S = 0.5  # before a replica that could not seal its shard is asked again


def seal_begun(placement: Placement) -> Placement:
    """Nobody leads from now on; one that is under way goes on.

    Nothing without writes, or while what this controller found has not been heard of.
    """
    if placement.sealing is not None or not placement.rules.writes or not placement.settled:
        return placement
    leaders = {shard: known.leader for shard, known in placement.leading.items()}
    sealing = {
        route.shard: Sealing(leader=_key_of(leaders.get(route.shard)))
        for route in placement.table.shards
    }
    return replace(placement, sealing=sealing, leading={})


def seal_dropped(placement: Placement) -> Placement:
    """Leaders are elected again, each with an epoch above that of the seal."""
    return placement if placement.sealing is None else replace(placement, sealing=None)


def sealed_seqs(placement: Placement) -> tuple[int, ...] | None:
    """Of each shard, how many writes it has for good; None: one is not sealed.

    Of a generation that takes no writes none is known: ().
    """
    if not placement.rules.writes:
        return ()
    found = [] if placement.sealing is None else [each.seq for each in placement.sealing.values()]
    if len(found) != len(placement.table.shards) or None in found:
        return None
    return tuple(seq for seq in found if seq is not None)


def ask_to_seal(placement: Placement, now_s: float) -> Outcome:
    """Asks a replica of each shard that is not sealed: the one that led, else any that answers."""
    assert placement.sealing is not None
    orders: list[Instruction] = []
    changed: dict[int, Sealing] = {}
    for shard, each in placement.sealing.items():
        asked = None if each.asked is None else placement.replicas.get(each.asked.key)
        if each.seq is not None or (asked is not None and can_be_asked(asked)):
            continue
        chosen = _chosen(placement, shard, each, now_s)
        if chosen is None:
            continue
        epoch = placement.counter + len(orders) + 1
        changed[shard] = replace(each, asked=Term(chosen, epoch))
        orders.append(Seal(key=chosen, epoch=epoch))
    if not orders:
        return placement, ()
    counter = placement.counter + len(orders)
    return replace(_with(placement, changed), counter=counter), tuple(orders)


def after_sealed(placement: Placement, event: Sealed) -> Placement:
    """What the replica of the newest order says counts, and is final."""
    each = _asked(placement, event.key, event.epoch)
    if each is None:
        return placement
    return _with(placement, {event.key.shard: replace(each, asked=None, seq=event.seq)})


def after_seal_failed(placement: Placement, event: SealFailed) -> Placement:
    """Another replica is asked, or the same one after a pause."""
    each = _asked(placement, event.key, event.epoch)
    if each is None:
        return placement
    failures = {**each.failures, event.key: each.failures.get(event.key, 0) + 1}
    now_s = max(placement.now_s, event.now_s)
    failed = replace(
        each, asked=None, failures=failures, not_before_s=now_s + RETRY_S, failed=event.reason
    )
    return _with(placement, {event.key.shard: failed})


def can_be_asked(state: ReplicaState) -> bool:
    """Whether it answers, and takes part."""
    return state.answers and state.stage is not Stage.DRAINING


def _key_of(leader: Term | None) -> ReplicaKey | None:
    return None if leader is None else leader.key


def _chosen(placement: Placement, shard: int, each: Sealing, now_s: float) -> ReplicaKey | None:
    keys = [
        state.key
        for state in placement.replicas.values()
        if state.key.shard == shard and can_be_asked(state)
    ]
    chosen = min(
        keys,
        key=lambda key: (each.failures.get(key, 0), key != each.leader, key.replica),
        default=None,
    )
    is_early = now_s < each.not_before_s
    return None if is_early and chosen in each.failures else chosen


def _asked(placement: Placement, key: ReplicaKey, epoch: int) -> Sealing | None:
    """The shard's, if it waits for that answer."""
    each = (placement.sealing or {}).get(key.shard)
    return each if each is not None and each.asked == Term(key, epoch) else None


def _with(placement: Placement, changed: Mapping[int, Sealing]) -> Placement:
    assert placement.sealing is not None
    return replace(placement, sealing={**placement.sealing, **changed})
