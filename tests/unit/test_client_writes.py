"""Writes of both clients against a real HTTP server over fake shards."""

import datetime as dt
import itertools
from decimal import Decimal
from typing import Any

import msgpack
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from shardline.router.client import write_calls
from shardline.router.client.answers import UpsertAnswer, together
from shardline.router.client.retries import Retry
from shardline.router.client.seq import Seq
from shardline.router.client.write_calls import WriteRequest, delete_requests, upsert_requests
from shardline.router.http import feature_values
from shardline.router.http.media import Media
from shardline.router.http.write_codec import decode_delete, decode_upsert
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import (
    Behind,
    DeltaFull,
    InvalidInput,
    NotFound,
    StoreFull,
    VersionMismatch,
)
from shardline.shards.core.messages import ErrorReply
from tests.client_pair import KINDS, slept_into
from tests.fake_encoder import ITEM_FEATURES, item_vector
from tests.live_router import DIM, running_router

CONFIG = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, write_timeout_ms=10_000)
ROWS = np.eye(3, DIM, dtype=np.float32)
IDS = [1, 2, 3]
FEATURED = {"item_id": 1, "features": {"a": 1}}
TITLES = ["a", "ü", None]


@pytest.fixture
def router():
    with running_router(CONFIG) as router:
        yield router


@pytest.fixture(params=KINDS)
def client(router, request):
    with request.param(router.url, retry=Retry(attempts=3)) as client:
        yield client


def read(requests: Any) -> list[tuple[WriteRequest, Any]]:
    """Each request, and what a server reads in its body."""
    return [(each, decode_upsert(each.body, Media.MSGPACK, CONFIG)) for each in requests]


def test_items_are_written_found_and_deleted(client):
    written = client.upsert(
        item_ids=[70, 3],
        vectors=5 * ROWS[:2],
        attributes={"title": ["x", "y"]},
        model_version="m1",
    )
    assert (written.rows, written.created, written.updated, written.duplicates) == (2, 1, 1, 0)
    assert written.seq == (1, None, None, 1)
    item = client.item(70)
    assert (item.attributes, item.seq, item.shard) == ({"title": "x"}, 1, 3)
    assert item.vector.tolist() == (5 * ROWS[0]).tolist()
    answer = client.search(vectors=ROWS[:1], k=1, min_seq=written.seq)
    assert answer.seq == (1, 0, 0, 1)
    deleted = client.delete([70, 71])
    assert (deleted.rows, deleted.deleted, deleted.missing) == (2, 1, 1)
    assert deleted.seq == (None, None, None, 2)
    with pytest.raises(NotFound):
        client.item(70)


@pytest.mark.parametrize(
    "items",
    [
        [
            {"item_id": 1, "vector": [1, 0], "attributes": {"a": 1}},
            {"item_id": 2, "vector": [0, 2]},
        ],
        pa.table({"item_id": [1, 2], "vector": [[1.0, 0], [0, 2]], "a": [1, None]}),
        pa.record_batch({"item_id": [1, 2], "vector": [[1.0, 0], [0, 2]], "a": [1, None]}),
        pd.DataFrame({"item_id": [1, 2], "vector": [[1.0, 0], [0, 2]], "a": [1, float("nan")]}),
        pl.DataFrame({"item_id": [1, 2], "vector": [[1.0, 0], [0, 2]], "a": [1, None]}),
    ],
    ids=["maps", "table", "batch", "pandas", "polars"],
)
def test_tables_and_maps_become_columns(items):
    ((_, got),) = read(upsert_requests(items=items))
    assert got.item_ids.tolist() == [1, 2]
    assert got.vectors.tolist() == [[1, 0], [0, 2]]
    assert got.attributes == {"a": [1, None]}


@pytest.mark.parametrize(
    "attributes",
    [
        {"n": [1.5, float("nan"), None], "t": ("a", "b", "c")},
        {"n": np.array([1.5, np.nan, np.nan]), "t": np.array(["a", "b", "c"])},
        pa.table({"n": [1.5, None, None], "t": ["a", "b", "c"]}),
        pd.DataFrame({"n": [1.5, None, None], "t": ["a", "b", "c"]}),
        pl.DataFrame({"n": [1.5, None, None], "t": ["a", "b", "c"]}),
    ],
    ids=["lists", "numpy", "table", "pandas", "polars"],
)
def test_attributes_of_any_kind_of_columns(attributes):
    ((_, got),) = read(upsert_requests(item_ids=IDS, vectors=ROWS, attributes=attributes))
    assert got.attributes == {"n": [1.5, None, None], "t": ["a", "b", "c"]}


