"""Shards with several replicas: whoever fails, answers are whole while one replica is well."""

import asyncio
import contextlib
import random
from dataclasses import replace

import numpy as np
import pytest

from shardline.router.fanout.attempts import LOOK_S
from shardline.router.fanout.choice import SLOW_START_S
from shardline.router.fanout.coalesce import LaneKey
from shardline.router.fanout.fanout import Fanout
from shardline.router.fanout.hedging import HEADROOM, REFRESH
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import InvalidInput, Unavailable
from shardline.shards.core.messages import (
    NO_OPTIONS,
    ErrorReply,
    SearchOptions,
    SearchRequest,
)
from shardline.shards.core.metrics import HEDGES, HEDGES_WON, RESENT, Recorder
from shardline.shards.wire.frames import HEADER, KEEP_ALIVE
from shardline.shards.wire.search_layout import reply_start
from tests.fake_shard import (
    SECRET,
    brute_force,
    make_rows,
    make_table,
    missing,
    replicated,
    running_replicas,
    until,
)
from tests.manual_clock import ManualClock

DIM = 8
CONFIG = RouterConfig(
    backoff_base_ms=1,
    backoff_max_ms=5,
    connect_timeout_ms=500,
    hedge_min_ms=20.0,
)
HEDGE_S = CONFIG.hedge_min_ms / 1000
SILENT_S = CONFIG.silent_after_ms / 1000
IDS, VECTORS = make_rows(60, DIM)


class Cluster:
    """A router before ``num_shards`` shards of ``copies`` replicas, on a clock of its own."""

    def __init__(self, shards, config):
        self.shards = shards
        self.clock = ManualClock()
        self.recorder = Recorder()
        self.fanout = Fanout(SECRET, config, random.Random(3), self.recorder, self.clock)
        self.version = 0

    async def apply(self, shards):
        self.version += 1
        routes = [replicated(replicas) for replicas in shards]
        lowest = tuple(int(replicas[0].ids[0]) for replicas in shards[1:])
        table = make_table(routes, DIM, version=self.version, boundaries=lowest)
        assert await self.fanout.apply(table, None)

    def ask(self, query=0, *, timeout=10.0, **options):
        """A task that searches."""
        return asyncio.create_task(self._search(query, timeout, **options))

    async def _search(self, query, timeout, k=5, min_coverage=0.0, options=NO_OPTIONS):
        with self.fanout.pin() as snapshot:
            key = LaneKey(snapshot=snapshot, k=k, min_coverage=min_coverage, options=options)
            deadline = self.clock.time() + timeout
            return await self.fanout.search(VECTORS[query][None], key, deadline=deadline)

    async def warm_up(self):
        """Asks until it is known how long a frame takes: no time at all."""
        for _ in range(REFRESH):
            await self.whole(self.ask())

    async def whole(self, task, query=0):
        """The answer of a task, once it is found to be complete and right."""
        answer = await asyncio.wait_for(task, 5)
        assert missing(answer) == []
        assert answer.coverage.share == 1.0
        expected = brute_force(VECTORS[query][None], IDS, VECTORS, 5)
        np.testing.assert_array_equal(answer.ranked.ids, expected.ids)
        np.testing.assert_array_equal(answer.ranked.scores, expected.scores)
        return answer

    def counted(self, metric, *labels):
        return sum(
            value
            for (each, of), value in self.recorder._totals.items()
            if each is metric and of[: len(labels)] == labels
        )

    @property
    def connections(self):
        return self.fanout.snapshot.all_connections

    def assert_nothing_is_pending(self):
        assert [c.in_flight for c in self.connections] == [0] * len(self.connections)
        assert self.fanout._coalescer._lanes == {}


@contextlib.asynccontextmanager
async def cluster(num_shards=1, copies=2, **config):
    settings = CONFIG.model_copy(update=config)
    async with running_replicas(IDS, VECTORS, num_shards, copies) as shards:
        made = Cluster(shards, settings)
        await made.apply(shards)
        yield made
        await made.fanout.close()
        await until(lambda: not any("connection" in t.get_name() for t in asyncio.all_tasks()))


def hold(*shards):
    for shard in shards:
        shard.gate.clear()


def let_go(*shards):
    for shard in shards:
        shard.gate.set()


