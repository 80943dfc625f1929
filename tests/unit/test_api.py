"""The HTTP API through the whole ASGI app: real codec, real service, fake shards on sockets."""

import asyncio
import contextlib
import gzip
import logging
from threading import get_ident

import httpx
import msgpack
import numpy as np
import orjson
import pytest

from shardline.router.http import body, body_values
from shardline.router.http.api import DECODE_IN_LOOP, create_app
from shardline.router.http.problems import PROBLEMS
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import Metric
from tests.fake_encoder import FakeEncoder
from tests.fake_shard import (
    SECRET,
    brute_force,
    make_rows,
    make_table,
    running_shards,
    until,
)
from tests.http_bodies import unpacked
from tests.live_router import running_router

DIM = 8
CONFIG = RouterConfig(
    backoff_base_ms=1,
    backoff_max_ms=5,
    max_batch=10,
    max_k=50,
    default_k=10,
    max_body_bytes=4096,
    body_timeout_ms=100,
    retry_after_s=2,
)
JSON = {"content-type": "application/json"}
MSGPACK = {"content-type": "application/msgpack"}


@contextlib.asynccontextmanager
async def api(encoder="m1", config=CONFIG, **table):
    """(http client, shards, service, vectors) over 60 rows in 4 shards."""
    ids, vectors = make_rows(60, DIM)
    async with running_shards(ids, vectors, 4) as shards:
        service = SearchService(
            config, SECRET, load_encoder=lambda _table: FakeEncoder(DIM, encoder)
        )
        await service.apply(make_table(shards, DIM, **table))
        transport = httpx.ASGITransport(app=create_app(service, config))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            yield http, shards, service, vectors
        await service.close()


def one_request(method, path, **options):
    """The response to one request to a fresh cluster."""
    table = options.pop("table", {})

    async def run():
        async with api(**table) as (http, _, _, _):
            return await http.request(method, path, **options)

    return asyncio.run(run())


async def test_search_in_json():
    async with api() as (http, _, _, vectors):
        response = await http.post("/v1/search", json={"vectors": vectors[:2].tolist(), "k": 3})
        ids, scores = brute_force(vectors[:2], np.arange(60), vectors, 3)
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        body = response.json()
        assert body["ids"] == ids.tolist()
        assert body["scores"] == scores.tolist()
        assert body["coverage"] == {
            "shards_asked": 4,
            "shards_answered": 4,
            "rows_asked": 60,
            "rows_answered": 60,
            "degraded": [],
        }
        assert (body["generation"], body["model_version"]) == (1, "m1")
        assert body["request_id"] == response.headers["x-request-id"]
        assert "reasons" not in body


def test_k_is_the_default_of_the_configuration():
    response = one_request("POST", "/v1/search", json={"item_ids": [1]})
    assert [len(row) for row in response.json()["ids"]] == [10]


@pytest.mark.parametrize(
    ("size", "elsewhere"),
    [(10, False), (body_values.COUNTED_IN_LOOP, True), (DECODE_IN_LOOP, True)],
)
async def test_what_takes_long_to_decode_is_not_decoded_in_the_event_loop(
    size, elsewhere, monkeypatch
):
    """Large bodies, and smaller ones of msgpack whose values must be counted first."""
    counted_by, config = [], CONFIG.model_copy(update={"max_body_bytes": 1 << 20})
    monkeypatch.setattr(body_values, "refuse_costly", lambda *_: counted_by.append(get_ident()))
    async with api(config=config) as (http, _, _, vectors):
        padding = {"features": [{"tags": ["a"] * size}]}
        response = await http.post("/v1/search", content=msgpack.packb(padding), headers=MSGPACK)
        assert response.json()["code"] == "invalid_input"
        assert [thread != get_ident() for thread in counted_by] == [True] * elsewhere
        array = {"dtype": "<f4", "shape": [1, DIM], "data": vectors[0].astype("<f4").tobytes()}
        content = msgpack.packb({"vectors": array, "k": 4})
        response = await http.post("/v1/search", content=content, headers=MSGPACK)
        assert response.status_code == 200