def test_items_are_written_by_features(client, router):
    """Rows of one kind in maps, or columns of any kind; what is also an attribute is one."""
    items = [
        {"item_id": 70, "features": ITEM_FEATURES},
        {"item_id": 71, "features": ITEM_FEATURES | {"size": 3}, "attributes": {"title": "b"}},
    ]
    assert client.upsert(items).created == 2
    columns = {
        "category": ["film", "song"],
        "size": np.array([2.0, np.nan]),
        "released": [None, dt.datetime(2014, 5, 13, 16, 53, 20)],
        "tags": [("x",), np.array(["y"])],
    }
    client.upsert(item_ids=[72, 73], features=columns, attributes={"title": ["c", None]})
    expected = [item_vector(DIM, 1, 0, 1, size, 1) for size in (2, 3, 2)]
    for item, vector in zip((70, 71, 72), expected, strict=True):
        np.testing.assert_allclose(client.item(item).vector, vector, atol=1e-6)
    np.testing.assert_allclose(client.item(73).vector, item_vector(DIM, 0, 1, 3), atol=1e-6)
    filled = {"category": "film", "size": 2, "released": None, "tags": ["x"]}
    assert client.item(70).attributes["title"] is None
    assert router.shards[3].attributes == {
        70: filled | {"title": None},
        71: filled | {"size": 3, "title": "b"},
        72: filled | {"title": "c"},
        73: {
            "category": "song",
            "size": None,
            "released": "2014-05-13T16:53:20",
            "tags": ["y"],
            "title": None,
        },
    }
    with pytest.raises(InvalidInput) as caught:
        client.upsert(item_ids=[74], features={name: [1] for name in columns})
    assert caught.value.field == "features.category[0]"


@pytest.mark.parametrize(
    "make", [dict, pa.table, pd.DataFrame, pl.DataFrame], ids=["map", "arrow", "pandas", "polars"]
)
def test_features_of_any_kind_of_columns(make):
    columns = {"size": [1.5, None, 3.0], "name": ["a", "b", None], "tags": [["x"], [], ["y", "z"]]}
    ((_, got),) = read(upsert_requests(item_ids=IDS, features=make(columns)))
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    assert got.features == rows
    assert got.vectors is None


def test_attributes_that_an_item_does_not_name_are_its_features():
    items = [
        {"item_id": 1, "features": {"a": 1, "b": 2}, "attributes": {"a": 5, "t": "x"}},
        {"item_id": 2, "features": {"a": 3, "b": 4}, "attributes": {"b": None}},
    ]
    ((_, got),) = read(upsert_requests(items=items))
    assert got.attributes == {"a": [5, 3], "t": ["x", None], "b": [2, None]}


def test_features_are_cut_to_what_a_server_takes(monkeypatch):
    """By lists and by texts, those beyond ASCII counted more often; in order, none left out."""
    assert write_calls.MAX_CHARACTERS <= feature_values.MAX_CHARACTERS
    assert write_calls.MAX_FEATURE_VALUES <= feature_values.MAX_VALUES
    assert write_calls.BEYOND_ASCII == feature_values.BEYOND_ASCII
    monkeypatch.setattr(write_calls, "MAX_FEATURE_VALUES", 10)
    monkeypatch.setattr(write_calls, "MAX_CHARACTERS", 100)
    count = 40
    lists = {"tags": [["x"] * (n % 7) for n in range(count)]}
    texts = {"text": [("ü" if n % 5 == 0 else "u") * (n % 12) for n in range(count)]}
    for columns, cost, most in (
        (lists, len, 10),
        (texts, lambda text: len(text) * (1 if text.isascii() else 10), 100),
    ):
        requests = read(upsert_requests(item_ids=np.arange(count), features=columns))
        (name,) = columns
        sent = [[row[name] for row in got.features] for _, got in requests]
        assert list(itertools.chain.from_iterable(sent)) == columns[name]
        sizes = [sum(map(cost, each)) for each in sent]
        assert all(size <= most or len(each) == 1 for size, each in zip(sizes, sent, strict=True))
        assert 1 < len(requests) < count
        for size, after in zip(sizes, sent[1:], strict=False):
            assert size + cost(after[0]) > most, "no request is smaller than it must be"


def test_values_travel_as_answers_have_them():
    moment = dt.datetime(2026, 3, 1, 12, 30)
    values = [moment, Decimal("1.5"), dt.timedelta(seconds=2), [np.float64("nan"), {"a": moment}]]
    ((_, got),) = read(
        upsert_requests(item_ids=[1, 2, 3, 4], vectors=np.eye(4), attributes={"a": values})
    )
    text = moment.isoformat()
    assert got.attributes == {"a": [text, 1.5, 2.0, [None, {"a": text}]]}


