"""Hosts, shard processes and Ray as the placement rules see them, in ticks of a second."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from shardline.cluster.control.events import (
    End,
    HostsSeen,
    Instruction,
    Lead,
    LeaderSeen,
    LeaderSilent,
    LeadFailed,
    Leading,
    Place,
    Publish,
    ReplicaFailed,
    ReplicaIdle,
    ReplicaRegistered,
    ReplicaUnreachable,
    Seal,
    Sealed,
    SealFailed,
)
from shardline.cluster.control.fleet_rules import FleetEvent, fleet_step
from shardline.cluster.control.fleet_state import Fleet
from shardline.cluster.control.hosts import Host
from shardline.cluster.control.leading_state import NOBODY
from shardline.cluster.control.placement import open_generation
from shardline.cluster.control.placement_state import Placement, Rules
from shardline.cluster.control.restart_state import Restart
from shardline.shards.core.messages import Absence, ReplicaKey, RoutingTable

GONE = Absence("unavailable", "gone")
READ_ONLY = Absence("read_only", "the store is mounted read-only")
FENCED = Absence("not_primary", "the log has a higher epoch")
UNREADABLE = Absence("corrupt_file", "index.faiss: wrong checksum")


@dataclass
class Process:
    """Of one replica; loads until ready_s, then answers. leads: the epoch that it leads with."""

    node_id: str
    ready_s: float
    address: tuple[str, int]
    registered: bool = False
    leads: int | None = None


@dataclass
class World:
    """What the controller acts on. ``tick`` lets a second pass.

    unreadable: nodes where no shard can be loaded. stuck: nodes where loading never ends.
    noticed_s: Ray's head notices the death of a host so late. free: processes that Ray
    has CPUs for on a node, where others have taken some; what is placed beyond them waits.
    connected_s: routers stay connected for so long to a replica that is out of the table.
    is_head_away: nothing is known of hosts, and no actor is created. unwritable: nodes that cannot
    write to the store. lead_s: a replica takes so long to lead. log_epochs: of each shard's log.
    asked: all that were asked to lead. deaf: they do as they are asked, and nobody hears of it.
    stopped: they do nothing, and live.
    """

    table: RoutingTable
    rules: Rules
    nodes: list[str]
    load_s: int = 3
    noticed_s: int = 0
    room: dict[str, float] = field(default_factory=dict)
    now: float = 100.0
    unreadable: set[str] = field(default_factory=set)
    stuck: set[str] = field(default_factory=set)
    free: dict[str, int] = field(default_factory=dict)
    connected_s: float = 0.0
    is_head_away: bool = False
    unwritable: set[str] = field(default_factory=set)
    lead_s: float = 0.0
    log_epochs: dict[tuple[int, int], int] = field(default_factory=dict)
    acknowledged: Counter[tuple[int, int]] = field(default_factory=Counter)
    asked: list[Lead | Seal] = field(default_factory=list)
    asking: list[tuple[float, Lead | Seal]] = field(default_factory=list)
    deaf: set[ReplicaKey] = field(default_factory=set)
    stopped: set[ReplicaKey] = field(default_factory=set)
    published_s: list[float] = field(default_factory=list)
    ended_s: dict[ReplicaKey, float] = field(default_factory=dict)
    left_s: dict[ReplicaKey, float] = field(default_factory=dict)
    processes: dict[ReplicaKey, Process] = field(default_factory=dict)
    ended: list[ReplicaKey] = field(default_factory=list)
    placed: list[Place] = field(default_factory=list)
    tables: list[RoutingTable] = field(default_factory=list)
    waiting: list[tuple[float, Place]] = field(default_factory=list)
    dead: dict[str, float] = field(default_factory=dict)
    ports: int = 0
    fleet: Fleet = None  # type: ignore[assignment]

    @property
    def placement(self) -> Placement:
        """Of the live generation."""
        return self.fleet.live

    def start(self, restart: Restart | None = None) -> "World":
        """A controller begins, or begins again: what it knew is gone, the processes are not."""
        self.waiting, self.asking = [], []
        counter = 1 + (self.fleet.counter if self.fleet is not None else 0)
        found = self.found(self.table.generation)
        for process in self.processes.values():
            process.registered = False
        live, instructions = open_generation(
            self.table,
            counter=counter,
            rules=self.rules,
            hosts=self.hosts(),
            found=found,
            now_s=self.now,
            restart=restart,
        )
        self.fleet = Fleet(live=live)
        self._carry_out(instructions)
        return self

    def found(self, generation: int) -> dict[ReplicaKey, str]:
        """The processes of its replicas, and where they are."""
        return {
            key: process.node_id
            for key, process in self.processes.items()
            if key.generation == generation
        }

    def hosts(self) -> tuple[Host, ...]:
        """As Ray's head knows them."""
        known = [*self.nodes, *(n for n, at in self.dead.items() if self.now - at < self.noticed_s)]
        return tuple(
            Host(node_id=node, address=f"h{node}", cpus=self.room.get(node, 8))
            for node in sorted(known)
        )

    def tick(self, seconds: int = 1) -> None:
        for _ in range(seconds):
            self.now += 1
            if not self.is_head_away:
                self.apply(HostsSeen(hosts=self.hosts(), now_s=self.now))
                for due, place in list(self.waiting):
                    if due <= self.now and self._has_cpus(place.node_id):
                        self.waiting.remove((due, place))
                        self._create(place)
            for key in list(self.processes):
                if key in self.processes:  # else the check of another has ended it
                    self._check(key)
            self.answer_asked()

    def until_calm(self, limit: int = 2000) -> int:
        """Ticks until nothing has been under way for longer than the rules wait for."""
        quiet = 0
        for ticks in range(limit):
            before = (len(self.placed), len(self.ended))
            self.tick()
            stages = {str(state.stage) for state in self.placement.replicas.values()}
            is_quiet = before == (len(self.placed), len(self.ended)) and stages == {"staying"}
            quiet = quiet + 1 if is_quiet and self.placement.ready else 0
            if quiet > 40:
                return ticks
        raise AssertionError("never calm")

    def kill_host(self, node: str) -> None:
        self.nodes.remove(node)
        self.dead[node] = self.now

    def kill_process(self, key: ReplicaKey, *, is_noticed: bool = True) -> None:
        """Ray starts it again in place; sooner than it is missed, if that is not noticed."""
        state = self.fleet.state(key)
        assert state is not None
        epoch = state.route.epoch
        process = self.processes[key]
        self.processes[key] = self._process(process.node_id)
        if not is_noticed:
            return
        self.apply(ReplicaUnreachable(key=key, epoch=epoch, reason=GONE, now_s=self.now))

    def lose(self, key: ReplicaKey, seconds: float) -> None:
        """Its process lives on, unheard of for so long."""
        self.processes[key].registered = False
        self.processes[key].ready_s = self.now + seconds
        state = self.fleet.state(key)
        assert state is not None
        epoch = state.route.epoch
        self.apply(ReplicaUnreachable(key=key, epoch=epoch, reason=GONE, now_s=self.now))

    def answer_asked(self) -> None:
        """Those who were asked to lead or to seal do, or say why not."""
        due = [order for at, order in self.asking if at <= self.now]
        self.asking = [(at, order) for at, order in self.asking if at > self.now]
        for order in due:
            reason = self._led(order)
            told = {"key": order.key, "epoch": order.epoch, "now_s": self.now}
            seq = self.acknowledged[order.key.generation, order.key.shard]
            if isinstance(order, Lead):
                failed = None if reason is None else LeadFailed(reason=reason, **told)
                self.apply(failed or Leading(seq=seq, **told))
            else:
                refused = None if reason is None else SealFailed(reason=reason, **told)
                self.apply(refused or Sealed(seq=seq, **told))

    def write(self) -> None:
        """A write to each shard that whoever leads it acknowledges, known to routers or not."""
        for key in self.processes:
            if self.leads(key) and key not in self.stopped:
                self.acknowledged[key.generation, key.shard] += 1

    def primary(self, shard: int) -> ReplicaKey | None:
        """By the newest table."""
        route = self.tables[-1].shards[shard]
        named = [each.key for each in route.replicas if each.key.replica == route.primary]
        return named[0] if named else None

    def leads(self, key: ReplicaKey | None) -> bool:
        """Whether it takes writes: its log has no higher epoch than its own."""
        process = None if key is None else self.processes.get(key)
        if process is None or key is None or not self._lives(process):
            return False
        newest = self.log_epochs.get((key.generation, key.shard))
        return process.leads is not None and process.leads == newest

    def _led(self, order: Lead | Seal) -> Absence | None:
        """Does what is asked; why it could not, or is not heard of."""
        process, log = self.processes.get(order.key), (order.key.generation, order.key.shard)
        if process is None or not self._lives(process) or order.key in self.stopped:
            return GONE
        if process.node_id in self.unwritable:
            return READ_ONLY
        if order.epoch <= self.log_epochs.get(log, 0):
            return FENCED
        self.log_epochs[log] = order.epoch
        process.leads = order.epoch if isinstance(order, Lead) else None
        return GONE if order.key in self.deaf else None

    def apply(self, event: FleetEvent) -> None:
        self.fleet, instructions = fleet_step(self.fleet, event)
        self._carry_out(instructions)

    def spots(self) -> list[tuple[int, str]]:
        return [(key.shard, process.node_id) for key, process in sorted(self.processes.items())]

    def loads(self) -> dict[str, int]:
        nodes = [process.node_id for process in self.processes.values()]
        return {node: nodes.count(node) for node in self.nodes}

    def answering(self, table: RoutingTable, shard: int) -> list[ReplicaKey]:
        """Replicas of the table whose processes do answer there."""
        found = []
        for route in table.shards[shard].replicas:
            process = self.processes.get(route.key)
            if process is not None and self._lives(process) and route.address == process.address:
                found.append(route.key)
        return found

    def _lives(self, process: Process) -> bool:
        return process.node_id in self.nodes and self.now >= process.ready_s

    def _carry_out(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Publish):
                self._publish(instruction.table)
            elif isinstance(instruction, Place):
                self.waiting.append((self.now + instruction.after_s, instruction))
            elif isinstance(instruction, End):
                self.ended.append(instruction.key)
                self.ended_s[instruction.key] = self.now
                self.processes.pop(instruction.key, None)
            elif isinstance(instruction, Lead | Seal):
                assert all(before.epoch < instruction.epoch for before in self.asked[-1:])
                self.asked.append(instruction)
                self.asking.append((self.now + self.lead_s, instruction))

    def _publish(self, table: RoutingTable) -> None:
        self.tables.append(table)
        self.published_s.append(self.now)
        for shard in table.shards:
            named = [each for each in shard.replicas if each.key.replica == shard.primary]
            assert len(named) == (shard.primary is not None)
            assert all(each.address is not None for each in named)
        assert all(before.version < table.version for before in self.tables[-2:-1])
        there = {route.key for shard in table.shards for route in shard.replicas}
        for key in self.processes:
            if key in there:
                self.left_s.pop(key, None)
            else:
                self.left_s.setdefault(key, self.now)

    def _is_connected(self, key: ReplicaKey) -> bool:
        """Routers are, to what the newest table has, and to the rest for a while."""
        return key not in self.left_s or self.now - self.left_s[key] < self.connected_s

    def _has_cpus(self, node_id: str) -> bool:
        held = sum(process.node_id == node_id for process in self.processes.values())
        return held < self.free.get(node_id, held + 1)

    def _create(self, place: Place) -> None:
        state = self.fleet.state(place.key)
        if state is None or state.node_id != place.node_id or place.key in self.processes:
            return
        self.placed.append(place)
        self.processes[place.key] = self._process(place.node_id)

    def _process(self, node_id: str) -> Process:
        self.ports += 1
        ready_s = self.now + (self.load_s if node_id not in self.stuck else 1e9)
        return Process(node_id, ready_s, (f"h{node_id}", self.ports))

    def _check(self, key: ReplicaKey) -> None:
        process = self.processes[key]
        if process.node_id in self.dead:
            if self.now - self.dead[process.node_id] >= self.noticed_s:
                self.processes.pop(key)
                self.apply(ReplicaFailed(key=key, reason=GONE))
        elif self.now >= process.ready_s and not process.registered and key not in self.stopped:
            if process.node_id in self.unreadable:
                self.processes.pop(key)
                self.apply(ReplicaFailed(key=key, reason=UNREADABLE))
                return
            process.registered = True
            leads = process.leads if self.leads(key) else None
            self.apply(
                ReplicaRegistered(key=key, address=process.address, leads=leads, now_s=self.now)
            )
            return
        if process.registered and not self._is_connected(key):
            self.apply(ReplicaIdle(key=key))
        placement = self.fleet.of(key.generation)
        if placement is None:
            return
        known = placement.leading.get(key.shard, NOBODY).leader
        if process.registered and known is not None and known.key == key:
            if key in self.stopped:
                self.apply(LeaderSilent(key=key, epoch=known.epoch, now_s=self.now))
                return
            leads = process.leads if self.leads(key) else None
            self.apply(LeaderSeen(key=key, epoch=known.epoch, leads=leads, now_s=self.now))


def a_choice(rng: random.Random, world: World) -> str:
    """A fault, by name, that leaves a host."""
    names = ["kill process", "restart controller", "nothing", "nothing"]
    names += ["kill host"] if len(world.nodes) > 2 else []
    names += ["new host"] if len(world.nodes) < 4 else []
    return rng.choice(names)