async def asked_first(shards):
    """(the one that has a request more than before, the other) of two held replicas."""
    await until(lambda: any(shard.asked.is_set() for shard in shards))
    first = next(shard for shard in shards if shard.asked.is_set())
    return first, next(shard for shard in shards if shard is not first)


async def held(made, **options):
    """(task, the replica that was asked, the other), both held, of the only shard."""
    (replicas,) = made.shards
    for replica in replicas:
        replica.asked.clear()
    hold(*replicas)
    task = made.ask(**options)
    return task, *await asked_first(replicas)


async def test_both_replicas_are_asked_about_equally_and_answers_are_those_of_one():
    async with cluster(num_shards=3) as made:
        for query in range(60):
            await made.whole(made.ask(query), query)
        for replicas in made.shards:
            counts = [len(replica.requests) for replica in replicas]
            assert sum(counts) == 60
            assert min(counts) > 15
        assert made.counted(HEDGES) == made.counted(RESENT) == 0
        made.assert_nothing_is_pending()


# Loss


@pytest.mark.parametrize("copies", [2, 3])
async def test_what_a_broken_connection_owed_is_asked_of_another_at_once(copies):
    async with cluster(num_shards=2, copies=copies) as made:
        every = [replica for replicas in made.shards for replica in replicas]
        hold(*every)
        task = made.ask(timeout=30.0)
        await until(lambda: sum(len(replica.requests) for replica in every) == 2)
        lost = [replica for replica in every if replica.requests]
        let_go(*(replica for replica in every if replica not in lost))
        for replica in lost:
            await replica.kill()
        await made.whole(task)
        assert [made.counted(RESENT, shard, "lost") for shard in "01"] == [1, 1]
        assert made.counted(RESENT) == 2
        made.assert_nothing_is_pending()


async def test_fetches_and_attributes_survive_a_broken_connection_too():
    async with cluster(num_shards=2) as made:
        every = [replica for replicas in made.shards for replica in replicas]

        async def fetched(snapshot, deadline):
            ids = np.array([0, 59, 17])
            found = await made.fanout.fetch(snapshot, ids, deadline=deadline)
            assert sorted(found.item_ids) == [0, 17, 59]
            assert found.coverage.share == 1.0

        async def named(snapshot, deadline):
            ids = np.array([0, 59, 17])
            found = await made.fanout.attributes(snapshot, ids, ("name",), deadline=deadline)
            assert found.values["name"] == {each: f"name of {each}" for each in (0, 17, 59)}
            assert found.missing == ()

        for look_up in (fetched, named):
            for replica in every:
                replica.requests.clear()
            hold(*every)
            with made.fanout.pin() as snapshot:
                task = asyncio.create_task(look_up(snapshot, made.clock.time() + 30))
                await until(lambda: sum(len(replica.requests) for replica in every) == 2)
                lost = next(replica for replica in made.shards[0] if replica.requests)
                for writer in lost._writers:
                    writer.transport.abort()
                let_go(*every)
                await asyncio.wait_for(task, 5)
            await until(lambda: all(each.connected for each in made.connections))
        assert made.counted(RESENT, "0", "lost") == 2
        made.assert_nothing_is_pending()


async def test_with_all_replicas_broken_the_shard_is_missing_at_once():
    async with cluster() as made:
        task, first, second = await held(made, timeout=30.0)
        await first.kill()
        await until(lambda: second.requests)
        await second.kill()
        with pytest.raises(Unavailable, match="no shard answered") as caught:
            await asyncio.wait_for(task, 5)
        assert "connection lost" in caught.value.hint
        assert (len(first.requests), len(second.requests)) == (1, 1)
        made.assert_nothing_is_pending()


async def test_no_replica_is_asked_twice_even_if_it_is_back():
    async with cluster() as made:
        task, first, second = await held(made, timeout=30.0)
        for replica in (first, second):
            await until(lambda replica=replica: replica.requests)
            for writer in replica._writers:
                writer.transport.abort()
            await until(lambda: sum(each.connected for each in made.connections) >= 1)
        with pytest.raises(Unavailable, match="no shard answered"):
            await asyncio.wait_for(task, 5)
        assert (len(first.requests), len(second.requests)) == (1, 1)