def test_decimals_of_attributes_keep_their_digits_and_those_of_features_are_floats():
    long = Decimal("0.12345678901234567890")
    given = {"a": [long, Decimal("1E+3"), [long], {"a": Decimal(2**63 + 1)}]}
    text = "0.12345678901234567890"
    ((_, got),) = read(upsert_requests(item_ids=[1, 2, 3, 4], vectors=np.eye(4), attributes=given))
    assert got.attributes == {"a": [text, 1000.0, [text], {"a": "9223372036854775809"}]}
    ((_, got),) = read(upsert_requests(item_ids=[1, 2], features={"a": [long, Decimal(3)]}))
    assert got.features == [{"a": float(long)}, {"a": 3.0}]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"item_ids": IDS}, "vectors"),
        ({"vectors": ROWS}, "items"),
        ({"items": [], "item_ids": IDS}, "items"),
        ({"item_ids": IDS[:2], "vectors": ROWS}, "vectors"),
        ({"item_ids": IDS, "vectors": ROWS, "attributes": {"a": [1]}}, "attributes.a"),
        ({"item_ids": IDS, "vectors": ROWS, "attributes": {"a": "xyz"}}, "attributes.a"),
        ({"item_ids": IDS, "vectors": ROWS, "attributes": 7}, "attributes"),
        ({"item_ids": IDS, "vectors": ROWS, "attributes": {"a": [object()] * 3}}, "attributes"),
        ({"item_ids": [-1], "vectors": ROWS[:1]}, "item_ids[0]"),
        ({"item_ids": [1.5], "vectors": ROWS[:1]}, "item_ids"),
        ({"item_ids": IDS, "vectors": ROWS, "key": "a b"}, "key"),
        ({"item_ids": IDS, "vectors": ROWS, "key": "k" * 121}, "key"),
        ({"items": [{"item_id": 1}]}, "items[0]"),
        ({"items": [{"item_id": 1, "vector": [1], "features": {}}]}, "items[0]"),
        ({"items": [FEATURED, {"item_id": 2, "vector": [1]}]}, "items[1]"),
        ({"items": [FEATURED, {"item_id": 2, "features": {}}]}, "items[1].features"),
        ({"items": [{"item_id": 1, "features": 5}]}, "items[0].features"),
        ({"items": pa.table({"item_id": [1], "a": [1]})}, "items.vector"),
        ({"item_ids": IDS, "vectors": ROWS, "features": {"a": IDS}}, "vectors"),
        ({"item_ids": IDS, "features": {"a": [1]}}, "features.a"),
        ({"item_ids": IDS, "features": {"a": "xyz"}}, "features.a"),
        ({"item_ids": IDS, "features": 7}, "features"),
        ({"item_ids": IDS, "features": {"a": [object()] * 3}}, "features and attributes"),
        ({"items": [{"item_id": 1, "vector": [1.0], "x": 2}]}, "items[0]"),
        ({"items": pa.table({"item_id": [1]})}, "items.vector"),
    ],
)
def test_what_cannot_be_sent_is_named(fields, field):
    with pytest.raises(InvalidInput) as caught:
        list(upsert_requests(**fields))
    assert caught.value.field == field


def test_large_writes_are_cut_and_every_request_has_a_key_of_its_own(monkeypatch):
    monkeypatch.setattr(write_calls, "MAX_WRITE_ITEMS", 2)
    vectors = np.eye(5)
    parts = read(upsert_requests(item_ids=range(5), vectors=vectors, attributes={"a": [*range(5)]}))
    assert [got.attributes["a"] for _, got in parts] == [[0, 1], [2, 3], [4]]
    np.testing.assert_array_equal(np.concatenate([got.vectors for _, got in parts]), vectors)
    assert len({request.key for request, _ in parts}) == 3
    named = [each.key for each in delete_requests(item_ids=range(5), key="job-7")]
    assert named == ["job-7", "job-7-0000001", "job-7-0000002"]


def test_long_texts_make_smaller_requests(monkeypatch):
    monkeypatch.setattr(write_calls, "MAX_BODY_BYTES", 1000)
    monkeypatch.setattr(write_calls, "MAX_WRITE_ITEMS", 8)
    parts = read(
        upsert_requests(item_ids=range(8), vectors=np.eye(8, 2), attributes={"a": ["x" * 800] * 8})
    )
    assert [len(got.item_ids) for _, got in parts] == [2, 2, 2, 2]


def test_nothing_to_write_is_said_by_the_server(client):
    with pytest.raises(InvalidInput, match="nothing to write"):
        client.delete([])
    with pytest.raises(InvalidInput, match="nothing to write"):
        client.upsert(item_ids=[], vectors=np.empty((0, DIM)))