async def test_search_in_msgpack_both_ways():
    async with api() as (http, _, _, vectors):
        data = vectors[:2].astype("<f4")
        array = {"dtype": "<f4", "shape": [2, DIM], "data": data.tobytes()}
        response = await http.post(
            "/v1/search", content=msgpack.packb({"vectors": array, "k": 4}), headers=MSGPACK
        )
        assert response.headers["content-type"] == "application/msgpack"
        answer = unpacked(response.content)
        ids, scores = brute_force(vectors[:2], np.arange(60), vectors, 4)
        np.testing.assert_array_equal(answer["ids"], ids)
        np.testing.assert_array_equal(answer["scores"], scores)

        response = await http.post(
            "/v1/search",
            json={"vectors": vectors[:2].tolist(), "k": 4},
            headers={"accept": "application/msgpack"},
        )
        np.testing.assert_array_equal(unpacked(response.content)["ids"], ids)


def test_an_unknown_item_is_an_empty_row_with_a_reason():
    response = one_request("POST", "/v1/search", json={"item_ids": [5, 999], "k": 2})
    assert response.status_code == 200
    body = response.json()
    assert [len(row) for row in body["ids"]] == [2, 0]
    assert 5 not in body["ids"][0]
    assert body["reasons"] == [{"query": 1, "code": "not_found", "text": "item 999 not found"}]


async def test_features_are_encoded():
    async with api() as (http, _, _, vectors):
        features = [{"slope": 0.25}, {"slope": -2.0}]
        response = await http.post("/v1/search", json={"features": features, "k": 2})
        expected = brute_force(FakeEncoder(DIM).encode(features), np.arange(60), vectors, 2)
        assert response.json()["ids"] == expected.ids.tolist()
        assert expected.ids[0].tolist() != expected.ids[1].tolist()


async def test_fastapis_own_way_to_a_search_gives_the_same_answer():
    """It only documents the search, which is called past it; but it is not there for show."""

    async with api() as (http, _, _, vectors):
        query = {"vectors": vectors[:2].tolist(), "k": 3}
        direct = await http.post("/v1/search", json=query)
        http._transport.app._direct = {}
        through = await http.post("/v1/search", json=query)
        assert through.status_code == 200
        assert through.json()["ids"] == direct.json()["ids"]
        assert through.headers.keys() == direct.headers.keys()
        bad = await http.post("/v1/search", json={"topk": 3})
        assert (bad.status_code, bad.json()["field"]) == (400, "topk")


async def test_the_time_taken_includes_the_arrival_of_the_body():
    async def body():
        yield b'{"vectors": [[1, 2, 3, 4, '
        await asyncio.sleep(0.03)
        yield b"5, 6, 7, 8]]}"

    async with api() as (http, _, _, _):
        response = await http.post("/v1/search", content=body(), headers=JSON)
        assert response.status_code == 200
        assert 25 < response.json()["took_ms"] < 2000


ONE = [1.0] * DIM
# (body, field, part of the detail); a body that is bytes is sent as it is
BAD = [
    ({"vectors": [[1.0] * 7]}, "vectors", "wrong dimension"),
    (b'{"vectors": [[NaN]]}', "body", "not JSON"),
    (b'{"vectors": [[1e999]]}', "body", "not JSON"),
    ({"vectors": [[1e39, *ONE[1:]]]}, "vectors[0]", "not finite"),
    ({"vectors": [ONE, [0.0] * DIM]}, "vectors[1]", "zero vector"),
    ({"vectors": [ONE], "k": 0}, "k", "out of range"),
    ({"vectors": [ONE], "k": -1}, "k", "out of range"),
    ({"vectors": [ONE], "k": 51}, "k", "out of range"),
    ({"vectors": [ONE], "k": 2**31}, "k", "out of range"),
    ({"vectors": [ONE], "k": 2**63}, "k", "out of range"),
    ({"vectors": [ONE], "k": 2.5}, "k", "wrong value"),
    ({"vectors": [ONE], "k": "3"}, "k", "wrong value"),
    ({"vectors": [ONE], "topk": 3}, "topk", "unknown field"),
    ({"vectors": [ONE], "params": {"nprob": 3}}, "params.nprob", "unknown field"),
    ({"vectors": [ONE], "params": {"nprobe": -3}}, "params.nprobe", "wrong value"),
    ({"vectors": [ONE], "params": {"nprobe": 2049}}, "params.nprobe", "wrong value"),
    ({"vectors": [ONE], "params": {"ef_search": 16_385}}, "params.ef_search", "wrong value"),
    ({"vectors": [ONE], "params": {"rerank_factor": 65}}, "params.rerank_factor", "wrong value"),
    ({"vectors": []}, "vectors", "empty batch"),
    ({"features": []}, "features", "empty batch"),
    ({"item_ids": []}, "item_ids", "empty batch"),
    ({"item_ids": [0] * 11}, "item_ids", "batch too large"),
    ({"item_ids": [-1]}, "item_ids[0]", "negative id"),
    ({"item_ids": [2**63]}, "item_ids", "id too large"),
    ({"item_ids": [1.5]}, "item_ids[0]", "wrong type"),
    ({}, "vectors", "exactly one kind"),
    ({"vectors": [ONE], "item_ids": [1]}, "item_ids", "exactly one kind"),
    ({"vectors": [["1"] * DIM]}, "vectors[0]", "wrong type"),
    ({"vectors": [ONE, ONE[1:]]}, "vectors[1]", "different lengths"),
    ({"features": [{}]}, "features[0].slope", "missing"),
    ({"features": [{"slope": "wide"}]}, "features[0].slope", "missing or of the wrong type"),
    ({"features": ["slope"]}, "features[0]", "wrong type"),
    ({"item_ids": [1], "timeout_ms": 0}, "timeout_ms", "out of range"),
    ({"item_ids": [1], "timeout_ms": 1e7}, "timeout_ms", "out of range"),
    ({"item_ids": [1], "min_coverage": 2}, "min_coverage", "out of range"),
    (b"", "body", "not JSON"),
    (b"k=5", "body", "not JSON"),
    (b"[]", "body", "not an object"),
]


