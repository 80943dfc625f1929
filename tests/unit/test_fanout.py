"""Fan-out over fake shards on real sockets: parity, deadlines, faults, and switches of tables."""

import asyncio
import contextlib
import random

import numpy as np
import pytest

from shardline.router.fanout import fanout as fanout_module
from shardline.router.fanout.coalesce import MERGE_IN_LOOP, LaneKey
from shardline.router.fanout.fanout import Fanout
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import DeadlineExceeded, InvalidInput, Overloaded, Unavailable
from shardline.shards.core.messages import ErrorReply, SearchParams, SearchRequest
from shardline.shards.wire.frames import HEADER
from tests.fake_shard import (
    SECRET,
    FakeShard,
    brute_force,
    make_rows,
    make_table,
    missing,
    moved,
    running_shards,
    until,
)
from tests.manual_clock import ManualClock

DIM = 8
FAST = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, connect_timeout_ms=500)


@contextlib.asynccontextmanager
async def cluster(num_rows=60, num_shards=4, config=FAST, clock=None, **options):
    """(fanout, shards, ids, vectors) with the table applied; no task is left behind."""
    ids, vectors = make_rows(num_rows, DIM)
    async with running_shards(ids, vectors, num_shards, **options) as shards:
        fanout = Fanout(SECRET, config, random.Random(0), clock=clock)
        assert await fanout.apply(make_table(shards, DIM), None)
        yield fanout, shards, ids, vectors
        await fanout.close()
        await until(lambda: not any("connection" in t.get_name() for t in asyncio.all_tasks()))


async def search(fanout, queries, k=5, *, timeout=2.0, **options):
    deadline = fanout.clock.time() + timeout
    with fanout.pin() as snapshot:
        key = LaneKey(snapshot=snapshot, k=k, **{"min_coverage": 0.0, **options})
        return await fanout.search(queries, key, deadline=deadline)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("k", [1, 5, 100])
async def test_sharding_changes_nothing(num_shards, k):
    async with cluster(num_shards=num_shards) as (fanout, _, ids, vectors):
        answer = await search(fanout, vectors[:6], k)
        expected_ids, expected_scores = brute_force(vectors[:6], ids, vectors, k)
        np.testing.assert_array_equal(answer.ranked.scores, expected_scores)
        np.testing.assert_array_equal(answer.ranked.ids, expected_ids)
        assert answer.search_ms == 0.25
        assert answer.coverage.share == 1.0
        assert answer.coverage.rows_answered == answer.coverage.rows_asked == 60
        assert answer.coverage.shards_answered == answer.coverage.shards_asked == num_shards
        assert missing(answer) == []


def test_on_the_event_loop_of_a_serve_replica():
    uvloop = pytest.importorskip("uvloop")

    async def run():
        async with cluster() as (fanout, shards, ids, vectors):
            answer = await search(fanout, vectors[:2], 60)
            np.testing.assert_array_equal(
                answer.ranked.ids, brute_force(vectors[:2], ids, vectors, 60)[0]
            )
            await shards[0].kill()
            await until(lambda: fanout.snapshot.connectivity()["shards_connected"] == 3)
            assert (await search(fanout, vectors[:1])).coverage.shards_answered == 3

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def test_a_merge_too_large_for_the_loop_is_the_same_in_a_thread():
    async with cluster() as (fanout, _, ids, vectors):
        k = 1100
        queries = np.tile(vectors[:10], (5, 1))
        assert 4 * len(queries) * k > MERGE_IN_LOOP
        answer = await search(fanout, queries, k)
        expected_ids, _ = brute_force(queries, ids, vectors, k)
        np.testing.assert_array_equal(answer.ranked.ids, expected_ids)


async def test_shards_get_the_parameters_and_the_remaining_time():
    async with cluster(num_shards=2) as (fanout, shards, _, vectors):
        params = SearchParams(nprobe=7)
        await search(fanout, vectors[:1], 3, timeout=0.5, params=params)
        for shard in shards:
            (request,) = shard.requests
            assert isinstance(request, SearchRequest)
            assert request.params == params
            assert request.k == 3
            assert 400 < request.timeout_ms <= 500


async def test_a_shard_beyond_the_deadline_is_left_out_and_named():
    clock = ManualClock()
    async with cluster(clock=clock) as (fanout, shards, ids, vectors):
        shards[2].gate.clear()
        running = asyncio.create_task(search(fanout, vectors[:2], 60, timeout=0.1))
        await until(lambda: [c.in_flight for c in fanout.snapshot.all_connections] == [0, 0, 1, 0])
        await clock.advance(0.09)
        assert not running.done()
        await clock.advance(0.02)
        answer = await running
        assert missing(answer) == ["shard 2: deadline exceeded"]
        assert (answer.coverage.shards_answered, answer.coverage.rows_answered) == (3, 45)
        assert answer.coverage.share == 0.75
        kept = ~np.isin(ids, shards[2].ids)
        expected, _ = brute_force(vectors[:2], ids[kept], vectors[kept], 60)
        np.testing.assert_array_equal(answer.ranked.ids, expected)
        # the late answers come now, and belong to nobody
        shards[2].gate.set()
        assert (await search(fanout, vectors[:1])).coverage.share == 1.0


