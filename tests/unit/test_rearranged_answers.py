"""Caps, boosts and diversity over real shards, beside brute force over the whole corpus."""

import asyncio
import contextlib
import json
import math
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pytest

from shardline import Client
from shardline.router.http.codec import decode_query, encode_answer
from shardline.router.http.media import Media
from shardline.router.query import SearchAnswer
from shardline.router.rearrange import pool_search, rearranger
from shardline.router.rearrange.pool_items import PoolItems
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.errors import DeadlineExceeded, InvalidInput, Unavailable
from shardline.shards.core.messages import (
    AttributesRequest,
    ErrorReply,
    FetchRequest,
    ReplicaRoute,
    SearchRequest,
    ShardRoute,
)
from shardline.shards.core.schema import Metric
from shardline.shards.live.attributes import check_attributes
from shardline.shards.live.item_attributes import ItemAttributes
from shardline.shards.live.records import Record, Upsert
from shardline.shards.live.state import ShardState, apply
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer
from tests.engine import build_main
from tests.fake_shard import SECRET, make_rows, make_table, running_shards
from tests.live_router import running_router
from tests.unit.test_rearrange import slow_capped, slow_diverse

DIM = 6
TODAY = datetime(2026, 3, 8, tzinfo=UTC)
FAST = {"backoff_base_ms": 1, "backoff_max_ms": 5, "default_timeout_ms": 10_000, "default_k": 10}
CAPPED = ("seller", "brand", "sold", "day")


@dataclass
class Corpus:
    """ids and vectors of a few small integers: inner products are exact, and many are equal."""

    ids: np.ndarray
    vectors: np.ndarray
    columns: dict[str, list[Any]]

    def table(self, rows: np.ndarray) -> pa.Table:
        kinds = {"seller": pa.string(), "brand": pa.int16(), "sold": pa.bool_(), "day": pa.date32()}
        made = {
            name: pa.array([values[row] for row in rows.tolist()], kinds.get(name))
            for name, values in self.columns.items()
        }
        made["seller"] = made["seller"].dictionary_encode()
        return pa.table(made)

    def value(self, column: str, item: int) -> Any:
        return self.columns[column][int(np.searchsorted(self.ids, item))]

    def ranking(self, query: np.ndarray, allowed: np.ndarray) -> list[tuple[int, float]]:
        """All items that are allowed, best first."""
        scores = self.vectors @ query
        order = np.lexsort((self.ids, -scores))
        return [(int(self.ids[row]), float(scores[row])) for row in order if allowed[row]]


