"""Bodies in both formats: what goes in comes out, and only numbers pass for numbers."""

import msgpack
import numpy as np
import orjson
import pytest

from shardline.router.client.answers import read_item, read_search
from shardline.router.client.calls import search_body
from shardline.router.contract import (
    Coverage,
    Degraded,
    ItemAnswer,
    NotAcceptable,
    Reason,
    ReasonCode,
    UnsupportedMediaType,
)
from shardline.router.http.codec import decode_query, encode_answer, encode_item
from shardline.router.http.media import Media, answer_media, body_media
from shardline.router.limits import resolve
from shardline.router.query import QueryKind, SearchAnswer
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import InvalidInput, ProtocolError
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import Ranked
from tests.http_bodies import packed

CONFIG = RouterConfig()
INF = np.float32(np.inf)
KNOWN_FIELDS = (
    "vectors, features, item_ids, texts, exclude_lists, k, timeout_ms, min_coverage, params, "
    "min_seq, min_seq_of, background, exact, filter, exclude, exclude_history, cap, boost, "
    "diversify, return, return_original_ids, experiment_key"
)
REASON = Reason(query=1, code=ReasonCode.NOT_FOUND, text="why")


def make_answer(**changes):
    content = {
        "ranked": Ranked(
            np.array([[4, 2, -1], [7, 8, 9]]),
            np.array([[0.1, -3.5, -INF], [3, 2, 1]], np.float32),
        ),
        "generation": 3,
        "table_version": 17,
        "model_version": "m",
        "coverage": Coverage(
            shards_asked=2,
            shards_answered=1,
            rows_asked=9,
            rows_answered=4,
            degraded=(Degraded(shard=1, code="unavailable", text="x"),),
        ),
        "took_ms": 1.23456,
        "search_ms": 0.5,
        "reasons": (),
        "request_id": "r",
        "seq": (12, None),
    }
    return SearchAnswer(**(content | changes))


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/json", Media.JSON),
        ("Application/JSON; charset=utf-8", Media.JSON),
        ("application/msgpack", Media.MSGPACK),
        ("application/x-msgpack", Media.MSGPACK),
    ],
)
def test_body_media(content_type, expected):
    assert body_media(content_type) is expected


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_other_bodies_are_unsupported(content_type):
    with pytest.raises(UnsupportedMediaType) as caught:
        body_media(content_type)
    assert caught.value.field == "Content-Type"


