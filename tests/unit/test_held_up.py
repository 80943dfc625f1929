"""A router whose own process stood still: nobody is judged by time in which it saw nothing."""

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from shardline.router.fanout.clock import LONGEST_GRACE_S, LONGEST_TICK_S, TICK_S, Attention
from shardline.router.fanout.coalesce import LaneKey
from shardline.router.fanout.fanout import Fanout
from shardline.router.query import Merged
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import Unavailable
from shardline.shards.core.messages import ShardRoute
from tests.fake_shard import SECRET, FakeShard, make_rows, make_table, running_shards, until
from tests.manual_clock import ManualClock

DIM = 8
CONFIG = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, connect_timeout_ms=500)
LATE_S = CONFIG.late_after_ms / 1000
SILENT_S = CONFIG.stall_timeout_ms / 1000
IDS, VECTORS = make_rows(60, DIM)


async def search(fanout: Fanout, timeout_s: float) -> Merged:
    deadline = fanout.clock.time() + timeout_s
    with fanout.pin() as snapshot:
        key = LaneKey(snapshot=snapshot, k=5, min_coverage=0.0)
        return await fanout.search(VECTORS[:1], key, deadline=deadline)


async def searched(fanout: Fanout, clock: ManualClock, timeout_s: float) -> Merged:
    """As ``search``, where a frame under way holds the lane."""
    task = asyncio.create_task(search(fanout, timeout_s))
    await asyncio.sleep(0)
    await clock.advance(0.01)
    return await asyncio.wait_for(task, 5)


def owed(fanout: Fanout) -> list[int]:
    """Of each shard, the answers that are awaited."""
    assert fanout.snapshot is not None
    return [connection.in_flight for connection in fanout.snapshot.all_connections]


async def run_for(clock: ManualClock, seconds: float) -> None:
    """As ``advance``, on a loop that is never held up."""
    for _ in range(round(seconds / TICK_S)):
        await clock.advance(TICK_S)


@contextlib.asynccontextmanager
async def cluster(clock: ManualClock):
    async with running_shards(IDS, VECTORS, 3) as shards:
        fanout = Fanout(SECRET, CONFIG, random.Random(0), clock=clock)
        await fanout.apply(make_table(shards, DIM), None)
        yield fanout, shards
        await fanout.close()


async def test_attention_counts_what_the_loop_has_seen() -> None:
    clock = ManualClock()
    attention = Attention(clock)
    began = attention.time()
    await clock.advance(10.0)
    assert attention.time() - began == pytest.approx(10.0)
    clock.hold_up(3600.0)
    held = attention.time() - began
    assert 10.0 < held <= 10.0 + LONGEST_TICK_S
    await clock.advance(0.0)
    assert attention.time() - began == pytest.approx(held)
    await clock.advance(1.0)
    assert attention.time() - began == pytest.approx(held + 1.0)
    attention.stop()


@pytest.mark.parametrize("pause_s", [2 * LATE_S, 2 * SILENT_S, 3600.0])
async def test_shards_are_not_silent_because_the_router_stood_still(pause_s: float) -> None:
    """The first search is under way when the process stops; the second is read before the sockets
    of the shards are, as chance has it."""
    clock = ManualClock()
    async with cluster(clock) as (fanout, shards):
        for shard in shards:
            shard.gate.clear()
        first = asyncio.create_task(search(fanout, 2 * pause_s))
        await until(lambda: all(shard.requests for shard in shards))
        clock.hold_up(pause_s)
        second = asyncio.create_task(search(fanout, 1.0))
        await asyncio.sleep(0)
        await clock.advance(0.0)
        for shard in shards:
            shard.gate.set()
        for answer in (await first, await second):
            assert answer.coverage.share == 1.0
        assert fanout.snapshot is not None
        assert fanout.snapshot.connected_shards == 3


async def test_shards_that_stay_silent_are_found_out_after_a_pause_too() -> None:
    clock = ManualClock()
    async with cluster(clock) as (fanout, shards):
        for shard in shards:
            shard.gate.clear()
        first = asyncio.create_task(search(fanout, 1000.0))
        await until(lambda: all(shard.requests for shard in shards))
        clock.hold_up(100.0)
        await run_for(clock, LATE_S + TICK_S)
        with pytest.raises(Unavailable, match="silent, though it owes answers"):
            await searched(fanout, clock, 1.0)
        await run_for(clock, SILENT_S)
        with pytest.raises(Unavailable, match="gone silent"):
            await searched(fanout, clock, 1.0)
        with pytest.raises(Unavailable, match="gone silent"):
            await asyncio.wait_for(first, 5)