@pytest.mark.parametrize(("body", "field", "detail"), BAD)
async def test_bad_input_is_400_names_the_field_and_reaches_no_shard(body, field, detail):
    async with api(metric=Metric.COSINE) as (http, shards, _, _):
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        response = await http.post("/v1/search", content=content, headers=JSON)
        assert response.status_code == 400
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert problem["code"] == "invalid_input"
        assert problem["field"] == field
        assert detail in problem["detail"]
        assert problem["request_id"] == response.headers["x-request-id"]
        assert [shard.requests for shard in shards] == [[], [], [], []]


def test_expected_and_got_are_told():
    response = one_request("POST", "/v1/search", json={"vectors": [[1.0] * 7]})
    problem = response.json()
    assert (problem["expected"], problem["got"]) == ("8", "7")


def test_nan_in_msgpack_is_400_too():
    data = np.array([[np.nan] * DIM], "<f4")
    array = {"dtype": "<f4", "shape": [1, DIM], "data": data.tobytes()}
    content = msgpack.packb({"vectors": array})
    response = one_request("POST", "/v1/search", content=content, headers=MSGPACK)
    assert (response.status_code, response.json()["field"]) == (400, "vectors[0]")


@pytest.mark.parametrize(
    ("changes", "field", "detail"),
    [
        ({"k": 2**31}, "k", "out of range"),
        ({"vectors": [ONE, ONE[1:]]}, "vectors[1]", "different lengths"),
        ({"k": msgpack.ExtType(4, b"x")}, "body", "extension types"),
        ({"vectors": msgpack.ExtType(1, bytes(4 * DIM))}, "body", "extension types"),
        # float64 that float32 cannot hold
        ({"vectors": [[1e39, *ONE[1:]]]}, "vectors[0]", "not finite"),
        (
            {
                "vectors": {
                    "dtype": "<f8",
                    "shape": [1, DIM],
                    "data": np.array([1e39, *ONE[1:]], "<f8").tobytes(),
                }
            },
            "vectors[0]",
            "not finite",
        ),
    ],
)
async def test_bad_values_in_msgpack_are_400_and_reach_no_shard(changes, field, detail):
    async with api() as (http, shards, _, _):
        content = msgpack.packb({"vectors": [ONE]} | changes)
        response = await http.post("/v1/search", content=content, headers=MSGPACK)
        assert response.status_code == 400
        problem = response.json()
        assert (problem["code"], problem["field"]) == ("invalid_input", field)
        assert detail in problem["detail"]
        assert [shard.requests for shard in shards] == [[], [], [], []]


