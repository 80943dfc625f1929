"""Filters in a shard under writes: answers are those of a slow model, and little is evaluated."""

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import faiss
import msgpack
import numpy as np
import pyarrow as pa
import pytest

from shardline.bench.shard_link import ShardLink
from shardline.bench.vectors import manifold
from shardline.shards.core.errors import DeadlineExceeded, InvalidInput
from shardline.shards.core.filter_language import check_filter
from shardline.shards.core.messages import (
    NO_FILTER,
    NO_PARAMS,
    ErrorReply,
    SearchOptions,
    SearchParams,
    SearchReply,
    SearchRequest,
)
from shardline.shards.core.schema import Metric
from shardline.shards.index import filtered_search
from shardline.shards.live import filtered, written_columns
from shardline.shards.live.attributes import check_attributes
from shardline.shards.live.delta import TILE_ROWS
from shardline.shards.live.filtered import FilterRows
from shardline.shards.live.item_attributes import ItemAttributes
from shardline.shards.live.records import Record, Upsert
from shardline.shards.live.state import ShardState, apply
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer
from tests.data_shapes.columns import TAKEN
from tests.engine import build_main
from tests.live_model import delete, upsert
from tests.reference import assert_same_answers, brute_force

DIM, ROWS = 8, 400
VECTORS = manifold(ROWS, DIM, 4, seed=3)
OTHERS = manifold(300, DIM, 4, seed=3, stream=1)
QUERIES = manifold(3, DIM, 4, seed=3, stream=2)
IDS = np.arange(0, 2 * ROWS, 2)
TAGS = ("new", "red", "sold")
SECRET = b"a secret of tests"

# of which JSON has no value, or a rounded one
CHANGED = {"float with nan", "only nan", "timestamp ns"}

Items = dict[int, tuple[np.ndarray, dict[str, Any]]]
# what a filter says, said in Python of an item's id and attributes
CASES: list[tuple[dict[str, Any], Callable[[int, dict[str, Any]], bool]]] = [
    ({"price": {"$lt": 3}}, lambda _, a: a["price"] is not None and a["price"] < 3),
    ({"price": None}, lambda _, a: a["price"] is None),
    ({"tags": "red"}, lambda _, a: "red" in (a["tags"] or [])),
    ({"tags": {"$ne": "red"}}, lambda _, a: "red" not in (a["tags"] or [])),
    ({"item_id": {"$gte": 700}}, lambda item, _: item >= 700),
    ({"price": {"$gt": 1e6}}, lambda _, a: False),
    (
        {"$or": [{"item_id": {"$in": [6, 7, 9]}}, {"price": 5, "tags": "sold"}]},
        lambda item, a: item in (6, 7, 9) or (a["price"] == 5 and "sold" in (a["tags"] or [])),
    ),
]


def random_attributes(rng: np.random.Generator) -> dict[str, Any]:
    tags = [tag for tag in TAGS if rng.random() < 0.3]
    return {
        "price": None if rng.random() < 0.2 else float(rng.integers(0, 10)),
        "tags": None if rng.random() < 0.2 else tags,
    }


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in ("price", "tags")}


def new_state(kind: str = "flat", **fields: Any) -> tuple[ShardState, Items]:
    rng = np.random.default_rng(7)
    given = [random_attributes(rng) for _ in range(ROWS)]
    table = pa.table(columns(given), schema=SCHEMA)
    main = build_main(VECTORS, metric=Metric.DOT, kind=kind, **fields)
    items = {int(item): each for item, *each in zip(IDS, VECTORS, given, strict=True)}
    return ShardState.of(main, IDS, ItemAttributes(table)), items


SCHEMA = pa.schema([("price", pa.float64()), ("tags", pa.list_(pa.string()))])


def written(rng: np.random.Generator, items: Items, seq: int) -> Record:
    ids = rng.choice(np.arange(2 * ROWS + 40), rng.integers(1, 30), replace=False).tolist()
    if rng.random() < 0.3:
        for item in ids:
            items.pop(item, None)
        return delete(seq, ids)
    vectors = OTHERS[rng.choice(len(OTHERS), len(ids), replace=False)]
    given = [random_attributes(rng) for _ in ids]
    for item, *each in zip(ids, vectors, given, strict=True):
        items[item] = each
    return upsert(seq, ids, vectors, msgpack.packb(columns(given)))


