"""Attributes and original ids beside the results of a search, from a shard's file to the client."""

import asyncio
import contextlib
import datetime as dt
import json
import uuid
from decimal import Decimal

import msgpack
import numpy as np
import pyarrow as pa
import pytest

from shardline import Client
from shardline.router import returned as returned_module
from shardline.router.contract import Coverage
from shardline.router.fanout import fanout as fanout_module
from shardline.router.fanout.fanout import _columns_of
from shardline.router.http.codec import decode_query, encode_answer
from shardline.router.http.media import Media
from shardline.router.query import Returned, SearchAnswer
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.errors import DeadlineExceeded, InvalidInput
from shardline.shards.core.messages import (
    MAX_RETURNED,
    MAX_RETURNED_BYTES,
    AttributesRequest,
    ErrorReply,
    ReplicaRoute,
    ShardRoute,
)
from shardline.shards.core.schema import Metric, Ranked
from shardline.shards.index.main_index import MainIndex
from shardline.shards.live import state as state_module
from shardline.shards.live.item_attributes import ItemAttributes
from shardline.shards.live.state import ShardState
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer
from shardline.shards.storage.vector_files import open_ipc, write_table
from tests.engine import build_main
from tests.fake_shard import SECRET, make_rows, make_table
from tests.live_router import DIM, running_router

CONFIG = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, default_timeout_ms=10_000)
IDS, VECTORS = make_rows(40, DIM)
TITLES = [None if item == 3 else f"ü {item}" for item in range(40)]
MOMENT = dt.datetime(2026, 3, 1, 12, 30, 0, 250)


def shard_with(attributes: pa.Table | None, ids=IDS, vectors=VECTORS) -> Shard:
    main: MainIndex = build_main(vectors, metric=Metric.DOT, kind="flat")
    return Shard(shard=0, generation=1, state=ShardState.of(main, ids, ItemAttributes(attributes)))


