"""The rules by which one replica of each shard leads, that is, takes its writes: pure.

Two replicas may both act as leader for a while, for one that is lost may live on. The epoch tells
them apart, and the shard's log holds the older one back (``shards.live``); here no epoch is given
out twice, each is above all before it, and a table names one leader or none. A leader that is to
leave hands over before it does: it stays in the table as the leader until its successor says that
it leads, so that writes are refused for as long as that takes, and no longer.
"""

from dataclasses import replace

from shardline.cluster.control.events import (
    Announce,
    Instruction,
    Lead,
    LeaderSeen,
    LeaderSilent,
    LeadFailed,
    Leading,
    ReplicaRegistered,
)
from shardline.cluster.control.leading_state import NOBODY, Leadership, Term
from shardline.cluster.control.placement_state import Placement, ReplicaState, Stage
from shardline.cluster.control.replacing import Outcome, retry_after_s
from shardline.cluster.control.sealing import ask_to_seal, can_be_asked
from shardline.shards.core.errors import NotPrimary
from shardline.shards.core.messages import Absence, ReplicaKey

# Without news of hosts for so long, several times their interval, Ray's head is away, and another
# controller may have been started that leads the shards.
HEAD_S = 5.0
# So long a leader that is to leave is kept for its successor, which finds the log already read.
HANDOVER_S = 60.0
CALM_S = 60.0  # without a failure for so long, beyond the pause after the last one, none counts


def primary_key(placement: Placement, shard: int) -> ReplicaKey | None:
    """The replica that takes the shard's writes; None: none does now."""
    if not placement.rules.writes:
        return None
    leader = leader_of(placement, placement.leading.get(shard, NOBODY))
    return None if leader is None else leader.key


def primary_of(placement: Placement, shard: int) -> int | None:
    """The number of that replica."""
    key = primary_key(placement, shard)
    return None if key is None else key.replica


def primary_epoch_of(placement: Placement, shard: int) -> int:
    """That with which it leads; 0: none does now."""
    key = primary_key(placement, shard)
    return 0 if key is None else epoch_of(placement, key) or 0


def epoch_of(placement: Placement, key: ReplicaKey) -> int | None:
    """That with which the replica leads its shard; None: it does not."""
    leader = placement.leading.get(key.shard, NOBODY).leader
    return leader.epoch if leader is not None and leader.key == key else None


def leader_of(placement: Placement, known: Leadership) -> ReplicaState | None:
    """The leader, if routers can ask it."""
    state = None if known.leader is None else placement.replicas.get(known.leader.key)
    return state if state is not None and can_be_asked(state) else None


def leads_on(leader: ReplicaState | None, known: Leadership) -> bool:
    """Whether the leader is to lead on."""
    return leader is not None and leader.stage is Stage.STAYING and not known.is_silent


def elect(placement: Placement, now_s: float) -> Outcome:
    """Asks a replica to lead each shard that has no leader, or whose leader is about to leave; of a
    generation that is to be sealed, to seal it instead.

    Not before the replicas that a restarted controller found have been heard of, for one of them
    may lead; nor without news of hosts. now_s: the time of the event; 0 for that of those news.
    """
    is_silent = now_s - placement.now_s > HEAD_S
    if is_silent or not placement.rules.writes or not placement.settled:
        return placement, ()
    if placement.sealing is not None:
        return ask_to_seal(placement, max(now_s, placement.now_s))
    changed: dict[int, Leadership] = {}
    orders: list[Instruction] = []
    for shard, states in _open_shards(placement).items():
        was = placement.leading.get(shard, NOBODY)
        known = replace(was, asked=None)
        chosen = _chosen(placement, known, states, max(now_s, placement.now_s))
        if chosen is not None:
            epoch = placement.counter + len(orders) + 1
            known = replace(known, asked=Term(chosen.key, epoch))
            orders.append(Lead(key=chosen.key, epoch=epoch))
        if known != was:
            changed[shard] = known
    if not changed:
        return placement, ()
    leading = {**placement.leading, **changed}
    counter = placement.counter + len(orders)
    return replace(placement, leading=leading, counter=counter), tuple(orders)


def is_to_hand_over(placement: Placement, state: ReplicaState) -> bool:
    """Whether the replica, which is to leave, stays in the table for what it leads.

    Not for ever, and not if it takes no writes anyway.
    """
    shard = state.key.shard
    known = placement.leading.get(shard, NOBODY)
    if primary_key(placement, shard) != state.key or known.refused is not None:
        return False
    begun_s = max(other.since_s for other in placement.staying(shard))
    return placement.now_s - begun_s < HANDOVER_S


def after_leading(placement: Placement, event: Leading) -> Placement:
    """The replica leads, unless another has been asked since."""
    known = placement.leading.get(event.key.shard, NOBODY)
    if known.asked != Term(event.key, event.epoch):
        return placement
    led = replace(_led_by(known, known.asked), asked=None)
    return _with(placement, event.key.shard, led)


def after_lead_failed(placement: Placement, event: LeadFailed) -> Outcome:
    """Another is asked, or the same one later; who led until then may lead still."""
    known = placement.leading.get(event.key.shard, NOBODY)
    if known.asked != Term(event.key, event.epoch):
        return placement, ()
    failed = _failed(placement, event.key, event.reason, event.now_s)
    # its log may have an epoch above all that this controller knows of: it tells when it registers
    is_fenced = event.reason.code == NotPrimary.code
    return failed, ((Announce(key=event.key),) if is_fenced else ())