def check(state: ShardState, items: Items) -> None:
    for given, holds in CASES:
        found = [item for item, (_, each) in items.items() if holds(item, each)]
        ids = np.array(found, np.int64)
        vectors = np.array([items[item][0] for item in found], np.float32).reshape(-1, DIM)
        matching = state.matching(check_filter(given))
        assert matching.rows == len(found), given
        expected = brute_force(QUERIES, vectors, ids, 10, Metric.DOT)
        for answer in (
            state.search(QUERIES, 10, NO_PARAMS, matching),
            state.search_exactly(QUERIES, 10, lambda: None, matching),
        ):
            assert_same_answers(answer, expected)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


@pytest.mark.parametrize("fields", [{"kind": "flat"}, {"kind": "ivf", "nlist": 8, "nprobe": 8}])
def test_after_every_write_answers_are_those_of_the_items_that_match(fields: dict) -> None:
    rng = np.random.default_rng(1)
    state, items = new_state(**fields)
    check(state, items)
    for seq in range(1, 60):
        state, _ = apply(state, [written(rng, items, seq)])
        if seq % 3 == 0:
            check(state, items)
    assert state.delta.rows > TILE_ROWS / 2


def test_threads_that_search_together_find_what_each_finds_alone() -> None:
    """As those of a batch job, each with blocks of queries of its own."""
    state, items = new_state(kind="ivf", nlist=8, nprobe=8)
    vectors = np.array([vector for vector, _ in items.values()])
    packed = [check_filter({"price": {"$lt": number}}) for number in range(1, 9)] * 3

    def found(each: bytes) -> np.ndarray:
        return state.search(vectors[:50], 10, NO_PARAMS, state.matching(each)).ids

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(found, packed))
    fresh, _ = new_state(kind="ivf", nlist=8, nprobe=8)
    for each, ids in zip(packed, together, strict=True):
        alone = fresh.search(vectors[:50], 10, NO_PARAMS, fresh.matching(each)).ids
        np.testing.assert_array_equal(ids, alone)


def test_a_state_is_answered_for_though_a_newer_one_was() -> None:
    """An exact search may hold a state while others search newer ones."""
    rng = np.random.default_rng(2)
    state, items = new_state()
    states = []
    for seq in range(1, 12):
        state, _ = apply(state, [written(rng, items, seq)])
        states.append((state, dict(items)))
    for place in rng.permutation(len(states)).tolist() * 2:
        check(*states[place])
    # two states that grew from one do not see each other's rows
    for other in (3, 4):
        own = dict(items)
        grown, _ = apply(state, [written(np.random.default_rng(other), own, 12)])
        check(grown, own)


def test_of_a_delta_only_new_rows_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    made: list[int] = []

    def matches(bound: Any, table: Any, item_ids: np.ndarray, look: Any) -> Any:
        looked_at.append(len(item_ids))
        return real(bound, table, item_ids, look)

    def arrow_array(values: Any, kind: Any) -> Any:
        made.append(len(values))
        return real_array(values, kind)

    real, real_array = filtered.matches, written_columns.arrow_array
    monkeypatch.setattr(filtered, "matches", matches)
    monkeypatch.setattr(written_columns, "arrow_array", arrow_array)
    state, _ = new_state()
    cheap, red = check_filter({"price": {"$lt": 3}}), check_filter({"tags": "red", "price": 3})
    state.matching(cheap)
    assert looked_at == [ROWS]
    for seq, rows in ((1, 5), (2, 7)):
        given = [{"price": 1.0, "tags": ["red"]}] * rows
        ids = np.arange(rows) + 1000 * seq
        attributes = msgpack.packb(columns(given))
        state, _ = apply(state, [upsert(seq, ids, OTHERS[:rows], attributes)])
        state.matching(cheap)
        state.matching(cheap)
    assert (looked_at, made) == ([ROWS, 5, 7], [5, 7])
    state.matching(red)
    assert (looked_at[3:], made[2:]) == ([ROWS, 12], [12]), "of price nothing is made anew"
    state, _ = apply(state, [delete(3, [1000])])
    assert state.matching(cheap).rows == state.matching(cheap).selection.num_selected + 11
    assert len(looked_at) == 5


def test_columns_in_many_parts_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_columns, "MAX_PARTS", 4)
    rng = np.random.default_rng(5)
    state, items = new_state()
    for seq in range(1, 20):
        state, _ = apply(state, [written(rng, items, seq)])
        state.matching(check_filter({"tags": "new"}))
    check(state, items)
    parts = [len(each.parts) for each in state.filter_rows._written._made_of[1].values()]
    assert max(parts) <= 5


