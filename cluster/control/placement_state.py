"""What the controller knows: plain data, no rules.

Times are seconds of the controller's own clock, as events bring them; no rule reads one.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from shardline.cluster.control.hosts import Host, Spot
from shardline.cluster.control.leading_state import Leadership, Term
from shardline.cluster.control.restart_state import Restart
from shardline.shards.core.messages import Absence, ReplicaKey, ReplicaRoute, RoutingTable


class Stage(StrEnum):
    """staying: is to serve. leaving: serves until another replica can in its stead. draining: out
    of the table; its process lives on for the queries that are under way."""

    STAYING = "staying"
    LEAVING = "leaving"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """Where a replica is and answers, or why it does not.

    failures: how many without a success, those of replicas before it included. since_s: when it was
    placed, began or ceased to answer, or came to its stage. unheard: it ran, or was to run, when
    this controller started, and nothing has been heard of it.
    """

    route: ReplicaRoute
    node_id: str
    failures: int = 0
    stage: Stage = Stage.STAYING
    since_s: float = 0.0
    unheard: bool = False

    @property
    def key(self) -> ReplicaKey:
        return self.route.key

    @property
    def answers(self) -> bool:
        return self.route.address is not None

    @property
    def spot(self) -> Spot:
        return Spot(self.key.shard, self.node_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Of a shard's replicas on one host, lately."""

    count: int
    last_s: float
    reason: Absence


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What stays the same for the life of a controller.

    replicas: wanted of each shard. cpus, gpus: what each reserves. load_limit_s: a replica that
    has not begun to answer by then is tried on another host, if there is one for it; one that was
    to take over from another is given up. writes: whether shards take any.
    """

    replicas: int = 1
    cpus: float = 0.0
    gpus: float = 0.0
    load_limit_s: float = 300.0
    writes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealing:
    """Of one shard that is to take no write any more; ``sealing`` has the rules.

    leader: who led before. asked: who was asked to seal it, and with which epoch. seq: how many
    writes it has for good; None: it is not sealed yet. failures: of each replica. not_before_s:
    until then none of those is asked again. failed: why the newest attempt failed.
    """

    leader: ReplicaKey | None = None
    asked: Term | None = None
    seq: int | None = None
    failures: Mapping[ReplicaKey, int] = field(default_factory=dict)
    not_before_s: float = 0.0
    failed: Absence | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The generation being served and the state of each replica of its shards, in key order.

    table: its replicas are those not draining; a shard without any has one route that says why.
    counter: the largest number given out, as a table version or an epoch.
    settled: what this controller found when it opened the generation has been heard of, or it is
    heard_by_s and nothing is lost without the rest.
    hosts: the living ones by node id, by address; seen_since: since when each is known.
    next_numbers: of each shard, the number of its next replica.
    leading: of each shard, which replica takes writes; a shard that is missing has had none yet.
    sealing: of each shard, while none is to take writes; None: they are to.
    reserved: (CPUs, GPUs) of a host, by node id, that another generation's replicas have.
    """

    rules: Rules
    table: RoutingTable
    replicas: Mapping[ReplicaKey, ReplicaState]
    counter: int
    next_numbers: Mapping[int, int]
    hosts: Mapping[str, Host]
    seen_since: Mapping[str, float]
    store_notes: tuple[Absence, ...]
    heard_by_s: float
    now_s: float
    settled: bool = False
    failed: Mapping[Spot, Failure] = field(default_factory=dict)
    restart: Restart | None = None
    leading: Mapping[int, Leadership] = field(default_factory=dict)
    sealing: Mapping[int, Sealing] | None = None
    reserved: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Every shard has its replicas, as many as the living hosts can have, and all answer."""
        staying = self.staying()
        all_there = len({state.key.shard for state in staying}) == len(self.table.shards)
        return all_there and all(state.answers for state in staying)

    @property
    def covers(self) -> bool:
        """Every shard has a replica that answers and is to stay."""
        answering = {state.key.shard for state in self.staying() if state.answers}
        return len(answering) == len(self.table.shards)

    @property
    def room(self) -> dict[str, int]:
        """Replicas that each living host has room for, by node id."""
        rules = self.rules
        return {
            node_id: host.without(*self.reserved.get(node_id, (0.0, 0.0))).room(
                cpus=rules.cpus, gpus=rules.gpus
            )
            for node_id, host in self.hosts.items()
        }

    @property
    def zones(self) -> dict[str, str]:
        return {node_id: host.zone for node_id, host in self.hosts.items()}

    @property
    def attainable(self) -> int:
        """Replicas that a shard can have: as many as are wanted, one per host."""
        return min(self.rules.replicas, sum(room > 0 for room in self.room.values()))

    def staying(self, shard: int | None = None) -> list[ReplicaState]:
        """Those that are to serve; of one shard or of all."""
        return self.at(Stage.STAYING, shard)

    def at(self, stage: Stage, shard: int | None = None) -> list[ReplicaState]:
        return [
            state
            for state in self.replicas.values()
            if state.stage is stage and shard in (None, state.key.shard)
        ]

    def shards_without_all(self) -> list[tuple[int, int]]:
        """(shard, how many stay) where fewer replicas stay than are wanted."""
        return [each for each in self._counts() if each[1] < self.rules.replicas]

    def shards_with_more(self) -> list[tuple[int, int]]:
        """(shard, how many stay) where more replicas stay than can be."""
        return [each for each in self._counts() if each[1] > self.attainable]

    def calm_shards(self) -> set[int]:
        """Those whose replicas all answer."""
        staying = self.staying()
        troubled = {state.key.shard for state in staying if not state.answers}
        return {state.key.shard for state in staying} - troubled

    def _counts(self) -> list[tuple[int, int]]:
        counts = Counter(state.key.shard for state in self.staying())
        return [(route.shard, counts[route.shard]) for route in self.table.shards]

    def with_states(self, *states: ReplicaState) -> "Placement":
        """With these added, or in place of those of the same keys."""
        replicas = {**self.replicas, **{state.key: state for state in states}}
        return replace(self, replicas=dict(sorted(replicas.items())))

    def without(self, key: ReplicaKey) -> "Placement":
        return replace(self, replicas={k: s for k, s in self.replicas.items() if k != key})

    def address_of(self, node_id: str) -> str:
        """Of a living host; else its node id."""
        return self.hosts[node_id].address if node_id in self.hosts else node_id
