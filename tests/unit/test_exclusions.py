"""Excluded items on their way through a router: bodies, frames, histories, short answers, cache."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgpack
import numpy as np
import pytest

from shardline.router.cache import cache_key
from shardline.router.contract import pack_array
from shardline.router.excluded import MAX_EXCLUDED, ascending, by_shard, with_excluded
from shardline.router.fanout import coalesce
from shardline.router.http.body_values import TakesLong
from shardline.router.http.codec import decode_query
from shardline.router.http.excluded_values import EXCLUDED_IN_LOOP
from shardline.router.http.media import Media
from shardline.router.limits import MAX_QUERY_BYTES, check_size
from shardline.router.query import ResolvedQuery, SearchAnswer
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.messages import SearchRequest
from shardline.shards.core.partition import Partitioning, partition
from tests.fake_encoder import FakeEncoder, history_encoder
from tests.fake_shard import (
    SECRET,
    FakeShard,
    brute_force,
    make_rows,
    make_table,
    running_shards,
    until,
)

DIM, ROWS, SHARDS = 8, 60, 4
CONFIG = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, max_batch=64, max_k=60, default_k=10)
IDS, VECTORS = make_rows(ROWS, DIM)
LOW = {"item_id": {"$lt": 20}}


def packed(media: Media, body: Any) -> bytes:
    if media is Media.JSON:
        return json.dumps(body).encode()
    whole: bytes = msgpack.packb(body, default=pack_array)
    return whole


def decoded(media: Media = Media.JSON, *, in_loop: bool = False, **body: Any) -> ResolvedQuery:
    return decode_query(packed(media, body), media, CONFIG, in_loop=in_loop)


@contextlib.asynccontextmanager
async def serving(
    config: RouterConfig = CONFIG, encoder: Any = None, **table: Any
) -> AsyncIterator[tuple[SearchService, list[FakeShard]]]:
    async with running_shards(IDS, VECTORS, SHARDS) as shards:
        service = SearchService(config, SECRET, load_encoder=lambda _table: encoder)
        await service.apply(make_table(shards, DIM, **table))
        yield service, shards
        await service.close()


async def ask(service: SearchService, **body: Any) -> SearchAnswer:
    now = asyncio.get_running_loop().time()
    return await service.search(decoded(**body), arrived_at=now)


def expected(query: np.ndarray, excluded: Sequence[int], k: int, below: int = ROWS) -> np.ndarray:
    kept = ~np.isin(IDS, np.array(excluded, np.int64)) & (below > IDS)
    return brute_force(query[None], IDS[kept], VECTORS[kept], k).ids[0]


def told(answer: SearchAnswer) -> list[tuple[Any, ...]]:
    return [(each.query, str(each.code), each.matched, each.count) for each in answer.reasons]


@pytest.mark.parametrize("media", Media)
def test_ids_are_ascending_and_each_once(media: Media) -> None:
    query = decoded(media, item_ids=[1, 2], exclude=[[5, 3, 5, 0, 2**63 - 1], []])
    assert [ids.tolist() for ids in query.excluded] == [[0, 3, 5, 2**63 - 1], []]
    assert all(ids.dtype == np.int64 for ids in query.excluded)
    for nothing in (None, [[], []]):
        assert decoded(media, item_ids=[1, 2], exclude=nothing).excluded == ()
    assert decoded(media, item_ids=[1, 2]).excluded == ()
    most = list(range(MAX_EXCLUDED))
    assert decoded(media, item_ids=[1], exclude=[most]).excluded[0].tolist() == most


@pytest.mark.parametrize("dtype", ["<i4", "<i8"])
def test_an_array_of_msgpack_is_a_list_of_ids(dtype: str) -> None:
    given = [np.array([9, 4, 9], dtype), np.array([], dtype)]
    query = decoded(Media.MSGPACK, item_ids=[1, 2], exclude=given)
    assert [ids.tolist() for ids in query.excluded] == [[4, 9], []]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (7, "exclude"),
        ("1,2", "exclude"),
        ({"1": 2}, "exclude"),
        ([], "exclude"),
        ([[1]], "exclude"),
        ([[1]] * 3, "exclude"),
        ([[1]] * 65, "exclude"),
        ([1, 2], "exclude[0]"),
        ([[1], None], "exclude[1]"),
        ([[1], "12"], "exclude[1]"),
        ([[1], [2, -1]], "exclude[1][1]"),
        ([[1], [2.0]], "exclude[1][0]"),
        ([[True], [2]], "exclude[0][0]"),
        ([[None], [2]], "exclude[0][0]"),
        ([[1, [2]], [2]], "exclude[0][1]"),
        ([["1"], [2]], "exclude[0][0]"),
        ([[2**63], []], "exclude[0]"),
        ([[1], list(range(MAX_EXCLUDED + 1))], "exclude[1]"),
    ],
)
@pytest.mark.parametrize("media", Media)
def test_what_is_no_list_of_ids_is_refused_by_its_place(
    media: Media, given: Any, field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        decoded(media, item_ids=[1, 2], exclude=given)
    assert caught.value.field == field
    assert caught.value.expected


@pytest.mark.parametrize(
    "array",
    [
        np.array([1.0, np.nan], "<f8"),
        np.array([1.0], "<f4"),
        np.array([-1], "<i8"),
        np.array([[1]], "<i8"),
        np.zeros(MAX_EXCLUDED + 1, "<i4"),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(InvalidInput) as caught:
        decoded(Media.MSGPACK, item_ids=[1], exclude=[array])
    assert caught.value.field is not None
    assert caught.value.field.startswith("exclude[0]")
    with pytest.raises(InvalidInput) as caught:
        decoded(Media.MSGPACK, item_ids=[1], exclude=array)
    assert caught.value.field == "exclude"


def test_nan_is_no_id() -> None:
    with pytest.raises(InvalidInput):
        decode_query(b'{"item_ids":[1],"exclude":[[NaN]]}', Media.JSON, CONFIG)
    with pytest.raises(InvalidInput) as caught:
        decoded(Media.MSGPACK, item_ids=[1], exclude=[[float("nan")]])
    assert caught.value.field == "exclude[0][0]"


def test_many_ids_are_checked_in_a_thread() -> None:
    lists = [list(range(EXCLUDED_IN_LOOP // 2))] * 2
    assert decoded(in_loop=True, item_ids=[1, 2], exclude=lists).excluded
    with pytest.raises(TakesLong):
        decoded(in_loop=True, item_ids=[1, 2], exclude=[[*lists[0], 99_999], lists[1]])


def test_what_no_frame_can_carry_is_refused() -> None:
    vectors = np.zeros((1000, 16), np.float32)
    fits = (MAX_QUERY_BYTES - vectors.nbytes - 4 * len(vectors)) // 8
    check_size(vectors, "vectors", fits)
    with pytest.raises(InvalidInput) as caught:
        check_size(vectors, "vectors", fits + 1)
    assert caught.value.field == "exclude"


@pytest.mark.parametrize("kind", Partitioning)
@pytest.mark.parametrize("num_shards", [1, 2, 7])
def test_each_shard_gets_its_own_ids(kind: Partitioning, num_shards: int) -> None:
    rng = np.random.default_rng(4)
    items = np.sort(rng.choice(10**6, 300, replace=False))
    parts = partition(items, num_shards, kind)
    for sizes in ([40], [0, 5, 300, 0, 1], [3, 0]):
        lists = [np.sort(rng.choice(items, size, replace=False)) for size in sizes]
        for shard, excluded in enumerate(by_shard(lists, parts)):
            own = [ids[parts.shard_of(ids) == shard] for ids in lists]
            if excluded is None:
                assert not any(map(len, own))
                continue
            assert excluded.counts.dtype == np.int32
            assert excluded.counts.tolist() == [len(ids) for ids in own]
            assert excluded.ids.tolist() == np.concatenate(own).tolist()


def test_ids_for_all_queries_are_added_to_each_ones_own() -> None:
    plain = decoded(item_ids=[1, 2])
    assert with_excluded(plain, np.array([], np.int64)) is plain
    query = with_excluded(plain, np.array([7, 3, 7]))
    assert [ids.tolist() for ids in query.excluded] == [[3, 7], [3, 7]]
    query = with_excluded(decoded(item_ids=[1, 2], exclude=[[5, 3], []]), np.array([7, 3]))
    assert [ids.tolist() for ids in query.excluded] == [[3, 5, 7], [3, 7]]


def test_ascending_is_unique() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 50):
        ids = rng.integers(0, 30, size)
        assert ascending(ids).tolist() == np.unique(ids).tolist()


def test_answers_of_other_exclusions_are_not_taken_from_the_cache() -> None:
    lists: list[Any] = [None, [[1], []], [[], [1]], [[1], [1]], [[1, 2], []]]
    queries = [decoded(item_ids=[1, 2], exclude=each) for each in lists]
    assert len({cache_key(1, VECTORS[:2], 3, query) for query in queries}) == len(lists)


async def test_excluded_items_do_not_come_back_and_a_short_answer_says_why() -> None:
    async with serving() as (service, shards):
        vectors = VECTORS[:3].tolist()
        best = expected(VECTORS[1], [], ROWS)
        lists = [[], best[:25].tolist(), [3, 999, 10**12]]
        answer = await ask(service, vectors=vectors, k=6, exclude=lists)
        for row, excluded in enumerate(lists):
            wanted = expected(VECTORS[row], excluded, 6)
            np.testing.assert_array_equal(answer.ranked.ids[row], wanted)
        assert answer.reasons == ()
        assert [len(shard.requests) for shard in shards] == [1] * SHARDS, "one frame to each"

        lists = [[], best[:55].tolist(), list(range(ROWS))]
        answer = await ask(service, vectors=vectors, k=6, exclude=lists)
        np.testing.assert_array_equal(answer.ranked.ids[1], expected(VECTORS[1], lists[1], 6))
        assert told(answer) == [(1, "exclusion", None, 55), (2, "exclusion", None, ROWS)]

        answer = await ask(service, vectors=vectors, k=6, exclude=lists, filter=LOW)
        for row, excluded in enumerate(lists):
            wanted = expected(VECTORS[row], excluded, 6, below=20)
            np.testing.assert_array_equal(answer.ranked.ids[row], wanted)
        of_low = int((best[:55] < 20).sum())
        assert told(answer) == [(1, "exclusion", None, of_low), (2, "exclusion", None, 20)]


async def test_a_shard_is_sent_its_own_ids_alone() -> None:
    async with serving() as (service, shards):
        exclude = [[1, 2, 40], [16]]
        await ask(service, vectors=VECTORS[:2].tolist(), exclude=exclude)
        sent = [shard.requests[-1].excluded for shard in shards]
        held = [
            None if each is None else (each.counts.tolist(), each.ids.tolist()) for each in sent
        ]
        assert held == [([2, 0], [1, 2]), ([0, 1], [16]), ([1, 0], [40]), None]


async def test_each_query_keeps_its_own_exclusions_with_filters_and_unknown_items() -> None:
    async with serving() as (service, _):
        filters = [LOW, None, LOW, {"item_id": {"$lt": 9}}]
        lists = [[1, 2, 3], [5], [], [0, 1]]
        answer = await ask(
            service, vectors=VECTORS[:4].tolist(), k=8, filter=filters, exclude=lists
        )
        for row, below in enumerate([20, ROWS, 20, 9]):
            wanted = expected(VECTORS[row], lists[row], 8, below)
            np.testing.assert_array_equal(answer.ranked.ids[row], wanted)
        assert told(answer) == [(3, "exclusion", None, 2)]

        answer = await ask(service, item_ids=[4, 999, 7], k=5, exclude=[[1, 2], [3], [4, 7]])
        for row, excluded in ((0, [1, 2, 4]), (2, [4, 7])):
            item = int([4, 999, 7][row])
            wanted = expected(VECTORS[item], excluded, 5)
            np.testing.assert_array_equal(answer.ranked.ids[row], wanted)
        assert (answer.ranked.ids[1] == -1).all()
        assert told(answer) == [(1, "not_found", None, None)]


async def test_an_item_query_of_the_largest_k_finds_all_others() -> None:
    async with serving() as (service, _):
        answer = await ask(service, item_ids=[4], k=ROWS)
        assert (answer.ranked.ids >= 0).sum() == ROWS - 1
        assert answer.reasons == ()
        config = CONFIG.model_copy(update={"max_k": 20})
        async with serving(config) as (smaller, _):
            answer = await ask(smaller, item_ids=[4], k=20)
            np.testing.assert_array_equal(answer.ranked.ids[0], expected(VECTORS[4], [4], 20))


async def test_a_partial_answer_says_how_many_items_were_not_searched() -> None:
    async with serving() as (service, shards):
        shards[0].gate.clear()
        lists = [list(range(10, 50))]
        answer = await ask(
            service, vectors=VECTORS[:1].tolist(), k=12, exclude=lists, timeout_ms=200
        )
        assert told(answer) == [(0, "exclusion", None, 35), (0, "coverage", None, 15)]
        whole = await ask(service, vectors=VECTORS[:1].tolist(), k=10, timeout_ms=200)
        assert whole.coverage.degraded
        assert whole.reasons == ()
        shards[0].gate.set()


async def test_searches_with_and_without_exclusions_share_frames() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coalesce, "HOLD_MS", 60_000.0)
        async with serving() as (service, shards):
            for shard in shards:
                shard.gate.clear()
            bodies: list[dict[str, Any]] = [
                {"vectors": VECTORS[:1].tolist()},
                {"vectors": VECTORS[1:2].tolist(), "exclude": [[1, 2, 3, 50]]},
                {"vectors": VECTORS[2:4].tolist()},
                {"vectors": VECTORS[4:6].tolist(), "exclude": [[], list(range(30))]},
            ]
            first = asyncio.create_task(ask(service, **bodies[0], k=6))
            await until(lambda: all(shard.requests for shard in shards))
            others = [asyncio.create_task(ask(service, **body, k=6)) for body in bodies[1:]]
            await asyncio.sleep(0.01)
            for shard in shards:
                shard.gate.set()
            answers = await asyncio.gather(first, *others)
            assert [len(each.queries) for each in shards[0].requests] == [1, 5]
            for body, answer in zip(bodies, answers, strict=True):
                lists = body.get("exclude", [[]] * len(body["vectors"]))
                for row, excluded in enumerate(lists):
                    query = np.array(body["vectors"][row], np.float32)
                    np.testing.assert_array_equal(
                        answer.ranked.ids[row], expected(query, excluded, 6)
                    )
                assert answer.reasons == ()


async def test_a_frame_carries_so_many_ids_and_a_larger_request_travels_alone() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coalesce, "HOLD_MS", 60_000.0)
        patch.setattr(coalesce, "MAX_FRAME_EXCLUDED", 10)
        async with serving() as (service, shards):
            for shard in shards:
                shard.gate.clear()
            lists = [[], [*range(6)], [*range(4)], [*range(5)], [*range(30)], [1], []]
            asked = [
                asyncio.create_task(ask(service, vectors=VECTORS[:1].tolist(), exclude=[each]))
                for each in lists[:1]
            ]
            await until(lambda: all(shard.requests for shard in shards))
            for each in lists[1:]:
                asked.append(
                    asyncio.create_task(ask(service, vectors=VECTORS[:1].tolist(), exclude=[each]))
                )
                await asyncio.sleep(0)
            for shard in shards:
                shard.gate.set()
            answers = await asyncio.gather(*asked)
            for excluded, answer in zip(lists, answers, strict=True):
                wanted = expected(VECTORS[0], excluded, 10)
                np.testing.assert_array_equal(answer.ranked.ids[0], wanted)
            assert [len(each.queries) for each in shards[0].requests] == [1, 2, 1, 1, 2]


async def test_the_cache_keeps_answers_of_exclusions_apart_with_their_reasons() -> None:
    config = CONFIG.model_copy(update={"cache_bytes": 1 << 20})
    async with serving(config) as (service, shards):
        body = {"vectors": VECTORS[:1].tolist(), "k": 5}
        lists: list[Any] = [None, [[1]], [list(range(58))]]
        first = [await ask(service, **body, exclude=each) for each in lists]
        before = len(shards[0].requests)
        again = [await ask(service, **body, exclude=each) for each in lists]
        assert len(shards[0].requests) == before
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(one.ranked.ids, other.ranked.ids)
            assert one.reasons == other.reasons
        assert told(again[2]) == [(0, "exclusion", None, 58)]


async def test_searches_with_exclusions_are_not_watched() -> None:
    async with serving() as (service, _):
        seen: list[int] = []
        service.watch.offer = lambda lane, queries, answer: seen.append(len(queries))  # type: ignore[method-assign]
        await ask(service, vectors=VECTORS[:1].tolist(), exclude=[[1]])
        assert seen == []
        await ask(service, vectors=VECTORS[:2].tolist())
        assert seen == [2]


async def test_the_items_of_a_history_do_not_come_back() -> None:
    known = np.eye(6, dtype=np.float32)
    async with serving(encoder=history_encoder(DIM, known)) as (service, shards):
        features = [{"history": [5, 1, 5, 40]}, {"history": None}, {"history": [2]}]
        plain = await ask(service, features=features, k=ROWS)
        answer = await ask(service, features=features, k=ROWS, exclude_history=True)
        for row, gone in enumerate([[1, 5, 40], [], [2]]):
            kept = [item for item in plain.ranked.ids[row].tolist() if item not in gone]
            found = answer.ranked.ids[row]
            assert sorted(found[found >= 0].tolist()) == sorted(kept)
        assert told(answer) == [(0, "exclusion", None, 3), (2, "exclusion", None, 1)]
        both = await ask(
            service, features=features, k=10, exclude_history=True, exclude=[[7], [8], []]
        )
        for row, gone in enumerate([[1, 5, 7, 40], [8], [2]]):
            assert not np.isin(both.ranked.ids[row], gone).any()
        request = shards[0].requests[-1]
        assert isinstance(request, SearchRequest)
        assert request.excluded is not None
        assert request.excluded.ids.tolist() == [1, 5, 7, 8, 2]


async def test_of_a_long_history_the_newest_items_are_left_out() -> None:
    known = np.eye(6, dtype=np.float32)
    async with serving(encoder=history_encoder(DIM, known)) as (service, _):
        history = [3, 4, *range(100, 100 + MAX_EXCLUDED - 1), 5]
        answer = await ask(service, features=[{"history": history}], k=ROWS, exclude_history=True)
        found = answer.ranked.ids[0]
        assert np.isin([3, 4], found).all()
        assert 5 not in found


async def test_a_history_is_excluded_only_where_there_is_one() -> None:
    with pytest.raises(InvalidInput) as caught:
        decoded(item_ids=[1], exclude_history=True)
    assert caught.value.field == "exclude_history"
    assert decoded(item_ids=[1], exclude_history=False).exclude_history is False
    async with serving(encoder=FakeEncoder(DIM)) as (service, shards):
        with pytest.raises(InvalidInput, match="no history") as caught:
            await ask(service, features=[{"slope": 1}], exclude_history=True)
        assert caught.value.field == "exclude_history"
        assert not shards[0].requests
        await ask(service, features=[{"slope": 1}])