async def test_a_killed_shard_is_missed_at_once_and_full_answers_come_back():
    async with cluster() as (fanout, shards, ids, vectors):
        for shard in shards:
            shard.asked.clear()
        shards[1].gate.clear()
        running = asyncio.create_task(search(fanout, vectors[:1], timeout=30.0))
        await asyncio.gather(*(shard.asked.wait() for shard in shards))
        await shards[1].kill()
        answer = await asyncio.wait_for(running, 2)
        assert missing(answer) == ["shard 1: connection lost"]
        answer = await asyncio.wait_for(search(fanout, vectors[:1], timeout=30.0), 2)
        assert answer.coverage.shards_answered == 3

        # Ray restarts it: another port, a higher epoch, a newer table
        again = FakeShard(ids=shards[1].ids, vectors=shards[1].vectors, shard=1, epoch=2)
        await again.start()
        routes = [shards[0], again, shards[2], shards[3]]
        assert await fanout.apply(make_table(routes, DIM, version=2), None)
        answer = await search(fanout, vectors[:1], 60)
        assert answer.coverage.share == 1.0
        expected, _ = brute_force(vectors[:1], ids, vectors, 60)
        np.testing.assert_array_equal(answer.ranked.ids, expected)
        assert [shard.connections for shard in shards] == [1, 0, 1, 1]
        await again.kill()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"garbage": HEADER.pack(2, 1) + b"\xc1\xc1"}, "shard 3: broke the protocol (bad frame)"),
        ({"short": True}, "shard 3: broke the protocol (wrong reply)"),
        ({"answers_as": 2}, "shard 3: broke the protocol (wrong reply)"),
        ({"error": ErrorReply(code="overloaded", message="")}, "shard 3: overloaded"),
        ({"error": ErrorReply(code="deadline_exceeded", message="")}, "shard 3: deadline exceeded"),
        (
            {"error": ErrorReply(code="corrupt_file", message="/a/path")},
            "shard 3: failed (corrupt_file)",
        ),
    ],
)
async def test_a_shard_that_answers_nonsense_or_fails_is_left_out(fault, reason):
    async with cluster() as (fanout, shards, _, vectors):
        for name, value in fault.items():
            setattr(shards[3], name, value)
        answer = await search(fanout, vectors[:1])
        assert missing(answer) == [reason]
        for name in fault:
            setattr(shards[3], name, None)
        await until(lambda: shards[3].connections == 1)
        await until(lambda: fanout.snapshot.connectivity()["rows_connected"] == 60)
        assert (await search(fanout, vectors[:1])).coverage.share == 1.0


async def test_a_shard_that_blames_the_caller_is_the_callers_error():
    async with cluster() as (fanout, shards, _, vectors):
        shards[0].error = ErrorReply(
            code="invalid_input", message="only for ivf", field="params.nprobe"
        )
        with pytest.raises(InvalidInput, match="only for ivf") as caught:
            await search(fanout, vectors[:1])
        assert caught.value.field == "params.nprobe"


async def test_a_shard_with_another_secret_never_answers():
    async with cluster() as (fanout, shards, _, vectors):
        spy = FakeShard(ids=shards[0].ids, vectors=shards[0].vectors, secret=b"other", epoch=2)
        await spy.start()
        await fanout.apply(make_table([spy, *shards[1:]], DIM, version=2), None)
        answer = await search(fanout, vectors[:1])
        assert missing(answer) == ["shard 0: connection lost during the handshake"]
        assert spy.requests == []
        await spy.kill()


async def test_a_shard_without_a_process_is_part_of_what_was_asked():
    async with cluster(num_shards=2) as (fanout, shards, _, vectors):
        routes = [shards[0], moved(shards[1], address=None)]
        await fanout.apply(make_table(routes, DIM, version=2), None)
        answer = await search(fanout, vectors[:1])
        assert missing(answer) == ["shard 1: no process serves it"]
        assert (answer.coverage.rows_asked, answer.coverage.rows_answered) == (60, 30)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("gate", DeadlineExceeded),
        ("kill", Unavailable),
        ("overload", Overloaded),
        ("mixed", Unavailable),
    ],
)
async def test_no_answer_at_all_says_why(fault, expected):
    async with cluster(num_shards=2) as (fanout, shards, _, vectors):
        for number, shard in enumerate(shards):
            if fault == "gate" or (fault == "mixed" and number):
                shard.gate.clear()
            elif fault == "overload":
                shard.error = ErrorReply(code="overloaded", message="")
            else:
                await shard.kill()
        with pytest.raises(Unavailable) as caught:
            await search(fanout, vectors[:1], timeout=0.05)
        assert type(caught.value) is expected
        assert caught.value.got == "0 of 60 rows"
        assert "shard 0: " in caught.value.hint
        assert "shard 1: " in caught.value.hint