async def test_a_replica_that_is_not_connected_at_one_look_is_asked_at_a_later_one():
    async with cluster() as made:
        task, first, second = await held(made, timeout=30.0)
        other = next(each for each in made.connections if each.route.key == second.key)
        link, other.link = other.link, None
        await made.clock.advance(SILENT_S + 2 * LOOK_S)
        assert not second.asked.is_set()
        other.link = link
        let_go(second)
        await made.clock.advance(2 * LOOK_S)
        await made.whole(task)
        assert made.counted(RESENT, "0", "silent") == 1
        assert (len(first.requests), len(second.requests)) == (1, 1)
        let_go(first)


async def test_a_replica_that_is_away_costs_nothing():
    async with cluster(num_shards=2) as made:
        for replicas in made.shards:
            await replicas[0].kill()
        await until(lambda: sum(each.connected for each in made.connections) == 2)
        for query in range(10):
            await made.whole(made.ask(query), query)
        assert made.counted(RESENT) == 0


# Refusals and nonsense


@pytest.mark.parametrize(
    "fault",
    [
        {"error": ErrorReply(code="overloaded", message="")},
        {"error": ErrorReply(code="behind", message="")},
        {"error": ErrorReply(code="corrupt_file", message="/a/path")},
        {"short": True},
        {"answers_as": 2},
        {"garbage": b"\xc1\xc1"},
    ],
)
async def test_a_replica_that_refuses_or_answers_nonsense_is_replaced_by_the_other(fault):
    async with cluster() as made:
        bad, good = made.shards[0]
        for name, value in fault.items():
            setattr(bad, name, value)
        for request_id in range(1, 50):
            if "garbage" in fault:
                bad.garbage = HEADER.pack(2, request_id) + fault["garbage"]
            await made.whole(made.ask())
            if bad.requests:
                break
        assert made.counted(RESENT, "0", "refused") == 1
        assert len(good.requests) >= 1
        made.assert_nothing_is_pending()
        if "error" not in fault:  # nonsense costs the connection
            await until(lambda: bad.greeted == 2)
        assert good.greeted == 1


async def test_nonsense_behind_a_fitting_start_costs_its_own_connection():
    async with cluster() as made:
        await made.warm_up()
        task, first, second = await held(made)
        await made.clock.advance(1.1 * HEDGE_S)
        await until(lambda: second.asked.is_set())
        await second.kill()
        await until(lambda: sum(each.connected for each in made.connections) == 1)
        cut_short = reply_start(1, 5, 1)
        first.garbage = HEADER.pack(len(cut_short), REFRESH + 1) + cut_short
        let_go(first)
        with pytest.raises(Unavailable, match="no shard answered") as caught:
            await asyncio.wait_for(task, 5)
        assert "broke the protocol" in caught.value.hint
        await until(lambda: first.greeted == 2)


async def test_what_is_wrong_with_the_request_is_asked_of_nobody_else():
    async with cluster() as made:
        for replica in made.shards[0]:
            replica.error = ErrorReply(code="invalid_input", message="only for ivf", field="params")
        with pytest.raises(InvalidInput, match="only for ivf"):
            await made.ask()
        assert sum(len(replica.requests) for replica in made.shards[0]) == 1


async def test_a_request_whose_time_is_over_is_asked_of_nobody_else():
    async with cluster() as made:
        for replica in made.shards[0]:
            replica.error = ErrorReply(code="deadline_exceeded", message="")
        with pytest.raises(Unavailable, match="no shard answered"):
            await made.ask()
        assert sum(len(replica.requests) for replica in made.shards[0]) == 1


async def test_refused_by_all_it_is_asked_once_of_each_and_the_last_refusal_is_told():
    async with cluster(num_shards=2, copies=3) as made:
        for replica in made.shards[1]:
            replica.error = ErrorReply(code="overloaded", message="")
        answer = await made.ask()
        assert missing(answer) == ["shard 1: overloaded"]
        assert [len(replica.requests) for replica in made.shards[1]] == [1, 1, 1]
        assert made.counted(RESENT, "1", "refused") == 2


# Hedging


