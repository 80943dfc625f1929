"""What replicas and hedging cost while all is well, and what they save while one replica stalls.

Theory: a query waits for its slowest shard. A replica that stalls in a share of its searches puts
that share, times the shards, on the queries' tail. Asked a second time after the hedge delay, the
shard answers in that delay and one more undisturbed search; the delay lies beyond the 95th
percentile, so few are asked twice. The ceiling is the undisturbed run, the baseline one replica
per shard, both in the same rounds.

Shards are processes with the real server in front of a shard that sleeps instead of searching, so
that they do not compete for cores; the router's half is the real fan-out on the loop of a Serve
replica. Open loop, Poisson arrivals; a latency counts from the time a query was meant to leave.
"""

import asyncio
import gc
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import numpy as np
import uvloop

from shardline.bench.load.fanout_peers import ROWS, Peers, stalling_processes
from shardline.bench.load.stats import p50_p99
from shardline.cluster.console import print_table
from shardline.cluster.serving.ray_session import cores
from shardline.router.fanout.coalesce import LaneKey
from shardline.router.fanout.fanout import Fanout
from shardline.router.router_config import RouterConfig
from shardline.shards.core.messages import RoutingTable, SearchRequest, ShardRoute
from shardline.shards.core.metrics import FRAME_QUERIES, HEDGES, HEDGES_WON, Recorder
from shardline.shards.core.partition import Partitioning
from shardline.shards.core.schema import Metric
from shardline.shards.process.memory import prepare_memory

COPIES = 2
DIM, K = 128, 100
QUERY = np.random.default_rng(0).random((1, DIM), dtype=np.float32)
TIMEOUT_S = 5.0
WARM_UP = 300  # queries, so that the router knows how long a frame takes
# The bounds of issue 14: p99 within twice the undisturbed one and the delay, at 5 % more work.
TIMES_UNDISTURBED = 2.0
MORE_WORK = 0.05


@dataclass(slots=True)
class Router:
    """One way to ask: with so many replicas per shard, hedging or not; and what it measured."""

    name: str
    copies: int
    hedge_share: float
    recorder: Recorder = field(default_factory=Recorder)
    latency_ms: dict[str, list[float]] = field(default_factory=dict)
    sequential_ms: list[float] = field(default_factory=list)  # median of each block
    cpu_us: list[float] = field(default_factory=list)  # of this process per query, of each block
    frames: dict[str, float] = field(default_factory=dict)
    hedges: dict[str, float] = field(default_factory=dict)
    won: dict[str, float] = field(default_factory=dict)
    delay_ms: float = 0.0  # after which single queries are hedged; 0: not
    fanout: Fanout | None = None

    async def connect(self, peers: Peers) -> None:
        config = RouterConfig(hedge_share=self.hedge_share)
        self.fanout = Fanout(peers.secret, config, random.Random(0), self.recorder)
        shards = tuple(
            ShardRoute(shard=shard, rows=ROWS, replicas=tuple(replicas[: self.copies]))
            for shard, replicas in enumerate(peers.routes)
        )
        table = RoutingTable(
            version=1,
            generation=1,
            generation_dir="none",
            model_version="none",
            dim=DIM,
            metric=Metric.DOT,
            index="none",
            partitioning=Partitioning.RANGE,
            boundaries=tuple(range(1, len(shards))),
            shards=shards,
        )
        await self.fanout.apply(table, None)
        for _ in range(WARM_UP):
            await self.ask()
        self.count("warm-up", len(shards))

    async def ask(self) -> None:
        assert self.fanout is not None
        with self.fanout.pin() as snapshot:
            key = LaneKey(snapshot=snapshot, k=K, min_coverage=0.0)
            deadline = asyncio.get_running_loop().time() + TIMEOUT_S
            found = await self.fanout.search(QUERY, key, deadline=deadline)
        assert found.coverage.share == 1.0

    async def run(self, phase: str, rate: float, seconds: float, seed: int) -> None:
        """Open loop."""
        gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds))
        took_ms = self.latency_ms.setdefault(phase, [])
        began = time.perf_counter()

        async def one(intended: float) -> None:
            await self.ask()
            took_ms.append((time.perf_counter() - intended) * 1e3)

        async with asyncio.TaskGroup() as group:
            for intended in (began + np.cumsum(gaps)).tolist():
                await asyncio.sleep(max(0.0, intended - time.perf_counter()))
                group.create_task(one(intended))
        assert self.fanout is not None
        assert self.fanout.snapshot is not None
        self.count(phase, len(self.fanout.snapshot.shards))

    async def run_sequentially(self, count: int) -> None:
        cpu, took_ms = time.process_time(), []
        for _ in range(count):
            began = time.perf_counter()
            await self.ask()
            took_ms.append((time.perf_counter() - began) * 1e3)
        self.sequential_ms.append(statistics.median(took_ms))
        self.cpu_us.append((time.process_time() - cpu) / count * 1e6)

    def count(self, phase: str, shards: int) -> None:
        """Adds what was recorded since the last time to the phase: requests to shards."""
        for sample in self.recorder.drain():
            if sample.metric is FRAME_QUERIES:
                self.frames[phase] = self.frames.get(phase, 0.0) + shards
            elif sample.metric is HEDGES:
                self.hedges[phase] = self.hedges.get(phase, 0.0) + sample.value
            elif sample.metric is HEDGES_WON:
                self.won[phase] = self.won.get(phase, 0.0) + sample.value

    async def close(self) -> None:
        assert self.fanout is not None
        assert self.fanout.snapshot is not None
        redundancy = self.fanout.snapshot.redundancy
        if redundancy is not None and self.hedge_share:
            self.delay_ms = redundancy.paces.of(SearchRequest, 1).delay_s * 1e3
        await self.fanout.close()


