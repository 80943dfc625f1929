"""The watch of recall: which queries are asked again, when answers compare, and the figure."""

import asyncio
import contextlib
import random

import numpy as np
import pytest

from shardline.router import recall_watch
from shardline.router.contract import Coverage
from shardline.router.experiments.assignment import Assignment
from shardline.router.fanout.coalesce import LaneKey
from shardline.router.limits import resolve
from shardline.router.query import Merged
from shardline.router.recall_watch import MAX_SHARE, SERVED, SERVED_S, WINDOW, RecallWindow
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.errors import Overloaded
from shardline.shards.core.filter_language import check_filter
from shardline.shards.core.messages import (
    MAX_SERVED_AT_ONCE,
    ErrorReply,
    SearchOptions,
    SearchParams,
    SearchRequest,
)
from shardline.shards.core.metrics import ARM_RECALL, RECALL, RECALL_SAMPLES
from shardline.shards.core.recall import count_matches
from shardline.shards.core.schema import Ranked
from tests.fake_shard import SECRET, brute_force, make_rows, make_table, running_shards, until

DIM = 8
CONFIG = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, watch_interval_s=5.0, cache_bytes=0)
IDS, VECTORS = make_rows(60, DIM)
WHOLE = Coverage(shards_asked=1, shards_answered=1, rows_asked=60, rows_answered=60, degraded=())
LOST = 3  # results that the shards' usual answers lack


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Watched:
    """A service over fake shards, on a clock of its own."""

    def __init__(self, service: SearchService, shards, clock: Clock) -> None:
        self.service, self.shards, self.clock = service, shards, clock

    @property
    def watch(self):
        return self.service.watch

    async def search(self, at_s: float | None = None, **query):
        """Then waits until the watch is done with it."""
        if at_s is not None:
            self.clock.now_s = 100.0 + at_s
        query = {"vectors": VECTORS[:2].tolist(), "k": 10} | query
        assignment = query.pop("assignment", None)
        now = asyncio.get_running_loop().time()
        resolved = resolve(CONFIG, **query)
        resolved.assignment = assignment
        answer = await self.service.search(resolved, arrived_at=now)
        if (task := self.watch._task) is not None:
            await asyncio.wait([task])
            await asyncio.sleep(0)
        return answer

    def outcomes(self) -> dict[str, float]:
        totals = self.service.recorder._totals.items()
        return {labels[0]: n for (metric, labels), n in totals if metric is RECALL_SAMPLES}

    def exact_requests(self) -> list[SearchRequest]:
        requests = self.shards[0].requests
        return [r for r in requests if isinstance(r, SearchRequest) and r.options.exact]


def make_forgetful(shard) -> None:
    """Its usual answers lack the best LOST of its rows; exact ones lack none."""
    whole = shard.reply

    def reply(message):
        if not isinstance(message, SearchRequest) or message.options.exact:
            return whole(message)
        found = whole(message)
        ranked = brute_force(message.queries, shard.ids, shard.vectors, message.k + LOST)
        found.ranked = Ranked(ranked.ids[:, LOST:].copy(), ranked.scores[:, LOST:].copy())
        return found

    shard.reply = reply


@contextlib.asynccontextmanager
async def watched(num_shards: int = 1, forgets: bool = True, arms=(), on_sample=None, **config):
    settings = CONFIG.model_copy(update=config)
    clock = Clock()
    async with running_shards(IDS, VECTORS, num_shards) as shards:
        service = SearchService(settings, SECRET, load_encoder=lambda _table: None)
        service.watch = service._finder._watch = recall_watch.RecallWatch(
            service._fanout,
            service.recorder,
            settings.watch_interval_s,
            random.Random(1),
            arms=arms,
            on_sample=on_sample,
            now=clock,
            wall=lambda: clock.now_s + 1e9,
        )
        service._finder._watch = service.watch
        if forgets:
            for shard in shards:
                make_forgetful(shard)
        await service.apply(make_table(shards, DIM))
        yield Watched(service, shards, clock)
        await service.close()


async def test_recall_is_that_of_the_served_queries() -> None:
    async with watched() as made:
        await made.search(0.0)
        assert made.exact_requests() == [], "the first one an interval after the start"
        assert made.watch.quality() is None
        for number in range(1, 5):
            await made.search(5.0 * number, vectors=VECTORS[number : number + 1].tolist())
        for request in made.exact_requests():
            assert len(request.queries) == 1
            assert request.options == SearchOptions(exact=True, min_seq=(0,))
        np.testing.assert_array_equal(
            np.concatenate([each.queries for each in made.exact_requests()]), VECTORS[1:5]
        )
        expected = []
        for query in VECTORS[1:5]:
            best = brute_force(query[None], IDS, VECTORS, 10 + LOST)
            kth = best.scores[0, 9]
            expected.append((best.scores[0, LOST:] >= kth).sum() / 10)
        quality = made.watch.quality()
        assert quality.recall == pytest.approx(np.mean(expected))
        assert 0.5 < quality.recall < 1
        assert (quality.generation, quality.queries, quality.k) == (1, 4, 10)
        assert quality.since == 1e9 + 105.0
        assert made.service.status()["quality"]["recall"] == quality.recall
        made.service.refresh_metrics()
        assert made.service.recorder._gauges[RECALL, ()] == quality.recall
        assert made.outcomes() == {"compared": 4}


