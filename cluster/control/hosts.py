"""Which host a replica belongs on: pure functions of the living hosts and what they hold.

The replicas of a shard are on different hosts, in different zones if there are several, and hosts
are loaded evenly. A host has room for a number of replicas, and what counts is how many more it
could take: with equal hosts that is an even spread, and with unequal ones the spread that fits
wherever any does. Where room is short zones do not count, for they could stand in its way.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

NAMED = 8  # hosts that an error lists
UNLIMITED = 1 << 20  # replicas that reserve nothing: more than there ever are


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A living host of the Ray cluster.

    node_id: Ray's name for it, another one each time that Ray starts there; address: by which Ray
    and the other hosts know it. cpus, gpus: what Ray may give to actors. zone: what can fail as a
    whole, by Ray's label; hosts of none are in one together.
    """

    node_id: str
    address: str
    cpus: float
    gpus: float = 0
    zone: str = ""

    def without(self, cpus: float, gpus: float) -> "Host":
        """As if it had so many fewer, none at the least."""
        if not cpus and not gpus:
            return self
        return replace(self, cpus=max(0.0, self.cpus - cpus), gpus=max(0.0, self.gpus - gpus))

    def room(self, *, cpus: float, gpus: float = 0) -> int:
        """Replicas that it has room for if each reserves so many CPUs and GPUs.

        0 where Ray has no CPUs at all: a head that is to hold nothing is started so.
        """
        if self.cpus <= 0:
            return 0
        wanted = ((self.cpus, cpus), (self.gpus, gpus))
        # 1 / 0.1 are ten, though 1 // 0.1 is nine
        rooms = [math.floor(has / each + 1e-6) for has, each in wanted if each]
        return min(rooms, default=UNLIMITED)


@dataclass(frozen=True, slots=True)
class Spot:
    """A replica that is placed: the shard, the host."""

    shard: int
    node_id: str


def fits(
    hosts: Iterable[Host],
    *,
    shards: int,
    replicas: int,
    cpus_per_shard: float,
    gpus_per_shard: float = 0,
) -> str | None:
    """Why so many replicas per shard have no room on these hosts, with the arithmetic; else None.

    A host takes one replica of each shard at most. It fits if what the hosts take so is enough in
    sum: giving each shard the hosts with the most room left then always succeeds (Gale, Ryser).
    """
    hosts = list(hosts)
    usable = {host.address: host.room(cpus=cpus_per_shard, gpus=gpus_per_shard) for host in hosts}
    taking = {address: min(room, shards) for address, room in usable.items() if room > 0}
    if replicas > len(taking):
        return (
            f"{replicas} replicas of each shard are on as many different hosts, and "
            f"{len(taking)} of {len(usable)} hosts can hold a shard"
            f"{_reserved(cpus_per_shard, gpus_per_shard)}{_too_small(hosts, taking)}"
        )
    room, needed = sum(taking.values()), shards * replicas
    if room >= needed:
        return None
    each = ", ".join(f"{address} {count}" for address, count in sorted(taking.items()))
    return (
        f"{shards} shards x {replicas} replicas = {needed}"
        f"{_reserved(cpus_per_shard, gpus_per_shard)}; there is room for {room}: {each}"
    )


def choose_host(
    shard: int,
    room: Mapping[str, int],
    spots: Sequence[Spot],
    *,
    failures: Mapping[str, int],
    num_shards: int,
    zones: Mapping[str, str] | None = None,
) -> str | None:
    """The host for one more replica of the shard; None: no host without one has room.

    room: of each living host, by node id, in the order in which equal ones are taken; spots: the
    replicas that stay; failures: of this shard's replicas on a host, lately; zones: of the hosts.
    """
    return Spread(room, spots, num_shards=num_shards, zones=zones).choose(shard, failures)


