"""Generations change places while a client writes: the real controller, router, shards, logs and
mirror, over real sockets. In place of Ray's actors are objects of this process."""

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import ray

from shardline.cluster.control import controller as module
from shardline.cluster.control import mirrors, publish_run, publishing
from shardline.cluster.control.actor_name import ActorName
from shardline.cluster.control.controller import Controller
from shardline.cluster.control.publish_parts import Bounds, Mirror
from shardline.cluster.control.publish_state import PublishOptions
from shardline.cluster.rollover.gate import GateFigure, GateReport
from shardline.cluster.rollover.mirror_actor import MirrorActor
from shardline.cluster.rollover.mirror_opening import MirrorOrder
from shardline.cluster.rollover.mirror_progress import MirrorProgress
from shardline.cluster.rollover.way_back import parting
from shardline.cluster.store import Store
from shardline.router.service import SearchService
from shardline.router.written import Deletes, Upserts, WriteAnswer
from shardline.shards.core.messages import RoutingTable
from shardline.shards.storage.generation import read_generation, write_generation
from tests.fake_shard import SECRET, until
from tests.live_shard import NEW_ITEMS, built, contents, opened, unit_vectors
from tests.unit.test_controller import settings
from tests.unit.test_handing_over import (
    CONFIG,
    Cluster,
    Replica,
    fast,  # noqa: F401 - a fixture
)


class HereMirror(MirrorActor):
    """In this process."""

    def __init__(self, order: MirrorOrder, controller: "Published") -> None:
        self._published = controller
        super().__init__(order)

    async def _table_after(self, version: int, timeout_s: float) -> RoutingTable | None:
        return await self._published.controller.table_of(
            self._order.target, version, min(0.2, timeout_s)
        )


@dataclass
class Reached:
    """A mirror as the controller reaches it."""

    published: "Published"
    between: tuple[int, int]

    async def progress(self) -> MirrorProgress:
        return await self.published.mirror(self.between).progress()

    async def drain(self, final: tuple[int, ...], timeout_s: float) -> MirrorProgress:
        return await self.published.mirror(self.between).drain(final, timeout_s)

    async def stop(self) -> None:
        if (mirror := self.published.mirrors.pop(self.between, None)) is not None:
            await mirror.stop()


class Published(Cluster):
    """With the mirrors of its controllers, by the generations that they are between."""

    store: Store
    mirrors: dict[tuple[int, int], HereMirror]

    async def start_mirror(self, source: RoutingTable, target: RoutingTable) -> Mirror:
        return Reached(self, (source.generation, target.generation))

    def mirror(self, between: tuple[int, int]) -> HereMirror:
        """The one that runs, or another one, as Ray starts it again."""
        if between not in self.mirrors:
            order = MirrorOrder(
                store=str(self.store.root),
                source=between[0],
                target=between[1],
                controller="",
                secret=SECRET,
            )
            self.mirrors[between] = HereMirror(order, self)
        return self.mirrors[between]

    async def end_mirrors(self, but: tuple[int, int] | None) -> None:
        for between in [each for each in self.mirrors if each != but]:
            await self.mirrors.pop(between).stop()

    async def parting(
        self, live: RoutingTable, candidate: RoutingTable
    ) -> Callable[[], Awaitable[None]]:
        note = await asyncio.to_thread(parting, self.store, live.generation, candidate.generation)
        return partial(asyncio.to_thread, note)

    def check_bounds(self, bounds: Bounds) -> None:
        assert not bounds

    async def run_gate(
        self,
        live: RoutingTable,
        candidate: RoutingTable,
        mirrored: MirrorProgress | None,
        bounds: Bounds,
    ) -> GateReport:
        assert mirrored is not None
        return GateReport(())

    def judge_unreplayed(self, rows: int, bounds: Bounds) -> GateFigure:
        return GateFigure(figure="unreplayed_rows", value=rows, bound="", ok=rows == 0, text="")

    @property
    def live(self) -> int:
        return self.controller._placement.table.generation

    async def ended(self, stage: str = "live") -> None:
        def is_over() -> bool:
            progress = self.controller._publishing.progress
            return progress is not None and progress["is_over"]

        await until(is_over, timeout=60)
        progress = self.controller._publishing.progress
        assert progress is not None
        assert (progress["stage"], progress["reason"]) == (stage, None)

    def assert_kept(self, generation: int) -> None:
        found = contents(opened(self.store.generation(generation))[0])
        assert {item for item in found if item >= NEW_ITEMS} >= set(self.written)