async def test_float64_in_msgpack_is_searched_as_float32():
    async with api() as (http, shards, _, vectors):
        exact = vectors[:1].astype("<f8") + 1e-12  # which float32 rounds away
        array = {"dtype": "<f8", "shape": [1, DIM], "data": exact.tobytes()}
        content = msgpack.packb({"vectors": array, "k": 4})
        response = await http.post("/v1/search", content=content, headers=MSGPACK)
        expected, _ = brute_force(vectors[:1], np.arange(60), vectors, 4)
        np.testing.assert_array_equal(unpacked(response.content)["ids"], expected)
        (request,) = shards[0].requests
        assert request.queries.dtype == np.float32


def test_a_body_that_is_not_msgpack_is_400():
    response = one_request("POST", "/v1/search", content=b'{"k": 1}', headers=MSGPACK)
    assert (response.status_code, response.json()["field"]) == (400, "body")


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        ("POST", "/v1/search", {"content": b"{}"}, 415, "unsupported_media_type"),
        ("POST", "/v1/search", {"data": {"k": "1"}}, 415, "unsupported_media_type"),
        (
            "POST",
            "/v1/search",
            {"content": b"{}", "headers": JSON | {"content-encoding": "gzip"}},
            415,
            "unsupported_media_type",
        ),
        (
            "POST",
            "/v1/search",
            {"json": {"item_ids": [1]}, "headers": {"accept": "text/html"}},
            406,
            "not_acceptable",
        ),
        ("GET", "/v1/search", {}, 405, "method_not_allowed"),
        ("DELETE", "/v1/items/3", {}, 405, "method_not_allowed"),
        ("POST", "/v1/status", {}, 405, "method_not_allowed"),
        ("GET", "/v2/search", {}, 404, "not_found"),
        ("POST", "/", {}, 405, "method_not_allowed"),
        ("GET", "/v1/items/60", {}, 404, "not_found"),
        ("GET", "/v1/items/-1", {}, 400, "invalid_input"),
        ("GET", "/v1/items/abc", {}, 400, "invalid_input"),
        ("GET", "/v1/items/16?timeout_ms=0", {}, 400, "invalid_input"),
        ("GET", "/v1/items/16?timeout_ms=nan", {}, 400, "invalid_input"),
        ("GET", "/v1/items/16?timeout_ms=1e9", {}, 400, "invalid_input"),
        ("GET", "/v1/items/16?timeout_ms=soon", {}, 400, "invalid_input"),
        ("GET", f"/v1/items/{2**70}", {}, 400, "invalid_input"),
        ("POST", "/v1/search", {"content": b"x" * 4097, "headers": JSON}, 413, "payload_too_large"),
        (
            "POST",
            "/v1/search",
            {"content": b"x", "headers": JSON | {"Content-Length": "9" * 5000}},
            413,
            "payload_too_large",
        ),
    ],
)
def test_other_refusals(method, path, options, status, code):
    response = one_request(method, path, **options)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == code
    assert response.json()["request_id"] == response.headers["x-request-id"]
    if status == 405:
        assert response.headers["allow"]


@pytest.fixture
def nothing_is_dropped(monkeypatch):
    """What is read of a body is read before the answer."""
    monkeypatch.setattr(body, "LINGER_S", 0.0)


@pytest.mark.usefixtures("nothing_is_dropped")
async def test_a_body_too_large_is_refused_without_content_length_and_before_all_of_it_came():
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1024
            yield b" " * 1024

    async with api() as (http, _, _, _):
        response = await http.post("/v1/search", content=endless(), headers=JSON)
        assert (response.status_code, response.json()["code"]) == (413, "payload_too_large")
        assert sent <= 8 * 1024


@pytest.mark.usefixtures("nothing_is_dropped")
@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "br", "gzip, gzip", "x-gzip"])
async def test_a_bomb_is_refused_before_a_byte_of_it_is_read(encoding):
    bomb = gzip.compress(bytes(32 << 20))
    assert len(bomb) < 64 << 10, "a thousand times as large unfolded"

    read = 0

    async def sent():
        nonlocal read
        read += 1
        yield bomb

    config = CONFIG.model_copy(update={"max_body_bytes": 1 << 20})
    async with api(config=config) as (http, _, service, _):
        headers = JSON | {"content-encoding": encoding}
        response = await http.post("/v1/search", content=sent(), headers=headers)
        problem = response.json()
        assert (response.status_code, problem["code"]) == (415, "unsupported_media_type")
        assert (problem["field"], problem["got"]) == ("Content-Encoding", encoding)
        assert read == 0
        # and one that does not say what it is is not unfolded
        response = await http.post("/v1/search", content=bomb, headers=JSON)
        assert (response.status_code, response.json()["field"]) == (400, "body")
        assert service.status()["in_flight"] == 0