def corpus(seed: int) -> Corpus:
    """50 to 400 items; one seller has nine in ten, sellers lie in the order of one dimension."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(50, 400))
    ids = np.sort(rng.choice(10_000, count, replace=False))
    vectors = rng.integers(-3, 4, (count, DIM)).astype(np.float32)
    vectors[:, 0] += 5
    is_large = rng.random(count) < 0.9
    small = rng.integers(0, 6, count)
    by_place = (vectors[:, 1] + 3).astype(int)
    sellers = [
        None if rng.random() < 0.03 else "large" if large and seed % 2 else f"{which} ü"
        for large, which in zip(is_large, small if seed % 2 else by_place, strict=True)
    ]
    pick = rng.integers
    return Corpus(
        ids,
        vectors,
        {
            "seller": sellers,
            "brand": [None if b == 5 else int(b) for b in pick(-2, 6, count)],
            "sold": [None if s == 2 else bool(s) for s in pick(0, 3, count)],
            "day": [TODAY.date() - timedelta(days=int(d)) for d in pick(0, 5, count)],
            "price": [
                None if p > 95 else math.nan if p > 90 else p / 4 for p in pick(0, 99, count)
            ],
            "tags": [["a"]] * count,
        },
    )


def state_of(given: Corpus, rows: np.ndarray, written: int) -> ShardState:
    """A shard of these rows, every ``written``-th of which came in a write: until then it had the
    attributes and the vector of the row before."""
    old = np.where(np.arange(len(rows)) % written == written - 1, np.roll(rows, 1), rows)
    main = build_main(given.vectors[old], metric=Metric.DOT, kind="flat")
    state = ShardState.of(main, given.ids[rows], ItemAttributes(given.table(old)))
    new = rows[old != rows]
    if not len(new):
        return state
    columns = {
        name: [given.columns[name][row] for row in new.tolist()] for name in (*CAPPED, "tags")
    }
    columns["day"] = [day.isoformat() for day in columns["day"]]
    change = Upsert(
        item_ids=given.ids[new],
        vectors=given.vectors[new],
        attributes=check_attributes(
            msgpack.packb(columns), given.ids[new], state.attributes.schema
        ),
    )
    state, _ = apply(state, [Record(seq=1, epoch=1, key="", change=change)])
    return state


@contextlib.asynccontextmanager
async def serving(
    given: Corpus, num_shards: int, *, written: int = 1 << 20, **config: Any
) -> AsyncIterator[SearchService]:
    """written: as of ``state_of``."""
    parts = np.array_split(np.arange(len(given.ids)), num_shards)
    servers, routes = [], []
    for number, rows in enumerate(parts):
        state = state_of(given, rows, written)
        server = ShardServer(Shard(shard=number, generation=1, state=state), secret=SECRET)
        address = server.bind()
        server.start(1)
        servers.append(server)
        route = ReplicaRoute(key=server.key, epoch=1, address=address)
        routes.append(ShardRoute(shard=number, rows=len(rows), replicas=(route,)))
    service = SearchService(
        RouterConfig(**FAST | config),
        SECRET,
        load_encoder=lambda _table: None,
        wall=lambda: TODAY.timestamp(),
    )
    try:
        lowest = tuple(int(given.ids[rows[0]]) for rows in parts[1:])
        await service.apply(make_table(routes, DIM, boundaries=lowest))
        yield service
    finally:
        await service.close()
        for server in servers:
            server.stop()


async def ask(service: SearchService, **body: Any) -> SearchAnswer:
    query = decode_query(json.dumps(body).encode(), Media.JSON, service.config)
    return await service.search(query, arrived_at=asyncio.get_running_loop().time())


def live(answer: SearchAnswer, row: int) -> list[int]:
    return [item for item in answer.ranked.ids[row].tolist() if item >= 0]


def codes_of(given: Corpus, items: list[int], columns: list[str]) -> list[list[int]]:
    known: dict[Any, int] = {}
    return [
        [
            -1 if value is None else known.setdefault((column, value), len(known))
            for column in columns
            for value in [given.value(column, item)]
        ]
        for item in items
    ]


def brute_force(
    given: Corpus, query: np.ndarray, allowed: np.ndarray, caps: list[dict[str, Any]], k: int
) -> list[tuple[int, float]]:
    ranking = given.ranking(query, allowed)
    rows = codes_of(given, [item for item, _ in ranking], [each["column"] for each in caps])
    return [ranking[place] for place in slow_capped(rows, [each["max"] for each in caps], k)]


@pytest.mark.parametrize("num_shards", range(1, 8))
@pytest.mark.parametrize("max_k", [30, 2048])
async def test_caps_are_exact(num_shards: int, max_k: int) -> None:
    """Whatever shards, pools, sellers, filters, exclusions, writes and ties there are."""
    kept = Counter[str]()
    for seed in (2 * num_shards, 2 * num_shards + 1):
        given, rng = corpus(seed), np.random.default_rng(seed)
        written = int(rng.choice([2, 3, 1 << 20]))
        async with serving(given, num_shards, max_k=max_k, written=written) as service:
            for _ in range(12):
                k = int(rng.integers(1, min(max_k, 60) + 1))
                columns = rng.choice(CAPPED, int(rng.integers(1, 4)), replace=False).tolist()
                caps = [{"column": each, "max": int(rng.integers(1, 5))} for each in columns]
                queries = rng.integers(-2, 3, (3, DIM)).astype(np.float32)
                body: dict[str, Any] = {"vectors": queries.tolist(), "k": k, "cap": caps}
                allowed = [np.ones(len(given.ids), np.bool_)] * 3
                if rng.random() < 0.5:
                    bounds = rng.choice(given.ids, 3).tolist()
                    body["filter"] = [{"item_id": {"$gte": bound}} for bound in bounds]
                    allowed = [given.ids >= bound for bound in bounds]
                if rng.random() < 0.5:
                    sizes = rng.integers(0, len(given.ids) // 2, 3)
                    body["exclude"] = [rng.choice(given.ids, size).tolist() for size in sizes]
                    allowed = [
                        each & ~np.isin(given.ids, excluded)
                        for each, excluded in zip(allowed, body["exclude"], strict=True)
                    ]
                answer = await ask(service, **body)
                assert answer.considered is not None
                short = {}
                for row, query in enumerate(queries):
                    expected = brute_force(given, query, allowed[row], caps, k)
                    assert live(answer, row) == [item for item, _ in expected], (seed, body)
                    scores = answer.ranked.scores[row, : len(expected)].tolist()
                    assert scores == [score for _, score in expected]
                    left = int(allowed[row].sum()) - len(expected)
                    if len(expected) < k and left:
                        short[row] = left
                told = {each.query: each for each in answer.reasons if each.code == "cap"}
                assert told.keys() == short.keys()
                for row, left in short.items():
                    assert 0 < told[row].count <= left
                    assert "no other" in told[row].text
                kept["short" if short else "whole"] += 1
                kept["again"] += int((answer.considered > min(max_k, max(4 * k, 100))).any())
    assert kept["short"]
    assert kept["whole"]
    assert kept["again"] or max_k > 400, "no query had to ask again"


async def test_one_map_is_a_list_of_one_and_every_query_has_its_own_counts() -> None:
    given = corpus(3)
    async with serving(given, 3) as service:
        vectors = [[1] * DIM, [1] * DIM]
        one = await ask(service, vectors=vectors, k=5, cap={"column": "seller", "max": 1})
        listed = await ask(service, vectors=vectors, k=5, cap=[{"column": "seller", "max": 1}])
        np.testing.assert_array_equal(one.ranked.ids, listed.ranked.ids)
        assert live(one, 0) == live(one, 1)
        plain = await ask(service, vectors=vectors, k=5, cap=[])
        assert plain.considered is None


async def test_an_item_that_was_asked_with_takes_no_place_of_its_seller() -> None:
    given = corpus(5)
    async with serving(given, 4, max_k=50) as service:
        items = given.ids[[3, 17, 40]].tolist()
        for k in (4, 50):
            answer = await ask(
                service, item_ids=[*items, 10_001], k=k, cap={"column": "seller", "max": 2}
            )
            for row, item in enumerate(items):
                place = int(np.searchsorted(given.ids, item))
                caps = [{"column": "seller", "max": 2}]
                others = given.ids != item
                expected = brute_force(given, given.vectors[place], others, caps, k)
                assert live(answer, row) == [each for each, _ in expected]
            assert live(answer, 3) == []
            assert answer.considered is not None
            assert answer.considered[3] == 0
            told = [(each.query, each.code) for each in answer.reasons]
            assert (3, "not_found") in told
            assert ((0, "cap") in told) == (k == 50)


async def test_boosts_are_added_to_the_best_of_the_pool() -> None:
    given = corpus(7)
    boosts = [
        {"column": "price", "weight": 0.5, "pool": 40},
        {"column": "day", "weight": 8, "half_life_days": 2},
        {"column": "sold", "weight": -1},
    ]
    async with serving(given, 3) as service:
        query = np.array([1, -1, 2, 0, 1, 0], np.float32)
        answer = await ask(service, vectors=[query.tolist()], k=10, boost=boosts)
        pool = given.ranking(query, np.ones(len(given.ids), np.bool_))[:40]
        boosted = []
        for item, score in pool:
            price, day = given.value("price", item), given.value("day", item)
            if price is not None and math.isfinite(price):
                score += 0.5 * price
            score += 8 * 2 ** (-(TODAY.date() - day).days / 2)
            score -= bool(given.value("sold", item))
            boosted.append((-np.float32(score), item))
        expected = sorted(boosted)[:10]
        assert live(answer, 0) == [item for _, item in expected]
        np.testing.assert_allclose(answer.ranked.scores[0], [-s for s, _ in expected], rtol=1e-6)
        assert answer.considered is not None
        assert answer.considered.tolist() == [40]
        assert json.loads(encode_answer(answer, Media.JSON))["pool"] == [40]


async def test_diversity_is_the_formula_over_stored_vectors_with_caps() -> None:
    given = corpus(8)
    unit = given.vectors / np.linalg.norm(given.vectors, axis=1, keepdims=True)
    async with serving(given, 5) as service:
        for share, most, boosts in ((0.6, 3, []), (0.0, 2, []), (0.5, 400, [1])):
            query = np.array([1, 2, -1, 0, 1, 1], np.float32)
            body: dict[str, Any] = {"diversify": {"lambda": share, "pool": 45}}
            caps = [{"column": "brand", "max": most}]
            if boosts:
                body["boost"] = {"column": "brand", "weight": 0.25}
            answer = await ask(service, vectors=[query.tolist()], k=12, cap=caps, **body)
            pool = given.ranking(query, np.ones(len(given.ids), np.bool_))[:45]
            if boosts:
                pool = [
                    (item, score + 0.25 * (given.value("brand", item) or 0)) for item, score in pool
                ]
                pool.sort(key=lambda each: (-each[1], each[0]))
            items = [item for item, _ in pool]
            scores = np.array([score for _, score in pool])
            relevance = (scores - scores.min()) / (scores.max() - scores.min())
            rows = np.searchsorted(given.ids, items)
            taken = slow_diverse(
                relevance.tolist(),
                unit[rows].astype(np.float32),
                codes_of(given, items, ["brand"]),
                [most],
                12,
                share,
            )
            assert live(answer, 0) == [items[place] for place in taken]
            np.testing.assert_allclose(answer.ranked.scores[0], scores[taken], rtol=1e-6)


@pytest.mark.parametrize("seed", range(6))
async def test_diverse_answers_under_caps_are_the_formula_over_all_pools(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And have k items, or all that caps allow, though the first pool has fewer."""
    given, query, share = corpus(2 * seed + 1), np.ones(DIM, np.float32), 0.5
    unit = given.vectors / np.linalg.norm(given.vectors, axis=1, keepdims=True)
    pools: list[np.ndarray] = []
    choose = PoolItems.choose

    def noted(items: PoolItems, ids: np.ndarray, scores: np.ndarray) -> Any:
        pools.append(ids)
        return choose(items, ids, scores)

    monkeypatch.setattr(PoolItems, "choose", noted)
    async with serving(given, 3) as service:
        body = {"vectors": [query.tolist()], "k": 12, "cap": {"column": "seller", "max": 2}}
        answer = await ask(service, **body, diversify={"lambda": share, "pool": 12})
    assert len(pools) > 1, "the first one does not do"
    pool = given.ranking(query, np.isin(given.ids, pools[-1]))
    items, scores = [item for item, _ in pool], np.array([score for _, score in pool])
    taken = slow_diverse(
        ((scores - scores.min()) / (scores.max() - scores.min())).tolist(),
        unit[np.searchsorted(given.ids, items)].astype(np.float32),
        codes_of(given, items, ["seller"]),
        [2],
        12,
        share,
    )
    assert live(answer, 0) == [items[place] for place in taken]
    everything = np.ones(len(given.ids), np.bool_)
    assert len(taken) == len(brute_force(given, query, everything, [body["cap"]], 12))


