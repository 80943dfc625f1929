"""Router to shards and back without index time: what sharding itself costs a query.

Theory: one frame encoded, one write and one read per shard, the shard's own decoding and encoding,
and the merge of the replies. Shards are processes with the real server in front of a shard that
answers at once with prepared rows; the router's half is the real fan-out on the loop that a Serve
replica runs (uvloop). The floor is the same bytes through the same number of processes that echo
them: sockets and scheduling, nothing of ours.
"""

import asyncio
import gc
import json
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import click
import numpy as np
import uvloop

from shardline.bench.load.fanout_peers import ROWS, PreparedShard, echo_processes, shard_processes
from shardline.bench.load.stats import p50_p99
from shardline.cluster.console import print_table
from shardline.cluster.serving.ray_session import cores
from shardline.router.fanout.coalesce import LaneKey
from shardline.router.fanout.fanout import Fanout
from shardline.router.merge import merge_top_k
from shardline.router.router_config import RouterConfig
from shardline.shards.core.messages import RoutingTable, SearchRequest
from shardline.shards.core.partition import Partitioning
from shardline.shards.core.schema import FloatArray, Metric
from shardline.shards.process.memory import prepare_memory
from shardline.shards.wire.frames import encode_frame

WARM_UP = 200
TIMEOUT_S = 5.0


def measure(*, shards: int, dim: int, k: int, rate: float, count: int) -> dict[str, Any]:
    """Milliseconds, p50 and p99, of sequential queries and of ``rate`` per second."""
    query = np.random.default_rng(0).random((1, dim), dtype=np.float32)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        with shard_processes(shards, dim, k) as (routes, secret):
            table = RoutingTable(
                version=1,
                generation=1,
                generation_dir="none",
                model_version="none",
                dim=dim,
                metric=Metric.DOT,
                index="none",
                partitioning=Partitioning.RANGE,
                boundaries=tuple(range(1, shards)),
                shards=routes,
            )
            ours = runner.run(_fan_out(table, secret, query, k, rate, count))
        request = len(encode_frame(1, SearchRequest(queries=query, k=k, timeout_ms=1.0)))
        reply = len(encode_frame(1, PreparedShard(0, dim=dim, k=k, shards=shards).reply(1)))
        with echo_processes(shards, request, reply) as ports:
            floor = runner.run(_echo(ports, request, reply, rate, count))
    return {
        "setup": {"shards": shards, "dim": dim, "k": k, "rate": rate, "cores": cores()},
        "fan_out_ms": ours,
        "echo_ms": floor,
        "merge_ms": _merge_ms(shards, dim, k, count),
    }


async def _fan_out(
    table: RoutingTable, secret: bytes, query: FloatArray, k: int, rate: float, count: int
) -> dict[str, dict[str, float]]:
    fanout = Fanout(secret, RouterConfig(), random.Random(0))
    await fanout.apply(table, None)
    loop = asyncio.get_running_loop()

    async def once() -> None:
        with fanout.pin() as snapshot:
            key = LaneKey(snapshot=snapshot, k=k, min_coverage=0.0)
            found = await fanout.search(query, key, deadline=loop.time() + TIMEOUT_S)
        assert found.coverage.share == 1.0

    prepare_memory(huge_pages=True)  # as a router replica does
    try:
        return await _timed(once, rate, count)
    finally:
        gc.unfreeze()
        await fanout.close()


async def _echo(
    ports: Sequence[int], request: int, reply: int, rate: float, count: int
) -> dict[str, dict[str, float]]:
    links = [await asyncio.open_connection("127.0.0.1", port) for port in ports]
    frame = bytes(request)

    async def once() -> None:
        for _, writer in links:
            writer.write(frame)
        for reader, _ in links:
            await reader.readexactly(reply)

    try:
        return await _timed(once, rate, count)
    finally:
        for _, writer in links:
            writer.close()
            await writer.wait_closed()


async def _timed(
    once: Callable[[], Coroutine[Any, Any, None]], rate: float, count: int
) -> dict[str, dict[str, float]]:
    """Sequential, and ``rate`` per second, when every process wakes with cold caches."""
    for _ in range(WARM_UP):
        await once()
    figures = {}
    for name, pause_s in (("sequential", 0.0), ("spaced", 1 / rate)):
        took_ms = []
        for _ in range(count):
            if pause_s:
                await asyncio.sleep(pause_s)
            began = time.perf_counter()
            await once()
            took_ms.append((time.perf_counter() - began) * 1e3)
        figures[name] = p50_p99(took_ms)
    return figures


def _merge_ms(shards: int, dim: int, k: int, count: int) -> dict[str, float]:
    peers = [PreparedShard(s, dim=dim, k=k, shards=shards) for s in range(shards)]
    parts = [peer.reply(1).ranked for peer in peers]
    took_ms = []
    for _ in range(count):
        began = time.perf_counter()
        merge_top_k(parts, k)
        took_ms.append((time.perf_counter() - began) * 1e3)
    return p50_p99(took_ms)


@click.command()
@click.option("--shards", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--dim", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("-k", type=click.IntRange(min=1, max=ROWS), default=100, show_default=True)
@click.option("--rate", type=click.FloatRange(min=0.1), default=20.0, show_default=True)
@click.option("--count", type=click.IntRange(min=10), default=500, show_default=True)
def main(shards: int, dim: int, k: int, rate: float, count: int) -> None:
    """Router to shards and back without index time, beside an echo of the same bytes."""
    report = measure(shards=shards, dim=dim, k=k, rate=rate, count=count)
    rows = []
    for label, name in (("router, shards, merge", "fan_out_ms"), ("echo (floor)", "echo_ms")):
        for how, said in (("sequential", "sequential"), ("spaced", f"at {rate:g}/s")):
            figures = report[name][how]
            rows.append((label, said, f"{figures['p50']:.3f}", f"{figures['p99']:.3f}"))
    merge = report["merge_ms"]
    rows.append(("merge alone", "sequential", f"{merge['p50']:.3f}", f"{merge['p99']:.3f}"))
    title = f"{shards} shards, {dim}-d, k = {k}, {report['setup']['cores']} cores"
    print_table(title, ("one query, ms", "", "p50", "p99"), rows)
    click.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