async def test_answers_that_came_while_the_loop_was_held_up_count() -> None:
    """One shard died, the others answered in time: 503 for all of them would be a lie."""
    clock = ManualClock()
    async with cluster(clock) as (fanout, shards):
        for shard in shards:
            shard.gate.clear()
        running = asyncio.create_task(search(fanout, 0.5))
        await until(lambda: all(shard.requests for shard in shards))
        await shards[1].kill()
        for shard in (shards[0], shards[2]):
            shard.gate.set()
        clock.hold_up(1.0)
        await clock.advance(0.0)  # the deadline comes before the sockets are read
        answer = await running
        assert (answer.coverage.shards_answered, answer.coverage.rows_answered) == (2, 40)


@pytest.mark.parametrize("held_up_s", [0.02, 0.1, 5.0])
async def test_shards_that_were_held_up_too_get_time_to_answer(held_up_s: float) -> None:
    """They were asked, and then nobody had a core for so long: as much is given again, bounded."""
    clock = ManualClock()
    async with cluster(clock) as (fanout, shards):
        for shard in shards:
            shard.gate.clear()
        running = asyncio.create_task(search(fanout, 0.5))
        await until(lambda: all(shard.requests for shard in shards))
        clock.hold_up(0.5 + held_up_s)
        grace_s = min(held_up_s, LONGEST_GRACE_S)
        await clock.advance(0.9 * grace_s)
        assert not running.done()
        for shard in (shards[0], shards[2]):
            shard.gate.set()
        await until(lambda: owed(fanout) == [0, 1, 0])
        assert not running.done()
        await clock.advance(0.2 * grace_s)
        answer = await running
        assert (answer.coverage.shards_answered, answer.coverage.rows_answered) == (2, 40)


async def test_a_deadline_in_time_waits_for_nobody() -> None:
    clock = ManualClock()
    async with cluster(clock) as (fanout, shards):
        for shard in shards:
            shard.gate.clear()
        running = asyncio.create_task(search(fanout, 0.5))
        await until(lambda: all(shard.requests for shard in shards))
        await clock.advance(0.5)
        with pytest.raises(Unavailable, match="no shard answered"):
            await running


@contextlib.contextmanager
def shard_elsewhere() -> Iterator[FakeShard]:
    """A shard in the loop of another thread, which goes on while this one stands still."""
    shard = FakeShard(ids=IDS, vectors=VECTORS)
    ready, done = threading.Event(), threading.Event()

    async def serve() -> None:
        await shard.start()
        ready.set()
        await asyncio.to_thread(done.wait)
        await shard.kill()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    ready.wait()
    try:
        yield shard
    finally:
        done.set()
        thread.join()


def uvloops() -> Callable[[], asyncio.AbstractEventLoop]:
    """The loop of a Serve replica, which runs its timers before it reads its sockets."""
    return pytest.importorskip("uvloop").new_event_loop


@pytest.mark.parametrize("new_loop", [lambda: asyncio.new_event_loop, uvloops])
def test_a_real_loop_reads_its_sockets_before_it_gives_up(
    new_loop: Callable[[], Callable[[], asyncio.AbstractEventLoop]],
) -> None:
    async def run(shard: FakeShard) -> None:
        fanout = Fanout(SECRET, CONFIG, random.Random(0))
        route: ShardRoute = shard.shard_route
        await fanout.apply(make_table([route], DIM), None)
        running = asyncio.create_task(search(fanout, 0.05))
        await until(lambda: shard.asked.is_set())
        time.sleep(0.1)  # the reply is in the socket by now, the deadline has passed
        answer = await running
        np.testing.assert_array_equal(answer.ranked.ids.shape, (1, 5))
        assert answer.coverage.share == 1.0
        await fanout.close()

    with shard_elsewhere() as shard, asyncio.Runner(loop_factory=new_loop()) as runner:
        shard.gate.set()
        runner.run(run(shard))
