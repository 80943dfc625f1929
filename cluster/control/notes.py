"""What people should see to, as the table tells it: made from the placement alone."""

from collections import defaultdict

from shardline.cluster.control.leading import leader_of, leads_on
from shardline.cluster.control.placement_state import Placement
from shardline.shards.core.errors import Unavailable
from shardline.shards.core.messages import Absence


def notes_of(placement: Placement) -> tuple[Absence, ...]:
    """Replicas without a host, hosts where shards cannot be loaded, shards that take no writes."""
    notes = []
    by_count: dict[int, list[int]] = defaultdict(list)
    for shard, count in placement.shards_without_all():
        by_count[count].append(shard)
    hosts = ", ".join(host.address for host in placement.hosts.values())
    wanted, living = placement.rules.replicas, len(placement.hosts)
    reason = (
        f"replicas of a shard are on different hosts, and {living} live{'s' * (living == 1)}"
        if living < wanted
        else "the living hosts have no room for more"
    )
    for count, shards in sorted(by_count.items()):
        text = f"{count} instead of {wanted} replicas of {_names(shards)}: {reason} ({hosts})"
        notes.append(Absence(Unavailable.code, text))
    return (*notes, *_failure_notes(placement), *_write_notes(placement))


def _failure_notes(placement: Placement) -> list[Absence]:
    """A replica that fails where it is says so in its route; this is of those placed elsewhere."""
    used = {state.spot for state in placement.staying()}
    by_reason: dict[tuple[str, Absence], list[int]] = defaultdict(list)
    for spot, failure in sorted(placement.failed.items(), key=lambda item: item[0].shard):
        if spot not in used:
            by_reason[placement.address_of(spot.node_id), failure.reason].append(spot.shard)
    return [
        Absence(reason.code, f"{_names(shards)} could not be loaded on {host}: {reason.text}")
        for (host, reason), shards in by_reason.items()
    ]


def _write_notes(placement: Placement) -> list[Absence]:
    """Which shards take no writes though they answer, or cannot be handed over, and why."""
    if not placement.rules.writes:
        return []
    by_reason: dict[tuple[str, Absence], list[int]] = defaultdict(list)
    for shard, known in sorted(placement.leading.items()):
        leader = leader_of(placement, known)
        if leader is not None and known.refused is not None:
            by_reason["are refused", known.refused].append(shard)
        elif known.failed is not None and leader is None:
            by_reason["are refused", known.failed].append(shard)
        elif known.failed is not None and not leads_on(leader, known):
            by_reason["cannot be handed over to another replica", known.failed].append(shard)
    return [
        Absence(reason.code, f"writes to {_names(shards)} {what}: {reason.text}")
        for (what, reason), shards in by_reason.items()
    ]


def _names(shards: list[int]) -> str:
    """ "shard 1", "shards 1, 2"."""
    return f"shard{'s' if len(shards) > 1 else ''} {', '.join(map(str, shards))}"
