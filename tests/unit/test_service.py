"""The life of a query without HTTP: kinds of queries, limits, encoder and table in one step."""

import asyncio
import contextlib
import time

import numpy as np
import pytest

from shardline.router.contract import Coverage, Reason, ReasonCode
from shardline.router.fanout.snapshot import ENCODE_IN_LOOP
from shardline.router.item_queries import drop_own
from shardline.router.limits import resolve
from shardline.router.readiness import HEAR_S, HEARD_S
from shardline.router.router_config import QUERIES_IN_TIME, RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.errors import (
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    Overloaded,
    Unavailable,
    VersionMismatch,
)
from shardline.shards.core.messages import ErrorReply, SearchOptions
from shardline.shards.core.schema import Metric, Ranked
from tests.fake_encoder import FakeEncoder
from tests.fake_shard import (
    SECRET,
    brute_force,
    make_rows,
    make_table,
    missing,
    running_shards,
    until,
)

DIM = 8
FAST = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, max_batch=10, max_k=60, default_k=10)


@contextlib.asynccontextmanager
async def serving(encoder="m1", config=FAST, **table):
    """(service, shards, ids, vectors) over 60 rows in 4 shards."""
    ids, vectors = make_rows(60, DIM)

    def load_encoder(table):
        return FakeEncoder(DIM, encoder) if encoder else None

    async with running_shards(ids, vectors, 4) as shards:
        service = SearchService(config, SECRET, load_encoder=load_encoder)
        await service.apply(make_table(shards, DIM, **table))
        yield service, shards, ids, vectors
        await service.close()


async def search(service, **query):
    arrived_at = asyncio.get_running_loop().time()
    return await service.search(
        resolve(service.config, **query), arrived_at=arrived_at, request_id="r1"
    )


def not_found(query: int, item: int) -> Reason:
    return Reason(query=query, code=ReasonCode.NOT_FOUND, text=f"item {item} not found")


async def test_vectors_are_searched_and_the_answer_says_on_what():
    async with serving() as (service, _, ids, vectors):
        answer = await search(service, vectors=vectors[:3].tolist(), k=4)
        expected_ids, expected_scores = brute_force(vectors[:3], ids, vectors, 4)
        np.testing.assert_array_equal(answer.ranked.ids, expected_ids)
        np.testing.assert_array_equal(answer.ranked.scores, expected_scores)
        assert (answer.generation, answer.model_version) == (1, "m1")
        assert answer.coverage.share == 1.0
        assert answer.reasons == ()
        assert answer.request_id == "r1"
        assert 0 < answer.took_ms < 2000


async def test_under_cosine_the_length_of_a_query_does_not_matter():
    async with serving(metric=Metric.COSINE) as (service, _, _, vectors):
        answer = await search(service, vectors=vectors[:1] * 1000, k=60)
        unit = vectors[:1] / np.linalg.norm(vectors[0])
        np.testing.assert_allclose(
            answer.ranked.scores[0], np.sort(unit @ vectors.T)[0, ::-1], rtol=1e-5
        )


async def test_features_are_encoded_by_the_query_tower():
    async with serving() as (service, _, ids, vectors):
        answer = await search(service, features=[{"slope": 0.0}, {"slope": 1.5}], k=5)
        queries = FakeEncoder(DIM).encode([{"slope": 0.0}, {"slope": 1.5}])
        expected_ids, _ = brute_force(queries, ids, vectors, 5)
        np.testing.assert_array_equal(answer.ranked.ids, expected_ids)


async def test_a_batch_too_large_for_the_loop_is_encoded_in_a_thread():
    config = FAST.model_copy(update={"max_batch": ENCODE_IN_LOOP + 1})
    async with serving(config=config) as (service, _, ids, vectors):
        features = [{"slope": float(row)} for row in range(ENCODE_IN_LOOP + 1)]
        answer = await search(service, features=features, k=2)
        expected_ids, _ = brute_force(FakeEncoder(DIM).encode(features), ids, vectors, 2)
        np.testing.assert_array_equal(answer.ranked.ids, expected_ids)