def read(shard: Shard, ids: list[int], *names: str):
    request = AttributesRequest(item_ids=np.array(ids, np.int64), names=names, timeout_ms=1e4)
    (reply,) = shard.attributes_batch([request], [MAX_RETURNED_BYTES])
    if isinstance(reply, InvalidInput):
        raise reply
    return reply.item_ids.tolist(), _columns_of(reply, len(names))


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1, None, 2**64 - 1], pa.uint64()), [1, None, 2**64 - 1]),
        (pa.array([1.5, None, 2.0], pa.float32()), [1.5, None, 2.0]),
        (pa.array([True, None, False]), [True, None, False]),
        (pa.array(["a", None, ""], pa.large_string()), ["a", None, ""]),
        (pa.array([["a", None], None, []], pa.list_(pa.string())), [["a", None], None, []]),
        (pa.array([Decimal("1.50"), None, Decimal(2)], pa.decimal128(5, 2)), [1.5, None, 2.0]),
        (pa.array([MOMENT, None, None], pa.timestamp("us")), [MOMENT.isoformat(), None, None]),
        (
            pa.array([1_000_000_001, None, 0], pa.timestamp("ns", "UTC")),
            ["1970-01-01T00:00:01.000000001+00:00", None, "1970-01-01T00:00:00+00:00"],
        ),
        (pa.array([1, None, 10**9], pa.time64("ns")), [1e-9, None, 1.0]),
        (pa.array([-1, None, 2**62 + 1], pa.duration("ns")), [-1e-9, None, "4611686018.427387905"]),
        (
            pa.array([Decimal("0.12345678901234567890"), None, Decimal(1)], pa.decimal128(38, 20)),
            ["0.12345678901234567890", None, 1.0],
        ),
        (pa.array([MOMENT.date(), None, None]), ["2026-03-01", None, None]),
        (pa.array([MOMENT.time(), None, None]), [45_000.00025, None, None]),
        (pa.array([dt.timedelta(hours=1), None, None]), [3600.0, None, None]),
        (pa.array([b"ab", None, b"\xff\x00"]), ["ab", None, "ff00"]),
        (pa.array([{"a": b"x"}, None, {"a": None}]), [{"a": "x"}, None, {"a": None}]),
        (
            pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
            [[["a", 1]], None, []],
        ),
        (
            pa.array([uuid.UUID(int=7).bytes, None, uuid.UUID(int=8).bytes], pa.uuid()),
            [str(uuid.UUID(int=7)), None, str(uuid.UUID(int=8))],
        ),
        (pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2)), [[1, 2], None, [3, 4]]),
        (pa.nulls(3), [None, None, None]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_every_type_has_a_form_in_json(column: pa.Array, expected, tmp_path) -> None:
    """From a file as builds write them, in both formats of an answer."""
    write_table(tmp_path / "a.arrow", pa.table({"a": column}))
    table = open_ipc(tmp_path / "a.arrow").read_all()
    shard = shard_with(table, np.array([5, 6, 9]), VECTORS[:3])
    found, (values,) = read(shard, [9, 7, 5, 6], "a")
    assert (found, values) == ([9, 5, 6], [expected[2], expected[0], expected[1]])
    returned = Returned(attributes={"a": [values]}, original_ids=None, missing=())
    answer = SearchAnswer(
        ranked=Ranked(np.array([found]), np.zeros((1, 3), np.float32)),
        generation=1,
        model_version="m",
        coverage=Coverage(
            shards_asked=1, shards_answered=1, rows_asked=3, rows_answered=3, degraded=()
        ),
        took_ms=1.0,
        search_ms=1.0,
        reasons=(),
        request_id="r",
        returned=returned,
    )
    for media, decode in ((Media.JSON, json.loads), (Media.MSGPACK, msgpack.unpackb)):
        assert decode(encode_answer(answer, media))["attributes"] == {"a": [values]}


def test_rows_are_found_in_every_chunk_of_a_column() -> None:
    parts = [pa.array(TITLES[:7]), pa.array([], pa.string()), pa.array(TITLES[7:])]
    shard = shard_with(pa.table({"title": pa.chunked_array(parts), "n": IDS}))
    for asked in ([7, 6, 39, 0], [6], [7], [3], []):
        expected = [[TITLES[item] for item in asked], asked]
        assert read(shard, asked, "title", "n") == (asked, expected)


def test_values_of_dictionaries_are_read_from_every_chunk() -> None:
    """Each chunk has a dictionary of its own; null is no value of it, or one."""
    parts = [pa.array(part, pa.string()) for part in (TITLES[:7], [], TITLES[7:20], TITLES[20:])]
    chunks = [part.dictionary_encode() for part in parts]
    chunks[-1] = parts[-1].dictionary_encode(null_encoding="encode")
    shard = shard_with(pa.table({"title": pa.chunked_array(chunks)}))
    for asked in ([7, 6, 39, 3, 0, 20, 19], [6], [3], [], list(range(40))):
        assert read(shard, asked, "title") == (asked, [[TITLES[item] for item in asked]])
    days = [MOMENT.date() if item % 3 else None for item in range(40)]
    shard = shard_with(pa.table({"day": pa.array(days).dictionary_encode()}))
    assert read(shard, [4, 3, 5], "day") == ([4, 3, 5], [["2026-03-01", None, "2026-03-01"]])


@pytest.mark.parametrize("names", [("price",), ("title", "price")])
def test_an_unknown_attribute_is_refused_with_those_there_are(names: tuple[str, ...]) -> None:
    shard = shard_with(pa.table({"title": TITLES}))
    with pytest.raises(InvalidInput) as caught:
        read(shard, [1], *names)
    assert (caught.value.field, caught.value.got) == ("return", "price")
    assert caught.value.expected == "one of title"


def test_a_value_that_python_cannot_hold_is_null() -> None:
    values = pa.array([10**13, 0] * 20, pa.timestamp("s"))
    assert read(shard_with(pa.table({"t": values})), [0, 1], "t") == (
        [0, 1],
        [[None, "1970-01-01T00:00:00"]],
    )


def test_more_than_an_answer_may_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "MAX_RETURNED_BYTES", 1_000)
    shard = shard_with(pa.table({"title": ["x" * 600] * 40}))
    assert read(shard, [1], "title") == ([1], [["x" * 600]])
    with pytest.raises(InvalidInput, match="too much to return"):
        read(shard, [1, 2], "title")


def test_reading_ends_when_the_time_is_out() -> None:
    shard = shard_with(pa.table({"title": TITLES}))
    late = AttributesRequest(item_ids=IDS, names=("title",), timeout_ms=-1.0)
    (reply,) = shard.attributes_batch([late], [MAX_RETURNED_BYTES])
    assert isinstance(reply, DeadlineExceeded)