async def test_whole_answers_have_a_recall_of_one_and_the_interval_holds() -> None:
    async with watched(num_shards=3, forgets=False) as made:
        for step in range(1, 31):
            await made.search(1.0 * step)
        assert made.watch.quality().recall == 1.0
        assert made.watch.quality().queries == 6
        asked = len(made.shards[0].requests)
        await made.search(30.5)
        assert len(made.shards[0].requests) == asked + 1


async def test_what_is_not_watched() -> None:
    async with watched() as made:
        await made.search(10.0, params=SearchParams(nprobe=1))
        await made.search(11.0, options=SearchOptions(exact=True))
        await made.search(12.0, options=SearchOptions(filter=check_filter({"item_id": 3})))
        assert made.watch.quality() is None
        assert len(made.exact_requests()) == 1
    async with watched(watch_interval_s=0.0) as made:
        await made.search(1e6)
        assert made.exact_requests() == []
    async with watched(num_shards=2) as made:
        made.shards[1].error = ErrorReply(code="overloaded", message="")
        await made.search(10.0)
        assert made.exact_requests() == [], "a partial answer"


async def test_a_write_in_between_drops_the_sample_unless_the_query_is_asked_anew_with_it() -> None:
    """Shards report more writes with every reply, or with the first exact one only."""
    async with watched() as made:
        (shard,) = made.shards
        inner = shard.reply

        def written(message):
            shard.seq += 1
            return inner(message)

        shard.reply = written
        await made.search(10.0)
        assert made.outcomes() == {"changed": 1}

        def written_once(message):
            shard.seq = max(shard.seq, 100 if message.options.min_seq else 0)
            return inner(message)

        shard.reply = written_once
        await made.search(20.0)
        assert made.outcomes() == {"changed": 1, "compared": 1}
        assert made.watch.quality().queries == 1
        assert made.exact_requests()[-1].options.min_seq == (2 + 1,)


async def test_a_refused_exact_search_costs_the_sample_alone() -> None:
    async with watched(num_shards=2) as made:
        refused = made.shards[1].reply

        def reply(message):
            if isinstance(message, SearchRequest) and message.options.exact:
                return ErrorReply(code=Overloaded.code, message="other exact searches wait")
            return refused(message)

        made.shards[1].reply = reply
        answer = await made.search(10.0)
        assert answer.coverage.share == 1.0
        assert made.outcomes() == {"unanswered": 1}
        missing = [m.name for m, _ in made.service.recorder._totals if "missing" in m.name]
        assert missing == [], "no answer that was given lacked a shard"
        made.shards[1].reply = refused
        await made.search(20.0)
        assert made.outcomes() == {"unanswered": 1, "compared": 1}


async def test_an_exact_search_takes_a_bounded_share_of_the_time() -> None:
    async with watched() as made:
        (shard,) = made.shards
        inner = shard.reply

        def slow(message):
            if message.options.exact:
                made.clock.now_s += 2.0
            return inner(message)

        shard.reply = slow
        await made.search(10.0)
        await made.search(12.0 + 2.0 / MAX_SHARE - 1)
        assert len(made.exact_requests()) == 1
        await made.search(12.0 + 2.0 / MAX_SHARE + 1)
        assert len(made.exact_requests()) == 2


async def test_one_at_a_time_and_closing_ends_it() -> None:
    async with watched() as made:
        (shard,) = made.shards
        made.clock.now_s = 110.0
        query = resolve(CONFIG, vectors=VECTORS[:1].tolist(), k=5)
        inner = shard.reply

        def reply(message):
            if not message.options.min_seq:  # as served; what is asked again is held back
                shard.gate.clear()
            return inner(message)

        shard.reply = reply
        now = asyncio.get_running_loop().time()
        await made.service.search(query, arrived_at=now)
        task = made.watch._task
        await until(lambda: len(made.exact_requests()) == 1)
        made.clock.now_s = 200.0
        lane = LaneKey(made.service._fanout.snapshot, 5, 0.0)
        ranked = brute_force(VECTORS[:1], IDS, VECTORS, 5)
        made.watch.offer(
            lane,
            VECTORS[:1],
            Merged(ranked=ranked, coverage=WHOLE, search_ms=0.0, seq=(0,)),
        )
        assert made.watch._task is task
    assert task.cancelled()
    assert made.watch._task is None
    assert made.outcomes() == {}


async def test_another_generation_begins_anew() -> None:
    async with watched() as made, running_shards(IDS, VECTORS, 1, generation=2) as new:
        await made.search(10.0)
        assert made.watch.quality().recall < 1
        await made.service.apply(make_table(new, DIM, version=2, generation=2))
        assert made.watch.quality() is None
        await made.search(20.0)
        quality = made.watch.quality()
        assert (quality.generation, quality.recall, quality.queries) == (2, 1.0, 1)