class Spread:
    """What the hosts hold, as replicas are added and removed: each choice costs one look at the
    hosts. The arguments are those of ``choose_host``."""

    def __init__(
        self,
        room: Mapping[str, int],
        spots: Iterable[Spot],
        *,
        num_shards: int,
        zones: Mapping[str, str] | None = None,
    ) -> None:
        self._room = room
        self._most = {node: min(count, num_shards) for node, count in room.items()}
        self._held = Counter(spots)
        self._loads: Counter[str] = Counter()
        for spot, count in self._held.items():
            self._loads[spot.node_id] += count
        self._crowd = _Crowd(zones, room, self._held, num_shards)

    def add(self, spot: Spot) -> None:
        self._count(spot, 1)

    def remove(self, spot: Spot) -> None:
        self._count(spot, -1)

    def holds(self, spot: Spot) -> bool:
        """Whether a replica of that shard is on that host."""
        return self._held[spot] > 0

    def choose(self, shard: int, failures: Mapping[str, int]) -> str | None:
        """As ``choose_host``."""
        loads, most, crowd = self._loads, self._most, self._crowd
        free = [
            node
            for node, count in self._room.items()
            if loads[node] < count and not self.holds(Spot(shard, node))
        ]
        return min(
            free,
            key=lambda node: (
                failures.get(node, 0),
                crowd.at(shard, node),
                loads[node] - most[node],
            ),
            default=None,
        )

    def _count(self, spot: Spot, change: int) -> None:
        self._held[spot] += change
        self._loads[spot.node_id] += change
        self._crowd.count(spot, change)


def better_spread(
    room: Mapping[str, int],
    spots: Sequence[Spot],
    *,
    barred: Iterable[Spot],
    num_shards: int,
    zones: Mapping[str, str] | None = None,
) -> tuple[Spot, str] | None:
    """A replica to move, and the host it should be on; None: no move is a gain.

    A move is a gain where it parts replicas of a shard that share a host or a zone, or where its
    target could take at least two more replicas than its origin: less would only swap the two. No
    move brings replicas of a shard together. barred: hosts where a shard has failed lately.
    """
    left, refused, seen = room_left(room, spots, num_shards), set(barred), Counter(spots)
    crowd = _Crowd(zones, room, seen, num_shards)
    by_room = sorted((node for node in room if left[node] > 0), key=lambda node: -left[node])

    def is_gain(spot: Spot, node: str) -> bool:
        there = Spot(spot.shard, node)
        if node == spot.node_id or there in seen or there in refused:
            return False
        # it is not in its own way
        here = crowd.at(spot.shard, spot.node_id) - 1
        after = crowd.at(spot.shard, node) - crowd.is_same(spot.node_id, node)
        is_even = left[node] - left[spot.node_id] >= 2
        return after <= here and (after < here or is_even or seen[spot] > 1)

    for spot in sorted(seen, key=lambda spot: (-seen[spot], left[spot.node_id], spot.shard)):
        node = next((node for node in by_room if is_gain(spot, node)), None)
        if node is not None:
            return spot, node
    return None


class _Crowd:
    """How many replicas of a shard are in a host's zone; in all, where zones do not count."""

    def __init__(
        self,
        zones: Mapping[str, str] | None,
        room: Mapping[str, int],
        held: Mapping[Spot, int],
        num_shards: int,
    ) -> None:
        is_ample = all(count >= num_shards or count == 0 for count in room.values())
        self._zones = zones if is_ample and zones is not None else {}
        self._counts: Counter[tuple[int, str]] = Counter()
        for spot, count in held.items():
            self.count(spot, count)

    def count(self, spot: Spot, change: int) -> None:
        self._counts[spot.shard, self._zones.get(spot.node_id, "")] += change

    def at(self, shard: int, node_id: str) -> int:
        return self._counts[shard, self._zones.get(node_id, "")]

    def is_same(self, one: str, other: str) -> bool:
        return self._zones.get(one, "") == self._zones.get(other, "")


def room_left(room: Mapping[str, int], spots: Sequence[Spot], num_shards: int) -> dict[str, int]:
    """Replicas that each host could take beside those it holds: one of each shard at most."""
    loads = Counter(spot.node_id for spot in spots)
    return {node: min(count, num_shards) - loads[node] for node, count in room.items()}


def _too_small(hosts: Iterable[Host], taking: Mapping[str, int]) -> str:
    """What the hosts have that can hold no shard."""
    found = [
        f"{host.address} {host.cpus:g}" + (f" and {host.gpus:g} GPUs" if host.gpus else "")
        for host in hosts
        if host.address not in taking
    ]
    more = f", and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"; CPUs of the others: {', '.join(found[:NAMED])}{more}" if found else ""


def _reserved(cpus: float, gpus: float) -> str:
    parts = [f"{cpus:g} CPUs"] if cpus else []
    parts += [f"{gpus:g} GPUs"] if gpus else []
    return f", each of which reserves {' and '.join(parts)}" if parts else ""