async def test_many_queries_are_answered_part_by_part_and_off_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = corpus(9)
    body: dict[str, Any] = {
        "item_ids": given.ids[:40].tolist(),
        "k": 15,
        "cap": {"column": "seller", "max": 2},
        "boost": {"column": "brand", "weight": 0.5, "pool": 20},
        "diversify": {"lambda": 0.8},
        "timeout_ms": 10_000,
    }
    async with serving(given, 3, max_k=50) as service:
        whole = await ask(service, **body)
        threads = Counter[str]()
        to_thread = asyncio.to_thread

        async def counted(work: Any, *arguments: Any) -> Any:
            threads["used"] += 1
            return await to_thread(work, *arguments)

        monkeypatch.setattr(asyncio, "to_thread", counted)
        monkeypatch.setattr(rearranger, "ITEMS_AT_ONCE", 100)
        monkeypatch.setattr(rearranger, "CHOSEN_IN_LOOP", 0)
        monkeypatch.setattr(pool_search, "TAKEN_IN_LOOP", 0)
        monkeypatch.setattr(pool_search, "IDS_AT_ONCE", 7)
        monkeypatch.setattr(pool_search, "FETCHED_BYTES", 100)
        parts = await ask(service, **body)
        assert threads["used"] > 10
        np.testing.assert_array_equal(parts.ranked.ids, whole.ranked.ids)
        np.testing.assert_array_equal(parts.ranked.scores, whole.ranked.scores)
        assert parts.considered is not None
        assert whole.considered is not None
        assert parts.considered.tolist() == whole.considered.tolist()
        assert parts.reasons == whole.reasons