@pytest.mark.parametrize(("min_coverage", "answers"), [(0.0, True), (0.75, True), (0.76, False)])
async def test_less_coverage_than_asked_for_is_no_answer(min_coverage, answers):
    async with cluster() as (fanout, shards, _, vectors):
        await shards[0].kill()
        work = search(fanout, vectors[:1], min_coverage=min_coverage)
        if answers:
            assert (await work).coverage.share == 0.75
            return
        with pytest.raises(Unavailable, match="too few rows") as caught:
            await work
        assert caught.value.expected == "coverage >= 0.76"
        assert caught.value.got == "45 of 60 rows"


async def test_a_deadline_that_has_passed_asks_nobody():
    async with cluster(num_shards=1) as (fanout, shards, _, vectors):
        with pytest.raises(DeadlineExceeded):
            await search(fanout, vectors[:1], timeout=-0.001)
        assert shards[0].requests == []


async def test_a_cancelled_query_leaves_nothing_in_flight():
    async with cluster(num_shards=2) as (fanout, shards, _, vectors):
        for shard in shards:
            shard.gate.clear()
        running = asyncio.create_task(search(fanout, vectors[:1], timeout=30.0))
        await asyncio.gather(*(shard.asked.wait() for shard in shards))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert fanout.snapshot.running == 0
        assert [c.link.in_flight for c in fanout.snapshot.all_connections] == [0, 0]


async def test_only_a_higher_version_is_applied_and_unchanged_connections_are_kept():
    async with cluster() as (fanout, shards, _, _):
        before = fanout.snapshot.shards
        assert not await fanout.apply(make_table(shards, DIM, version=1, index="other"), None)
        assert fanout.snapshot.table.index == "flat"
        assert await fanout.apply(make_table(shards, DIM, version=5, index="other"), None)
        assert fanout.snapshot.table.index == "other"
        assert fanout.snapshot.shards == before
        assert not await fanout.apply(make_table(shards, DIM, version=4), None)
        assert [shard.connections for shard in shards] == [1, 1, 1, 1]


@pytest.mark.parametrize("learns", [True, False])
async def test_a_switch_waits_for_shards_that_have_yet_to_learn_their_epoch(learns):
    """As after a restart of the controller; one that never learns delays it by switch_wait_ms."""

    config = FAST.model_copy(update={"switch_wait_ms": 5000.0 if learns else 60.0})
    async with cluster(num_shards=2, config=config) as (fanout, shards, _, vectors):
        routes = [moved(shard, epoch=2) for shard in shards]
        switch = asyncio.create_task(fanout.apply(make_table(routes, DIM, version=2), None))
        # beside the two connections of the old table, two new ones keep trying
        await until(lambda: min(shard.greeted for shard in shards) >= 3)
        if learns:
            assert not switch.done()
            for shard in shards:
                shard.epoch = 2
        assert await switch
        answer = await search(fanout, vectors[:1]) if learns else None
        connected = fanout.snapshot.connectivity()["shards_connected"]
        assert connected == (2 if learns else 0)
        assert answer is None or answer.coverage.share == 1.0


async def test_a_switch_that_is_cancelled_leaves_no_task_and_no_connection():
    async with cluster(num_shards=2) as (fanout, shards, _, vectors):
        routes = [moved(shard, epoch=2) for shard in shards]  # which they never learn
        before = asyncio.all_tasks()
        switch = asyncio.create_task(fanout.apply(make_table(routes, DIM, version=2), None))
        await until(lambda: min(shard.greeted for shard in shards) >= 3)
        switch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await switch
        # those of FakeShard come and go with the connections
        ours = {"settled", "_keep_connected", "close"}
        await until(
            lambda: not {t.get_coro().__name__ for t in asyncio.all_tasks() - before} & ours
        )
        assert fanout.snapshot.table.version == 1
        assert (await search(fanout, vectors[:1])).coverage.share == 1.0