def test_answers_add_up():
    one, two = (
        UpsertAnswer(
            rows=rows,
            created=1,
            updated=rows - 1,
            duplicates=0,
            generation=1,
            model_version="m",
            took_ms=2.0,
            request_id=str(rows),
            seq=Seq(seq),
        )
        for rows, seq in ((3, (4, None, None)), (2, (None, 7, None)))
    )
    total = together(together(None, one), two)
    assert (total.rows, total.created, total.updated, total.took_ms) == (5, 2, 3, 4.0)
    assert (total.seq, total.request_id) == ((4, 7, None), "2")


@pytest.mark.parametrize("verb", ["upsert", "delete"])
def test_a_call_that_two_generations_answer_counts_both(client, router, monkeypatch, verb):
    monkeypatch.setattr(write_calls, "MAX_WRITE_ITEMS", 1)
    fields = {"vectors": ROWS} if verb == "upsert" else {}

    def goes_live(done: int) -> None:
        if done == 2:
            router.switch(2, model_version="m2")

    written = getattr(client, verb)(item_ids=IDS, progress=goes_live, **fields)
    assert (written.rows, written.generation, written.model_version) == (3, 2, "m2")
    assert written.seq == (1, None, None, None), "the one write that the newer generation counts"
    assert written.seq.origin == {"generation": 2, "table_version": 2}


def test_seq_of_a_write_holds_after_a_switch(client, router):
    slept_into(client, [])
    router.shards[0].seq = 5000
    written = client.upsert(item_ids=[1], vectors=ROWS[:1])
    assert written.seq == (5001, None, None, None)
    router.switch(2)
    router.shards[0].seq = 3
    with pytest.raises(Behind):  # numbers alone are of whichever generation is live
        client.search(vectors=ROWS[:1], min_seq=list(written.seq), min_coverage=1.0)
    found = client.search(vectors=ROWS[:1], k=1, min_seq=written.seq, min_coverage=1.0)
    assert (found.generation, found.seq) == (2, (3, 0, 0, 0))
    assert client.search(vectors=ROWS[:1], min_seq=found.seq, min_coverage=1.0).seq == found.seq


def test_seq_of_a_write_asks_for_what_was_brought_over(client, router):
    slept_into(client, [])
    written = client.upsert(item_ids=[1], vectors=ROWS[:1])
    router.switch(2, went_live_with=(2, 0, 0, 0))
    with pytest.raises(Behind):
        client.search(vectors=ROWS[:1], min_seq=written.seq, min_coverage=1.0)
    router.shards[0].seq = 2
    assert client.search(vectors=ROWS[:1], min_seq=written.seq, min_coverage=1.0).seq[0] == 2


def test_an_overloaded_shard_is_asked_again_and_nothing_is_written_twice(client, router):
    router.shards[3].write_error = ErrorReply(code="delta_full", message="compaction first")
    pauses: list[float] = []

    def mended(seconds: float) -> None:
        router.shards[3].write_error = None

    slept_into(client, pauses)
    with pytest.raises(DeltaFull) as caught:
        client.upsert(item_ids=[1, 70], vectors=ROWS[:2])
    assert len(pauses) == 2
    parts = caught.value.parts
    assert [(each.shard, each.code, each.items) for each in parts.failed] == [(3, "delta_full", 1)]
    assert parts.applied_items == 1
    assert router.shards[0].seq == 1, "three times the same key"
    mended(0)
    again = client.upsert(item_ids=[1, 70], vectors=ROWS[:2], key=parts.idempotency_key)
    assert (again.seq, router.shards[0].seq) == ((1, None, None, 1), 1)


def test_errors_of_writes_are_typed(client, router):
    with pytest.raises(VersionMismatch) as caught:
        client.upsert(item_ids=[1], vectors=ROWS[:1], model_version="m0")
    assert (caught.value.expected, caught.value.got) == ("m1", "m0")
    router.shards[0].write_error = ErrorReply(code="store_full", message="no space")
    with pytest.raises(StoreFull, match="1 items of shard 0 not acknowledged: no space"):
        client.delete([1])


def test_progress_counts_items(client, monkeypatch):
    monkeypatch.setattr(write_calls, "MAX_WRITE_ITEMS", 2)
    done: list[int] = []
    client.upsert(item_ids=IDS, vectors=ROWS, progress=done.append)
    client.delete(IDS, progress=done.append)
    assert done == [2, 3, 2, 3]


def test_bodies_of_deletes():
    (request,) = delete_requests(item_ids=np.array([3, 1], np.int32), timeout_ms=5)
    got = decode_delete(request.body, Media.MSGPACK, CONFIG)
    assert (got.item_ids.tolist(), got.timeout_ms) == ([3, 1], 5.0)
    assert msgpack.unpackb(request.body).keys() == {"item_ids", "timeout_ms"}