async def test_a_value_that_boosted_items_have_freed_is_asked_for_again() -> None:
    """Whatever the pool is, no item is left out of a short answer that its caps allow."""
    for seed in range(6):
        given = corpus(2 * seed)
        caps = [{"column": "seller", "max": 2}, {"column": "brand", "max": 2}]
        boost = {"column": "brand", "weight": 2.0, "pool": 16}
        async with serving(given, 3, max_k=16) as service:
            body = {"vectors": [[1.0, 2, -1, 0, 1, 1]], "k": 16, "cap": caps, "boost": boost}
            for asked in (body, body | {"diversify": {"lambda": 0.5, "pool": 16}}):
                answer = await ask(service, **asked)
                items = live(answer, 0)
                told = [each for each in answer.reasons if each.code == "cap"]
                if len(items) == 16 or "there may be" in told[0].text:
                    continue
                for cap in caps:
                    name, most = cap["column"], cap["max"]
                    counts = Counter(given.value(name, item) for item in items)
                    cap["full"] = {v for v, n in counts.items() if v is not None and n >= most}
                others = set(given.ids.tolist()) - set(items)
                allowed = [
                    item
                    for item in others
                    if not any(given.value(c["column"], item) in c["full"] for c in caps)
                ]
                assert allowed == []
                for cap in caps:
                    del cap["full"]