async def test_a_slow_replica_is_overtaken_by_the_other():
    async with cluster() as made:
        await made.warm_up()
        task, first, second = await held(made)
        let_go(second)
        await made.clock.advance(0.9 * HEDGE_S)
        assert not second.asked.is_set()
        await made.clock.advance(0.2 * HEDGE_S)
        await made.whole(task)
        assert second.asked.is_set()
        assert (made.counted(HEDGES, "0"), made.counted(HEDGES_WON, "0")) == (1, 1)
        assert made.counted(RESENT) == 0
        # the late reply belongs to nobody, and until it is here the other one is preferred
        made.assert_nothing_is_pending()
        owed = {each.route.key.replica: each.link.owed for each in made.connections}
        assert owed == {first.replica: 1, second.replica: 0}
        latency_s = {each.route.key.replica: each.latency_s for each in made.connections}
        assert latency_s[first.replica] > 2 * latency_s[second.replica]
        pace = made.fanout.snapshot.redundancy.paces.of(SearchRequest, 1)
        assert pace._recent[-1] >= HEDGE_S, "counted from the first request, not from the hedge"
        for _ in range(10):
            await made.whole(made.ask())
        assert len(first.requests) + len(second.requests) == REFRESH + 12
        let_go(first)
        await until(lambda: all(each.link.owed == 0 for each in made.connections))


async def test_the_first_to_answer_wins_be_it_the_one_asked_first():
    async with cluster() as made:
        await made.warm_up()
        task, first, second = await held(made)
        await made.clock.advance(1.1 * HEDGE_S)
        await until(lambda: second.asked.is_set())
        let_go(first)
        await made.whole(task)
        let_go(second)
        await until(lambda: all(each.link.owed == 0 for each in made.connections))
        assert (made.counted(HEDGES), made.counted(HEDGES_WON)) == (1, 0)
        made.assert_nothing_is_pending()


async def test_both_replies_in_one_read_count_once():
    async with cluster(num_shards=2) as made:
        await made.warm_up()
        replicas = made.shards[0]
        for replica in replicas:
            replica.asked.clear()
        hold(*replicas)
        task = made.ask()
        await asked_first(replicas)
        await made.clock.advance(1.1 * HEDGE_S)
        await until(lambda: all(replica.asked.is_set() for replica in replicas))
        let_go(*replicas)
        answer = await made.whole(task)
        assert answer.coverage.shards_answered == answer.coverage.shards_asked == 2
        assert answer.coverage.rows_answered == 60
        await until(lambda: all(each.link.owed == 0 for each in made.connections))
        made.assert_nothing_is_pending()


async def test_a_loss_after_the_hedge_has_answered_changes_nothing():
    async with cluster() as made:
        await made.warm_up()
        task, first, second = await held(made)
        let_go(second)
        await made.clock.advance(1.1 * HEDGE_S)
        await made.whole(task)
        await first.kill()
        await until(lambda: sum(each.connected for each in made.connections) == 1)
        assert made.counted(RESENT) == 0
        await made.whole(made.ask())


async def test_a_loss_while_both_are_asked_leaves_the_other_and_asks_nobody_twice():
    async with cluster() as made:
        await made.warm_up()
        task, first, second = await held(made)
        before = len(second.requests)
        await made.clock.advance(1.1 * HEDGE_S)
        await until(lambda: second.asked.is_set())
        await first.kill()
        await until(lambda: sum(each.connected for each in made.connections) == 1)
        assert not task.done()
        let_go(second)
        await made.whole(task)
        assert len(second.requests) == before + 1
        assert made.counted(RESENT) == 0


@pytest.mark.parametrize("min_coverage", [0.0, 0.5])
async def test_only_the_shard_that_is_slow_is_asked_twice(min_coverage):
    """Be the wait for it cut short, because enough shards have answered, or not."""
    async with cluster(num_shards=3) as made:
        for _ in range(3 * REFRESH):
            await made.whole(made.ask())
        slow = made.shards[2]
        for replica in slow:
            replica.asked.clear()
        hold(*slow)
        task = made.ask(min_coverage=min_coverage)
        _, second = await asked_first(slow)
        others = [c for replicas in made.fanout.snapshot.shards[:2] for c in replicas]
        await until(lambda: not any(each.in_flight for each in others))
        let_go(second)
        await made.clock.advance(1.1 * HEDGE_S)
        await made.whole(task)
        assert [made.counted(HEDGES, shard) for shard in "012"] == [0, 0, 1]


