"""Searches that share a frame: who leaves with whom, when, and that each gets its own answer."""

import asyncio
import contextlib
import random

import numpy as np
import pytest

from shardline.router.fanout.coalesce import HOLD_MS, MAX_FRAME_ROWS, LaneKey
from shardline.router.fanout.fanout import Fanout
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import DeadlineExceeded, Unavailable
from shardline.shards.core.messages import ErrorReply, SearchParams
from tests.fake_shard import (
    SECRET,
    brute_force,
    make_rows,
    make_table,
    missing,
    running_shards,
    until,
)
from tests.manual_clock import ManualClock

DIM = 8


@contextlib.asynccontextmanager
async def cluster(num_shards=2, clock=None, **config):
    """(fanout, shards, ids, vectors) of 60 rows; on the event loop's clock unless one is given."""
    ids, vectors = make_rows(60, DIM)
    settings = RouterConfig(backoff_base_ms=1, backoff_max_ms=5).model_copy(update=config)
    async with running_shards(ids, vectors, num_shards) as shards:
        fanout = Fanout(SECRET, settings, random.Random(0), clock=clock)
        await fanout.apply(make_table(shards, DIM), None)
        yield fanout, shards, ids, vectors
        await fanout.close()
        await until(lambda: not any("connection" in t.get_name() for t in asyncio.all_tasks()))


async def search(fanout, queries, k=5, *, timeout=5.0, min_coverage=0.0, params=None):
    deadline = fanout.clock.time() + timeout
    with fanout.pin() as snapshot:
        key = LaneKey(
            snapshot=snapshot, k=k, min_coverage=min_coverage, params=params or SearchParams()
        )
        return await fanout.search(queries, key, deadline=deadline)


def only_late(fanout, shard):
    """Of each shard, whether it owes answers exactly if it is the one that does not answer."""
    for number, (connection,) in enumerate(fanout.snapshot.shards):
        yield (connection.in_flight > 0) == (number == shard)


def rows_asked(shard):
    return [len(request.queries) for request in shard.requests]