async def test_what_is_returned_is_of_the_final_items() -> None:
    given = corpus(2)
    async with serving(given, 2) as service:
        cap = {"column": "brand", "max": 1}
        answer = await ask(service, vectors=[[1] * DIM], k=4, cap=cap, **{"return": ["brand"]})
        assert answer.returned is not None
        (brands,) = answer.returned.attributes["brand"]
        assert brands == [given.value("brand", item) for item in live(answer, 0)]


@pytest.mark.parametrize(
    ("body", "field", "expected"),
    [
        ({"cap": {"column": "sellr", "max": 1}}, "cap.column", "seller"),
        ({"cap": [{"column": "seller", "max": 1}, {"column": "x", "max": 1}]}, "cap[1].column", ""),
        ({"cap": {"column": "tags", "max": 1}}, "cap.column", "texts, integers"),
        ({"cap": {"column": "price", "max": 1}}, "cap.column", "texts, integers"),
        ({"cap": {"column": "tags", "max": 99}}, "cap.column", "texts, integers"),
        ({"boost": {"column": "seller", "weight": 1}}, "boost.column", "numbers"),
        ({"boost": {"column": "tags", "weight": 1}}, "boost.column", "numbers"),
        ({"boost": {"column": "day", "weight": 1}}, "boost.half_life_days", "days"),
        (
            {"boost": [{"column": "price", "weight": 1, "half_life_days": 2}]},
            "boost[0].column",
            "dates",
        ),
        ({"boost": {"column": "nothing", "weight": 1}}, "boost.column", "price"),
    ],
)
async def test_columns_that_do_not_fit_are_refused(
    body: dict[str, Any], field: str, expected: str
) -> None:
    """Also where no item is found: it does not depend on what came back."""
    given = corpus(4)
    async with serving(given, 2) as service:
        for item_filter in (None, {"item_id": 10_001}):
            with pytest.raises(InvalidInput) as caught:
                await ask(service, vectors=[[1] * DIM], k=4, filter=item_filter, **body)
            assert caught.value.field == field
            assert expected in caught.value.details