async def test_an_item_is_left_out_of_its_own_answer_and_still_gets_k_results():
    async with serving() as (service, _, ids, vectors):
        wanted = [7, 31, 7]
        answer = await search(service, item_ids=wanted, k=5)
        for row, item in enumerate(wanted):
            others = ids != item
            expected, scores = brute_force(
                vectors[item : item + 1], ids[others], vectors[others], 5
            )
            assert answer.ranked.ids[row].tolist() == expected[0].tolist()
            assert answer.ranked.scores[row].tolist() == scores[0].tolist()


async def test_at_the_largest_k_an_item_to_item_answer_is_one_short():
    async with serving() as (service, _, ids, _):
        answer = await search(service, item_ids=[3], k=60)
        assert set(answer.ranked.ids[0, :59]) == set(ids) - {3}
        assert answer.ranked.ids[0, 59] == -1
        assert np.isneginf(answer.ranked.scores[0, 59])


async def test_an_unknown_item_is_empty_with_a_reason_and_the_others_are_answered():
    async with serving() as (service, _, _, _):
        answer = await search(service, item_ids=[5, 999, 6], k=3)
        alone = await search(service, item_ids=[5, 6], k=3)
        assert answer.reasons == (not_found(1, 999),)
        np.testing.assert_array_equal(answer.ranked.ids[[0, 2]], alone.ranked.ids)
        assert answer.ranked.ids[1].tolist() == [-1, -1, -1]
        assert np.isneginf(answer.ranked.scores[1]).all()


async def test_only_unknown_items_are_still_an_answer():
    async with serving() as (service, _, _, _):
        answer = await search(service, item_ids=[999, 1000], k=2)
        assert answer.ranked.ids.tolist() == [[-1, -1], [-1, -1]]
        assert answer.reasons == (not_found(0, 999), not_found(1, 1000))
        assert answer.coverage.share == 1.0


async def test_an_item_of_a_dead_shard_is_said_to_be_missing_among_the_rest():
    async with serving() as (service, shards, _, _):
        await shards[0].kill()
        await until(lambda: service.ready()[1]["shards_connected"] == 3)
        answer = await search(service, item_ids=[0, 59], k=2)
        (reason,) = answer.reasons
        assert (reason.query, reason.code) == (0, ReasonCode.NOT_FOUND_PARTIAL)
        assert "item 0 not found in the shards that answered (shard 0:" in reason.text
        assert answer.ranked.ids[1, 0] != -1
        now = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable, match="not found in the shards that answered"):
            await service.item(0, arrived_at=now)


async def test_a_look_up_that_missed_the_items_shard_makes_the_answer_partial():
    """Shard 0 fails only the fetch: the search that follows is complete, the answer is not."""

    async with serving() as (service, shards, _, _):
        shards[0].fetch_error = ErrorReply(code="overloaded", message="")
        for items in ([0, 59], [0]):  # with and without a search after the look-up
            answer = await search(service, item_ids=items, k=2)
            assert answer.reasons[0].code is ReasonCode.NOT_FOUND_PARTIAL
            assert missing(answer) == ["shard 0: overloaded"]
            assert (answer.coverage.shards_answered, answer.coverage.share) == (3, 0.75)
            await search(service, item_ids=items, k=2, min_coverage=0.75)
            with pytest.raises(Overloaded, match="too few rows") as caught:
                await search(service, item_ids=items, k=2, min_coverage=1.0)
            assert caught.value.hint == "shard 0: overloaded"


async def test_a_look_up_that_found_every_item_is_whole_whoever_missed_it():
    async with serving() as (service, shards, _, _):
        shards[0].fetch_error = ErrorReply(code="overloaded", message="")
        answer = await search(service, item_ids=[30, 59, 30], k=2, min_coverage=1.0)
        assert answer.reasons == ()
        assert (answer.coverage.share, answer.coverage.degraded) == (1.0, ())