def test_an_id_that_was_kept_is_its_own_original() -> None:
    assert read(shard_with(None), [4, 2], "original_id") == ([4, 2], [[4, 2]])
    shard = shard_with(pa.table({"original_id": TITLES}))
    assert read(shard, [4, 2], "original_id") == ([4, 2], [["ü 4", "ü 2"]])


@contextlib.asynccontextmanager
async def service_over(tables: list[pa.Table | None]):
    """(service, servers) with a shard per table, each with its part of the 40 rows."""
    parts = np.array_split(np.arange(40), len(tables))
    servers, routes = [], []
    for number, (rows, table) in enumerate(zip(parts, tables, strict=True)):
        shard = shard_with(table, IDS[rows], VECTORS[rows])
        shard.shard = number
        server = ShardServer(shard, secret=SECRET)
        route = ReplicaRoute(key=server.key, epoch=1, address=server.bind())
        server.start(1)
        servers.append(server)
        routes.append(ShardRoute(shard=number, rows=len(rows), replicas=(route,)))
    service = SearchService(CONFIG, SECRET, load_encoder=lambda _table: None)
    try:
        boundaries = tuple(int(IDS[rows[0]]) for rows in parts[1:])
        await service.apply(make_table(routes, DIM, boundaries=boundaries))
        yield service, servers
    finally:
        await service.close()
        for server in servers:
            server.stop()


def titled(number_of_shards: int) -> list[pa.Table]:
    rows = np.array_split(np.arange(40), number_of_shards)
    return [pa.table({"title": [TITLES[row] for row in part]}) for part in rows]


async def ask(service: SearchService, media: Media = Media.JSON, **body):
    """The answer's body, decoded."""
    query = decode_query(json.dumps(body).encode(), Media.JSON, CONFIG)
    answer = await service.search(query, arrived_at=asyncio.get_running_loop().time())
    encoded = encode_answer(answer, media)
    return json.loads(encoded) if media is Media.JSON else msgpack.unpackb(encoded)


@pytest.mark.parametrize("media", list(Media))
async def test_attributes_come_in_the_order_of_the_results(media: Media) -> None:
    async with service_over(titled(3)) as (service, _):
        queries = {"vectors": VECTORS[:2].tolist(), "k": 40}
        plain = await ask(service, **queries)
        wanted = {"return": ["title", "title"], "return_original_ids": True}
        answer = await ask(service, media, **queries, **wanted)
        assert answer["attributes"] == {"title": [[TITLES[i] for i in row] for row in plain["ids"]]}
        assert answer["original_ids"] == plain["ids"]
        assert "attributes" not in plain
        assert "original_ids" not in plain


async def test_empty_slots_and_unknown_items_have_no_attributes() -> None:
    async with service_over(titled(2)) as (service, _):
        answer = await ask(service, item_ids=[99, 3], k=2, **{"return": ["title"]})
        assert [len(row) for row in answer["attributes"]["title"]] == [0, 2]
        answer = await ask(service, item_ids=[99], k=2, **{"return": ["title"]})
        assert answer["attributes"] == {"title": [[]]}
        with pytest.raises(InvalidInput, match="no such attribute"):
            await ask(service, item_ids=[99], k=2, **{"return": ["titel"]})


async def test_what_a_shard_did_not_bring_is_null_and_said() -> None:
    """The results are whole, from the cache; their attributes miss a shard, then both."""
    async with service_over(titled(2)) as (service, servers):
        body = {"vectors": VECTORS[:1].tolist(), "k": 40, "min_coverage": 1.0}
        whole = await ask(service, **body)
        for stopped, present in ((1, range(20)), (0, ())):
            servers[stopped].stop()
            answer = await ask(service, **body, **{"return": ["title"]})
            assert answer["ids"] == whole["ids"]
            (titles,), (ids,) = answer["attributes"]["title"], answer["ids"]
            assert titles == [TITLES[item] if item in present else None for item in ids]
            assert answer["coverage"]["rows_answered"] == 40
            missing = [each["shard"] for each in answer["attributes_missing"]]
            assert missing == list(range(stopped, 2))


def test_a_search_that_misses_a_shard_leaves_time_for_attributes() -> None:
    with running_router(CONFIG) as router, Client(router.url) as client:
        router.shards[3].gate.clear()
        try:
            answer = client.search(vectors=VECTORS[:1], k=60, timeout_ms=400, return_=["title"])
        finally:
            router.shards[3].gate.set()
        assert answer.coverage.shards_answered == 3
        (titles,), (ids,) = answer.attributes["title"], answer.ids.tolist()
        assert titles == [f"title of {item}" for item in ids if item >= 0]
        assert len(titles) == 45


