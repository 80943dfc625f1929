"""Filters on their way through a router: bodies, groups of queries, short answers, the cache."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import numpy as np
import pytest

from shardline.router.contract import Reason
from shardline.router.filter_groups import FILTERS_AT_ONCE, groups_of
from shardline.router.http.body_values import TakesLong
from shardline.router.http.codec import (
    FILTERED_IN_LOOP,
    FILTERS_BYTES_IN_LOOP,
    FILTERS_IN_LOOP,
    decode_query,
    encode_answer,
)
from shardline.router.http.media import Media
from shardline.router.limits import MAX_QUERY_BYTES
from shardline.router.query import ResolvedQuery, SearchAnswer
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.filter_language import MAX_FILTER_BYTES, check_filter
from shardline.shards.core.messages import NO_OPTIONS, SearchOptions, SearchRequest
from shardline.shards.wire.frames import HEADER, MAX_FRAME_BYTES, encode_frame
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
FEW = {"item_id": {"$in": [3, 33, 59]}}
NONE = {"item_id": 999}


def packed(media: Media, **body: Any) -> bytes:
    return json.dumps(body).encode() if media is Media.JSON else msgpack.packb(body)


def decoded(media: Media = Media.JSON, *, in_loop: bool = False, **body: Any) -> ResolvedQuery:
    return decode_query(packed(media, **body), media, CONFIG, in_loop=in_loop)


@contextlib.asynccontextmanager
async def serving(
    config: RouterConfig = CONFIG,
) -> AsyncIterator[tuple[SearchService, list[FakeShard]]]:
    async with running_shards(IDS, VECTORS, SHARDS) as shards:
        service = SearchService(config, SECRET, load_encoder=lambda _table: None)
        await service.apply(make_table(shards, DIM))
        yield service, shards
        await service.close()


async def ask(service: SearchService, **body: Any) -> SearchAnswer:
    now = asyncio.get_running_loop().time()
    return await service.search(decoded(**body), arrived_at=now)


def expected(queries: np.ndarray, allowed: np.ndarray, k: int) -> np.ndarray:
    return brute_force(queries, IDS[allowed], VECTORS[allowed], k).ids


@pytest.mark.parametrize("media", Media)
def test_equal_filters_of_a_body_are_one_option(media: Media) -> None:
    one = decoded(media, item_ids=[1, 2], filter=LOW)
    assert (one.options.filter, one.filters) == (check_filter(LOW), ())
    listed = decoded(media, item_ids=[1, 2], filter=[LOW, {"item_id": {"$lt": 20.0}}])
    assert (listed.options, listed.filters) == (one.options, ())
    several = decoded(media, item_ids=[1, 2], filter=[LOW, None], exact=True)
    assert several.filters == (check_filter(LOW), b"")
    assert several.options.exact
    for nothing in (None, {}, [None, None], [{}, None]):
        query = decoded(media, item_ids=[1, 2], filter=nothing)
        assert (query.options, query.filters) == (NO_OPTIONS, ())
    assert decoded(media, item_ids=[1, 2], filter=None).options is NO_OPTIONS


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"item_id": {"$near": 1}}, "filter.item_id.$near"),
        ([LOW, {"item_id": {"$near": 1}}], "filter[1].item_id.$near"),
        ([LOW, 7], "filter[1]"),
        (7, "filter"),
        ("price < 20", "filter"),
        ([], "filter"),
        ([LOW], "filter"),
        ([LOW] * 3, "filter"),
        ([LOW] * 65, "filter"),
    ],
)
@pytest.mark.parametrize("media", Media)
def test_what_is_no_filter_is_refused_by_its_path(media: Media, given: Any, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decoded(media, item_ids=[1, 2], filter=given)
    assert caught.value.field == field


@pytest.mark.parametrize("value", [{"dtype": "<i8", "shape": [1], "data": bytes(8)}, b"a", 1e999])
def test_what_only_msgpack_has_is_no_value_of_a_filter(value: Any) -> None:
    for given in ({"item_id": value}, {"item_id": {"$in": [value]}}, {"item_id": {"$lt": value}}):
        with pytest.raises(InvalidInput) as caught:
            decoded(Media.MSGPACK, item_ids=[1], filter=given)
        assert caught.value.field is not None
        assert caught.value.field.startswith("filter.item_id")


@pytest.mark.parametrize(
    ("place", "field"),
    [
        (lambda array: array, "filter"),
        (lambda array: [array], "filter[0]"),
        (lambda array: {"$and": array}, "filter.$and"),
        (lambda array: {"$or": array}, "filter.$or"),
        (lambda array: {"$or": [array]}, "filter.$or[0]"),
        (lambda array: {"$not": array}, "filter.$not"),
        (lambda array: {"a": {"$not": array}}, "filter.a.$not"),
        (lambda array: {"a": {"$in": array}}, "filter.a.$in"),
        (lambda array: {"a": {"$exists": array}}, "filter.a.$exists"),
    ],
)
@pytest.mark.parametrize("length", [0, 1, 2])
def test_an_array_of_msgpack_is_no_part_of_a_filter(place: Any, field: str, length: int) -> None:
    array = {"dtype": "<i8", "shape": [length], "data": bytes(8 * length)}
    with pytest.raises(InvalidInput) as caught:
        decoded(Media.MSGPACK, item_ids=[1], filter=place(array))
    assert caught.value.field == field


def test_large_filters_are_checked_in_a_thread() -> None:
    many = {"item_id": {"$in": list(range(9000))}}
    assert len(packed(Media.JSON, item_ids=[1], filter=many)) > FILTERED_IN_LOOP
    with pytest.raises(TakesLong):
        decoded(in_loop=True, item_ids=[1], filter=many)
    assert decoded(item_ids=[1], filter=many).options.filter
    assert decoded(in_loop=True, item_ids=[1], filter=LOW).options.filter


def test_many_filters_are_checked_in_a_thread() -> None:
    """Their number counts, not only their bytes."""
    config = CONFIG.model_copy(update={"max_batch": 1000})

    def taken(count: int, given: Any) -> ResolvedQuery:
        body = packed(Media.JSON, item_ids=[1] * count, filter=[given] * count)
        return decode_query(body, Media.JSON, config, in_loop=True)

    assert taken(FILTERS_IN_LOOP, {"a": 1}).options.filter
    with pytest.raises(TakesLong):
        taken(FILTERS_IN_LOOP + 1, {"a": 1})
    with pytest.raises(TakesLong):
        taken(2, {"a": {"$in": ["x" * FILTERS_BYTES_IN_LOOP]}})


def test_a_frame_has_room_for_the_most_vectors_and_the_largest_filter() -> None:
    dim = 8192
    rows = MAX_QUERY_BYTES // (4 * dim)
    request = SearchRequest(
        queries=np.zeros((rows, dim), np.float32),
        k=10,
        timeout_ms=1.0,
        options=SearchOptions(min_seq=(2**40,) * 8, filter=bytes(MAX_FILTER_BYTES)),
    )
    assert (rows + 1) * dim * 4 > MAX_QUERY_BYTES
    assert len(encode_frame(1, request)) <= HEADER.size + MAX_FRAME_BYTES


async def test_only_items_that_match_come_back_and_a_short_answer_says_why() -> None:
    async with serving() as (service, _):
        vectors = VECTORS[:3].tolist()
        answer = await ask(service, vectors=vectors, k=4, filter=LOW)
        np.testing.assert_array_equal(answer.ranked.ids, expected(VECTORS[:3], IDS < 20, 4))
        assert answer.reasons == ()

        answer = await ask(service, vectors=vectors[:1], k=4, filter=FEW)
        few = np.isin(IDS, [3, 33, 59])
        np.testing.assert_array_equal(answer.ranked.ids, expected(VECTORS[:1], few, 4))
        reason = Reason(query=0, code="filter", text="3 items match the filter", matched=3)
        assert answer.reasons == (reason,)
        for media, decode in ((Media.JSON, json.loads), (Media.MSGPACK, msgpack.unpackb)):
            body = decode(encode_answer(answer, media))
            assert body["reasons"] == [
                {"query": 0, "code": "filter", "text": "3 items match the filter", "matched": 3}
            ]

        answer = await ask(service, vectors=vectors[:2], k=4, filter=NONE)
        assert (answer.ranked.ids == -1).all()
        assert [(each.query, each.text) for each in answer.reasons] == [
            (0, "no item matches the filter"),
            (1, "no item matches the filter"),
        ]


async def test_each_query_has_its_own_filter_and_equal_ones_share_a_frame() -> None:
    async with serving() as (service, shards):
        filters = [LOW, None, FEW, LOW, NONE]
        answer = await ask(service, vectors=VECTORS[:5].tolist(), k=4, filter=filters)
        everything = np.ones(ROWS, np.bool_)
        few = np.isin(IDS, [3, 33, 59])
        allowed = [IDS < 20, everything, few, IDS < 20, ~everything]
        for row, each in enumerate(allowed):
            wanted = expected(VECTORS[row : row + 1], each, 4)[0]
            np.testing.assert_array_equal(answer.ranked.ids[row], wanted)
        assert [(each.query, each.matched) for each in answer.reasons] == [(2, 3), (4, 0)]
        asked = [each for each in shards[0].requests if isinstance(each, SearchRequest)]
        assert sorted(len(each.queries) for each in asked) == [1, 1, 1, 2]
        assert answer.coverage.rows_asked == ROWS
        assert answer.seq == (0,) * SHARDS


async def test_many_filters_are_asked_a_few_at_a_time() -> None:
    async with serving() as (service, shards):
        for shard in shards:
            shard.gate.clear()
        filters = [{"item_id": row} for row in range(40)]
        asking = asyncio.create_task(
            ask(service, vectors=VECTORS[:40].tolist(), k=1, filter=filters)
        )
        await until(lambda: len(shards[0].requests) >= FILTERS_AT_ONCE)
        await asyncio.sleep(0.05)
        assert len(shards[0].requests) == FILTERS_AT_ONCE
        for shard in shards:
            shard.gate.set()
        answer = await asking
        assert answer.ranked.ids[:, 0].tolist() == list(range(40))


async def test_an_item_that_matches_is_not_counted_in_its_own_answer() -> None:
    async with serving() as (service, _):
        answer = await ask(service, item_ids=[3, 999, 4], k=5, filter=FEW)
        assert [row[row >= 0].tolist() for row in np.sort(answer.ranked.ids, axis=1)] == [
            [33, 59],
            [],
            [3, 33, 59],
        ]
        told = [(each.query, each.code, each.matched) for each in answer.reasons]
        assert told == [(1, "not_found", None), (0, "filter", 2), (2, "filter", 3)]

        each = await ask(service, item_ids=[3, 999, 4], k=2, filter=[FEW, LOW, NONE])
        told = [(each.query, each.code, each.matched) for each in each.reasons]
        assert told == [(1, "not_found", None), (2, "filter", 0)]
        assert sorted(each.ranked.ids[0].tolist()) == [33, 59]


async def test_a_partial_answer_says_that_others_may_match() -> None:
    async with serving() as (service, shards):
        shards[0].gate.clear()
        answer = await ask(service, vectors=VECTORS[:1].tolist(), k=4, filter=FEW, timeout_ms=200)
        assert answer.coverage.shards_answered == SHARDS - 1
        assert [reason.text for reason in answer.reasons] == [
            "2 items match the filter in the shards that answered",
            "15 of 60 items were not searched",
        ]
        shards[0].gate.set()


async def test_what_a_shard_refuses_is_the_callers_error_with_its_place() -> None:
    async with serving() as (service, _):
        wrong = {"price": {"$lt": 20}}
        with pytest.raises(InvalidInput, match="item_id") as caught:
            await ask(service, vectors=VECTORS[:1].tolist(), filter=wrong)
        assert caught.value.field == "filter.price"
        with pytest.raises(InvalidInput, match="item_id") as caught:
            await ask(service, item_ids=[1, 999, 2], filter=[LOW, LOW, wrong])
        assert caught.value.field == "filter[2].price"


async def test_what_was_not_begun_is_not_asked_after_a_filter_was_refused() -> None:
    async with serving() as (service, shards):
        filters = [{"item_id": row} for row in range(40)]
        filters[3] = {"price": 1}
        with pytest.raises(InvalidInput) as caught:
            await ask(service, vectors=VECTORS[:40].tolist(), k=1, filter=filters)
        assert caught.value.field == "filter[3].price"
        assert len(shards[0].requests) < 40


async def test_the_cache_keeps_answers_of_filters_apart_with_their_reasons() -> None:
    config = CONFIG.model_copy(update={"cache_bytes": 1 << 20})
    async with serving(config) as (service, shards):
        body = {"vectors": VECTORS[:1].tolist(), "k": 4}
        first = [await ask(service, **body, filter=each) for each in (None, LOW, FEW)]
        before = len(shards[0].requests)
        again = [await ask(service, **body, filter=each) for each in (None, LOW, FEW)]
        assert len(shards[0].requests) == before
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(one.ranked.ids, other.ranked.ids)
            assert one.reasons == other.reasons
        assert len({tuple(each.ranked.ids[0]) for each in first}) == 3
        large = {"item_id": {"$in": list(range(9000))}}
        size = service._finder.stats.bytes
        await ask(service, **body, filter=large)
        assert service._finder.stats.bytes - size > len(check_filter(large))


def test_groups_keep_the_order_of_queries() -> None:
    groups = groups_of([b"a", b"", b"a", b"b"])
    assert {packed: rows.tolist() for packed, rows in groups.items()} == {
        b"a": [0, 2],
        b"": [1],
        b"b": [3],
    }