def test_joined_coverage_is_the_smaller_with_the_reasons_of_both():
    def coverage(answered, *degraded):
        return Coverage(
            shards_asked=4,
            shards_answered=answered,
            rows_asked=40,
            rows_answered=10 * answered,
            degraded=degraded,
        )

    search_part, fetch_part = coverage(3, "shard 1: a"), coverage(2, "shard 1: a", "shard 2: b")
    expected = coverage(2, "shard 1: a", "shard 2: b")
    assert search_part.joined(fetch_part) == expected
    assert fetch_part.joined(search_part) == expected


BAD = [
    ({}, "vectors", "exactly one kind"),
    ({"vectors": [[1.0] * DIM], "item_ids": [1]}, "item_ids", "exactly one kind"),
    ({"vectors": []}, "vectors", "empty batch"),
    ({"features": []}, "features", "empty batch"),
    ({"item_ids": []}, "item_ids", "empty batch"),
    ({"item_ids": list(range(11))}, "item_ids", "batch too large"),
    ({"vectors": [[1.0] * 7]}, "vectors", "wrong dimension"),
    ({"vectors": [[1.0] * DIM, [np.nan] * DIM]}, "vectors[1]", "not finite"),
    ({"vectors": [[np.inf] + [1.0] * 7]}, "vectors[0]", "not finite"),
    ({"vectors": [[1e39] + [1.0] * 7]}, "vectors[0]", "not finite"),
    ({"vectors": [[0.0] * DIM]}, "vectors[0]", "zero vector"),
    ({"item_ids": [1, -4]}, "item_ids[1]", "negative id"),
    ({"item_ids": [1], "k": 0}, "k", "out of range"),
    ({"item_ids": [1], "k": -3}, "k", "out of range"),
    ({"item_ids": [1], "k": 61}, "k", "out of range"),
    ({"item_ids": [1], "timeout_ms": 0.0}, "timeout_ms", "out of range"),
    ({"item_ids": [1], "timeout_ms": 1e9}, "timeout_ms", "out of range"),
    ({"item_ids": [1], "min_coverage": 1.1}, "min_coverage", "out of range"),
    ({"item_ids": [1], "min_coverage": -0.1}, "min_coverage", "out of range"),
    ({"features": [{"slope": 1.0}, {}]}, "features[1].slope", "missing"),
]


@pytest.mark.parametrize(("query", "field", "message"), BAD)
async def test_bad_input_is_named_and_reaches_no_shard(query, field, message):
    async with serving(metric=Metric.COSINE) as (service, shards, _, _):
        with pytest.raises(InvalidInput, match=message) as caught:
            await search(service, **query)
        assert caught.value.field == field
        assert [shard.requests for shard in shards] == [[], [], [], []]


@pytest.mark.parametrize(
    ("queries", "timeout_ms", "expected"),
    [
        (1, None, 300.0),
        (QUERIES_IN_TIME, None, 300.0),
        (2 * QUERIES_IN_TIME, None, 600.0),
        (4 * QUERIES_IN_TIME, None, 1000.0),  # the largest that may be asked for
        (4 * QUERIES_IN_TIME, 50.0, 50.0),
    ],
)
def test_the_default_time_limit_grows_with_the_batch(queries, timeout_ms, expected):
    config = RouterConfig(default_timeout_ms=300, max_timeout_ms=1000)
    for query in ({"item_ids": list(range(queries))}, {"features": [{}] * queries}):
        assert resolve(config, **query, timeout_ms=timeout_ms).timeout_ms == expected


async def test_an_encoder_of_another_model_is_refused_and_vectors_still_work():
    async with serving(encoder="m0") as (service, _, _, vectors):
        with pytest.raises(VersionMismatch) as caught:
            await search(service, features=[{"slope": 1.0}])
        assert (caught.value.expected, caught.value.got) == ("m1", "m0")
        assert (await search(service, vectors=vectors[:1], k=1)).ranked.ids.shape == (1, 1)