def measure(
    *,
    shards: int,
    rate: float,
    seconds: float,
    rounds: int,
    search_ms: float,
    stall_ms: float,
    stall_share: float,
) -> dict[str, Any]:
    """Every phase ``rounds`` times in alternation, ``seconds`` each; the report, for JSON."""
    setup = dict(locals()) | {"cores": cores(), "copies": COPIES}
    routers = [
        Router("one replica", 1, 0.0),
        Router("two replicas, no hedging", COPIES, 0.0),
        Router("two replicas, hedging", COPIES, MORE_WORK),
    ]
    with (
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        stalling_processes(
            *(shards, COPIES, DIM, K), search_s=search_ms / 1e3, stall_s=stall_ms / 1e3
        ) as peers,
    ):
        prepare_memory(huge_pages=True)  # as a router replica does
        try:
            runner.run(_phases(routers, peers, rate, seconds, rounds, stall_share))
        finally:
            gc.unfreeze()
    return {"setup": setup, **_report(routers)}


async def _phases(
    routers: Sequence[Router],
    peers: Peers,
    rate: float,
    seconds: float,
    rounds: int,
    stall_share: float,
) -> None:
    for router in routers:
        await router.connect(peers)
    try:
        for seed in range(rounds):
            order = list(routers)
            random.Random(seed).shuffle(order)
            for router in order * 2:
                await router.run_sequentially(max(10, int(rate * seconds) // 4))
            for phase, share in (("well", 0.0), ("stalling", stall_share)):
                peers.stall(share)
                for router in order:
                    await router.run(phase, rate, seconds, seed)
            peers.stall(0.0)
    finally:
        for router in routers:
            await router.close()


def _report(routers: Sequence[Router]) -> dict[str, Any]:
    found: dict[str, Any] = {"routers": {}}
    for router in routers:
        phases = {
            phase: p50_p99(took_ms)
            | {
                "longest": max(took_ms),
                "second_requests_share": router.hedges.get(phase, 0.0) / router.frames[phase],
                "second_requests_first": router.won.get(phase, 0.0),
            }
            for phase, took_ms in router.latency_ms.items()
        }
        found["routers"][router.name] = phases | {
            "sequential_p50_ms": statistics.median(router.sequential_ms),
            "router_cpu_us": statistics.median(router.cpu_us),
            "hedge_delay_ms": router.delay_ms,
        }
    single, plain, hedging = routers
    well, stalling = (found["routers"][hedging.name][phase] for phase in ("well", "stalling"))
    undisturbed = found["routers"][plain.name]["well"]
    bound_ms = TIMES_UNDISTURBED * undisturbed["p99"] + hedging.delay_ms
    return found | {
        "p99_bound_ms": bound_ms,
        "p99_is_within": stalling["p99"] <= bound_ms,
        "work_is_within": max(each["second_requests_share"] for each in (well, stalling))
        <= MORE_WORK,
        "cost_of_hedging": _cost(hedging, plain),
        "cost_of_second_replica": _cost(plain, single),
    }


def _cost(router: Router, of: Router) -> dict[str, float]:
    """More time and CPU per sequential query, as shares: medians over blocks side by side."""
    pairs = (router.sequential_ms, of.sequential_ms), (router.cpu_us, of.cpu_us)
    time_share, cpu_share = (
        statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) - 1
        for ours, theirs in pairs
    )
    return {"time": time_share, "router_cpu": cpu_share}


@click.command()
@click.option("--shards", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--rate", type=click.FloatRange(min=1), default=100.0, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=20.0, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--search-ms", type=click.FloatRange(min=0), default=1.0, show_default=True)
@click.option("--stall-ms", type=click.FloatRange(min=0), default=200.0, show_default=True)
@click.option("--stall-share", type=click.FloatRange(0, 1), default=0.05, show_default=True)
def main(**options: Any) -> None:
    """One of two replicas stalls in some of its searches: p50 and p99 with and without hedging."""
    report = measure(**options)
    rows = []
    for name, figures in report["routers"].items():
        for phase in ("well", "stalling"):
            found = figures[phase]
            more = f"{found['second_requests_share']:.2%}"
            times = (f"{found[each]:.2f}" for each in ("p50", "p99", "longest"))
            rows.append((name, phase, *times, more))
    title = f"{options['shards']} shards, {options['rate']:g}/s, {report['setup']['cores']} cores"
    print_table(title, ("one query, ms", "", "p50", "p99", "longest", "second requests"), rows)
    costs = [
        (
            name,
            f"{figures['sequential_p50_ms']:.3f}",
            f"{figures['router_cpu_us']:.0f}",
            f"{figures['hedge_delay_ms']:.1f}" if figures["hedge_delay_ms"] else "-",
        )
        for name, figures in report["routers"].items()
    ]
    header = ("sequential, all well", "p50, ms", "router's CPU, us", "hedge delay, ms")
    print_table("what it costs", header, costs)
    click.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