async def test_a_body_that_does_not_arrive_is_given_up():
    async def stuck():
        yield b"{"
        await asyncio.Event().wait()

    async with api() as (http, _, _, _):
        response = await http.post("/v1/search", content=stuck(), headers=JSON)
        assert (response.status_code, response.json()["code"]) == (408, "body_timeout")


@pytest.mark.parametrize(
    "sent_before", [[], [b'{"item_ids"'], [b'{"item_ids": [', b"1, "]], ids=["none", "some", "more"]
)
async def test_a_client_that_leaves_gets_nothing_and_harms_nothing(sent_before):
    async with api() as (http, shards, service, _):
        app = http._transport.app
        received = [
            {"type": "http.request", "body": part, "more_body": True} for part in sent_before
        ]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/search",
            "headers": [(b"content-type", b"application/json")],
        }
        sent = []

        async def gone():
            return received.pop(0) if received else {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await app(scope, gone, send)
        assert sent == []
        assert service.status()["in_flight"] == 0
        assert [shard.requests for shard in shards] == [[], [], [], []]


async def test_a_client_that_leaves_while_it_waits_ends_its_search():
    async with api() as (http, shards, service, vectors):
        for shard in shards:
            shard.gate.clear()  # none answers
        body = orjson.dumps({"vectors": vectors[:1].tolist(), "timeout_ms": 10_000})
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        sent = []

        async def receive():
            if messages:
                return messages.pop()
            await until(lambda: all(shard.requests for shard in shards))
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/search",
            "headers": [(b"content-type", b"application/json")],
        }
        async with asyncio.timeout(5):
            await http._transport.app(scope, receive, send)
        assert sent == []
        assert service.status()["in_flight"] == 0


@pytest.mark.parametrize("given", ["abc-123", "!" * 128])
def test_a_request_id_is_echoed(given):
    for path in ("/healthz", "/v1/search"):
        response = one_request("GET", path, headers={"x-request-id": given})
        assert response.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "\x01"])
def test_a_request_id_that_is_not_fit_to_print_is_replaced(given):
    headers = {"x-request-id": given.encode()}
    response = one_request("GET", "/healthz", headers=headers)
    (made,) = response.headers.get_list("x-request-id")
    assert made != given
    assert len(made) == 16


async def test_partial_answers_are_200_and_say_so_and_min_coverage_makes_them_503():
    async with api() as (http, shards, _, _):
        await shards[3].kill()
        query = {"item_ids": [1], "k": 3}
        response = await http.post("/v1/search", json=query)
        assert response.status_code == 200
        coverage = response.json()["coverage"]
        assert (coverage["rows_asked"], coverage["rows_answered"]) == (60, 45)
        (degraded,) = coverage["degraded"]
        assert (degraded["shard"], degraded["code"]) == (3, "unavailable")

        response = await http.post("/v1/search", json=query | {"min_coverage": 1})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "2"
        problem = response.json()
        assert problem["code"] == "unavailable"
        assert problem["got"] == "45 of 60 rows"


async def test_a_missed_deadline_is_504():
    async with api() as (http, shards, _, vectors):
        for shard in shards:
            shard.gate.clear()
        query = {"vectors": vectors[:1].tolist(), "timeout_ms": 20}
        response = await http.post("/v1/search", json=query)
        assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")


async def test_overload_is_429_at_once_and_passes():
    config = CONFIG.model_copy(update={"max_in_flight": 1})
    async with api(config=config) as (http, shards, _, vectors):
        query = {"vectors": vectors[:1].tolist(), "timeout_ms": 5000}
        shards[0].gate.clear()
        running = asyncio.create_task(http.post("/v1/search", json=query))
        await shards[0].asked.wait()
        response = await http.post("/v1/search", json=query)
        assert (response.status_code, response.json()["code"]) == (429, "overloaded")
        assert response.headers["retry-after"] == "2"
        assert (await http.get("/healthz")).status_code == 200
        shards[0].gate.set()
        assert (await running).status_code == 200
        assert (await http.post("/v1/search", json=query)).status_code == 200