async def test_as_many_attributes_as_are_allowed_come_from_a_shard() -> None:
    """With the original ids: what the wire takes is a name more than what the API takes."""
    names = [f"a{number}" for number in range(MAX_RETURNED)]
    table = pa.table({name: [name] * 40 for name in names})
    async with service_over([table]) as (service, _):
        answer = await ask(
            service, item_ids=[3], k=2, **{"return": names, "return_original_ids": True}
        )
        assert answer["attributes"] == {name: [[name] * 2] for name in names}
        assert "attributes_missing" not in answer


async def test_many_results_are_asked_for_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout_module, "IDS_AT_A_TIME", 7)
    monkeypatch.setattr(state_module, "READ_ROWS", 2)
    async with service_over(titled(3)) as (service, servers):
        answer = await ask(service, vectors=VECTORS[:2].tolist(), k=40, **{"return": ["title"]})
        assert answer["attributes"]["title"] == [[TITLES[i] for i in row] for row in answer["ids"]]
        assert "attributes_missing" not in answer
        assert all(server.stats.overloaded == 0 for server in servers)


async def test_what_many_queries_share_counts_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(returned_module, "MAX_RETURNED_BYTES", 100_000)
    async with service_over([pa.table({"text": ["x" * 600] * 40})]) as (service, _):
        wanted = {"k": 40, "return": ["text"]}
        answer = await ask(service, vectors=VECTORS[:3].tolist(), **wanted)
        assert len(answer["attributes"]["text"][2]) == 40
        with pytest.raises(InvalidInput, match="too much to return"):
            await ask(service, vectors=VECTORS[:5].tolist(), **wanted)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"return": "title"}, "return"),
        ({"return": [1]}, "return[0]"),
        ({"return": ["a"] * (MAX_RETURNED + 1)}, "return"),
        ({"item_ids": [1] * 200, "k": 2000, "return": ["a"]}, "return"),
        ({"return_original_ids": "yes"}, "return_original_ids"),
        ({"returned": ["title"]}, "returned"),
    ],
)
def test_wrong_fields_are_refused_by_name(wrong: dict, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_query(json.dumps({"item_ids": [1]} | wrong).encode(), Media.JSON, CONFIG)
    assert caught.value.field == field


def test_the_client_brings_them_as_tables() -> None:
    with running_router(CONFIG) as router, Client(router.url) as client:
        wanted = {"return_": ["title", "id"], "return_original_ids": True}
        answer = client.search(vectors=VECTORS[:2], k=3, **wanted)
        titles = [[f"title of {item}" for item in row] for row in answer.ids.tolist()]
        assert answer.attributes["title"] == titles
        table = answer.to_arrow()
        assert table["title"].to_pylist() == titles[0] + titles[1]
        assert table["id"].to_pylist() == answer.ids.ravel().tolist()
        assert table["attribute.id"].to_pylist()[0] == f"id of {answer.ids[0, 0]}"
        assert table["original_id"].to_pylist()[0] == f"original_id of {answer.ids[0, 0]}"
        assert answer.to_pandas()["title"].tolist() == titles[0] + titles[1]
        with pytest.raises(InvalidInput) as caught:
            client.search(vectors=VECTORS[:2], return_="title")
        assert caught.value.field == "return"


@pytest.mark.parametrize("values", [b"\xc1", msgpack.packb([]), msgpack.packb(["a"] * 99)])
def test_a_shard_that_sends_something_else_counts_as_missing(values: bytes) -> None:
    with running_router(CONFIG) as router, Client(router.url) as client:
        for shard in router.shards[1:]:
            shard.bad_values = values
        answer = client.search(vectors=VECTORS[:1], k=60, return_=["title"])
        assert answer.coverage.shards_answered == 4
        assert [each.shard for each in answer.attributes_missing] == [1, 2, 3]
        (titles,), (ids,) = answer.attributes["title"], answer.ids.tolist()
        assert titles == [f"title of {item}" if item < 15 else None for item in ids]
        router.shards[0].fetch_error = ErrorReply(code="unavailable", message="gone")
        answer = client.search(vectors=VECTORS[:1], k=60, return_=["title"])
        assert answer.attributes == {"title": [[None] * 60]}
