"""The controller: one named Ray actor that places shard actors, watches them, publishes the table.

A thin shell: every rule is in ``cluster.control.placement`` and ``fleet_rules``, ``shard_actors``
reaches the shards, ``watch`` looks at them, and ``publishing`` makes another generation live. It
does not carry queries; while it is away, routers keep serving on the table they have. Both it and
the shard actors are detached, so that a restarted controller finds the shards alive and learns
their addresses from them. No decision is made from what Ray's head does not confirm: while it is
away there are no events about hosts.
"""

import asyncio
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shardline.cluster.control.actor_name import CONTROLLER_NAME
from shardline.cluster.control.beside import Opener, with_beside
from shardline.cluster.control.cluster_quality import ClusterQuality
from shardline.cluster.control.cluster_report import Http, cluster_report
from shardline.cluster.control.decisions import Decisions
from shardline.cluster.control.events import (
    Event,
    Instruction,
    NumberSeen,
    ReplicaRegistered,
)
from shardline.cluster.control.fleet_state import Fleet
from shardline.cluster.control.leading import primary_key
from shardline.cluster.control.news import News
from shardline.cluster.control.opening import (
    claimed,
    cluster_id_of,
    first_hosts,
    is_restart,
    opened,
)
from shardline.cluster.control.orders import Orders
from shardline.cluster.control.outlook import (
    hopeless,
    not_ready,
    raise_if_hopeless,
    without_room,
)
from shardline.cluster.control.placement_state import Placement, Rules
from shardline.cluster.control.publish_book import PublishBook
from shardline.cluster.control.publish_note import PublishNote
from shardline.cluster.control.publish_state import PublishOptions, after_restart
from shardline.cluster.control.publish_wiring import WiredParts
from shardline.cluster.control.publishing import RETIRE_AFTER_S, Publishing
from shardline.cluster.control.quality_config import QualityConfig
from shardline.cluster.control.restart_note import RestartNote
from shardline.cluster.control.restarts import Restarts
from shardline.cluster.control.shard_actors import ShardActors, ShardSettings
from shardline.cluster.control.tasks import Tasks, tried
from shardline.cluster.control.term import Superseded
from shardline.cluster.control.watch import Watch
from shardline.cluster.rollover.publish_config import PublishConfig
from shardline.cluster.store import Store
from shardline.shards.core.errors import Unavailable, error_of
from shardline.shards.core.messages import (
    Absence,
    ReplicaKey,
    RouterNews,
    RouterSeen,
    RoutingTable,
)

logger = logging.getLogger(__name__)

LOAD_TRIES = 3  # hosts on which a shard is tried before a generation is given up


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings(ShardSettings):
    """What a controller is started with: the store, and how its shards are.

    generation: the only one that this cluster serves; None: the one that is live in the store
    whenever the controller starts. replicas: wanted of each shard. load_limit_s: of a shard, before
    another host is tried. writes: whether shards take any. http_host, http_port: where the front
    ends of all hosts listen. quality: when an index needs repair. publish: what a generation must
    reach to go live.
    """

    store: str
    generation: int | None = None
    replicas: int = 1
    load_limit_s: float = 300.0
    writes: bool = True
    http_host: str = "127.0.0.1"
    http_port: int = 8000
    quality: QualityConfig = field(default_factory=QualityConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)


def rules_of(settings: ControllerSettings) -> Rules:
    """Of a generation that is not on GPUs."""
    return Rules(
        replicas=settings.replicas,
        cpus=settings.cpus_per_shard,
        load_limit_s=settings.load_limit_s,
        writes=settings.writes,
    )