def test_an_encoder_of_another_model_is_503():
    response = one_request(
        "POST", "/v1/search", json={"features": [{"slope": 1}]}, table={"encoder": "m0"}
    )
    problem = response.json()
    assert (response.status_code, problem["code"]) == (503, "version_mismatch")
    assert (problem["expected"], problem["got"]) == ("m1", "m0")


@pytest.mark.parametrize("path", ["/v1/search", "/v1/status"])
def test_an_unexpected_error_is_500_without_details(path, caplog):
    async def run():
        async with api() as (http, _, service, _):

            def broken(*_args, **_options):
                raise RuntimeError("a secret detail")

            service.search = service.status = broken
            method = "POST" if path == "/v1/search" else "GET"
            options = {"json": {"item_ids": [1]}} if method == "POST" else {}
            return await http.request(method, path, **options)

    with caplog.at_level(logging.ERROR):
        response = asyncio.run(run())
    assert response.status_code == 500
    assert response.json()["code"] == "internal"
    assert "secret" not in response.text
    assert "a secret detail" in caplog.text


async def test_a_condition_that_a_shard_refuses_is_named_by_its_path():
    async with api() as (http, _, service, _):

        async def refused(*_args, **_options):
            raise InvalidInput("wrong type of value", field="filter.price.$lt", got="'2'")

        service.search = refused
        parts = [{"price": {"$lt": 1}}, {"price": {"$lt": "2"}}]
        body = {"item_ids": [1], "filter": {"$or": parts}}
        for content in ({"json": body}, {"content": msgpack.packb(body), "headers": MSGPACK}):
            response = await http.post("/v1/search", **content)
            field = response.json()["field"]
            assert (response.status_code, field) == (400, "filter.$or[1].price.$lt")


async def test_item_gives_its_vector():
    async with api() as (http, _, _, vectors):
        body = (await http.get("/v1/items/16")).json()
        assert body == {
            "item_id": 16,
            "vector": vectors[16].tolist(),
            "attributes": {"title": "title of 16"},
            "seq": 0,
            "shard": 1,
            "generation": 1,
            "model_version": "m1",
        }
        response = await http.get("/v1/items/16", headers={"accept": "application/msgpack"})
        assert msgpack.unpackb(response.content)["shard"] == 1


async def test_an_item_is_waited_for_as_long_as_is_asked(monkeypatch):
    async with api() as (http, _, service, _):
        fetch, waits = service._fanout.fetch, []

        async def watched(snapshot, ids, *, deadline, **others):
            waits.append(deadline - asyncio.get_running_loop().time())
            return await fetch(snapshot, ids, deadline=deadline, **others)

        monkeypatch.setattr(service._fanout, "fetch", watched)
        for query in ("", "?timeout_ms=4000"):
            assert (await http.get(f"/v1/items/16{query}")).status_code == 200
        assert waits[0] <= service.config.default_timeout_ms / 1000
        assert 3 < waits[1] <= 4


def test_the_items_time_limit_is_described():
    parameters = one_request("GET", "/openapi.json").json()
    parameters = parameters["paths"]["/v1/items/{item_id}"]["get"]["parameters"]
    assert [each["name"] for each in parameters] == ["item_id", "timeout_ms"]


def test_status_tells_table_shards_and_features():
    body = one_request("GET", "/v1/status").json()
    assert (body["generation"], body["rows"], body["metric"]) == (1, 60, "dot")
    assert [shard["connected"] for shard in body["shards"]] == [True] * 4
    assert [shard["rows"] for shard in body["shards"]] == [15] * 4
    assert body["shards"][0]["address"].startswith("127.0.0.1:")
    assert body["encoder"] == {
        "model_version": "m1",
        "features": [{"name": "slope", "kind": "number"}],
    }


async def test_ready_follows_the_shards_and_healthy_does_not():
    service = SearchService(CONFIG, SECRET)
    transport = httpx.ASGITransport(app=create_app(service, CONFIG))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        assert (await http.get("/healthz")).json() == {"status": "ok", "cluster_id": None}
        response = await http.get("/readyz")
        assert response.status_code == 503
        assert response.json()["reason"] == "no routing table yet"
        assert response.headers["retry-after"] == str(CONFIG.retry_after_s)
        response = await http.post("/v1/search", json={"item_ids": [1]})
        assert (response.status_code, response.json()["code"]) == (503, "unavailable")
    async with api() as (http, _, _, _):
        response = await http.get("/readyz")
        assert response.status_code == 200
        assert response.json()["rows_connected"] == 60


