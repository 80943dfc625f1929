"""Where a publish gets its mirror and its gate from: the two places that know how they are made."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from shardline.cluster.control.opening import cluster_id_of
from shardline.cluster.control.publish_parts import Bounds, Mirror
from shardline.cluster.control.shard_actors import DIGEST_DIGITS, ShardActors
from shardline.cluster.rollover.gate import GateFigure, GateReport, unreplayed_figure
from shardline.cluster.rollover.gate_actor import GateOrder, judged_in_a_process
from shardline.cluster.rollover.mirror_actor import end_mirror, start_mirror
from shardline.cluster.rollover.mirror_opening import MirrorOrder
from shardline.cluster.rollover.mirror_progress import MirrorProgress
from shardline.cluster.rollover.publish_config import PublishConfig
from shardline.cluster.rollover.takeovers import takeovers
from shardline.cluster.rollover.way_back import parting
from shardline.cluster.store import Store
from shardline.shards.core.messages import ReplicaKey, RoutingTable
from shardline.shards.core.schema import FloatArray
from shardline.shards.live.takeover import Takeover, TakeoverLook


class WiredParts:
    """The ``PublishParts`` of a running cluster. secret: what proves a peer to shards. controller:
    the name of its actor. shards: those of the cluster. served: vectors of queries that a model
    has served lately; None: none."""

    def __init__(
        self,
        store: Store,
        secret: bytes,
        config: PublishConfig,
        controller: str,
        shards: ShardActors,
        served: Callable[[str], FloatArray | None],
    ) -> None:
        self._store = store
        self._secret = secret
        self._config = config
        self._controller = controller
        self._shards = shards
        self._served = served

    async def start_mirror(self, source: RoutingTable, target: RoutingTable) -> Mirror:
        """As ``PublishParts``: a detached actor, which is found again."""
        order = MirrorOrder(
            store=str(self._store.root),
            source=source.generation,
            target=target.generation,
            controller=self._controller,
            secret=self._secret,
        )
        return await start_mirror(order, self._digest)

    async def end_mirrors(self, but: tuple[int, int] | None) -> None:
        """As ``PublishParts``."""
        await end_mirror(self._digest, but)

    async def parting(
        self, live: RoutingTable, candidate: RoutingTable
    ) -> Callable[[], Awaitable[None]]:
        """As ``PublishParts``."""
        note = await asyncio.to_thread(parting, self._store, live.generation, candidate.generation)
        return partial(asyncio.to_thread, note)

    def check_bounds(self, bounds: Bounds) -> None:
        """As ``PublishParts``."""
        self._config.with_bounds(bounds)

    async def run_gate(
        self,
        live: RoutingTable,
        candidate: RoutingTable,
        mirrored: MirrorProgress | None,
        bounds: Bounds,
    ) -> GateReport:
        """As ``PublishParts``."""
        order = GateOrder(
            candidate=candidate.generation,
            live=live.generation,
            controller=self._controller,
            secret=self._secret,
            config=self._config.with_bounds(bounds),
            served=self._served(live.model_version),
            unreplayed=0 if mirrored is None else mirrored.unreplayed,
        )
        return await judged_in_a_process(order)

    async def takeovers(
        self, live: RoutingTable, generation: int, token: str
    ) -> tuple[Takeover, ...]:
        """As ``PublishParts``."""
        return await asyncio.to_thread(takeovers, self._store, live.generation, generation, token)

    async def take_over(self, key: ReplicaKey, order: Takeover) -> None:
        """As ``PublishParts``."""
        await self._shards.take_over(key, order)

    async def taken_over(self, key: ReplicaKey) -> TakeoverLook | None:
        """As ``PublishParts``."""
        return await self._shards.taken_over(key)

    async def mark(self, key: ReplicaKey) -> None:
        """As ``PublishParts``."""
        await self._shards.mark(key)

    async def judge_files(self, live: RoutingTable, generation: int, bounds: Bounds) -> GateReport:
        """As ``PublishParts``."""
        order = GateOrder(
            candidate=generation,
            live=live.generation,
            controller=self._controller,
            secret=self._secret,
            config=self._config.with_bounds(bounds),
            served=self._served(live.model_version),
            unreplayed=0,
            in_files=str(self._store.generation(generation)),
        )
        return await judged_in_a_process(order)

    def judge_unreplayed(self, rows: int, bounds: Bounds) -> GateFigure:
        """As ``PublishParts``."""
        return unreplayed_figure(rows, self._config.with_bounds(bounds))

    @property
    def _digest(self) -> str:
        return cluster_id_of(self._secret)[:DIGEST_DIGITS]