@pytest.mark.parametrize(
    ("accept", "default", "expected"),
    [
        ("", Media.MSGPACK, Media.MSGPACK),
        ("*/*", Media.MSGPACK, Media.MSGPACK),
        ("application/*", Media.JSON, Media.JSON),
        ("application/msgpack", Media.JSON, Media.MSGPACK),
        ("text/html, application/json;q=0.4, application/msgpack;q=0.5", Media.JSON, Media.MSGPACK),
        ("application/msgpack;q=0.2, */*;q=0.1", Media.JSON, Media.MSGPACK),
        ("application/json;q=oops", Media.MSGPACK, Media.JSON),
    ],
)
def test_answer_media(accept, default, expected):
    assert answer_media(accept, default) is expected


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0", "image/*"])
def test_other_answers_are_not_acceptable(accept):
    with pytest.raises(NotAcceptable):
        answer_media(accept, Media.JSON)


def test_json_query():
    body = (
        b'{"vectors": [[1, 2.5], [-3e2, 0]], "k": 7, "timeout_ms": 50, "min_coverage": 1,'
        b' "params": {"nprobe": 4}, "features": null}'
    )
    query = decode_query(body, Media.JSON, CONFIG)
    assert query.kind is QueryKind.VECTORS
    assert query.values.tolist() == [[1.0, 2.5], [-300.0, 0.0]]
    assert (query.k, query.timeout_ms, query.min_coverage) == (7, 50.0, 1.0)
    assert query.params == SearchParams(nprobe=4)


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<i4", "<i8"])
def test_msgpack_arrays_of_every_type(dtype):
    body = msgpack.packb({"vectors": packed([[1, 2], [3, 4]], dtype)})
    query = decode_query(body, Media.MSGPACK, CONFIG)
    assert query.values.dtype == np.dtype(dtype)
    assert query.values.tolist() == [[1, 2], [3, 4]]


def test_msgpack_takes_plain_lists_too():
    query = decode_query(msgpack.packb({"item_ids": [3, 2**62]}), Media.MSGPACK, CONFIG)
    assert (query.kind, query.values) == (QueryKind.ITEM_IDS, [3, 2**62])
    query = decode_query(msgpack.packb({"vectors": [[1, 2.5]]}), Media.MSGPACK, CONFIG)
    assert query.values.tolist() == [[1.0, 2.5]]


def test_an_array_as_a_feature_is_a_list():
    body = msgpack.packb({"features": [{"interest": packed([1, 2], "<f4"), "country": "DE"}]})
    query = decode_query(body, Media.MSGPACK, CONFIG)
    assert query.values == [{"interest": [1.0, 2.0], "country": "DE"}]


@pytest.mark.parametrize(
    "fields",
    [
        {"vectors": np.array([[1, 2]], "<f4"), "k": 3, "params": SearchParams(ef_search=9)},
        {"item_ids": np.array([5, 6], "<i8"), "timeout_ms": 20.5, "min_coverage": 0.5},
        {"features": [{"age": 30, "past": [1, 2], "country": None, "new": True}]},
    ],
)
def test_what_the_client_sends_is_what_the_server_reads(fields):
    query = decode_query(search_body(**fields), Media.MSGPACK, CONFIG)
    expected = resolve(CONFIG, **fields)
    assert np.array_equal(query.values, expected.values)
    for name in ("kind", "k", "timeout_ms", "min_coverage", "params", "options"):
        assert getattr(query, name) == getattr(expected, name)


BAD_JSON = [
    (b"", "body", "not JSON"),
    (b"{", "body", "not JSON"),
    (b"\xff\xfe", "body", "not JSON"),
    (b"[" * 3000 + b"]" * 3000, "body", "not JSON"),
    (b'{"vectors": [[NaN]]}', "body", "not JSON"),
    (b'{"vectors": [[1e999]]}', "body", "not JSON"),
    (b"[1]", "body", "not an object"),
    (b"null", "body", "not an object"),
    (b'{"vectors": 3}', "vectors", "wrong type"),
    (b'{"vectors": [1.0, 2.0]}', "vectors[0]", "wrong type"),
    (b'{"vectors": {"dtype": "<f4"}}', "vectors", "wrong type"),
    (b'{"vectors": [["1.5"]]}', "vectors[0]", "wrong type"),
    (b'{"vectors": [[1.0], [true]]}', "vectors[1]", "wrong type"),
    (b'{"vectors": [[1.0], [null]]}', "vectors[1]", "wrong type"),
    (b'{"vectors": [[1.0, 2.0], [1.0]]}', "vectors[1]", "rows of different lengths"),
    (b'{"vectors": [[[1.0]]]}', "vectors[0]", "wrong type"),
    (b'{"item_ids": "5"}', "item_ids", "wrong type"),
    (b'{"item_ids": [1, 2.0]}', "item_ids[1]", "wrong type"),
    (b'{"item_ids": [true]}', "item_ids[0]", "wrong type"),
    (b'{"item_ids": [1, "2"]}', "item_ids[1]", "wrong type"),
    (b'{"features": {"age": 3}}', "features", "wrong type"),
    (b'{"features": [3]}', "features[0]", "wrong type"),
    (b'{"features": [{"age": {"years": 3}}]}', "features[0].age", "wrong type"),
    (b'{"features": [{"age": [[3]]}]}', "features[0].age", "wrong type"),
    (b'{"item_ids": [1], "k": "5"}', "k", "wrong value"),
    (b'{"item_ids": [1], "k": 5.0}', "k", "wrong value"),
    (b'{"item_ids": [1], "k": true}', "k", "wrong value"),
    (b'{"item_ids": [1], "timeout_ms": "9"}', "timeout_ms", "wrong value"),
    (b'{"item_ids": [1], "params": {"nprobe": 0}}', "params.nprobe", "wrong value"),
    (b'{"item_ids": [1], "params": {"nprobes": 1}}', "params.nprobes", "unknown field"),
    (b'{"item_ids": [1], "params": 3}', "params", "wrong value"),
    (b'{"item_id": [1]}', "item_id", "unknown field"),
]


@pytest.mark.parametrize(("body", "field", "message"), BAD_JSON)
def test_bad_json_is_named(body, field, message):
    with pytest.raises(InvalidInput, match=message) as caught:
        decode_query(body, Media.JSON, CONFIG)
    assert caught.value.field == field


def test_an_unknown_field_comes_with_the_known_ones_and_a_guess():
    with pytest.raises(InvalidInput) as caught:
        decode_query(b'{"item_id": [1]}', Media.JSON, CONFIG)
    assert caught.value.hint == (f"did you mean item_ids? known fields: {KNOWN_FIELDS}")
    with pytest.raises(InvalidInput) as caught:
        decode_query(b'{"params": {"zzz": 1}}', Media.JSON, CONFIG)
    assert caught.value.hint == "known fields: nprobe, ef_search, rerank_factor"


@pytest.mark.parametrize("name", ["user_ids", "user_id", "users"])
def test_users_are_asked_for_by_features(name):
    """The nearest spelling is item_ids, which would answer another question."""
    with pytest.raises(InvalidInput) as caught:
        decode_query(f'{{"{name}": [17]}}'.encode(), Media.JSON, CONFIG)
    assert caught.value.field == name
    assert caught.value.hint == (
        "users are asked for by their features, which /v1/status lists: use features; "
        f"known fields: {KNOWN_FIELDS}"
    )


BAD_MSGPACK = [
    (b"", "body", "not msgpack"),
    (b"\xc1", "body", "not msgpack"),
    (msgpack.packb({"k": 1}) + b"x", "body", "not msgpack"),
    (b"\x91" * 3000 + b"\x01", "body", "not msgpack"),
    (b"\xdf\xff\xff\xff\xff", "body", "not msgpack"),
    (msgpack.packb({1: 2}), "body", "not msgpack"),
    (b"\x82\xa1k\x01\xa1k\x02", "body", "a key comes twice"),
    (msgpack.packb({"k": msgpack.ExtType(4, b"x")}), "body", "extension types"),
    (msgpack.packb({"k": msgpack.Timestamp(4)}), "k", "wrong value"),
    (
        msgpack.packb({"features": [{"age": msgpack.Timestamp(4)}]}),
        "features[0].age",
        "wrong type",
    ),
    (msgpack.packb({"features": [{"age": float("nan")}]}), "features[0].age", "not finite"),
    (msgpack.packb({"features": [{"age": b"raw"}]}), "features[0].age", "wrong type"),
    (msgpack.packb({"timeout_ms": float("nan")}), "timeout_ms", "wrong value"),
    (msgpack.packb({"vectors": packed([1, 2], "<f4")}), "vectors", "wrong shape"),
    (msgpack.packb({"vectors": packed(1, "<f4")}), "vectors", "wrong shape"),
    (msgpack.packb({"item_ids": packed([[1, 2]], "<i8")}), "item_ids", "wrong shape"),
    (msgpack.packb({"vectors": packed([[1, 2]], "<u2")}), "dtype", "array type"),
    (msgpack.packb({"vectors": packed([[1, 2]], "<f4") | {"dtype": "O"}}), "dtype", "array type"),
    (msgpack.packb({"vectors": packed([[1, 2]], "<f4") | {"shape": [1, 3]}}), "data", "bad array"),
    (
        msgpack.packb({"vectors": packed([[1, 2]], "<f4") | {"shape": [-1, -2]}}),
        "shape",
        "bad array",
    ),
    (msgpack.packb({"vectors": packed([[1, 2]], "<f4") | {"shape": 2}}), "shape", "bad array"),
    (msgpack.packb({"vectors": packed([[1, 2]], "<f4") | {"data": "ab"}}), "data", "bad array"),
    (msgpack.packb({"vectors": packed([[[1, 2]]], "<f4")}), "shape", "bad array"),
]


@pytest.mark.parametrize(("body", "field", "message"), BAD_MSGPACK)
def test_bad_msgpack_is_named(body, field, message):
    with pytest.raises(InvalidInput, match=message) as caught:
        decode_query(body, Media.MSGPACK, CONFIG)
    assert caught.value.field == field


def test_json_answers_are_cut_to_live_results():
    content = orjson.loads(encode_answer(make_answer(), Media.JSON))
    assert content == {
        "ids": [[4, 2], [7, 8, 9]],
        "scores": [[0.1, -3.5], [3.0, 2.0, 1.0]],
        "seq": [12, None],
        "generation": 3,
        "table_version": 17,
        "model_version": "m",
        "coverage": {
            "shards_asked": 2,
            "shards_answered": 1,
            "rows_asked": 9,
            "rows_answered": 4,
            "degraded": [{"shard": 1, "code": "unavailable", "text": "x"}],
        },
        "took_ms": 1.235,
        "search_ms": 0.5,
        "request_id": "r",
    }


def test_full_json_answers_are_not_cut():
    answer = make_answer(ranked=Ranked(np.array([[1, 2]]), np.array([[2, 1]], np.float32)))
    content = orjson.loads(encode_answer(answer, Media.JSON))
    assert (content["ids"], content["scores"]) == ([[1, 2]], [[2.0, 1.0]])


def test_reasons_are_there_only_when_there_are_any():
    content = orjson.loads(encode_answer(make_answer(reasons=(REASON,)), Media.JSON))
    assert content["reasons"] == [{"query": 1, "code": "not_found", "text": "why"}]


def test_msgpack_answers_come_back_as_they_were_empty_slots_included():
    answer = make_answer(reasons=(REASON,), took_ms=1.5)
    again = read_search(encode_answer(answer, Media.MSGPACK))
    np.testing.assert_array_equal(again.ids, answer.ranked.ids)
    np.testing.assert_array_equal(again.scores, answer.ranked.scores)
    assert (again.ids.dtype, again.scores.dtype) == (np.int64, np.float32)
    for name in ("generation", "model_version", "took_ms", "search_ms", "request_id"):
        assert getattr(again, name) == getattr(answer, name)
    assert (again.coverage, again.reasons) == (answer.coverage, answer.reasons)


def test_fields_of_a_newer_server_are_ignored():
    content = msgpack.unpackb(encode_answer(make_answer(), Media.MSGPACK))
    assert read_search(msgpack.packb(content | {"from_a_newer_server": 1})).generation == 3


FLOATS = packed([[1.5]], "<f4")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x80",
        b"\x01",
        msgpack.packb({"coverage": {"a": 1}}),
        msgpack.packb({"ids": FLOATS, "scores": FLOATS}),
        msgpack.packb({"ids": packed([[1, 2]], "<i8"), "scores": FLOATS}),
        msgpack.packb({"ids": [[1]], "scores": [[1.5]]}),
    ],
)
@pytest.mark.parametrize("read", [read_search, read_item])
def test_what_is_no_answer_is_a_protocol_error(body, read):
    with pytest.raises(ProtocolError, match="not a"):
        read(body)


def test_item_in_both_formats():
    answer = ItemAnswer(
        item_id=5,
        vector=np.array([0.1, 2], np.float32),
        attributes={"title": "a", "tags": [None, 1]},
        shard=1,
        seq=7,
        generation=2,
        model_version="m",
    )
    content = orjson.loads(encode_item(answer, Media.JSON))
    assert content == {
        "item_id": 5,
        "vector": [0.1, 2.0],
        "attributes": {"title": "a", "tags": [None, 1]},
        "shard": 1,
        "seq": 7,
        "generation": 2,
        "model_version": "m",
    }
    body = encode_item(answer, Media.MSGPACK)
    assert msgpack.unpackb(body)["vector"] == packed([0.1, 2], "<f4")
    again = read_item(body)
    assert again.vector.tolist() == answer.vector.tolist()
    assert (again.item_id, again.shard, again.generation, again.model_version) == (5, 1, 2, "m")
    assert (again.attributes, again.seq) == (answer.attributes, 7)