async def test_a_third_replica_is_not_asked_because_the_second_takes_long_too():
    async with cluster(copies=3) as made:
        await made.warm_up()
        (replicas,) = made.shards
        for replica in replicas:
            replica.asked.clear()
        hold(*replicas)
        task = made.ask()
        await until(lambda: any(replica.asked.is_set() for replica in replicas))
        await run_for(made.clock, 0.9 * SILENT_S)
        await until(lambda: sum(replica.asked.is_set() for replica in replicas) == 2)
        let_go(*replicas)
        await made.whole(task)
        assert sum(replica.asked.is_set() for replica in replicas) == 2
        assert made.counted(HEDGES) == 1


async def test_a_loss_that_is_told_after_the_end_asks_nobody():
    """As when two links end at once, and what one of them owed was given up for the other."""
    async with cluster(copies=3) as made:
        await made.warm_up()
        (replicas,) = made.shards
        for replica in replicas:
            replica.asked.clear()
        hold(*replicas)
        task = made.ask(timeout=0.2)
        await run_for(made.clock, 0.1)
        await until(lambda: sum(replica.asked.is_set() for replica in replicas) == 2)
        told = [each for c in made.connections for each in c.link._pending.values()]
        assert len(told) == 2
        await run_for(made.clock, 0.15)
        with pytest.raises(Unavailable):
            await asyncio.wait_for(task, 5)
        for tell in told:
            tell(Unavailable("connection lost"))
        assert sum(c.in_flight for c in made.connections) == 0
        assert made.counted(RESENT) == 0


async def test_without_a_token_nobody_is_asked_a_second_time():
    async with cluster(hedge_share=0.015625) as made:  # one for 64 requests
        await made.warm_up()
        for hedges in (1, 1):  # the second finds no token
            task, first, second = await held(made, timeout=0.2)
            let_go(second)
            await made.clock.advance(0.21)
            if second.asked.is_set():
                await made.whole(task)
            else:
                with pytest.raises(Unavailable):
                    await asyncio.wait_for(task, 5)
            assert made.counted(HEDGES) == hedges
            let_go(first)
            await until(lambda: all(each.link.owed == 0 for each in made.connections))
        assert not second.asked.is_set()


@pytest.mark.parametrize("hedge_share", [0.0, 0.05])
async def test_one_replica_that_stalls_in_one_of_twenty_searches(hedge_share):
    """100 queries per second, one after the other; a stall is shorter than silence is."""
    stall_s, queries, rng, stalling = 0.2, 600, random.Random(5), []
    async with cluster(hedge_share=hedge_share) as made:
        await made.warm_up()
        bad = made.shards[0][0]
        answer = bad._answer

        async def answer_late(writer, request_id, message):
            if rng.random() < 0.05:
                stalling.append(request_id)
                await made.clock.sleep(stall_s)
            await answer(writer, request_id, message)

        bad._answer = answer_late
        took_s = []
        for _ in range(queries):
            stalls, began, hedges = len(stalling), made.clock.time(), made.counted(HEDGES)
            task = made.ask(timeout=1.0)
            await until(lambda task=task, stalls=stalls: task.done() or len(stalling) > stalls)
            while not task.done() and made.counted(HEDGES) == hedges:
                await made.clock.advance(HEDGE_S / 4)
                await asyncio.sleep(0.002)  # replies come by real sockets
            await made.whole(task)
            took_s.append(made.clock.time() - began)
            await made.clock.advance(0.01)
        stalls = len(stalling)
        assert stalls > 3
        hedges = made.counted(HEDGES)
        if hedge_share:
            assert max(took_s) < 1.5 * HEDGE_S
            assert hedges == made.counted(HEDGES_WON) == stalls <= hedge_share * queries
        else:
            assert sum(took >= 0.9 * stall_s for took in took_s) == stalls
            assert hedges == 0
        await run_for(made.clock, stall_s)


async def test_a_share_of_nothing_turns_hedging_off():
    async with cluster(hedge_share=0.0) as made:
        await made.warm_up()
        task, first, second = await held(made, timeout=0.2)
        await made.clock.advance(0.15)
        assert not second.asked.is_set()
        let_go(first)
        await made.whole(task)


async def test_a_large_frame_is_not_compared_with_small_ones():
    async with cluster() as made:
        await made.warm_up()
        hold(*made.shards[0])
        for replica in made.shards[0]:
            replica.asked.clear()

        async def search():
            with made.fanout.pin() as snapshot:
                key = LaneKey(snapshot=snapshot, k=5, min_coverage=0.0)
                deadline = made.clock.time() + 10
                return await made.fanout.search(VECTORS, key, deadline=deadline)

        task = asyncio.create_task(search())
        first, second = await asked_first(made.shards[0])
        await made.clock.advance(0.9 * SILENT_S)
        assert not second.asked.is_set()
        let_go(first)
        answer = await asyncio.wait_for(task, 5)
        np.testing.assert_array_equal(answer.ranked.ids, brute_force(VECTORS, IDS, VECTORS, 5).ids)