@pytest.mark.parametrize(
    ("step", "pools"),
    [(8, [(100, False)]), (20, [(100, False), (400, False)]), (100, [(100, False), (400, True)])],
)
async def test_a_larger_pool_comes_before_a_narrower_filter(
    step: int, pools: list[tuple[int, bool]]
) -> None:
    """One seller has all items but each ``step``-th, and these have one each. pools: their sizes,
    and whether a filter narrows them."""
    count, k = 2000, 12
    ids = np.arange(count)
    vectors = np.zeros((count, DIM), np.float32)
    vectors[:, 0] = count - ids
    is_other = ids % step == step - 1
    names = [f"{item}" if other else "large" for item, other in zip(ids, is_other, strict=True)]
    given = Corpus(ids, vectors, {"seller": names})
    async with serving(given, 2) as service:
        asked: list[tuple[int, bool]] = []
        find = service._finder.find

        async def noted(*arguments: Any, is_kept: bool = True) -> Any:
            query = arguments[3]
            asked.append((arguments[2], any(query.filters)))
            assert is_kept != any(query.filters), "nobody asks for those again"
            return await find(*arguments, is_kept=is_kept)

        service._finder.find = noted  # type: ignore[method-assign]
        query = [1.0] + [0.0] * (DIM - 1)
        answer = await ask(service, vectors=[query], k=k + 1, cap={"column": "seller", "max": 1})
        others = ids[is_other][:k]
        assert live(answer, 0) == sorted([0, *others.tolist()])[: k + 1]
        assert asked == pools
        assert answer.reasons == ()


async def test_kinds_of_columns_are_asked_once_and_other_searches_pay_nothing() -> None:
    ids, vectors = make_rows(60, 8)
    async with running_shards(ids, vectors, 3) as shards:
        service = SearchService(RouterConfig(**FAST), SECRET, load_encoder=lambda _table: None)
        await service.apply(make_table(shards, 8))
        body = {"vectors": vectors[:1].tolist(), "k": 4}
        await ask(service, **body)
        assert [type(each) for each in shards[0].requests] == [SearchRequest]
        for _ in range(2):
            shards[0].requests.clear()
            await ask(service, **body, cap={"column": "title", "max": 1})
        asked = [type(each) for each in shards[0].requests]
        assert asked == [AttributesRequest], "the pool comes from the cache"
        shards[0].requests.clear()
        await ask(service, **body, cap={"column": "title", "max": 4})
        assert shards[0].requests == [], "an answer of four has no five of one title"
        shards[0].requests.clear()
        await ask(service, **body, diversify={"lambda": 0.5})
        assert [type(each) for each in shards[0].requests][-1] is FetchRequest
        await service.close()


async def test_a_shard_that_does_not_bring_attributes_is_missed() -> None:
    ids, vectors = make_rows(60, 8)
    async with running_shards(ids, vectors, 3) as shards:
        service = SearchService(RouterConfig(**FAST), SECRET, load_encoder=lambda _table: None)
        await service.apply(make_table(shards, 8))
        for asked in (
            {"cap": {"column": "title", "max": 1}},
            {"diversify": {"lambda": 0.5}},
            {"diversify": {"lambda": 0.5, "pool": 50}},  # a full one
        ):
            shards[1].fetch_error = None
            body = {"vectors": vectors[:2].tolist(), "k": 50, **asked}
            await ask(service, **body)
            shards[1].fetch_error = ErrorReply(code="overloaded", message="no")
            answer = await ask(service, **body)
            assert answer.coverage.shards_answered == 2
            assert answer.coverage.rows_answered == 40
            assert [(each.shard, each.code) for each in answer.coverage.degraded] == [
                (1, "overloaded")
            ]
            assert not set(live(answer, 0)) & set(shards[1].ids.tolist())
            assert {each.code for each in answer.reasons} <= {"coverage", "cap"}
            assert "cap" in asked or "cap" not in {each.code for each in answer.reasons}
            with pytest.raises(Unavailable):
                await ask(service, **body, min_coverage=0.9)
        await service.close()


