"""Writes go on while the lead goes from replica to replica: the real controller, router, shards and
log, over real sockets. In place of Ray's actors are objects of this process."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from shardline.cluster.control import (
    opening,
    orders,
    reconcile,
    replacing,
    shard_actors,
    watch,
)
from shardline.cluster.control.actor_name import ActorName
from shardline.cluster.control.controller import Controller
from shardline.cluster.control.hosts import Host
from shardline.cluster.store import Store
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.router.written import Upserts
from shardline.shards.core.messages import Pulse, ReplicaKey
from shardline.shards.server.shard_server import ShardServer
from tests.fake_shard import SECRET, until
from tests.live_shard import NEW_ITEMS, built, contents, opened, unit_vectors
from tests.unit.test_controller import settings

HOSTS = tuple(Host(node_id=f"n{name}", address=f"10.0.0.{name}", cpus=2) for name in (1, 2))
CONFIG = RouterConfig(backoff_base_ms=1, backoff_max_ms=20)


class Replica:
    """A shard's process, and the handle of its actor: calls are carried out one after the other."""

    def __init__(self, generation: Path, key: ReplicaKey, controller: Callable[[], Controller]):
        self.key = key
        self.is_dead = False
        self._controller = controller
        self._calls = asyncio.Lock()
        self.shard, self.writes = opened(generation)
        self.server = ShardServer(
            self.shard, secret=SECRET, replica=key.replica, writes=self.writes
        )
        self.address = self.server.bind()
        self.server.start(0)

    @property
    def ping(self) -> "Remote":
        return Remote(self, self._pulse)

    @property
    def lead(self) -> "Remote":
        return Remote(self, lambda epoch: asyncio.to_thread(self.server.lead, epoch))

    @property
    def seal(self) -> "Remote":
        return Remote(self, lambda epoch: asyncio.to_thread(self.server.seal, epoch))

    @property
    def announce(self) -> "Remote":
        return Remote(self, self._announce)

    @property
    def describe(self) -> "Remote":
        return Remote(self, self._describe)

    async def called(self, method: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        async with self._calls:
            if self.is_dead:
                raise ActorDiedError
            return await method(*arguments)

    def die(self) -> None:
        self.is_dead = True
        self.server.stop()

    async def _pulse(self) -> Pulse:
        writes = self.writes
        leads, refused = writes.leading_epoch, writes.refused
        return Pulse(pid=1, seq=writes.seq, leads=leads, refused=refused)

    async def _describe(self) -> dict[str, Any]:
        return {"connections": len(self.server.sessions)}

    async def _announce(self) -> None:
        self.server.epoch = await self._controller().register_replica(
            key=self.key,
            address=self.address,
            epoch=max(self.server.epoch, self.writes.newest_epoch()),
            leads=self.writes.leading_epoch,
        )


@dataclass
class Remote:
    """A method of an actor."""

    replica: Replica
    method: Callable[..., Any]

    def remote(self, *arguments: Any) -> Any:
        return self.replica.called(self.method, arguments)


@dataclass
class Cluster:
    """replicas: by their number, those alive and those that were. written: items whose write was
    acknowledged. longest_s: the longest time of a write."""

    controller: Controller
    service: SearchService
    replicas: dict[int, Replica]
    generation: Path
    written: list[int]
    longest_s: float = 0.0

    @property
    def primary(self) -> int | None:
        table = self.controller._decisions.published
        return None if table is None else table.shards[0].primary

    async def follow(self) -> None:
        version = 0
        while True:
            table = await self.controller.table_after(version, 0.2)
            if table is not None:
                version = table.version
                await self.service.apply(table)

    async def write(self) -> None:
        """One item after the other; any refusal ends it."""
        loop = asyncio.get_running_loop()
        for number in itertools.count(NEW_ITEMS):
            given = Upserts(
                item_ids=[number],
                vectors=unit_vectors(1, number).tolist(),
                attributes={},
                timeout_ms=20_000,
            )
            began_at = time.perf_counter()
            await self.service.writes.upsert(
                given, f"k{number}", arrived_at=loop.time(), began_at=began_at
            )
            self.longest_s = max(self.longest_s, time.perf_counter() - began_at)
            self.written.append(number)
            await asyncio.sleep(0.001)

    async def writes_go_on(self, writes: int = 20) -> None:
        wanted = len(self.written) + writes
        await until(lambda: len(self.written) >= wanted, timeout=30)

    def assert_nothing_lost(self) -> None:
        found = contents(opened(self.generation)[0])
        assert {item for item in found if item >= NEW_ITEMS} >= set(self.written)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for user in (watch, opening):
        monkeypatch.setattr(user, "fresh_hosts", lambda known=(): HOSTS)
    monkeypatch.setattr(watch, "WATCH_INTERVAL_S", 0.02)
    monkeypatch.setattr(orders, "RETRY_S", 0.02)
    monkeypatch.setattr(replacing, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(reconcile, "OVERLAP_S", 0.1)
    yield


@contextlib.asynccontextmanager
async def written_to(
    store: Path, monkeypatch: pytest.MonkeyPatch, replicas: int = 2
) -> AsyncIterator[Cluster]:
    """One shard, of which all replicas answer, one leads, and a client writes without a pause."""
    generation = built(store)
    Store(store).set_current(7)
    handles: dict[str, Replica] = {}
    cluster: Cluster

    def get_actor(name: str) -> Replica:
        parsed = ActorName.parse(name)
        assert parsed is not None
        if name not in handles:
            handles[name] = Replica(generation, parsed.key, lambda: cluster.controller)
            cluster.replicas[parsed.key.replica] = handles[name]
        return handles[name]

    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(ray, "kill", Replica.die)
    monkeypatch.setattr(ray.util, "list_named_actors", lambda: list(handles))
    service = SearchService(CONFIG, SECRET, load_encoder=lambda table: None)
    controller = Controller(settings(Store(store), None, replicas=replicas))
    cluster = Cluster(controller, service, {}, generation, [])
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
        await service.close()
        await cluster.controller.close()
        for replica in handles.values():
            replica.server.stop()
    cluster.assert_nothing_lost()


@pytest.mark.parametrize("replicas", [1, 2])
async def test_no_write_is_refused_or_lost_in_a_rolling_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: None, replicas: int
) -> None:
    async with written_to(tmp_path, monkeypatch, replicas) as cluster:
        cluster.longest_s = 0.0
        await cluster.controller.restart_rolling()
        await until(lambda: cluster.controller._placement.restart.is_over, timeout=60)
        assert cluster.primary is not None
        assert cluster.primary >= replicas
        assert cluster.longest_s < 5


async def test_no_write_is_refused_or_lost_when_the_primary_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: None
) -> None:
    async with written_to(tmp_path, monkeypatch) as cluster:
        before = cluster.primary
        assert before is not None
        await asyncio.to_thread(cluster.replicas[before].die)
        await until(lambda: cluster.primary not in (None, before), timeout=30)


async def test_one_that_was_not_heard_of_follows_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: None
) -> None:
    """It lives, and is searched again, and so must know what the successor is written."""
    async with written_to(tmp_path, monkeypatch) as cluster:
        before = cluster.primary
        assert before is not None
        old = cluster.replicas[before]
        monkeypatch.setattr(shard_actors, "DESCRIBE_TIMEOUT_S", 0.5)
        async with old._calls:  # it answers none
            await until(lambda: cluster.primary not in (None, before), timeout=30)
        await until(lambda: old.writes.leading_epoch is None, timeout=30)
        seq = old.writes.seq
        await until(lambda: old.writes.seq > seq + 20, timeout=30)


async def test_a_restarted_controller_does_not_disturb_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: None
) -> None:
    async with written_to(tmp_path, monkeypatch) as cluster:
        before = cluster.primary
        epochs = [replica.writes.leading_epoch for replica in cluster.replicas.values()]
        cluster.controller._tasks.cancel()  # it is killed, and its shards live on
        cluster.controller = Controller(settings(Store(tmp_path), None, replicas=2))
        await until(lambda: cluster.primary == before, timeout=30)
        await cluster.writes_go_on()
        assert [r.writes.leading_epoch for r in cluster.replicas.values()] == epochs