async def test_a_frame_of_a_size_that_is_new_goes_by_the_sizes_that_are_known():
    async with cluster() as made:
        await made.warm_up()
        (replicas,) = made.shards
        for replica in replicas:
            replica.asked.clear()
        hold(*replicas)
        leading = made.ask()
        await asked_first(replicas)
        pair = [made.ask(1), made.ask(2)]  # they leave together, behind the first
        await made.clock.advance(0.9 * HEDGE_S)
        await until(lambda: sum(len(replica.requests) for replica in replicas) == REFRESH + 2)
        await run_for(made.clock, 2.5 * HEDGE_S)
        await until(lambda: made.counted(HEDGES) == 2)
        let_go(*replicas)
        await made.whole(leading)
        for query, task in enumerate(pair, 1):
            await made.whole(task, query)


async def test_an_exact_search_is_not_hedged_and_teaches_nothing_of_the_pace():
    async with cluster() as made:
        await made.warm_up()
        before = {each: each.latency_s for each in made.connections}
        pace = made.fanout.snapshot.redundancy.paces.of(SearchRequest, 1)
        recent = list(pace._recent)
        hold(*made.shards[0])
        for shard in made.shards[0]:
            shard.asked.clear()
        task = made.ask(options=SearchOptions(exact=True))
        await until(lambda: any(shard.asked.is_set() for shard in made.shards[0]))
        await made.clock.advance(0.9 * SILENT_S)
        assert sum(shard.asked.is_set() for shard in made.shards[0]) == 1
        let_go(*made.shards[0])
        await made.whole(task)
        assert made.counted(HEDGES) == 0
        assert {each: each.latency_s for each in made.connections} == before
        assert list(pace._recent) == recent


async def test_frames_that_usually_take_long_are_not_hedged_early():
    async with cluster() as made:
        usual_s = 0.1
        for _ in range(REFRESH):
            task, first, second = await held(made)
            await made.clock.advance(usual_s)
            let_go(first, second)
            await made.whole(task)
        task, first, second = await held(made)
        await made.clock.advance(0.95 * HEADROOM * usual_s)
        assert not second.asked.is_set()
        await made.clock.advance(0.15 * HEADROOM * usual_s)
        let_go(second)
        await made.whole(task)


# Silence


async def test_a_silent_replica_is_left_for_the_other_and_asked_again_once_it_speaks():
    async with cluster() as made:  # not warmed up: nothing is hedged
        task, first, second = await held(made)
        let_go(second)
        await made.clock.advance(0.9 * SILENT_S)
        assert not task.done()
        await run_for(made.clock, 0.1 * SILENT_S + 2 * LOOK_S)
        await made.whole(task)
        assert made.counted(RESENT, "0", "silent") == 1
        asked = len(first.requests)
        for _ in range(20):
            await made.whole(made.ask())
        assert len(first.requests) == asked
        let_go(first)
        await until(lambda: all(each.link.owed == 0 for each in made.connections))
        for _ in range(200):
            await made.whole(made.ask())
        assert len(first.requests) > asked


async def test_a_replica_at_work_is_not_silent():
    async with cluster() as made:
        task, first, second = await held(made)
        (writer,) = first._writers
        link = next(c for c in made.connections if c.in_flight).link
        for _ in range(10):
            await run_for(made.clock, 0.1)
            writer.write(KEEP_ALIVE)
            await until(lambda: link.stalled_for() == 0.0)
        assert not second.asked.is_set()
        let_go(first)
        await made.whole(task)


async def test_time_in_which_the_router_stood_still_is_no_silence():
    async with cluster() as made:
        task, first, second = await held(made)
        made.clock.hold_up(10 * SILENT_S - 1.0)
        await made.clock.advance(0.0)
        assert not second.asked.is_set()
        let_go(first)
        await made.whole(task)