async def test_a_generation_without_an_encoder_takes_no_features():
    async with serving(encoder=None) as (service, _, _, _):
        with pytest.raises(InvalidInput, match="no query encoder"):
            await search(service, features=[{"slope": 1.0}])
        assert service.status()["encoder"] is None


async def test_encoder_and_table_change_in_one_step_and_a_running_query_keeps_both():
    """The second generation's encoder belongs to its model; the first query began before it."""

    ids, vectors = make_rows(60, DIM)
    loaded = []

    def load_encoder(table):
        loaded.append(table.generation)
        return FakeEncoder(DIM, table.model_version)

    async with (
        running_shards(ids, vectors, 2) as old,
        running_shards(ids + 1000, vectors, 2, generation=2) as new,
    ):
        service = SearchService(FAST, SECRET, load_encoder=load_encoder)
        await service.apply(make_table(old, DIM))
        await service.apply(make_table(old, DIM, version=2))
        assert loaded == [1]  # the same generation needs no second load

        old[0].gate.clear()
        # item-to-item asks the shards twice, with the switch in between
        running = asyncio.create_task(search(service, item_ids=[3], k=5))
        await old[0].asked.wait()
        table = make_table(new, DIM, version=3, generation=2, model_version="m2")
        assert await service.apply(table)
        assert service.status()["encoder"]["model_version"] == "m2"
        fresh = await search(service, features=[{"slope": 0.5}], k=5)
        assert (fresh.generation, fresh.model_version) == (2, "m2")
        old[0].gate.set()
        answer = await running
        assert (answer.generation, answer.model_version) == (1, "m1")
        assert (answer.ranked.ids < 1000).all()
        assert (fresh.ranked.ids >= 1000).all()
        await service.close()


async def test_one_deadline_covers_looking_up_and_searching():
    async with serving() as (service, shards, _, _):
        for shard in shards:
            shard.gate.clear()
        with pytest.raises(DeadlineExceeded):
            await search(service, item_ids=[1], timeout_ms=30.0)


async def test_the_deadline_counts_from_the_arrival_not_from_the_start_of_the_work():
    async with serving() as (service, shards, _, vectors):
        long_ago = asyncio.get_running_loop().time() - 1.0
        with pytest.raises(DeadlineExceeded):
            await service.search(
                resolve(service.config, vectors=vectors[:1], timeout_ms=900.0), arrived_at=long_ago
            )
        assert shards[0].requests == []


async def test_the_time_taken_counts_from_when_the_request_began():
    async with serving() as (service, _, _, vectors):
        query, began_at = resolve(service.config, vectors=vectors[:1]), time.perf_counter() - 3.0
        now = asyncio.get_running_loop().time()
        answer = await service.search(query, arrived_at=now, began_at=began_at)
        assert 3000 < answer.took_ms < 5000


def test_on_a_loop_with_a_coarse_clock_the_time_taken_is_fine_grained():
    uvloop = pytest.importorskip("uvloop")

    async def run():
        async with serving() as (service, _, _, vectors):
            taken = [(await search(service, vectors=vectors[:1])).took_ms for _ in range(5)]
            assert any(abs(took_ms - round(took_ms)) > 1e-6 for took_ms in taken)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def test_more_requests_than_allowed_are_refused_and_the_place_is_given_back():
    service = SearchService(FAST.model_copy(update={"max_in_flight": 1}), SECRET)
    with service.admit(), pytest.raises(Overloaded, match="too many requests"), service.admit():
        pass
    with service.admit():
        pass


