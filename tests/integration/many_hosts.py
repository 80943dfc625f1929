"""A Ray of several logical hosts on this machine, as a process of its own: hosts die and come back.

Run with a folder: writes what was seen there as JSON lines, {"event": ..., ...}. Every process is a
child of this one, and the folder holds all that Ray writes.
"""

import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray._private import ray_constants
from ray.cluster_utils import Cluster

from shardline.cluster.control.controller import ControllerSettings
from shardline.cluster.control.start import start_controller, wait_ready
from shardline.cluster.serving.ray_session import NAMESPACE
from shardline.cluster.store import Store
from shardline.router.limits import resolve
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.router.written import Upserts
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.messages import RouterSeen, RoutingTable
from tests.engine import build_generation

SHARDS, REPLICAS = 2, 2
HEAD_AWAY_S = 8.0
WRITE_TIMEOUT_MS = 2000.0
SECRET = b"s" * 32
CONFIG = RouterConfig(backoff_base_ms=20, backoff_max_ms=100)
NODE = {"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}


class Watched:
    """What a router sees of the cluster: every table, and answers to queries and writes without a
    pause."""

    def __init__(self, out: Path, controller: Any, vectors: np.ndarray) -> None:
        self._out = out
        self._controller = controller
        self._query = resolve(CONFIG, vectors=vectors[:1].tolist(), k=3)
        self._service = SearchService(CONFIG, SECRET, load_encoder=lambda table: None)
        self._phase = "start"
        self.table: RoutingTable | None = None
        self.answers = {"full": 0, "partial": 0, "failed": 0}
        self.writes: dict[str, float] = {}
        self._vectors = vectors
        self._written_at = 0.0

    def tell(self, event: str, **rest: Any) -> None:
        with self._out.open("a") as file:
            line = {"event": event, "phase": self._phase, "at": round(time.monotonic(), 2)}
            file.write(json.dumps(line | rest) + "\n")

    @contextlib.asynccontextmanager
    async def phase(self, name: str) -> AsyncIterator[None]:
        """Counts the answers of the block, until one more write has succeeded after it."""
        self._phase = name
        self.answers = {"full": 0, "partial": 0, "failed": 0}
        self.writes = {"written": 0, "refused": 0, "pause_s": 0.0}
        began = time.monotonic()
        yield
        written = self.writes["written"]
        await self.until(lambda table, report: self.writes["written"] > written)
        seconds = round(time.monotonic() - began, 1)
        self.tell("phase", seconds=seconds, **self.answers, **self.writes)

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        tasks = [asyncio.ensure_future(each()) for each in (self._follow, self._ask, self._write)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._service.close()

    async def until(self, condition: Callable[[RoutingTable, dict[str, Any]], bool]) -> None:
        async with asyncio.timeout(60):
            while True:
                report = await self._controller.report.remote()
                if self.table is not None and condition(self.table, report):
                    return
                await asyncio.sleep(0.1)

    async def _follow(self) -> None:
        seen = RouterSeen(host="10.9.9.9", node_id=ray.get_runtime_context().get_node_id(), pid=1)
        version = 0
        while True:
            try:
                await self._controller.router_lives.remote(seen)
                table = await self._controller.table_after.remote(version, 5.0)
            except ray.exceptions.RayError:
                await asyncio.sleep(0.2)
                continue
            if table is not None:
                version = table.version
                routes = [route for shard in table.shards for route in shard.replicas]
                self.tell(
                    "table",
                    answering=[
                        sum(route.address is not None for route in shard.replicas)
                        for shard in table.shards
                    ],
                    replicas=[
                        [*route.key.labels[1:], route.address is not None] for route in routes
                    ],
                )
                await self._service.apply(table)
                self.table = table

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if self.table is not None:
                try:
                    answer = await self._service.search(self._query, arrived_at=loop.time())
                    share = answer.coverage.share
                    self.answers["full" if share == 1.0 else "partial"] += 1
                except ShardlineError as error:
                    self.answers["failed"] += 1
                    self.tell("failed", code=error.code, text=str(error))
            await asyncio.sleep(0.02)

    async def _write(self) -> None:
        """An item of each shard, again and again; pause_s: the longest time between two successes,
        the second of which is of the phase."""
        loop = asyncio.get_running_loop()
        for number in itertools.count():
            if self.table is not None:
                rows = [number % 50, 150 + number % 50]
                given = Upserts(
                    item_ids=rows,
                    vectors=self._vectors[rows].tolist(),
                    attributes={},
                    timeout_ms=WRITE_TIMEOUT_MS,
                )
                try:
                    await self._service.writes.upsert(
                        given, f"w{number}", arrived_at=loop.time(), began_at=time.perf_counter()
                    )
                except ShardlineError as error:
                    self.writes["refused"] += 1
                    self.tell("refused", code=error.code, text=str(error))
                else:
                    pause_s = round(loop.time() - (self._written_at or loop.time()), 2)
                    self.writes["pause_s"] = max(self.writes["pause_s"], pause_s)
                    self.writes["written"] += 1
                    self._written_at = loop.time()
            await asyncio.sleep(0.05)


async def primary_process(controller: Any, report: dict[str, Any]) -> psutil.Process:
    """Of shard 0."""
    primary = report["shards"][0]["primary"]
    described = await controller.shard_reports.remote()
    (pid,) = (each["pid"] for each in described if (each["shard"], each["replica"]) == (0, primary))
    return psutil.Process(pid)


def gcs_of(cluster: Cluster) -> psutil.Process:
    """What Ray's head keeps its knowledge of hosts and actors in."""
    (found,) = cluster.head_node.all_processes[ray_constants.PROCESS_TYPE_GCS_SERVER]
    return psutil.Process(found.process.pid)


def keys(report: dict[str, Any]) -> set[tuple[int, int]]:
    return {(each["shard"], each["replica"]) for each in report["replicas"]}


def is_whole(hosts: int) -> Callable[[RoutingTable, dict[str, Any]], bool]:
    """All replicas answer, none is being replaced, and hosts differ by one replica at most."""

    def holds(table: RoutingTable, report: dict[str, Any]) -> bool:
        replicas = report["replicas"]
        loads = [len(host["replicas"]) for host in report["hosts"] if host["alive"]]
        is_quiet = all(each["answers"] and each["stage"] == "staying" for each in replicas)
        counted = len(replicas) == SHARDS * min(REPLICAS, hosts) and len(loads) == hosts
        return is_quiet and counted and max(loads) - min(loads) <= 1

    return holds


def is_level(table: RoutingTable, report: dict[str, Any]) -> bool:
    """Every shard has a primary, and every replica keeps up with it."""
    has_all = all(shard["primary"] is not None for shard in report["shards"])
    return has_all and all(each["lag"] == 0 for each in report["replicas"])


async def scenario(cluster: Cluster, out: Path, store: Store, vectors: np.ndarray) -> None:
    second = cluster.add_node(**NODE)
    settings = ControllerSettings(
        store=str(store.root),
        secret=SECRET,
        shard_host="127.0.0.1",
        threads_per_shard=1,
        cpus_per_shard=0.5,
        gpus_per_shard=0,
        huge_pages=False,
        replicas=REPLICAS,
    )
    controller = start_controller(settings)
    await asyncio.to_thread(wait_ready, controller, 120)
    now = Watched(out, controller, vectors)
    async with now.following():
        async with now.phase("two hosts"):
            await now.until(is_whole(2))
            await asyncio.sleep(1)
            now.tell("report", report=await controller.report.remote())
        async with now.phase("primary killed"):
            report = await controller.report.remote()
            (await primary_process(controller, report)).kill()
            await now.until(lambda table, later: later["shards"] != report["shards"])
            await now.until(is_whole(2))
            await now.until(is_level)
            now.tell("report", report=await controller.report.remote())
        async with now.phase("primary stopped"):
            report = await controller.report.remote()
            process = await primary_process(controller, report)
            process.suspend()
            await now.until(lambda table, later: later["shards"] != report["shards"])
            await asyncio.sleep(2)
            process.resume()
            await now.until(is_level)
            await now.until(is_whole(2))
        async with now.phase("host killed"):
            cluster.remove_node(second, allow_graceful=False)
            await now.until(is_whole(1))
            now.tell("report", report=await controller.report.remote())
        async with now.phase("host added"):
            cluster.add_node(**NODE)
            await now.until(is_whole(2))
        async with now.phase("rolling restart"):
            before = await controller.report.remote()
            begun = await controller.restart_rolling.remote()
            await now.until(lambda table, report: report["restart"]["is_over"])
            after = await controller.report.remote()
            kept = len(keys(before) & keys(after))
            now.tell("restarted", begun=begun, over=after["restart"], kept=kept)
        async with now.phase("third host"):
            cluster.add_node(**NODE)
            await now.until(is_whole(3))
        async with now.phase("head away"):
            before = await controller.report.remote()
            head = gcs_of(cluster)
            head.suspend()
            await asyncio.sleep(HEAD_AWAY_S)
            head.resume()
            await asyncio.sleep(3)
            await now.until(is_whole(3))
            after = await controller.report.remote()
            now.tell("head", moved=len(keys(before) ^ keys(after)), hosts=after["hosts"])
        async with now.phase("controller killed"):
            ray.kill(controller, no_restart=False)
            version = now.table.version if now.table is not None else 0
            await now.until(lambda table, report: table.version > version)
            await now.until(is_whole(3))
            await now.until(is_level)
            now.tell("report", report=await controller.report.remote())
    await controller.close.remote()
    ray.kill(controller)


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((200, 8)).astype(np.float32)
    store = Store(folder / "store")
    build_generation(store.generation(1), vectors, np.arange(200), SHARDS, kind="flat")
    store.set_current(1)
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        asyncio.run(scenario(cluster, folder / "seen", store, vectors))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