async def test_a_replica_that_stays_silent_is_connected_anew_though_nobody_asks_it():
    async with cluster(stall_timeout_ms=1000.0) as made:
        task, first, second = await held(made)
        let_go(second)
        await run_for(made.clock, SILENT_S + 2 * LOOK_S)
        await made.whole(task)
        greeted = first.greeted
        await run_for(made.clock, 1.0)
        await made.whole(made.ask())
        await until(lambda: first.greeted > greeted)


async def test_all_replicas_silent_is_as_one_silent_shard():
    async with cluster(num_shards=2) as made:
        hold(*made.shards[0])
        task = made.ask(timeout=2.0)
        await until(lambda: any(replica.requests for replica in made.shards[0]))
        await run_for(made.clock, 2.1)
        assert missing(await asyncio.wait_for(task, 5)) == ["shard 0: deadline exceeded"]
        assert [len(replica.requests) for replica in made.shards[0]] == [1, 1]
        answer = await asyncio.wait_for(made.ask(timeout=30.0), 5)
        assert missing(answer) == ["shard 0: silent, though it owes answers"]
        let_go(*made.shards[0])
        await until(lambda: all(each.link.owed == 0 for each in made.connections))
        await made.whole(made.ask())


# Tables that change


async def test_a_replica_moves_without_a_partial_answer_and_those_on_their_way_go_on():
    """As the controller does it: the new one beside the old, then without it, then its end."""
    async with cluster(num_shards=2, copies=3) as made:
        before = [replicas[:2] for replicas in made.shards]
        beside = made.shards
        after = [replicas[1:] for replicas in made.shards]
        await made.apply(before)
        hold(*(each for replicas in before for each in replicas))
        on_old = made.ask(0, timeout=30.0)
        await until(lambda: all(any(r.requests for r in replicas) for replicas in before))
        await made.apply(beside)
        assert len(made.connections) == 6
        let_go(*(each for replicas in before for each in replicas))
        await made.whole(on_old)
        for query in range(20):
            await made.whole(made.ask(query), query)
        hold(*(replicas[0] for replicas in beside))
        tasks = [made.ask(query, timeout=30.0) for query in range(20)]
        await made.apply(after)
        for replicas in beside:
            await replicas[0].kill()
        for query, task in enumerate(tasks):
            await run_for(made.clock, 0.01)
            await made.whole(task, query)
        for query in range(20):
            await made.whole(made.ask(query), query)
        assert all(replicas[2].requests for replicas in made.shards)
        await until(lambda: len(made.fanout._holders) == 4)
        made.assert_nothing_is_pending()


async def test_a_replica_that_comes_back_starts_slowly():
    async with cluster() as made:
        first = made.shards[0][0]
        await made.clock.advance(60.0)
        await first.kill()
        await until(lambda: not all(each.connected for each in made.connections))
        await first.start(first.port)
        await until(lambda: all(each.connected for each in made.connections))

        async def asked_of_first():
            before = len(first.requests)
            for _ in range(200):
                await made.whole(made.ask())
            return len(first.requests) - before

        assert await asked_of_first() < 30
        await run_for(made.clock, SLOW_START_S)
        assert 70 < await asked_of_first() < 130


async def test_shards_with_one_replica_beside_shards_with_two():
    async with cluster(num_shards=2) as made:
        await made.apply([made.shards[0], made.shards[1][:1]])
        for query in range(10):
            await made.whole(made.ask(query), query)
        await made.shards[1][0].kill()
        await made.shards[0][0].kill()
        await until(lambda: sum(each.connected for each in made.connections) == 1)
        assert missing(await made.ask())[0].startswith("shard 1: ")
        assert (await made.ask()).coverage.shards_answered == 1


async def test_of_replicas_of_which_only_one_is_placed_that_one_is_asked():
    async with cluster() as made:
        route = replicated(made.shards[0])
        nowhere = replace(route.replicas[0], address=None)
        table = make_table([replace(route, replicas=(nowhere, route.replicas[1]))], DIM, version=7)
        assert await made.fanout.apply(table, None)
        await made.whole(made.ask())
        assert len(made.shards[0][1].requests) == 1


# All of it at random