async def test_another_generation_is_served_once_its_shards_can_be_asked():
    """A first attempt to connect that fails, as on a busy machine, costs no search its answer."""
    ids, vectors = make_rows(60, DIM)
    async with (
        running_shards(ids + 1000, vectors, 3, generation=2) as new,
        cluster(num_shards=2) as (fanout, _, _, _),
    ):
        port = new[1].port
        await new[1].kill()
        table = make_table(new, DIM, version=2, generation=2)
        switch = asyncio.create_task(fanout.apply(table, None))
        await until(lambda: [new[0].connections, new[2].connections] == [1, 1])
        await asyncio.sleep(0.1)  # many attempts at the third, which are refused
        assert not switch.done()
        answer = await search(fanout, vectors[:1], 60)
        assert answer.coverage.share == 1.0
        assert set(answer.ranked.ids[0]) == set(ids)

        await new[1].start(port)
        assert await switch
        answer = await search(fanout, vectors[:1], 60)
        assert answer.coverage.share == 1.0
        assert set(answer.ranked.ids[0]) == set(ids + 1000)


@pytest.mark.parametrize("is_worse", [True, False])
async def test_another_generation_is_not_waited_for_in_vain(monkeypatch, is_worse):
    """Its missing shard costs it a third of the rows: less than the one before has lost, or more.
    Then it is waited for no longer than GENERATION_WAIT_S."""
    monkeypatch.setattr(fanout_module, "GENERATION_WAIT_S", 0.2 if is_worse else 60.0)
    ids, vectors = make_rows(60, DIM)
    async with (
        running_shards(ids + 1000, vectors, 3, generation=2) as new,
        cluster(num_shards=2) as (fanout, old, _, _),
    ):
        await new[1].kill()
        if not is_worse:
            await old[0].kill()
            await until(lambda: fanout.snapshot.connected_shards == 1)
        began = asyncio.get_running_loop().time()
        assert await fanout.apply(make_table(new, DIM, version=2, generation=2), None)
        took_s = asyncio.get_running_loop().time() - began
        assert took_s >= 0.2 if is_worse else took_s < 10
        assert fanout.snapshot.connected_shards == 2


async def test_a_running_query_ends_on_the_table_it_began_with():
    ids, vectors = make_rows(60, DIM)
    async with (
        running_shards(ids + 1000, vectors, 3, generation=2) as new,
        cluster(num_shards=2) as (fanout, old, _, _),
    ):
        old[1].gate.clear()
        running = asyncio.create_task(search(fanout, vectors[:1], 60, timeout=30.0))
        await old[1].asked.wait()
        table = make_table(new, DIM, version=2, generation=2, model_version="m2")
        assert await fanout.apply(table, None)

        answer = await search(fanout, vectors[:1], 60)
        assert set(answer.ranked.ids[0]) == set(ids + 1000)
        assert answer.coverage.share == 1.0
        assert [shard.connections for shard in old] == [1, 1]

        old[1].gate.set()
        answer = await running
        assert set(answer.ranked.ids[0]) == set(ids)
        await until(lambda: [shard.connections for shard in old] == [0, 0])
        assert [shard.connections for shard in new] == [1, 1, 1]


async def test_queries_during_many_switches_are_complete_and_never_mix_generations():
    ids, vectors = make_rows(60, DIM)
    async with (
        running_shards(ids + 1000, vectors, 3, generation=2) as two,
        cluster(num_shards=2) as (fanout, one, _, _),
    ):
        answers = []
        stop = asyncio.Event()

        async def keep_asking():
            while not stop.is_set():
                answers.append(await search(fanout, vectors[:1], 60))

        askers = [asyncio.create_task(keep_asking()) for _ in range(3)]
        for version in range(2, 22):
            shards, generation = (two, 2) if version % 2 == 0 else (one, 1)
            table = make_table(shards, DIM, version=version, generation=generation)
            assert await fanout.apply(table, None)
            await asyncio.sleep(0)
        stop.set()
        await asyncio.gather(*askers)
    assert {answer.coverage.share for answer in answers} == {1.0}
    found = {frozenset(answer.ranked.ids[0].tolist()) for answer in answers}
    assert found == {frozenset(ids.tolist()), frozenset((ids + 1000).tolist())}


async def test_fetch_finds_items_wherever_they_are():
    async with cluster() as (fanout, _, _, vectors):
        deadline = asyncio.get_running_loop().time() + 1
        with fanout.pin() as snapshot:
            found = await fanout.fetch(snapshot, np.array([59, 0, 999, 16]), deadline=deadline)
        order = np.argsort(found.item_ids)
        assert found.item_ids[order].tolist() == [0, 16, 59]
        assert found.shards[order].tolist() == [0, 1, 3]
        np.testing.assert_array_equal(found.vectors[order], vectors[[0, 16, 59]])
        assert found.coverage.shards_answered == 4


def test_before_any_table_nothing_can_be_asked():
    fanout = Fanout(SECRET, FAST, random.Random(0))
    with pytest.raises(Unavailable, match="no routing table yet"), fanout.pin():
        pass