def test_written_values_may_be_more_than_a_dictionary_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(written_columns, "MAX_PARTS", 4)
    kind = pa.dictionary(pa.int8(), pa.string())
    table = pa.table({"name": pa.array(["a", "b"] * (ROWS // 2)).dictionary_encode().cast(kind)})
    main = build_main(VECTORS, metric=Metric.DOT, kind="flat")
    state = ShardState.of(main, IDS, ItemAttributes(table))
    for seq in range(1, 8):
        ids = np.arange(150) + 1000 * seq
        names = msgpack.packb({"name": [f"n{item}" for item in ids.tolist()]})
        state, _ = apply(state, [upsert(seq, ids, OTHERS[:150], names)])
        assert state.matching(check_filter({"name": f"n{ids[7]}"})).rows == 1
    listed = {"name": {"$in": ["a", "n1003", "n7149", "n7150"]}}
    assert state.matching(check_filter(listed)).rows == ROWS // 2 + 2


def test_what_is_kept_is_bounded_and_the_least_used_goes_first() -> None:
    state, _ = new_state()
    rows = FilterRows(IDS, state.attributes, max_bytes=20_000)
    packed = [check_filter({"price": {"$lt": number}}) for number in range(50)]
    for each in packed:
        rows.matching(packed[0], None, state.delta)
        rows.matching(each, None, state.delta)
        assert rows._bytes == sum(kept.size(key) for key, kept in rows._kept.items()) <= 20_000
    known = [
        number for number, each in enumerate(packed) if rows.known(each, state.delta) is not None
    ]
    assert known[0] == 0
    assert known[1:] == list(range(50 - len(known) + 1, 50))
    assert len(known) < 20
    tiny = FilterRows(IDS, state.attributes, max_bytes=1)
    for each in packed[:3]:
        assert (
            tiny.matching(each, None, state.delta).rows
            == rows.matching(each, None, state.delta).rows
        )


def test_a_filter_is_prepared_once_it_is_known_but_for_a_few_rows() -> None:
    state, _ = new_state()
    shard = Shard(shard=0, generation=7, state=state)
    asked = request({"price": {"$lt": 3}})
    assert shard.is_prepared(replace(asked, options=SearchOptions()))
    assert not shard.is_prepared(asked)
    shard.search(asked)
    assert shard.is_prepared(asked)
    ids, vectors = np.arange(10), OTHERS[:10]
    shard.state, _ = apply(shard.state, [upsert(1, ids, vectors)])
    assert shard.is_prepared(asked)
    ids, vectors = np.arange(filtered.AT_ONCE_ROWS), np.repeat(OTHERS[:1], 512, axis=0)
    shard.state, _ = apply(shard.state, [upsert(2, ids, vectors)])
    assert not shard.is_prepared(asked)
    shard.search(asked)
    assert shard.is_prepared(asked)


def test_without_attributes_there_is_the_item_id_alone() -> None:
    state = ShardState.of(build_main(VECTORS, metric=Metric.DOT, kind="flat"), IDS)
    state, _ = apply(state, [upsert(1, [1, 3, 4], OTHERS[:3])])
    assert state.matching(check_filter({"item_id": {"$lt": 5}})).rows == 5
    with pytest.raises(InvalidInput, match="one of item_id") as caught:
        state.matching(check_filter({"price": 1}))
    assert caught.value.field == "filter.price"


def test_wrong_filters_are_refused_and_not_kept() -> None:
    state, _ = new_state()
    for given, field in [
        ({"colour": "red"}, "filter.colour"),
        ({"price": {"$lt": "cheap"}}, "filter.price.$lt"),
    ]:
        for _ in range(2):
            with pytest.raises(InvalidInput) as caught:
                state.matching(check_filter(given))
            assert caught.value.field == field
    with pytest.raises(InvalidInput):
        state.matching(b"\xc1")
    assert not state.filter_rows._kept


def request(given: dict[str, Any], rows: int = 1, *, exact: bool = False) -> SearchRequest:
    options = SearchOptions(filter=check_filter(given), exact=exact)
    return SearchRequest(queries=QUERIES[:rows], k=5, timeout_ms=1e4, options=options)


def test_a_batch_is_grouped_by_filter_and_replies_count_what_matches() -> None:
    state, items = new_state()
    shard = Shard(shard=0, generation=7, state=state)
    cheap, wrong = {"price": {"$lt": 3}}, {"colour": "red"}
    plain = SearchRequest(queries=QUERIES[:1], k=5, timeout_ms=1e4)
    requests = [request(cheap), plain, request(wrong), request(cheap, 2), request({"item_id": 4})]
    replies = shard.search_batch(requests)
    assert isinstance(replies[2], InvalidInput)
    count = sum(CASES[0][1](item, each) for item, (_, each) in items.items())
    given = [None if isinstance(each, InvalidInput) else each.matched for each in replies]
    assert given == [count, NO_FILTER, None, count, 1]
    assert_same_answers(replies[0].ranked, replies[3].ranked.rows(slice(0, 1)))
    assert replies[4].ranked.ids.tolist() == [[4, -1, -1, -1, -1]]
    exact = shard.search_exactly(request(cheap, exact=True), lambda: None)
    assert isinstance(exact, SearchReply)
    assert_same_answers(exact.ranked, replies[0].ranked)
    assert exact.matched == count


def test_the_loop_thread_evaluates_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves everybody, and a filter takes longer the first time than a search."""
    threads: list[str] = []
    evaluated = FilterRows._evaluated

    def noted(self: FilterRows, packed: bytes, look: Any) -> Any:
        threads.append(threading.current_thread().name)
        return evaluated(self, packed, look)

    monkeypatch.setattr(FilterRows, "_evaluated", noted)
    server = ShardServer(Shard(shard=0, generation=7, state=new_state()[0]), secret=SECRET)
    address = server.bind()
    server.start(1)
    link = ShardLink(address, SECRET, timeout_s=5)
    try:
        link.send(0, SearchRequest(queries=QUERIES[:1], k=5, timeout_ms=1e4))
        assert isinstance(link.receive(5)[1], SearchReply)
        for number, exact in enumerate((False, False, True), start=1):
            link.send(number, request({"price": {"$lt": 3}}, exact=exact))
            assert isinstance(link.receive(5)[1], SearchReply)
        link.send(9, request({"colour": "red"}))
        number, refused = link.receive(5)
        assert isinstance(refused, ErrorReply)
        assert (refused.code, refused.field) == ("invalid_input", "filter.colour")
        assert "price" in refused.message
    finally:
        link.close()
        server.stop()
    # the wrong one again to answer with what is wrong
    assert threads == ["shard-filter", "shard-filter", "shard-search"]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The filter RED takes until the second event is set, and then looks; the first is set when its
    evaluation begins."""
    began, may_end = threading.Event(), threading.Event()
    evaluated = FilterRows._evaluated

    def slow(self: FilterRows, packed: bytes, look: Callable[[], None]) -> Any:
        if packed == check_filter(RED):
            began.set()
            assert may_end.wait(5)
            look()
        return evaluated(self, packed, look)

    monkeypatch.setattr(FilterRows, "_evaluated", slow)
    yield began, may_end
    may_end.set()


RED = {"tags": "red"}
CHEAP = {"price": {"$lt": 3}}


def test_who_asks_for_a_known_filter_waits_for_no_evaluation(held: Any) -> None:
    state, _ = new_state()
    known = state.matching(check_filter(CHEAP))
    began, may_end = held
    with ThreadPoolExecutor(1) as other:
        evaluating = other.submit(state.matching, check_filter(RED))
        assert began.wait(5)
        assert state.filter_rows.known(check_filter(CHEAP), state.delta) is known.selection
        assert state.matching(check_filter(CHEAP)) is known
        assert state.matching(check_filter({"price": 3})).rows  # nor for one that is new
        assert not evaluating.done()
        may_end.set()
        assert evaluating.result().rows


def test_of_two_evaluations_of_one_filter_one_is_kept(held: Any) -> None:
    state, _ = new_state()
    began, may_end = held
    with ThreadPoolExecutor(2) as others:
        found = [others.submit(state.matching, check_filter(RED)) for _ in range(2)]
        assert began.wait(5)
        may_end.set()
        first, second = (each.result().selection for each in found)
    assert state.matching(check_filter(RED)).selection in (first, second)
    assert len(state.filter_rows._kept) == 1
    (kept,) = state.filter_rows._kept.items()
    assert state.filter_rows._bytes == kept[1].size(kept[0])


def test_a_filter_is_given_up_when_the_time_is_over_and_nothing_is_kept() -> None:
    state, _ = new_state()
    shard = Shard(shard=0, generation=7, state=state)
    plain = SearchRequest(queries=QUERIES[:1], k=5, timeout_ms=1e4)
    late = replace(request(CHEAP), timeout_ms=-1.0)
    first, second, third = shard.search_batch([plain, late, request(RED)])
    assert isinstance(first, SearchReply)
    assert isinstance(second, DeadlineExceeded)
    assert isinstance(third, SearchReply)
    assert list(state.filter_rows._kept) == [check_filter(RED)]
    # who has time left gets the answer, and the other has it too
    both = shard.search_batch([late, request(CHEAP)])
    assert all(isinstance(reply, SearchReply) for reply in both)


def test_searches_are_answered_while_a_filter_is_evaluated(held: Any) -> None:
    shard = Shard(shard=0, generation=7, state=new_state()[0])
    shard.search(request(CHEAP))
    began, may_end = held
    server = ShardServer(shard, secret=SECRET)
    address = server.bind()
    server.start(1)
    link = ShardLink(address, SECRET, timeout_s=5)
    try:
        link.send(1, request(RED))
        assert began.wait(5)
        link.send(2, SearchRequest(queries=QUERIES, k=5, timeout_ms=1e4))
        assert link.receive(5)[0] == 2
        link.send(3, request(CHEAP))
        assert link.receive(5)[0] == 3
        link.send(4, replace(request({"price": 3}), timeout_ms=1e-3))
        may_end.set()
        replies = dict(link.receive(5) for _ in range(2))
        assert isinstance(replies[1], SearchReply)
        assert replies[4].code == "deadline_exceeded"
        assert server.stats.expired == 1
    finally:
        may_end.set()
        link.close()
        server.stop()


def test_a_server_stops_though_filters_wait(held: Any) -> None:
    server = ShardServer(Shard(shard=0, generation=7, state=new_state()[0]), secret=SECRET)
    address = server.bind()
    server.start(1)
    link = ShardLink(address, SECRET, timeout_s=5)
    began, may_end = held
    link.send(1, request(RED))
    link.send(2, request(CHEAP))
    assert began.wait(5)
    with ThreadPoolExecutor(1) as other:
        stopping = other.submit(server.stop)
        while not server._filters._stopped:
            assert not stopping.done()
        may_end.set()
        stopping.result()
    link.close()
    assert not server._filters._thread.is_alive()
    assert not server.shard.state.filter_rows._kept


def test_dear_searches_with_filters_are_not_the_loop_threads(monkeypatch) -> None:
    monkeypatch.setattr(filtered_search, "COPIED_VALUES", 100 * DIM)
    monkeypatch.setattr(filtered_search, "COPIED_AGAIN_VALUES", 200 * DIM)
    monkeypatch.setattr(filtered_search, "COPIED_AFTER", 1)
    monkeypatch.setattr(filtered_search, "COPIES_MS", 0.0)
    monkeypatch.setattr(filtered_search, "CHEAP_MS", 0.0)
    shard = Shard(shard=0, generation=7, state=new_state("ivf")[0])
    few, many = {"item_id": {"$lt": 300}}, {"item_id": {"$gte": 300}}
    for _ in range(2):  # copies of 150 rows are made when they are searched again, not of 250
        for given in (few, many):
            assert not shard.is_cheap(request(given))
            shard.search(request(given))
    assert shard.is_cheap(request(few))
    assert not shard.is_cheap(request(few, 2))
    assert not shard.is_cheap(request(many))
    monkeypatch.setattr(filtered_search, "CHEAP_MS", 1e6)
    assert shard.is_cheap(request(many))  # by the time that it took
    assert not shard.is_cheap(replace(request(many), k=100))  # not searched for so many yet
    assert not shard.is_cheap(replace(request(many), params=SearchParams(nprobe=2)))
    assert not shard.is_cheap(request({"item_id": {"$gte": 301}}))  # not searched yet
    monkeypatch.setattr(filtered_search, "CHEAP_MS", 0.0)
    shard.state, _ = apply(shard.state, [upsert(1, np.arange(60), OTHERS[:60])])
    assert shard.is_prepared(request(few))
    assert not shard.is_cheap(request(few))  # with what the delta has


def test_a_search_of_a_known_filter_ends_with_its_time_too(monkeypatch) -> None:
    monkeypatch.setattr(filtered_search, "COPIED_VALUES", 0)
    monkeypatch.setattr(filtered_search, "COPIED_AGAIN_VALUES", 0)
    shard = Shard(shard=0, generation=7, state=new_state("ivf")[0])
    assert shard.search(request(CHEAP)).matched
    with pytest.raises(DeadlineExceeded):
        shard.search(replace(request(CHEAP), timeout_ms=-1.0))


@pytest.mark.parametrize(("cheap_ms", "later"), [(0.0, "shard-search"), (1e6, "shard-loop")])
def test_the_loop_thread_searches_copies_that_are_made_and_what_took_little_time(
    cheap_ms: float, later: str, monkeypatch
) -> None:
    monkeypatch.setattr(filtered_search, "CHEAP_MS", cheap_ms)
    monkeypatch.setattr(filtered_search, "COPIED_VALUES", 0)
    monkeypatch.setattr(filtered_search, "COPIED_AGAIN_VALUES", 200 * DIM)
    monkeypatch.setattr(filtered_search, "COPIED_AFTER", 1)
    monkeypatch.setattr(filtered_search, "COPIES_MS", 0.0)
    shard = Shard(shard=0, generation=7, state=new_state("ivf")[0])
    threads: list[str] = []
    search_batch = shard.search_batch

    def noted(requests: Any) -> Any:
        threads.append(threading.current_thread().name)
        return search_batch(requests)

    monkeypatch.setattr(shard, "search_batch", noted)
    server = ShardServer(shard, secret=SECRET)
    address = server.bind()
    server.start(1)
    link = ShardLink(address, SECRET, timeout_s=5)
    try:
        for given in ({"item_id": {"$lt": 300}}, {"item_id": {"$gte": 300}}):
            for _ in range(3):
                assert isinstance(link.ask(request(given), timeout_s=5), SearchReply)
    finally:
        link.close()
        server.stop()
    # of a filter's first search nothing is known, and the second one makes the copies
    copied = ["shard-search", "shard-search", "shard-loop"]
    assert threads == [*copied, "shard-search", later, later]


@pytest.mark.parametrize("background", [False, True])
def test_searches_with_filters_say_nothing_of_those_without(background: bool) -> None:
    shard = Shard(shard=0, generation=7, state=new_state()[0])
    server = ShardServer(shard, secret=SECRET)
    address = server.bind()
    server.start(1)
    link = ShardLink(address, SECRET, timeout_s=5)
    answerer = server._answerer
    try:
        asked = request(CHEAP, 3)
        options = replace(asked.options, background=background)
        for _ in range(2):
            assert isinstance(link.ask(replace(asked, options=options), timeout_s=5), SearchReply)
        assert (answerer.ms_per_row, answerer.background_ms_per_row) == (math.inf, math.inf)
        options = replace(options, filter=b"")
        assert isinstance(link.ask(replace(asked, options=options), timeout_s=5), SearchReply)
        known = answerer.background_ms_per_row if background else answerer.ms_per_row
        assert known < math.inf
    finally:
        link.close()
        server.stop()


@pytest.mark.parametrize("name", sorted(TAKEN.keys() - CHANGED))
def test_written_values_of_every_type_match_as_those_of_main_do(name: str) -> None:
    column = TAKEN[name][0]()
    attributes = ItemAttributes(pa.table({"a": column}))
    values = attributes.values("a", np.arange(len(column)))
    main = build_main(VECTORS[: len(column)], metric=Metric.DOT, kind="flat")
    state = ShardState.of(main, np.arange(len(column)), attributes)
    packed = check_attributes(msgpack.packb({"a": values}), np.arange(8), attributes.schema)
    written, _ = apply(state, [upsert(1, np.arange(8), OTHERS[:8], packed)])
    parts = [value if isinstance(value, list) else [value] for value in values if value is not None]
    scalars = {part for value in parts for part in value if part is not None}
    if name == "uuid":  # which an import makes a text of
        scalars = set()
    nothing = [{"a": {"$exists": False}}] if column.type != pa.null() else []
    for given in [{"a": {"$exists": True}}, *nothing, *({"a": part} for part in scalars)]:
        of_main = state.matching(check_filter(given))
        of_delta = written.matching(check_filter(given))
        assert of_delta.selection.num_selected == 0
        rows = of_main.selection.selected().tolist()
        assert of_delta.delta.ids.tolist() == rows, given


def test_an_upsert_without_attributes_has_none() -> None:
    state, _ = new_state()
    change = Upsert(item_ids=np.array([1]), vectors=OTHERS[:1], attributes=b"")
    state, _ = apply(state, [Record(seq=1, epoch=1, key="", change=change)])
    for given, rows in (({"price": None, "item_id": 1}, 1), ({"price": 1, "item_id": 1}, 0)):
        assert state.matching(check_filter(given)).rows == rows