async def test_item_is_the_stored_vector_and_its_shard():
    async with serving() as (service, _, _, vectors):
        now = asyncio.get_running_loop().time()
        answer = await service.item(16, arrived_at=now)
        np.testing.assert_array_equal(answer.vector, vectors[16])
        assert (answer.item_id, answer.shard, answer.generation) == (16, 1, 1)
        with pytest.raises(NotFound):
            await service.item(60, arrived_at=now)
        with pytest.raises(InvalidInput):
            await service.item(-1, arrived_at=now)


async def test_ready_and_status_follow_table_and_connections():
    empty = SearchService(FAST, SECRET)
    assert empty.ready() == (False, {"ready": False, "reason": "no routing table yet"})
    with pytest.raises(Unavailable):
        empty.status()
    async with serving() as (service, shards, _, _):
        assert service.ready() == (
            True,
            {
                "ready": True,
                "cluster_id": "",
                "shards_connected": 4,
                "shards": 4,
                "rows_connected": 60,
                "rows": 60,
            },
        )
        status = service.status()
        assert {key: status[key] for key in ("version", "index", "dim", "metric", "rows")} == {
            "version": 1,
            "index": "flat",
            "dim": DIM,
            "metric": "dot",
            "rows": 60,
        }
        assert status["encoder"]["features"] == FakeEncoder.features
        for shard in shards:
            await shard.kill()
        await until(lambda: not service.ready()[0])
        assert [shard["connected"] for shard in service.status()["shards"]] == [False] * 4
        assert all(shard["reason"] for shard in service.status()["shards"])


async def test_shards_that_keep_silent_do_not_count_as_ready():
    config = FAST.model_copy(update={"late_after_ms": 100.0, "stall_timeout_ms": 60_000.0})

    async def connected(count):
        """Once the question that goes on has found out who is late."""
        while (found := await service.heard_ready())[1]["shards_connected"] != count:
            await asyncio.sleep(0.01)
        return found

    async with serving(config=config) as (service, shards, _, _):
        assert (await service.heard_ready())[0]
        asked = [len(shard.requests) for shard in shards]
        await asyncio.gather(*(service.heard_ready() for _ in range(50)))
        assert [len(shard.requests) for shard in shards] == asked, "not again so soon"
        for shard in shards[1:]:
            shard.gate.clear()
        await asyncio.sleep(HEARD_S)
        ready, state = await asyncio.wait_for(connected(1), 5)
        assert (ready, state["rows_connected"]) == (True, 15)
        shards[0].gate.clear()
        assert not (await asyncio.wait_for(connected(0), 5))[0]
        found = await asyncio.gather(*(service.heard_ready() for _ in range(50)))
        assert {ready for ready, _ in found} == {False}
        for shard in shards:
            shard.gate.set()
        await until(lambda: service.ready()[1]["shards_connected"] == 4)
        assert (await service.heard_ready())[0]


async def test_readiness_waits_neither_for_the_last_shard_nor_for_long():
    """Kubernetes gives a probe a second: one shard that answers is enough, and with none that does
    what is known decides, until the question has found out more."""
    config = FAST.model_copy(update={"late_after_ms": 600.0, "stall_timeout_ms": 60_000.0})

    async def asked():
        began_at = asyncio.get_running_loop().time()
        ready, _ = await service.heard_ready()
        return ready, asyncio.get_running_loop().time() - began_at

    async with serving(config=config) as (service, shards, _, _):
        for shard in shards[1:]:
            shard.gate.clear()
        for _ in range(3):
            ready, took_s = await asked()
            assert ready
            assert took_s < HEAR_S
        await until(lambda: service._readiness._hearing is None)
        await asyncio.sleep(HEARD_S)
        shards[0].gate.clear()
        began_at = asyncio.get_running_loop().time()
        ready, took_s = await asked()
        assert ready, "not late yet"
        assert HEAR_S <= took_s < 2 * HEAR_S
        while (await asked())[0]:
            pass
        assert asyncio.get_running_loop().time() - began_at < 0.6 + 2 * HEAR_S