def test_openapi_describes_what_the_code_checks():
    schema = one_request("GET", "/openapi.json").json()
    assert set(schema["paths"]) == {
        "/v1/search",
        "/v1/items",
        "/v1/items/{item_id}",
        "/v1/lists",
        "/v1/lists/{name}",
        "/v1/events",
        "/v1/status",
        "/healthz",
        "/readyz",
    }
    search = schema["paths"]["/v1/search"]["post"]
    assert set(search["requestBody"]["content"]) == {"application/json", "application/msgpack"}
    assert "422" not in search["responses"]
    with_time, without = search["responses"]["503"]["description"].split("; ")
    for code, kind in PROBLEMS.items():  # test_damaged_encoder holds the headers
        if kind.status == 503 and code not in {"behind", "not_primary", "read_only"}:  # of shards
            assert code in (with_time if kind.retry else without)
    assert "no Retry-After" in without
    body = schema["components"]["schemas"]["SearchBody"]
    assert set(body["properties"]) == {
        "exclude_lists",
        "vectors",
        "features",
        "item_ids",
        "texts",
        "k",
        "timeout_ms",
        "min_coverage",
        "params",
        "min_seq",
        "min_seq_of",
        "background",
        "exact",
        "filter",
        "exclude",
        "exclude_history",
        "cap",
        "boost",
        "diversify",
        "return",
        "return_original_ids",
        "experiment_key",
    }
    assert body["additionalProperties"] is False

    def refs(node):
        if isinstance(node, dict):
            yield from [node["$ref"]] if "$ref" in node else []
            node = list(node.values())
        if isinstance(node, list):
            for item in node:
                yield from refs(item)

    for ref in refs(schema):
        assert ref.rpartition("/")[2] in schema["components"]["schemas"]


def test_docs_need_no_other_host():
    response = one_request("GET", "/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "/v1/search" in response.text
    assert "min_coverage" in response.text
    assert "http://" not in response.text
    assert "https://" not in response.text


@pytest.mark.parametrize(
    "path",
    ["/healthz", "/readyz", "/docs", "/openapi.json", "/", "/v1/items/5", "/v1/items/60", "/v2"],
)
async def test_head_answers_as_get_does_without_a_body(path):
    async with api() as (http, _, _, _):
        got, head = await http.get(path), await http.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    varying = {"x-request-id"}
    assert {**head.headers, **dict.fromkeys(varying)} == {**got.headers, **dict.fromkeys(varying)}


def test_head_of_what_there_is_no_get_of_is_refused():
    response = one_request("HEAD", "/v1/search")
    assert (response.status_code, response.content) == (405, b"")


def test_a_server_that_answered_head_goes_on_with_its_connection():
    with running_router(CONFIG) as router, httpx.Client(base_url=router.url) as http:
        for _ in range(2):
            assert http.head("/healthz").status_code == 200
            assert http.get("/healthz").json()["status"] == "ok"
            assert http.head("/nowhere").status_code == 404


def test_the_root_leads_to_the_docs():
    response = one_request("GET", "/")
    assert (response.status_code, response.headers["location"]) == (307, "/docs")


def test_the_documented_response_is_the_real_one():
    schema = one_request("GET", "/openapi.json").json()["components"]["schemas"]
    body = one_request(
        "POST",
        "/v1/search",
        json={
            "item_ids": [5, 999],
            "return": ["title"],
            "return_original_ids": True,
            "background": True,
            "cap": {"column": "title", "max": 1},
        },
    ).json()
    only_if_missing = {"attributes_missing", "arms"}  # test_experiments has those with arms
    assert set(body) | only_if_missing == set(schema["SearchResponse"]["properties"])
    assert only_if_missing.isdisjoint(body)
    assert set(body["coverage"]) == set(schema["CoverageBody"]["properties"])
    item = one_request("GET", "/v1/items/5").json()
    assert set(item) == set(schema["ItemResponse"]["properties"])
    problem = one_request("POST", "/v1/search", json={"vectors": [[1.0]], "x": 1}).json()
    assert set(problem) <= set(schema["Problem"]["properties"])
