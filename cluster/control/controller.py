"""The controller: one named Ray actor that places shard actors, watches them, publishes the table.

A thin shell: every rule is in ``cluster.control.placement``, and ``cluster.control.shard_actors``
reaches the shards. It does not carry queries; while it is away, routers keep serving on the table
they have. Both it and the shard actors are detached, so that a restarted controller finds the
shards alive and learns their addresses from them. No decision is made from what Ray's head does not
confirm: while it is away there are no events about hosts.
"""

import asyncio
import logging
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from shardline.cluster.control.cluster_quality import ClusterQuality
from shardline.cluster.control.cluster_report import Http, cluster_report, restart_progress
from shardline.cluster.control.decisions import Decisions, known_error
from shardline.cluster.control.events import (
    Event,
    HostsSeen,
    Instruction,
    NumberSeen,
    ReplicaFailed,
    ReplicaRegistered,
    RestartAsked,
    RestartStopped,
)
from shardline.cluster.control.leading import epoch_of
from shardline.cluster.control.news import News
from shardline.cluster.control.opening import (
    cluster_id_of,
    empty_table,
    first_hosts,
    is_restart,
    opened,
)
from shardline.cluster.control.orders import Orders
from shardline.cluster.control.outlook import (
    hopeless,
    not_ready,
    raise_if_hopeless,
    refuse_without_spare,
    without_room,
)
from shardline.cluster.control.placement import open_generation
from shardline.cluster.control.placement_state import Placement, Rules, Stage
from shardline.cluster.control.quality_config import QualityConfig
from shardline.cluster.control.ray_hosts import fresh_hosts
from shardline.cluster.control.restart_note import RestartNote
from shardline.cluster.control.rolling_restart import is_restarting
from shardline.cluster.control.shard_actors import ShardActors, ShardSettings
from shardline.cluster.control.tasks import Tasks, tried
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

CONTROLLER_NAME = "shardline-controller"
WATCH_INTERVAL_S = 1.0
# How long the shards of a replaced generation live on, for the queries that began on them: far
# above the largest deadline that routers allow by default.
RETIRE_AFTER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings(ShardSettings):
    """What a controller is started with: the store, and how its shards are.

    generation: the only one that this cluster serves; None: the one that is live in the store
    whenever the controller starts. replicas: wanted of each shard. load_limit_s: of a shard, before
    another host is tried. writes: whether shards take any. http_host, http_port: where the front
    ends of all hosts listen. quality: when an index needs repair.
    """

    store: str
    generation: int | None = None
    replicas: int = 1
    load_limit_s: float = 300.0
    writes: bool = True
    http_host: str = "127.0.0.1"
    http_port: int = 8000
    quality: QualityConfig = field(default_factory=QualityConfig)