class Troublemaker:
    """Does to one replica, again and again, what replicas do when they are not well."""

    def __init__(self, shard, rng):
        self.shard = shard
        self.rng = rng

    async def run(self, stop):
        while not stop.is_set():
            await asyncio.sleep(self.rng.uniform(0, 0.02))
            fault = self.rng.choice(
                [self.stall, self.cut, self.refuse, self.babble, self.restart, self.delay]
            )
            await fault()

    async def stall(self):
        self.shard.gate.clear()
        await asyncio.sleep(self.rng.uniform(0, 0.3))
        self.shard.gate.set()

    async def cut(self):
        for writer in list(self.shard._writers):
            writer.transport.abort()

    async def refuse(self):
        code = self.rng.choice(["overloaded", "behind", "error"])
        self.shard.error = ErrorReply(code=code, message="")
        await asyncio.sleep(self.rng.uniform(0, 0.05))
        self.shard.error = None

    async def babble(self):
        fault, value = self.rng.choice([("short", True), ("answers_as", 9)])
        setattr(self.shard, fault, value)
        await asyncio.sleep(self.rng.uniform(0, 0.02))
        setattr(self.shard, fault, None)

    async def restart(self):
        await self.shard.kill()
        await asyncio.sleep(self.rng.uniform(0, 0.05))
        await self.shard.start(self.shard.port)

    async def delay(self):
        for _ in range(10):
            self.shard.gate.clear()
            await asyncio.sleep(0.01)
            self.shard.gate.set()
            await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_to_the_others_one_replica_that_is_well_is_enough(seed):
    rng = random.Random(seed)
    copies = rng.choice([2, 3])
    config = CONFIG.model_copy(update={"hedge_min_ms": 5.0, "silent_after_ms": 40.0})
    recorder = Recorder()
    async with running_replicas(IDS, VECTORS, 3, copies) as shards:
        fanout = Fanout(SECRET, config, random.Random(seed), recorder)
        lowest = tuple(int(replicas[0].ids[0]) for replicas in shards[1:])
        table = make_table(list(map(replicated, shards)), DIM, boundaries=lowest)
        assert await fanout.apply(table, None)
        stop, answered = asyncio.Event(), 0
        for _ in range(4 * REFRESH):  # one in three teaches how long a frame takes
            with fanout.pin() as snapshot:
                key = LaneKey(snapshot=snapshot, k=5, min_coverage=0.0)
                deadline = asyncio.get_running_loop().time() + 20.0
                await fanout.search(VECTORS[:1], key, deadline=deadline)

        async def keep_asking(rng):
            nonlocal answered
            while not stop.is_set():
                queries = VECTORS[rng.sample(range(60), rng.choice([1, 1, 1, 5]))]
                k = rng.choice([3, 5])
                deadline = asyncio.get_running_loop().time() + 20.0
                with fanout.pin() as snapshot:
                    key = LaneKey(snapshot=snapshot, k=k, min_coverage=0.0)
                    answer = await fanout.search(queries, key, deadline=deadline)
                    assert missing(answer) == []
                    expected = brute_force(queries, IDS, VECTORS, k)
                    np.testing.assert_array_equal(answer.ranked.ids, expected.ids)
                    ids = np.array(rng.sample(range(60), 4))
                    found = await fanout.fetch(snapshot, ids, deadline=deadline)
                    assert found.coverage.share == 1.0
                    assert sorted(found.item_ids) == sorted(ids)
                answered += 1

        unwell = [
            Troublemaker(replica, random.Random(rng.random()))
            for replicas in shards
            for replica in rng.sample(replicas, copies - 1)
        ]
        askers = [asyncio.create_task(keep_asking(random.Random(n))) for n in range(6)]
        trouble = [asyncio.create_task(each.run(stop)) for each in unwell]
        await asyncio.sleep(2.0)
        stop.set()
        await asyncio.gather(*askers, *trouble)
        assert answered > 50
        resent = {of[1] for (each, of) in recorder._totals if each is RESENT}
        assert resent >= {"lost", "refused"}  # a stall may be over before it is silence
        hedged = sum(n for (each, _), n in recorder._totals.items() if each is HEDGES)
        assert hedged > 0
        await until(lambda: not any(each.in_flight for each in fanout.snapshot.all_connections))
        assert fanout._coalescer._lanes == {}
        await fanout.close()
        await until(lambda: not any("connection" in t.get_name() for t in asyncio.all_tasks()))


async def run_for(clock, seconds):
    """As ``advance``, on a loop that is never held up."""
    steps = max(1, round(seconds / 0.05))
    for _ in range(steps):
        await clock.advance(seconds / steps)