class Controller:
    """The state machine's shell. Create it with ``control.start``."""

    def __init__(self, settings: ControllerSettings) -> None:
        store = Store(Path(settings.store))
        self._secret = settings.secret
        self._http = Http(host=settings.http_host, port=settings.http_port)
        cluster_id = cluster_id_of(settings.secret)
        self._term = claimed(store, cluster_id, is_restart=is_restart())
        # Ray runs this again when it restarts the controller: another generation may be live then
        folder, manifest = opened(store, settings.generation, is_restart=is_restart())
        self._shards = ShardActors(settings, CONTROLLER_NAME)
        opener = Opener(
            store, self._shards, cluster_id, rules_of(settings), settings.gpus_per_shard
        )
        restart_note = RestartNote(store.root, cluster_id)
        restart = restart_note.read(manifest.generation)
        placement, instructions = opener.live(folder, manifest, first_hosts(), restart)
        note = PublishNote(store.root, cluster_id, self._guard)
        noted = after_restart(note.read(), manifest.generation)
        fleet, more = with_beside(Fleet(live=placement), noted, opener)
        self._quality = ClusterQuality(settings.quality)
        self._news = News(placement.hosts.values(), time.monotonic())
        self._tasks = Tasks()
        self._orders = Orders(
            self._shards, self._tasks, state_of=lambda key: self._fleet.state(key), take=self._take
        )
        self._decisions = Decisions(store, fleet, self._orders.carry_out, self._guard)
        self._watch = Watch(
            self._decisions, self._shards, self._news, self._tasks, after_hosts=self._after_hosts
        )
        self._publishing = Publishing(
            store,
            self._decisions,
            opener,
            WiredParts(
                store,
                settings.secret,
                settings.publish,
                CONTROLLER_NAME,
                self._shards,
                self._quality.served,
            ),
            self._tasks,
            PublishBook(note, noted, lambda: self._fleet),
            keep_s=settings.publish.keep_s,
            load_s=settings.load_limit_s * LOAD_TRIES,
            is_pinned=settings.generation is not None,
            written=self._written,
        )
        self._restarts = Restarts(self._decisions, restart_note, self._publishing.refuse_restart)
        self._tasks.spawn(self._open((*instructions, *more)))

    @property
    def _fleet(self) -> Fleet:
        return self._decisions.fleet

    @property
    def _placement(self) -> Placement:
        return self._decisions.placement

    async def _take(self, event: Event) -> None:
        await self._decisions.take(event)

    async def connection_secret(self) -> bytes:
        """What proves a peer to a shard: for routers, batch jobs and tools of this cluster.

        Ray's token decides who may call actors, and so who may have it.
        """
        return self._secret

    async def register_replica(
        self,
        *,
        key: ReplicaKey,
        address: tuple[str, int],
        epoch: int = 0,
        leads: int | None = None,
    ) -> int:
        """A shard process announces where it listens; the epoch it must say Hello with.

        epoch: the largest that it knows, the one it says Hello with until then or that of its log.
        leads: the one with which it takes writes.

        Raises:
            Unavailable: the replica belongs to a generation that is not loaded.
        """
        if self._fleet.state(key) is None:
            raise _not_served(self._fleet, str(key))
        registered = ReplicaRegistered(
            key=key,
            address=(address[0], address[1]),
            epoch=epoch,
            leads=leads,
            now_s=time.monotonic(),
        )
        await self._take(registered)
        state = self._fleet.state(key)
        if state is None:  # its generation has been ended meanwhile
            raise _not_served(self._fleet, str(key))
        return state.route.epoch

    async def table_after(self, version: int, timeout_s: float) -> RoutingTable | None:
        """The routing table once it is newer than ``version``; None when the time is up first.

        A version above all of ours was given out before the record of it was lost.
        """
        await self._take(NumberSeen(number=version))
        await self._decisions.until(
            lambda: self._decisions.newer_than(version) is not None, timeout_s
        )
        return self._decisions.newer_than(version)

    async def table_of(
        self, generation: int, after_version: int, timeout_s: float
    ) -> RoutingTable | None:
        """The table of a generation that is loaded, live or not, once it is newer than that; None
        when the time is up first. For the mirror and the gate: routers have ``table_after``.

        Raises:
            Unavailable: it is not loaded.
        """

        def newer() -> RoutingTable | None:
            placement = self._fleet.of(generation)
            if placement is None:
                raise _not_served(self._fleet, f"generation {generation}")
            is_newer = placement.settled and placement.table.version > after_version
            return placement.table if is_newer else None

        await self._decisions.until(lambda: newer() is not None, timeout_s)
        return newer()

    async def router_lives(
        self, router: RouterSeen, news: RouterNews | None = None
    ) -> tuple[Absence, ...]:
        """A router announces itself, and tells what it has found; one that does not again within
        seconds is not reported. The repairs that are due: their codes and texts."""
        now_s = time.monotonic()
        self._news.heard(router, now_s)
        if news is not None:
            self._quality.heard((router.node_id, router.pid), news, now_s)
        return self._quality.repairs(self._placement.table.generation, self._shards.health, now_s)

    async def trouble_after(self, known: Absence | None, timeout_s: float) -> Absence | None:
        """Why no newer table can be published, once that is another reason than ``known``, or when
        the time is up; None: nothing hinders it."""
        await self._decisions.until(lambda: self._decisions.unsaved != known, timeout_s)
        return self._decisions.unsaved

    async def wait_ready(self, timeout_s: float) -> int:
        """The generation that is served, once every replica answers.

        Raises:
            ShardlineError: a replica cannot be placed, or the store takes no counter; of that
                reason's code.
            Unavailable: the time is up.
        """

        def is_over() -> bool:
            is_lost = bool(hopeless(self._placement) or without_room(self._placement))
            return self._placement.ready or is_lost or self._decisions.unsaved is not None

        if not await self._decisions.until(is_over, timeout_s):
            raise not_ready(self._placement, timeout_s)
        if (unsaved := self._decisions.unsaved) is not None:
            raise error_of(unsaved.code, unsaved.text)
        raise_if_hopeless(self._placement)
        return self._placement.table.generation

    async def shard_reports(self) -> list[dict[str, Any]]:
        """What each shard process says of itself, or why it does not, of the live generation, in
        the order of their keys.

        ``reason``, instead of the rest: {"code", "text"}.
        """
        return list(await asyncio.gather(*map(self._report, self._placement.replicas)))

    async def report(self) -> dict[str, Any]:
        """The state of the cluster: what ``cluster_report``, ``ClusterQuality.report`` and
        ``Publishing.report`` say."""
        now_s, generation = time.monotonic(), self._placement.table.generation
        told = cluster_report(
            self._placement,
            news=self._news,
            applied=self._shards.applied,
            health=self._shards.health,
            http=self._http,
            now_s=now_s,
        )
        quality = self._quality.report(generation, self._shards.health, now_s)
        return told | quality | self._publishing.report()

    async def publish(self, options: PublishOptions) -> dict[str, Any]:
        """Begins to make a generation live: the progress at first. Raises: ``Publishing.begin``."""
        return await self._publishing.begin(options)

    async def roll_back(self) -> dict[str, Any]:
        """Begins to make the generation before live. Raises: ``Publishing.roll_back``."""
        return await self._publishing.roll_back()

    async def publish_progress(self) -> dict[str, Any] | None:
        """Of the newest publish or rollback; None: there was none."""
        return self._publishing.progress

    async def stop_publish(self) -> dict[str, Any] | None:
        """Ends the publish that is under way: ``Publishing.stop``."""
        return await self._publishing.stop()

    async def finish_publish(self) -> int | None:
        """Ends what is kept for a rollback: ``Publishing.finish``."""
        return await self._publishing.finish()

    async def restart_rolling(self) -> dict[str, Any]:
        """Begins to replace every replica, one after the other. Raises: ``Restarts.begin``."""
        return await self._restarts.begin()

    async def stop_restart(self) -> dict[str, Any] | None:
        """Begins no further replacement of a rolling restart; one that is under way is brought to
        its end. Raises: ``Restarts.stop``."""
        return await self._restarts.stop()

    async def restart_progress(self) -> dict[str, Any] | None:
        """Of the newest rolling restart: ``cluster_report.restart_progress`` says what it is.

        None, or of another number than ``restart_rolling`` gave: it was cut short.
        """
        return self._restarts.progress

    async def close(self) -> None:
        """Stops watching and ends every shard actor, for good."""
        self._tasks.cancel()
        await tried(self._publishing.close, "note that the cluster ends")
        self._shards.end()

    def _written(self) -> int | None:
        """To all shards of the live generation; None: not known of every one."""
        shards = [route.shard for route in self._placement.table.shards]
        primaries = [primary_key(self._placement, shard) for shard in shards]
        seqs = [None if key is None else self._shards.applied.seq(key) for key in primaries]
        known = [seq for seq in seqs if seq is not None]
        return sum(known) if len(known) == len(seqs) else None

    async def _open(self, instructions: tuple[Instruction, ...]) -> None:
        self._decisions.order(instructions)
        self._watch.begin()
        self._publishing.go_on()
        # of a table that routers have: until then they ask the generation before
        await self._decisions.until(
            lambda: self._decisions.published is not None and self._placement.covers
        )
        await asyncio.sleep(RETIRE_AFTER_S)
        await self._orders.end_others(
            lambda: [each.table.generation for each in self._fleet.placements]
        )

    def _guard(self) -> None:
        """Raises Superseded: another controller has been started since. Then all that this one does
        ends; Ray ends its process once its host is heard of again."""
        try:
            self._term.check()
        except Superseded as error:
            logger.error("%s", error)
            self._tasks.cancel()
            raise

    async def _after_hosts(self) -> None:
        self._guard()
        await tried(self._restarts.keep_note, "note how far the rolling restart is")

    async def _report(self, key: ReplicaKey) -> dict[str, Any]:
        state = self._fleet.state(key)
        assert state is not None
        found: dict[str, Any] | Absence
        if key in self._shards.placed:
            found = await self._shards.describe(key)
        else:
            found = state.route.absence or Absence(Unavailable.code, "not placed")
        rest = {"reason": asdict(found)} if isinstance(found, Absence) else found
        return asdict(key) | {"failures": state.failures} | rest


def _not_served(fleet: Fleet, got: str) -> Unavailable:
    numbers = [str(each.table.generation) for each in fleet.placements]
    return Unavailable(
        "this replica is not being served",
        expected=f"one of generation {' or '.join(numbers)} that is placed now",
        got=got,
    )