async def test_a_shard_that_hangs_is_missed_and_the_others_keep_to_the_caps() -> None:
    ids, vectors = make_rows(60, 8)
    async with running_shards(ids, vectors, 3) as shards:
        for shard in shards:
            shard.attributes = {item: {"seller": f"{item % 2}"} for item in shard.ids.tolist()}
        service = SearchService(RouterConfig(**FAST), SECRET, load_encoder=lambda _table: None)
        await service.apply(make_table(shards, 8))
        shards[1].gate.clear()
        for asked in (
            {"cap": {"column": "seller", "max": 3}},
            {"cap": {"column": "seller", "max": 3}, "diversify": {"lambda": 0.5}},
        ):
            answer = await ask(service, vectors=vectors[:2].tolist(), k=6, timeout_ms=400, **asked)
            assert answer.coverage.rows_answered == 40
            for row in range(2):
                items = live(answer, row)
                assert Counter(item % 2 for item in items) == {0: 3, 1: 3}
                assert not set(items) & set(shards[1].ids.tolist())
        shards[1].gate.set()
        await service.close()


async def test_time_that_runs_out_leaves_the_answer_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the second pool nothing comes."""
    given = corpus(6)
    async with serving(given, 3, max_k=20) as service:
        body = {"vectors": [[1.0] * DIM], "k": 20, "cap": {"column": "seller", "max": 2}}
        whole = await ask(service, **body)
        find = service._finder.find
        calls = Counter[str]()

        async def late(*arguments: Any, **given: Any) -> Any:
            calls["find"] += 1
            if calls["find"] > 1:
                raise DeadlineExceeded("too late")
            return await find(*arguments, **given)

        monkeypatch.setattr(service._finder, "find", late)
        answer = await ask(service, **body)
        assert 0 < len(live(answer, 0)) < len(live(whole, 0))
        assert live(answer, 0) == live(whole, 0)[: len(live(answer, 0))]
        (reason,) = [each for each in answer.reasons if each.code == "cap"]
        assert "there may be others" in reason.text
        assert answer.coverage.share == 1.0


async def test_a_filter_at_its_limit_cannot_be_narrowed_and_the_answer_says_so() -> None:
    given = corpus(6)
    async with serving(given, 3, max_k=20) as service:
        conditions = [{"item_id": {"$gte": -number}} for number in range(256)]
        answer = await ask(
            service,
            vectors=[[1.0] * DIM],
            k=20,
            cap={"column": "seller", "max": 1},
            filter={"$and": conditions},
        )
        assert len(live(answer, 0)) < 20
        assert [each.code for each in answer.reasons] == ["cap"]
        assert "there may be others" in answer.reasons[0].text


def test_a_client_reads_how_many_items_were_considered() -> None:
    with running_router(RouterConfig(**FAST)) as router, Client(router.url) as client:
        answer = client.search(
            item_ids=[1, 10_001],
            k=3,
            cap={"column": "title", "max": 1},
            diversify={"lambda": np.float32(0.5), "pool": 20},
        )
        assert answer.pool == (20, 0)
        assert (answer.ids[0] >= 0).all()
        assert client.search(item_ids=[1], k=3).pool == ()
        with pytest.raises(InvalidInput) as caught:
            client.search(item_ids=[1], k=3, boost={"column": "title", "weight": 1})
        assert caught.value.field == "boost.column"