@contextlib.asynccontextmanager
async def published(
    folder: Path, monkeypatch: pytest.MonkeyPatch, replicas: int = 1
) -> AsyncIterator[Published]:
    """Generations 7, which is live, and 8, of one shard; a client writes without a pause."""
    first, store = built(folder), Store(folder)
    shutil.copytree(first, store.generation(8))
    write_generation(store.generation(8), replace(read_generation(first), generation=8))
    store.set_current(7)
    handles: dict[str, Replica] = {}

    def get_actor(name: str) -> Replica:
        parsed = ActorName.parse(name)
        assert parsed is not None
        if name not in handles or handles[name].is_dead:
            where = store.generation(parsed.key.generation)
            handles[name] = Replica(where, parsed.key, lambda: cluster.controller)
        return handles[name]

    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(ray, "kill", Replica.die)
    monkeypatch.setattr(ray.util, "list_named_actors", lambda: list(handles))
    monkeypatch.setattr(publishing, "RETIRE_AFTER_S", 0.0)
    monkeypatch.setattr(publish_run, "LOOK_S", 0.02)
    monkeypatch.setattr(mirrors, "ANSWER_S", 0.5)
    monkeypatch.setattr(module, "WiredParts", lambda *given: cluster)
    service = SearchService(CONFIG, SECRET, load_encoder=lambda table: None)
    cluster = Published(None, service, {}, first, [])  # type: ignore[arg-type]
    cluster.store, cluster.mirrors = store, {}
    cluster.controller = Controller(settings(store, None, replicas=replicas))
    tasks = [asyncio.ensure_future(cluster.follow())]
    try:
        await until(lambda: cluster.primary is not None, timeout=30)
        await until(lambda: service._fanout.snapshot is not None, timeout=30)
        tasks.append(asyncio.ensure_future(cluster.write()))
        await cluster.writes_go_on()
        yield cluster
        await cluster.writes_go_on()
        assert not tasks[1].done(), "no write was refused"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await cluster.end_mirrors(None)
        await service.close()
        await cluster.controller.close()
        for replica in handles.values():
            replica.server.stop()
    cluster.assert_kept(store.current())


async def test_no_write_is_refused_or_lost_there_back_and_there_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fast: None,  # noqa: F811
) -> None:
    async with published(tmp_path, monkeypatch) as cluster:
        for generation in (8, 7, 8):
            if generation == 8:
                await cluster.controller.publish(PublishOptions(generation=8))
            else:
                await cluster.controller.roll_back()
            await cluster.ended()
            assert cluster.live == cluster.store.current() == generation
            await cluster.writes_go_on()
            cluster.assert_kept(generation)
        assert cluster.longest_s < 4
    assert cluster.store.current() == 8


async def test_a_write_that_is_repeated_after_the_switch_is_one_effect(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fast: None,  # noqa: F811
) -> None:
    async with published(tmp_path, monkeypatch) as cluster:
        writes, loop = cluster.service.writes, asyncio.get_running_loop()

        async def delete(key: str) -> WriteAnswer:
            given = Deletes(item_ids=[5], timeout_ms=20_000)
            now_s = time.perf_counter()
            return await writes.delete(given, key, arrived_at=loop.time(), began_at=now_s)

        async def upsert() -> None:
            vectors = unit_vectors(1, 5).tolist()
            given = Upserts(item_ids=[5], vectors=vectors, attributes={}, timeout_ms=20_000)
            now_s = time.perf_counter()
            await writes.upsert(given, "u", arrived_at=loop.time(), began_at=now_s)

        def is_there() -> bool:
            return 5 in contents(opened(cluster.store.generation(8))[0])

        assert (await delete("once")).existed == 1
        await cluster.controller.publish(PublishOptions(generation=8))
        await cluster.ended()
        await until(lambda: cluster.service._fanout.snapshot.table.generation == 8, timeout=30)
        await upsert()  # newer than the delete
        assert is_there()
        again = await delete("once")
        assert (again.existed, again.generation) == (1, 8)
        assert again.seq[0] is not None
        assert is_there(), "it was applied before the upsert, and not after it"
        assert (await delete("twice")).existed == 1
        assert not is_there()


async def test_a_rollback_after_a_publish_without_writes_has_those_of_before_and_since(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fast: None,  # noqa: F811
) -> None:
    async with published(tmp_path, monkeypatch) as cluster:
        options = PublishOptions(generation=8, with_writes=False, skip_gate="it lacks them")
        await cluster.controller.publish(options)
        await cluster.ended()
        assert cluster.live == cluster.store.current() == 8
        await cluster.writes_go_on()
        await cluster.controller.roll_back()
        await cluster.ended()
        assert cluster.live == 7
        await cluster.writes_go_on()
        cluster.assert_kept(7)


@pytest.mark.parametrize("fault", ["controller", "primary", "mirror"])
async def test_no_write_is_refused_or_lost_when_something_dies_meanwhile(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fast: None,  # noqa: F811
    fault: str,
) -> None:
    async with published(tmp_path, monkeypatch, replicas=2) as cluster:
        await cluster.controller.publish(PublishOptions(generation=8))
        await until(lambda: bool(cluster.mirrors), timeout=30)
        if fault == "controller":
            cluster.controller._tasks.cancel()
            cluster.controller = Controller(settings(cluster.store, None, replicas=2))
        elif fault == "primary":
            placement = cluster.controller._placement
            (leading,) = placement.leading.values()
            assert leading.leader is not None
            await asyncio.to_thread(cluster.controller._shards._handles[leading.leader.key].die)
        else:
            killed = cluster.mirrors.pop((7, 8))
            for task in killed._tasks:
                task.cancel()
            await killed._target.close()
        await cluster.ended()
        assert cluster.live == cluster.store.current() == 8
        await cluster.writes_go_on()