@contextlib.asynccontextmanager
async def held_lane():
    """``cluster``, and a search whose frame is under way and stays there until it is answered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardline.router.fanout.coalesce.HOLD_MS", 60_000.0)
        async with cluster() as (fanout, shards, ids, vectors):
            for shard in shards:
                shard.gate.clear()
            first = asyncio.create_task(search(fanout, vectors[:1]))
            await until(lambda: all(shard.requests for shard in shards))
            yield fanout, shards, ids, vectors, first


def answer_all(shards):
    for shard in shards:
        shard.gate.set()


async def test_what_arrives_while_a_frame_is_under_way_leaves_together_and_each_gets_its_own():
    async with held_lane() as (fanout, shards, ids, vectors, first):
        sizes = [1, 3, 1, 2]
        starts = np.cumsum([1, *sizes])
        others = [
            asyncio.create_task(search(fanout, vectors[start : start + size]))
            for start, size in zip(starts, sizes, strict=False)
        ]
        await asyncio.sleep(0)
        answer_all(shards)
        for answer, start, size in zip(
            await asyncio.gather(first, *others), [0, *starts], [1, *sizes], strict=False
        ):
            expected = brute_force(vectors[start : start + size], ids, vectors, 5)
            np.testing.assert_array_equal(answer.ranked.ids, expected[0])
            np.testing.assert_array_equal(answer.ranked.scores, expected[1])
            assert answer.coverage.share == 1.0
        assert [rows_asked(shard) for shard in shards] == [[1, 7], [1, 7]]
        assert fanout._coalescer._lanes == {}


async def test_an_idle_lane_asks_at_once_and_other_terms_do_not_wait():
    async with held_lane() as (fanout, shards, _, vectors, first):
        others = [
            asyncio.create_task(search(fanout, vectors[:1], k=6)),
            asyncio.create_task(search(fanout, vectors[:1], params=SearchParams(nprobe=2))),
            asyncio.create_task(search(fanout, vectors[:1], min_coverage=0.5)),
        ]
        await until(lambda: len(shards[0].requests) == 4)
        answer_all(shards)
        await asyncio.gather(first, *others)
        assert rows_asked(shards[0]) == [1, 1, 1, 1]


async def test_a_shard_that_hangs_holds_up_nobody_for_longer_than_the_hold():
    clock = ManualClock()
    async with cluster(clock=clock) as (fanout, shards, ids, vectors):
        shards[1].gate.clear()
        first = asyncio.create_task(search(fanout, vectors[:1], timeout=0.3))
        await until(lambda: shards[1].requests)
        second = asyncio.create_task(search(fanout, vectors[1:2], timeout=0.3))
        await clock.advance(0.9 * HOLD_MS / 1000)
        assert [rows_asked(shard) for shard in shards] == [[1], [1]]
        await clock.advance(0.2 * HOLD_MS / 1000)
        await until(lambda: len(shards[0].requests) == 2)
        await until(lambda: all(only_late(fanout, 1)))
        await clock.advance(0.3)
        for answer, query in zip(await asyncio.gather(first, second), vectors, strict=False):
            assert missing(answer) == ["shard 1: deadline exceeded"]
            half = brute_force(query[None], ids[:30], vectors[:30], 5)
            np.testing.assert_array_equal(answer.ranked.ids, half[0])


async def test_a_frame_is_bounded_and_what_does_not_fit_travels_alone():
    async with held_lane() as (fanout, shards, ids, vectors, first):
        big = np.tile(vectors, (MAX_FRAME_ROWS // len(vectors) + 1, 1))
        assert len(big) > MAX_FRAME_ROWS
        work = [vectors[:1], big, vectors[:2], vectors[:3]]
        others = [asyncio.create_task(search(fanout, queries)) for queries in work]
        await asyncio.sleep(0)
        answer_all(shards)
        answers = await asyncio.gather(first, *others)
        assert rows_asked(shards[0]) == [1, 1, len(big), 5]
        expected = brute_force(big, ids, vectors, 5)
        np.testing.assert_array_equal(answers[2].ranked.ids, expected.ids)


async def test_a_deadline_that_ends_behind_a_frame_is_said_and_a_caller_that_left_is_forgotten():
    async with held_lane() as (fanout, shards, _, vectors, first):
        gone = asyncio.create_task(search(fanout, vectors[:1]))
        with pytest.raises(DeadlineExceeded, match="before the shards were asked"):
            await search(fanout, vectors[:1], timeout=0.02)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        answer_all(shards)
        await first
        assert rows_asked(shards[0]) == [1]
        assert fanout._coalescer._lanes == {}


async def test_a_member_keeps_its_own_deadline_in_a_shared_frame():
    async with held_lane() as (fanout, shards, _, vectors, first):
        patient = asyncio.create_task(search(fanout, vectors[:1], timeout=5.0))
        hasty = asyncio.create_task(search(fanout, vectors[1:2], timeout=0.2))
        await asyncio.sleep(0)
        answer = shards[1]._answer

        async def answer_all_but_pairs(writer, request_id, message):
            if len(message.queries) != 2:
                await answer(writer, request_id, message)

        shards[1]._answer = answer_all_but_pairs
        answer_all(shards)
        assert (await first).coverage.share == 1.0
        assert missing(await asyncio.wait_for(hasty, 2)) == ["shard 1: deadline exceeded"]
        assert not patient.done()
        await shards[1].kill()
        assert missing(await patient) == ["shard 1: connection lost"]
        assert rows_asked(shards[0]) == [1, 2]


async def test_enough_coverage_shortens_the_wait_for_the_rest():
    clock = ManualClock()
    patient = {"late_after_ms": 1e6, "stall_timeout_ms": 1e6}
    async with cluster(num_shards=4, clock=clock, **patient) as (fanout, shards, _, vectors):
        shards[3].gate.clear()
        for asked, (min_coverage, cut) in enumerate([(0.75, True), (0.8, False), (0.0, False)], 1):
            running = asyncio.create_task(
                search(fanout, vectors[:1], timeout=10.0, min_coverage=min_coverage)
            )
            await until(lambda asked=asked: len(shards[3].requests) == asked)
            await until(lambda: all(only_late(fanout, 3)))
            await clock.advance(1.9)
            assert not running.done()
            await clock.advance(0.2)  # a fifth of the time has passed
            assert running.done() == cut
            await clock.advance(8.0)
            if min_coverage == 0.8:
                with pytest.raises(Unavailable, match="too few rows"):
                    await running
            else:
                assert (await running).coverage.share == 0.75


async def test_queries_go_without_a_shard_that_has_been_silent_until_it_speaks_again():
    clock = ManualClock()
    config = {"late_after_ms": 50.0, "stall_timeout_ms": 60_000.0}
    async with cluster(clock=clock, **config) as (fanout, shards, _, vectors):
        shards[1].gate.clear()
        first = asyncio.create_task(search(fanout, vectors[:1], timeout=0.1))
        await until(lambda: shards[1].requests)
        await clock.advance(0.2)
        assert missing(await first) == ["shard 1: deadline exceeded"]
        answer = await asyncio.wait_for(search(fanout, vectors[:1], timeout=30.0), 5)
        assert missing(answer) == ["shard 1: silent, though it owes answers"]
        assert rows_asked(shards[1]) == [1]  # nothing piles up behind it
        shards[1].gate.set()

        async def whole():
            return (await search(fanout, vectors[:1])).coverage.share == 1.0

        async with asyncio.timeout(5):
            while not await whole():
                await asyncio.sleep(0.002)


async def test_refusals_do_not_count_as_coverage():
    async with cluster(num_shards=4) as (fanout, shards, _, vectors):
        shards[0].error = ErrorReply(code="overloaded", message="")
        shards[3].gate.clear()
        running = asyncio.create_task(search(fanout, vectors[:1], timeout=5.0, min_coverage=0.75))
        await until(lambda: shards[3].requests)
        await until(lambda: all(only_late(fanout, 3)))
        assert not running.done()
        shards[3].gate.set()
        assert missing(await running) == ["shard 0: overloaded"]


async def test_many_frames_that_no_shard_takes_end_one_after_the_other():
    async with held_lane() as (fanout, shards, _, vectors, first):
        big = np.tile(vectors, (3, 1))  # two of them do not fit one frame
        others = [asyncio.create_task(search(fanout, big)) for _ in range(400)]
        await asyncio.sleep(0)
        for shard in shards:
            await shard.kill()
        for outcome in await asyncio.gather(first, *others, return_exceptions=True):
            assert isinstance(outcome, Unavailable)
        assert fanout._coalescer._lanes == {}


async def test_what_does_not_fit_the_first_frame_leaves_without_its_answer_too():
    async with cluster() as (fanout, shards, _, vectors):
        shards[0].gate.clear()  # every frame waits for this one
        many = np.tile(vectors[:20], (10, 1))
        searches = [asyncio.create_task(search(fanout, many, timeout=5.0)) for _ in range(4)]
        await until(lambda: len(shards[1].requests) == 4)
        assert not any(each.done() for each in searches)
        shards[0].gate.set()
        for each in searches:
            assert (await each).coverage.share == 1.0