async def test_served_queries_are_told_once_some_at_a_time() -> None:
    async with watched(watch_interval_s=0.0) as made:
        assert made.watch.news().served is None
        for number in range(40):
            row = VECTORS[number : number + 1]
            await made.search(number * 1.01 * SERVED_S, vectors=row.tolist())
            await made.search(vectors=row.tolist())  # too soon for another one
        told = made.watch.news().served
        assert told.model_version == "m1"
        np.testing.assert_array_equal(told.vectors, VECTORS[40 - MAX_SERVED_AT_ONCE : 40])
        assert made.watch.news().served is None
        await made.search(1000.0, vectors=VECTORS[50:51].tolist())
        np.testing.assert_array_equal(made.watch.news().served.vectors, VECTORS[50:51])
        assert len(made.watch._served) <= SERVED


def test_the_window_is_bounded_and_counts_hits_not_queries() -> None:
    window = RecallWindow(1)
    exact = Ranked(np.array([[1, 2, -1]]), np.array([[3.0, 2.0, -np.inf]], np.float32))
    none = Ranked(np.full((1, 3), -1), np.full((1, 3), -np.inf, np.float32))
    window.add(none, none, 0.0)
    assert window.quality() is None, "no row, no sample"
    window.add(none, exact, 1.0)
    window.add(exact, exact, 2.0)
    assert window.quality().recall == 0.5
    for second in range(WINDOW):
        window.add(exact, exact, 3.0 + second)
    quality = window.quality()
    assert (quality.recall, quality.queries, quality.since) == (1.0, WINDOW, 3.0)


@pytest.mark.parametrize("seed", range(5))
def test_matches_are_counted_as_by_hand(seed) -> None:
    """Ties and rounding: a result counts that is among the exact ones, or as good as their last."""
    rng = np.random.default_rng(seed)
    scores = np.sort(rng.integers(0, 6, 30).astype(np.float32))[::-1]
    ids = np.arange(30)
    exact = Ranked(ids[None, :10], scores[None, :10])
    chosen = np.sort(rng.choice(30, 10, replace=False))
    found = Ranked(ids[None, chosen], scores[None, chosen] * np.float32(1 - 1e-7))
    by_hand = sum(score >= scores[9] for score in scores[chosen])
    assert count_matches(found, exact) == (by_hand, 10)
    far = Ranked(exact.ids, exact.scores - 1)  # of rounding, as of squared distances far away
    assert count_matches(far, exact) == (10, 10)


# Arms of experiments

FEW, CONTROL = ("probes", "few"), ("probes", "control")
NPROBE = {"params": SearchParams(nprobe=2)}


def in_arm(arm, *, is_whole=True) -> Assignment:
    return Assignment(arms=(arm,), key="u", is_whole=is_whole)


async def test_each_arm_has_its_turn_however_few_searches_it_has() -> None:
    told = []

    def on_sample(assignment, recall) -> None:
        told.append((assignment.arms[0], recall))

    async with watched(arms=(FEW, CONTROL), on_sample=on_sample) as made:
        for step in range(1, 401):
            is_few = step % 20 == 0
            arm = {"assignment": in_arm(FEW), **NPROBE} if is_few else {}
            if not is_few and step % 2:
                arm = {"assignment": in_arm(CONTROL)}
            await made.search(1.0 * step, **arm)
        found = made.watch.arm_qualities()
        assert set(found) == {FEW, CONTROL}
        assert 0.5 < found[FEW].recall < 1
        # one look per five seconds in all; three windows, one of which also takes control's
        assert made.outcomes()["compared"] <= 80
        assert found[FEW].queries >= 15
        assert found[CONTROL].queries >= 15
        assert made.watch.quality().queries >= found[CONTROL].queries
        assert [arm for arm, _ in told].count(FEW) == found[FEW].queries
        assert np.mean([r for arm, r in told if arm == FEW]) == pytest.approx(found[FEW].recall)
        made.service.refresh_metrics()
        assert made.service.recorder._gauges[ARM_RECALL, FEW] == found[FEW].recall


async def test_searches_that_are_not_as_their_arm_says_are_not_its_samples() -> None:
    async with watched(arms=(FEW,)) as made:
        for step in range(1, 30):
            await made.search(5.0 * step, assignment=in_arm(FEW, is_whole=False), **NPROBE)
            await made.search(assignment=in_arm(("gone", "arm")), **NPROBE)
        assert made.exact_requests() == []
        assert made.watch.arm_qualities() == {FEW: None}
        assert made.watch.quality() is None


async def test_an_arm_of_another_generation_begins_anew() -> None:
    async with watched(arms=(FEW,)) as made, running_shards(IDS, VECTORS, 1, generation=2) as new:
        await made.search(10.0, assignment=in_arm(FEW), **NPROBE)
        assert made.watch.arm_qualities()[FEW].queries == 1
        await made.service.apply(make_table(new, DIM, generation=2, version=2))
        assert made.watch.arm_qualities() == {FEW: None}
        await made.search(40.0, assignment=in_arm(FEW), **NPROBE)
        found = made.watch.arm_qualities()[FEW]
        assert (found.generation, found.queries, found.recall) == (2, 1, 1.0)