def after_leader_seen(placement: Placement, event: LeaderSeen) -> Placement:
    """The leader is known not to lead any more, or to take no writes, or to take them again."""
    shard = event.key.shard
    known = placement.leading.get(shard, NOBODY)
    if known.leader != Term(event.key, event.epoch):
        return placement
    if event.leads == event.epoch:
        seen = replace(known, is_silent=False, refused=event.refused)
        return placement if seen == known else _with(placement, shard, seen)
    if known.asked is None:  # else its successor has read the log, and is about to say so
        text = f"replica {event.key.replica} has lost the lead: its log has a higher epoch"
        reason = Absence(NotPrimary.code, text)
        placement = _failed(placement, event.key, reason, event.now_s)
    return _with(placement, shard, _led_by(placement.leading[shard], None))


def after_leader_silent(placement: Placement, event: LeaderSilent) -> Placement:
    """Another is to lead, if there is one; until it does the silent one may go on."""
    known = placement.leading.get(event.key.shard, NOBODY)
    if known.is_silent or known.leader != Term(event.key, event.epoch):
        return placement
    return _with(placement, event.key.shard, replace(known, is_silent=True))


def after_registered(placement: Placement, event: ReplicaRegistered, *, is_new: bool) -> Placement:
    """One that says that it leads does, if no higher epoch was given out; another does not.

    is_new: the process is another one than before. None leads a shard that is to be sealed.
    """
    if placement.sealing is not None:
        return placement
    shard = event.key.shard
    known = was = placement.leading.get(shard, NOBODY)
    led = known.leader is not None and known.leader.key == event.key
    if led and known.leader != Term(event.key, event.leads or 0):
        known = _led_by(known, None)
    if is_new and known.asked is not None and known.asked.key == event.key:
        known = replace(known, asked=None)
    epochs = [term.epoch for term in (known.leader, known.asked) if term is not None]
    if event.leads is not None and event.leads > max(epochs, default=0):
        # whoever was asked with a lower epoch is fenced by now
        known = replace(_led_by(known, Term(event.key, event.leads)), asked=None)
    return placement if known == was else _with(placement, shard, known)


def _is_open(placement: Placement, shard: int) -> bool:
    """Whether somebody may have to be asked to lead the shard."""
    known = placement.leading.get(shard, NOBODY)
    asked = None if known.asked is None else placement.replicas.get(known.asked.key)
    if asked is not None and can_be_asked(asked):
        return False
    return known.asked is not None or not leads_on(leader_of(placement, known), known)


def _open_shards(placement: Placement) -> dict[int, list[ReplicaState]]:
    """The replicas of the shards where somebody may have to be asked; most often there are none."""
    found: dict[int, list[ReplicaState]] = {
        route.shard: [] for route in placement.table.shards if _is_open(placement, route.shard)
    }
    if found:
        for state in placement.replicas.values():
            if state.key.shard in found:
                found[state.key.shard].append(state)
    return found


def _chosen(
    placement: Placement, known: Leadership, states: list[ReplicaState], now_s: float
) -> ReplicaState | None:
    """Who is to be asked now; None: nobody, because the leader stays, or no other can yet."""
    leader = leader_of(placement, known)
    if leads_on(leader, known):
        return None
    staying = [state for state in states if state.stage is Stage.STAYING and state is not leader]
    able = [state for state in staying if state.answers]
    if leader is None:
        able = able or [state for state in states if can_be_asked(state)]
    elif not known.is_silent and len(able) < len(staying):
        able = []  # it serves on until all are there, and hands over once

    def worth(state: ReplicaState) -> tuple[int, bool, int]:
        restart = placement.restart
        is_old = restart is not None and restart.concerns(state.key)
        return known.failures.get(state.key, 0), is_old, state.key.replica

    chosen = min(able, key=worth, default=None)
    is_early = now_s < known.not_before_s
    if chosen is None or (is_early and chosen.key in known.failures):
        return None
    return chosen


def _led_by(known: Leadership, leader: Term | None) -> Leadership:
    """Nothing is known of another leader, or of why there was none; for none, that stays."""
    failed = known.failed if leader is None else None
    return replace(known, leader=leader, is_silent=False, failed=failed, refused=None)


def _failed(placement: Placement, key: ReplicaKey, reason: Absence, now_s: float) -> Placement:
    """Nobody is asked any more; the replica is asked again later, and later each time."""
    known = placement.leading[key.shard]
    now_s = max(placement.now_s, now_s)
    is_calm = now_s - known.not_before_s >= CALM_S
    counted = {} if is_calm else known.failures
    failures = {other: count for other, count in counted.items() if other in placement.replicas}
    failures[key] = failures.get(key, 0) + 1
    paused = replace(
        known,
        asked=None,
        failures=failures,
        not_before_s=now_s + retry_after_s(failures[key]),
        failed=reason,
    )
    return _with(placement, key.shard, paused)


def _with(placement: Placement, shard: int, known: Leadership) -> Placement:
    return replace(placement, leading={**placement.leading, shard: known})