def test_drop_own_moves_the_rest_up_and_leaves_other_rows_alone():
    ids = np.array([[4, 7, 9], [4, 7, -1]])
    scores = np.array([[3, 2, 1], [3, 2, -np.inf]], np.float32)
    got_ids, got_scores = drop_own(Ranked(ids, scores), np.array([7, 100]))
    assert got_ids.tolist() == [[4, 9, -1], [4, 7, -1]]
    assert got_scores.tolist() == [[3, 1, -np.inf], [3, 2, -np.inf]]


async def test_a_query_that_comes_again_is_answered_from_the_cache():
    async with serving() as (service, shards, _, vectors):
        first = await search(service, vectors=vectors[:2].tolist(), k=4)
        again = await search(service, vectors=vectors[:2].tolist(), k=4)
        np.testing.assert_array_equal(again.ranked.ids, first.ranked.ids)
        np.testing.assert_array_equal(again.ranked.scores, first.ranked.scores)
        assert again.coverage == first.coverage
        assert again.search_ms == 0.0
        await search(service, vectors=vectors[:2].tolist(), k=5)
        assert [len(shard.requests) for shard in shards] == [2, 2, 2, 2]
        stats = service.status()["cache"]
        assert (stats["hits"], stats["misses"], stats["entries"]) == (1, 2, 2)


async def test_background_searches_are_not_kept():
    options = SearchOptions(background=True)
    async with serving() as (service, shards, _, vectors):
        for _ in range(2):
            answer = await search(service, vectors=vectors[:2].tolist(), k=4, options=options)
        assert answer.others_share == 0.0
        assert [len(shard.requests) for shard in shards] == [2, 2, 2, 2]
        assert service.status()["cache"]["entries"] == 0
        assert (await search(service, vectors=vectors[:2].tolist(), k=4)).others_share is None


async def test_a_partial_answer_is_never_repeated():
    async with serving() as (service, shards, _, vectors):
        shards[1].error = ErrorReply(code="overloaded", message="")
        assert (await search(service, vectors=vectors[:1])).coverage.share == 0.75
        shards[1].error = None
        assert (await search(service, vectors=vectors[:1])).coverage.share == 1.0


async def test_another_generation_answers_for_itself():
    ids, vectors = make_rows(60, DIM)
    async with (
        serving() as (service, _, _, _),
        running_shards(ids + 1000, vectors, 2, generation=2) as new,
    ):
        assert (await search(service, vectors=vectors[:1])).ranked.ids.max() < 1000
        await service.apply(make_table(new, DIM, version=2, generation=2))
        assert service.status()["cache"]["entries"] == 0
        answer = await search(service, vectors=vectors[:1])
        assert answer.ranked.ids.min() >= 1000
        assert answer.generation == 2


async def test_an_answer_that_is_late_for_a_switch_is_not_given_to_the_new_generation():
    ids, vectors = make_rows(60, DIM)
    async with (
        serving() as (service, old, _, _),
        running_shards(ids + 1000, vectors, 2, generation=2) as new,
    ):
        query = {"vectors": vectors[:1].tolist(), "timeout_ms": 5000}
        old[1].gate.clear()
        running = asyncio.create_task(search(service, **query))
        await old[1].asked.wait()
        await service.apply(make_table(new, DIM, version=2, generation=2))
        old[1].gate.set()
        late = await running
        assert (late.generation, late.ranked.ids.max() < 1000) == (1, True)
        for _ in range(2):  # the second one from the cache
            answer = await search(service, **query)
            assert (answer.generation, answer.ranked.ids.min() >= 1000) == (2, True)
        assert service.status()["cache"]["hits"] == 1


async def test_without_a_cache_every_query_is_asked():
    config = FAST.model_copy(update={"cache_bytes": 0})
    async with serving(config=config) as (service, shards, _, vectors):
        for _ in range(2):
            await search(service, vectors=vectors[:1])
        assert len(shards[0].requests) == 2
        assert service.status()["cache"] is None