class Controller:
    """The state machine's shell. Create it with ``control.start``."""

    def __init__(self, settings: ControllerSettings) -> None:
        self._store = store = Store(Path(settings.store))
        self._secret = settings.secret
        self._http = Http(host=settings.http_host, port=settings.http_port)
        # Ray runs this again when it restarts the controller: another generation may be live then
        folder, manifest = opened(store, settings.generation, is_restart=is_restart())
        cluster_id = cluster_id_of(settings.secret)
        self._shards = ShardActors(settings, folder, manifest, CONTROLLER_NAME)
        self._restart_note = RestartNote(store.root, cluster_id, manifest.generation)
        placement, instructions = open_generation(
            empty_table(store, folder, manifest, cluster_id),
            counter=store.counter() + 1,
            rules=Rules(
                replicas=settings.replicas,
                cpus=settings.cpus_per_shard,
                gpus=settings.gpus_per_shard if self._shards.on_gpu else 0,
                load_limit_s=settings.load_limit_s,
                writes=settings.writes,
            ),
            hosts=first_hosts(),
            found=self._shards.found(),
            now_s=time.monotonic(),
            restart=self._restart_note.read(),
        )
        self._quality = ClusterQuality(settings.quality)
        self._news = News(placement.hosts.values(), time.monotonic())
        self._checked: set[ReplicaKey] = set()
        self._tasks = Tasks()
        self._orders = Orders(
            self._shards, self._tasks, placement=lambda: self._placement, take=self._take
        )
        self._decisions = Decisions(store, placement, self._orders.carry_out)
        self._tasks.spawn(self._open(instructions))

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
            Unavailable: the replica belongs to a generation that is not being served.
        """
        if key not in self._placement.replicas:
            generation = self._placement.table.generation
            raise Unavailable(
                "this replica is not being served",
                expected=f"one of generation {generation} that is placed now",
                got=str(key),
            )
        registered = ReplicaRegistered(
            key=key,
            address=(address[0], address[1]),
            epoch=epoch,
            leads=leads,
            now_s=time.monotonic(),
        )
        await self._take(registered)
        return self._placement.replicas[key].route.epoch

    async def table_after(self, version: int, timeout_s: float) -> RoutingTable | None:
        """The routing table once it is newer than ``version``; None when the time is up first.

        A version above all of ours was given out before the record of it was lost.
        """
        await self._take(NumberSeen(number=version))
        await self._decisions.until(
            lambda: self._decisions.newer_than(version) is not None, timeout_s
        )
        return self._decisions.newer_than(version)

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
        """What each shard process says of itself, or why it does not, in the order of their keys.

        ``reason``, instead of the rest: {"code", "text"}.
        """
        return list(await asyncio.gather(*map(self._report, self._placement.replicas)))

    async def report(self) -> dict[str, Any]:
        """The state of the cluster: ``cluster_report`` and ``ClusterQuality.report`` say what is in
        it."""
        now_s, generation = time.monotonic(), self._placement.table.generation
        told = cluster_report(
            self._placement,
            news=self._news,
            applied=self._shards.applied,
            http=self._http,
            now_s=now_s,
        )
        return told | self._quality.report(generation, self._shards.health, now_s)

    async def restart_rolling(self) -> dict[str, Any]:
        """Begins to replace every replica, one after the other; its ``restart_progress``, as that
        of one that is under way already.

        Raises:
            Unavailable: there is a replica that could not be replaced, for want of room.
            ShardlineError: the store takes no counter.
        """
        if not is_restarting(self._placement):
            refuse_without_spare(self._placement)
        progress = await self._restart(RestartAsked())
        assert progress is not None
        return progress

    async def stop_restart(self) -> dict[str, Any] | None:
        """Begins no further replacement of a rolling restart; the ``restart_progress`` of then.

        One that is under way is brought to its end. Raises ShardlineError: as ``restart_rolling``.
        """
        return await self._restart(RestartStopped())

    async def restart_progress(self) -> dict[str, Any] | None:
        """Of the newest rolling restart: ``cluster_report.restart_progress`` says what it is.

        None, or of another number than ``restart_rolling`` gave: it was cut short.
        """
        return restart_progress(self._placement)

    async def _restart(self, event: Event) -> dict[str, Any] | None:
        try:
            await self._take(event)
        except OSError as error:
            raise known_error(error) from error
        await tried(self._keep_note)  # else with the next look at the hosts
        return restart_progress(self._placement)

    async def _keep_note(self) -> None:
        self._restart_note.keep(self._placement)

    async def close(self) -> None:
        """Stops watching and ends every shard actor, for good."""
        self._tasks.cancel()
        self._shards.end()

    async def _open(self, instructions: tuple[Instruction, ...]) -> None:
        self._decisions.order(instructions)
        self._tasks.spawn(self._watch_replicas())
        self._tasks.spawn(self._watch_hosts())
        # of a table that routers have: until then they ask the generation before
        await self._decisions.until(
            lambda: self._decisions.published is not None and self._placement.covers
        )
        await asyncio.sleep(RETIRE_AFTER_S)
        await self._orders.end_others()

    async def _watch_replicas(self) -> None:
        """Each on its own: one that does not answer must not hold up the others."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            self._news.log_silence(time.monotonic())
            for key in self._shards.placed:
                if key not in self._checked and key in self._placement.replicas:
                    self._checked.add(key)
                    self._tasks.spawn(tried(partial(self._check, key)))

    async def _watch_hosts(self) -> None:
        """While Ray's head is away there is no event, and so nothing is decided about hosts."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            await tried(self._see_hosts)

    async def _see_hosts(self) -> None:
        # in a thread: it blocks while the head is away
        hosts = await asyncio.to_thread(fresh_hosts, self._placement.hosts)
        if not hosts:
            return
        self._news.saw_hosts(hosts, time.monotonic())
        await self._decisions.save_again()
        await self._take(HostsSeen(hosts=hosts, now_s=time.monotonic()))
        await self._keep_note()

    async def _check(self, key: ReplicaKey) -> None:
        """One health check; what it finds becomes an event."""
        try:
            state = self._placement.replicas.get(key)
            if state is None:
                return
            event: Event | None
            if state.stage is Stage.DRAINING:
                event = await self._shards.is_idle(key)
            else:
                event = await self._shards.check(
                    key,
                    state.route.epoch,
                    lambda: self._is_lost(key),
                    leads=epoch_of(self._placement, key),
                )
            if event is not None:
                await self._take(event)
                if isinstance(event, ReplicaFailed):  # not before: a full disk must not lose it
                    self._shards.forget(key)
        finally:
            self._checked.discard(key)

    def _is_lost(self, key: ReplicaKey) -> bool:
        state = self._placement.replicas.get(key)
        return state is not None and not state.answers

    async def _report(self, key: ReplicaKey) -> dict[str, Any]:
        state = self._placement.replicas[key]
        found: dict[str, Any] | Absence
        if key in self._shards.placed:
            found = await self._shards.describe(key)
        else:
            found = state.route.absence or Absence(Unavailable.code, "not placed")
        rest = {"reason": asdict(found)} if isinstance(found, Absence) else found
        return asdict(key) | {"failures": state.failures} | rest
