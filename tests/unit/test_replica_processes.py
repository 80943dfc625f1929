"""Replicas as processes, with the real server: stopped, killed, or long at work."""

import asyncio
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest

from shardline.bench.load.fanout_peers import ROWS, Peers, stalling_processes
from shardline.bench.load.hedging_bench import measure
from shardline.router.fanout.coalesce import LaneKey
from shardline.router.fanout.connection import ShardConnection
from shardline.router.fanout.fanout import Fanout
from shardline.router.router_config import RouterConfig
from shardline.shards.core.messages import ShardRoute
from shardline.shards.core.metrics import RESENT, Recorder
from tests.fake_shard import make_table, until

SHARDS, COPIES, DIM, K = 2, 2, 8, 5
CONFIG = RouterConfig(  # patient, because other work may hold up the shards
    hedge_share=0.0,
    silent_after_ms=500.0,
    backoff_base_ms=1.0,
    backoff_max_ms=20.0,
    connect_timeout_ms=10_000.0,
    switch_wait_ms=10_000.0,
)
SILENT_S = CONFIG.silent_after_ms / 1000
SEARCH_S = 0.003  # longer than what a shard searches in its event loop
STALL_S = 1.0  # longer than CONFIG.silent_after_ms
QUERY = np.ones((1, DIM), np.float32)


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    with stalling_processes(SHARDS, COPIES, DIM, K, search_s=SEARCH_S, stall_s=STALL_S) as found:
        yield found


class Router:
    """Asks, and knows how long it took. Nothing is hedged: only silence and loss help."""

    def __init__(self, peers: Peers) -> None:
        self.recorder = Recorder()
        self.fanout = Fanout(peers.secret, CONFIG, random.Random(1), self.recorder)
        self.table = make_table(
            [
                ShardRoute(shard=shard, rows=ROWS, replicas=tuple(replicas))
                for shard, replicas in enumerate(peers.routes)
            ],
            DIM,
            boundaries=(ROWS,),
        )

    async def __aenter__(self) -> "Router":
        assert await self.fanout.apply(self.table, None)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.fanout.close()

    async def whole(self) -> float:
        """Seconds until an answer, which is complete."""
        began = time.perf_counter()
        with self.fanout.pin() as snapshot:
            key = LaneKey(snapshot=snapshot, k=K, min_coverage=0.0)
            deadline = asyncio.get_running_loop().time() + 20.0
            answer = await self.fanout.search(QUERY, key, deadline=deadline)
        assert answer.coverage.share == 1.0
        return time.perf_counter() - began

    @property
    def connections(self) -> list[ShardConnection]:
        assert self.fanout.snapshot is not None
        return self.fanout.snapshot.all_connections

    def resent(self, why: str) -> float:
        return sum(
            value
            for (metric, labels), value in self.recorder._totals.items()
            if metric is RESENT and labels[1] == why
        )


async def test_a_stopped_process_costs_a_moment_of_silence_once(peers: Peers) -> None:
    stopped = multiprocessing.active_children()[0]
    assert stopped.pid is not None
    async with Router(peers) as router:
        for _ in range(20):
            await router.whole()
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            took_s = [await router.whole() for _ in range(100)]
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        assert router.resent("silent") == 1
        assert SILENT_S <= max(took_s) < 3 * SILENT_S
        assert sum(took > 0.8 * SILENT_S for took in took_s) == 1
        connections = router.fanout.snapshot.all_connections if router.fanout.snapshot else []
        await until(
            lambda: all(each.link is not None and not each.link.owed for each in connections)
        )
        await router.whole()


async def test_a_long_search_is_not_silence(peers: Peers) -> None:
    """A whole second of one search in the second thread: keep-alive frames come all the while."""
    async with Router(peers) as router:
        for _ in range(20):
            await router.whole()
        peers.stall(1.0)
        took_s: float = 0.0
        while took_s < STALL_S:  # until the one that stalls is the one that is asked
            took_s = await router.whole()
        peers.stall(0.0)
        assert router.resent("silent") == 0


async def test_a_killed_process_costs_nothing(peers: Peers) -> None:
    async with Router(peers) as router:
        running = [asyncio.create_task(router.whole()) for _ in range(50)]
        await asyncio.sleep(0)
        killed = multiprocessing.active_children()[0]
        killed.kill()
        await asyncio.gather(*running)
        for _ in range(50):
            await router.whole()
        killed.join()
        assert sum(each.connected for each in router.connections) == 3


def test_the_benchmark_reports_every_figure() -> None:
    report = measure(
        shards=1,
        rate=200.0,
        seconds=0.5,
        rounds=1,
        search_ms=0.0,
        stall_ms=20.0,
        stall_share=0.1,
    )
    assert set(report["routers"]) == {
        "one replica",
        "two replicas, no hedging",
        "two replicas, hedging",
    }
    for figures in report["routers"].values():
        for phase in ("well", "stalling"):
            assert 0 < figures[phase]["p50"] <= figures[phase]["p99"] <= figures[phase]["longest"]
        assert figures["router_cpu_us"] > 0
    assert report["routers"]["two replicas, hedging"]["hedge_delay_ms"] >= 5.0
    for figure in ("cost_of_hedging", "cost_of_second_replica"):
        assert set(report[figure]) == {"time", "router_cpu"}
