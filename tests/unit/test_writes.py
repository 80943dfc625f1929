"""Writes through the whole ASGI app: real codec, real service, fake shards on sockets."""

import asyncio
import contextlib
import threading
from dataclasses import replace

import httpx
import msgpack
import numpy as np
import pytest

from shardline.router import write_service
from shardline.router.fanout import primary
from shardline.router.http.api import create_app
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.messages import DeleteRequest, ErrorReply, UpsertRequest
from shardline.shards.core.schema import Metric
from tests.fake_shard import (
    SECRET,
    make_rows,
    make_table,
    moved,
    replicated,
    running_replicas,
    running_shards,
    until,
)
from tests.http_bodies import packed, unpacked

DIM = 8
ROWS, SHARDS = 60, 4  # ids 0 to 14 are of shard 0, 15 to 29 of shard 1, ..., 45 and above of 3
CONFIG = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, write_timeout_ms=10_000)
MSGPACK = {"content-type": "application/msgpack"}
VECTOR = [9.0] + [0.0] * (DIM - 1)


@contextlib.asynccontextmanager
async def api(config=CONFIG, **table):
    """(http client, shards, service) over ROWS rows in SHARDS shards."""
    ids, vectors = make_rows(ROWS, DIM)
    async with running_shards(ids, vectors, SHARDS) as shards:
        service = SearchService(config, SECRET, load_encoder=lambda _table: None)
        await service.apply(make_table(shards, DIM, **table))
        transport = httpx.ASGITransport(app=create_app(service, config))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            yield http, shards, service
        await service.close()


def writes_of(shard):
    return [each for each in shard.requests if isinstance(each, UpsertRequest | DeleteRequest)]


async def delete(http, item_ids, **options):
    return await http.request("DELETE", "/v1/items", json={"item_ids": item_ids}, **options)


async def test_items_are_written_each_to_its_shard_and_found() -> None:
    async with api() as (http, shards, _):
        items = [
            {"item_id": 3, "vector": VECTOR, "attributes": {"title": "a", "price": 1.5}},
            {"item_id": 100, "vector": VECTOR, "attributes": {"title": "b"}},
            {"item_id": 101, "vector": VECTOR},
        ]
        response = await http.put("/v1/items", json={"items": items, "model_version": "m1"})
        assert response.status_code == 200
        body = response.json()
        assert body.pop("took_ms") > 0
        assert body == {
            "rows": 3,
            "created": 2,
            "updated": 1,
            "duplicates": 0,
            "seq": [1, None, None, 1],
            "generation": 1,
            "table_version": 1,
            "model_version": "m1",
            "request_id": response.headers["x-request-id"],
        }
        assert [len(writes_of(shard)) for shard in shards] == [1, 0, 0, 1]
        (sent,) = writes_of(shards[3])
        assert sent.item_ids.tolist() == [100, 101]
        assert sent.vectors.tolist() == [VECTOR, VECTOR]
        columns = {"title": ["b", None], "price": [None, None]}  # each shard is told all names
        assert msgpack.unpackb(sent.attributes) == columns
        found = (await http.post("/v1/search", json={"vectors": [VECTOR], "k": 3})).json()
        assert set(found["ids"][0]) == {3, 100, 101}


async def test_columns_in_msgpack_and_in_json() -> None:
    async with api() as (http, shards, _):
        content = {
            "item_ids": packed([70, 71], "<i8"),
            "vectors": packed([VECTOR, VECTOR], "<f4"),
            "attributes": {"price": packed([1.0, 2.0], "<f8"), "tags": [["x"], None]},
        }
        response = await http.put("/v1/items", content=msgpack.packb(content), headers=MSGPACK)
        assert response.headers["content-type"] == "application/msgpack"
        assert unpacked(response.content)["seq"] == [None, None, None, 1]
        assert shards[3].attributes == {
            70: {"price": 1.0, "tags": ["x"]},
            71: {"price": 2.0, "tags": None},
        }
        content = {"item_ids": [70], "vectors": [VECTOR], "attributes": {"tags": [{"a": [1]}]}}
        response = await http.put("/v1/items", json=content)
        assert (response.json()["updated"], response.json()["seq"][3]) == (1, 2)
        assert shards[3].attributes[70] == {"tags": {"a": [1]}}


async def test_deleted_items_are_gone_and_missing_ones_counted() -> None:
    async with api() as (http, _, _):
        response = await delete(http, [5, 5, 20, 999])
        body = response.json()
        assert response.status_code == 200
        assert {name: body[name] for name in ("rows", "deleted", "missing", "duplicates")} == {
            "rows": 3,
            "deleted": 2,
            "missing": 1,
            "duplicates": 1,
        }
        assert body["seq"] == [1, 1, None, 1]
        assert (await http.get("/v1/items/5")).status_code == 404
        assert (await http.get("/v1/items/6")).status_code == 200


@pytest.mark.parametrize(
    "given",
    [
        {"items": [{"item_id": 5, "vector": [n] * DIM} for n in (1.0, 2.0, 3.0)]},
        {"item_ids": [5, 5, 5], "vectors": [[n] * DIM for n in (1.0, 2.0, 3.0)]},
    ],
)
async def test_of_items_with_the_same_id_the_last_wins(given) -> None:
    async with api() as (http, shards, _):
        body = (await http.put("/v1/items", json=given)).json()
        assert (body["rows"], body["duplicates"], body["updated"]) == (1, 2, 1)
        assert (await http.get("/v1/items/5")).json()["vector"] == [3.0] * DIM
        assert len(writes_of(shards[0])) == 1


async def test_vectors_are_normalised_under_cosine_and_bad_ones_named_by_their_row() -> None:
    async with api(metric=Metric.COSINE) as (http, shards, _):
        items = [{"item_id": n, "vector": [2.0] + [0.0] * (DIM - 1)} for n in range(3)]
        assert (await http.put("/v1/items", json={"items": items})).status_code == 200
        (sent,) = writes_of(shards[0])
        assert sent.vectors[:, 0].tolist() == [1.0, 1.0, 1.0]
        items[1] = {"item_id": 1, "vector": [0.0] * DIM}
        problem = (await http.put("/v1/items", json={"items": items})).json()
        assert (problem["status"], problem["field"]) == (400, "items[1].vector")
        columns = {"item_ids": [1, 2], "vectors": [VECTOR, [0.0] * DIM]}
        problem = (await http.put("/v1/items", json=columns)).json()
        assert (problem["status"], problem["field"]) == (400, "vectors[1]")
        assert len(writes_of(shards[0])) == 1, "bad input changes nothing"


def item(**changes):
    return {"items": [{"item_id": 1, "vector": VECTOR} | changes]}


def columns(**changes):
    return {"item_ids": [1], "vectors": [VECTOR]} | changes


BAD = [
    ({}, "items"),
    ([], "body"),
    ({"items": []}, "items"),
    ({"items": 5}, "items"),
    ({"items": [5]}, "items[0]"),
    (item() | columns(), "item_ids"),
    (item() | {"x": 1}, "x"),
    (item(x=1), "items[0].x"),
    (item(item_id=-1), "items[0].item_id"),
    (item(item_id=2**63), "items"),
    (item(item_id=1.0), "items[0].item_id"),
    (item(item_id=True), "items[0].item_id"),
    (item(item_id=None), "items[0].item_id"),
    (item(vector=None), "items[0].vector"),
    (item(vector=[1.0] * (DIM + 1)), "items"),
    (item(vector=["1"] * DIM), "items[0].vector"),
    (item(vector=[[1.0]] * DIM), "items[0].vector"),
    (item(vector=[1e39] * DIM), "items[0].vector"),
    (item(features={"a": 1}), "items[0].vector"),
    (item() | {"features": {"a": [1]}}, "features"),
    (item(attributes=[1]), "items[0].attributes"),
    (item(attributes={"a": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]}), "items[0].attributes.a"),
    (item() | {"timeout_ms": 0}, "timeout_ms"),
    (item() | {"timeout_ms": "5"}, "timeout_ms"),
    (item() | {"model_version": 5}, "model_version"),
    (columns(vectors=None), "vectors"),
    (columns(vectors=[VECTOR, VECTOR]), "vectors"),
    (columns(item_ids=[]), "item_ids"),
    (columns(item_ids=["1"]), "item_ids[0]"),
    (columns(item_ids=[-1]), "item_ids[0]"),
    (columns(attributes=[1]), "attributes"),
    (columns(attributes={"a": 1}), "attributes.a"),
    (columns(attributes={"a": [1, 2]}), "attributes.a"),
    ({"items": [{"item_id": 1, "vector": VECTOR}] * 10_001}, "items"),
]


@pytest.mark.parametrize(("body", "field"), BAD)
async def test_bad_input_is_400_names_the_field_and_reaches_no_shard(body, field) -> None:
    async with api() as (http, shards, service):
        response = await http.put("/v1/items", json=body)
        assert (response.status_code, response.json()["code"]) == (400, "invalid_input")
        assert response.json()["field"] == field
        assert not any(writes_of(shard) for shard in shards)
        assert service.writes.taken == 0


def nan(value):
    return msgpack.packb(columns(attributes={"a": [value]}))


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (nan(float("nan")), "attributes.a[0]"),
        (nan(b"x"), "attributes.a[0]"),
        (nan({b"x": 1}), "attributes.a[0].b'x'"),
        (nan(msgpack.Timestamp(1)), "attributes.a[0]"),
        (msgpack.packb(columns() | {b"y": 1}), "b'y'"),
        (msgpack.packb(columns(vectors=packed([[np.nan] * DIM], "<f4"))), "vectors[0]"),
        (msgpack.packb(columns(vectors=packed([1.0] * DIM, "<f4"))), "vectors"),
        (msgpack.packb(columns(item_ids=packed([1.0], "<f4"))), "item_ids"),
        (msgpack.packb(columns(item_ids=packed(range(10_001), "<i8"))), "item_ids"),
    ],
)
async def test_bad_values_in_msgpack_are_400_too(content, field) -> None:
    async with api() as (http, shards, _):
        response = await http.put("/v1/items", content=content, headers=MSGPACK)
        assert (response.status_code, response.json()["field"]) == (400, field)
        assert not any(writes_of(shard) for shard in shards)


@pytest.mark.parametrize("key", ["", "x" * 129, "a b", "ü"])
async def test_a_key_that_is_none_is_400(key) -> None:
    async with api() as (http, _, _):
        headers = {"idempotency-key": key.encode("latin-1")}
        response = await http.put("/v1/items", json=item(), headers=headers)
        assert (response.status_code, response.json()["field"]) == (400, "Idempotency-Key")


async def test_too_many_attributes_are_413() -> None:
    async with api() as (http, _, _):
        items = [{"item_id": n, "vector": VECTOR, "attributes": {str(n): 1}} for n in range(1100)]
        response = await http.put("/v1/items", json={"items": items})
        assert (response.status_code, response.json()["code"]) == (413, "payload_too_large")


async def test_vectors_of_another_model_are_409() -> None:
    async with api() as (http, _, _):
        response = await http.put("/v1/items", json=item() | {"model_version": "m0"})
        problem = response.json()
        assert (response.status_code, problem["code"]) == (409, "version_mismatch")
        assert (problem["expected"], problem["got"]) == ("m1", "m0")
        assert "retry-after" not in response.headers


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("not_primary", 503),
        ("read_only", 503),
        ("unavailable", 503),
        ("store_full", 507),
        ("delta_full", 429),
        ("overloaded", 429),
        ("invalid_input", 400),
        ("deadline_exceeded", 504),
        ("corrupt_file", 503),
    ],
)
async def test_a_write_that_one_shard_refuses_fails_and_says_what_was_written(code, status) -> None:
    async with api(make_config(write_timeout_ms=2000)) as (http, shards, _):
        shards[1].write_error = ErrorReply(code=code, message="because", field="attributes.a")
        items = [{"item_id": n, "vector": VECTOR} for n in (1, 2, 20, 50)]
        headers = {"idempotency-key": "mine"}
        response = await http.put("/v1/items", json={"items": items}, headers=headers)
        problem = response.json()
        told = code if code != "corrupt_file" else "unavailable"
        assert (response.status_code, problem["code"]) == (status, told)
        assert [(each["shard"], each["code"], each["items"]) for each in problem["failed"]] == [
            (1, told, 1)
        ]
        assert (problem["applied_items"], problem["idempotency_key"]) == (3, "mine")
        assert "same Idempotency-Key" in problem["hint"]
        if code == "invalid_input":
            assert problem["field"] == "attributes.a"
        shards[1].write_error = None
        again = await http.put("/v1/items", json={"items": items}, headers=headers)
        assert again.status_code == 200
        assert again.json()["seq"] == [1, 1, None, 1], "nothing is written twice"


def make_config(**changes):
    return CONFIG.model_copy(update=changes)


async def test_of_several_reasons_the_gravest_is_the_answer() -> None:
    async with api() as (http, shards, _):
        for shard, code in zip(shards, ("delta_full", "read_only", "store_full"), strict=False):
            shard.write_error = ErrorReply(code=code, message=code)
        response = await delete(http, [1, 20, 40, 50])
        assert response.status_code == 507
        codes = [each["code"] for each in response.json()["failed"]]
        assert codes == ["delta_full", "read_only", "store_full"]
        assert response.json()["applied_items"] == 1


@pytest.mark.parametrize("when", ["drops", "drops_after"])
async def test_a_connection_that_breaks_once_costs_nothing(when) -> None:
    async with api() as (http, shards, _):
        setattr(shards[0], when, 1)
        response = await http.put("/v1/items", json=item())
        assert response.status_code == 200
        assert (shards[0].seq, len(shards[0].written)) == (1, 1)
        assert response.json()["updated"] == 1


async def test_a_connection_that_breaks_twice_is_an_error_of_unknown_outcome() -> None:
    async with api() as (http, shards, _):
        shards[0].drops_after = 2
        response = await http.put("/v1/items", json=item())
        assert (response.status_code, response.json()["code"]) == (503, "unavailable")
        assert "may have been applied" in response.json()["failed"][0]["text"]
        assert len(writes_of(shards[0])) == 2, "it is sent again once"


async def test_nonsense_is_no_acknowledgement() -> None:
    async with api() as (http, shards, _):
        shards[0].answers_as = 9
        response = await http.put("/v1/items", json=item())
        assert response.status_code == 503
        assert "broke the protocol" in response.json()["failed"][0]["text"]


async def test_a_shard_that_does_not_answer_is_504_at_the_deadline() -> None:
    async with api() as (http, shards, service):
        shards[0].gate.clear()
        response = await http.put("/v1/items", json=item() | {"timeout_ms": 50})
        assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
        assert response.json()["failed"][0]["code"] == "deadline_exceeded"
        assert service.writes.taken == 0
        shards[0].gate.set()


async def test_more_writes_than_allowed_are_429_and_searches_go_on() -> None:
    async with api(make_config(max_writes_in_flight=1)) as (http, shards, service):
        shards[0].gate.clear()
        first = asyncio.create_task(http.put("/v1/items", json=item()))
        await until(lambda: service.writes.taken == 1)
        response = await delete(http, [50])
        assert (response.status_code, response.json()["code"]) == (429, "overloaded")
        assert response.headers["retry-after"] == "1"
        found = await http.post("/v1/search", json={"vectors": [VECTOR], "timeout_ms": 50})
        assert found.status_code == 200
        shards[0].gate.set()
        assert (await first).status_code == 200


async def test_parts_of_one_shard_are_bounded_and_have_keys_of_their_own(monkeypatch) -> None:
    monkeypatch.setattr("shardline.router.written.MAX_WRITTEN_ROWS", 2)
    async with api() as (http, shards, _):
        response = await delete(http, [1, 2, 3, 4, 5])
        assert response.json()["deleted"] == 5
        assert [len(each.item_ids) for each in writes_of(shards[0])] == [2, 2, 1]
        assert len(shards[0].written) == 3
        assert response.json()["seq"] == [3, None, None, None]


async def test_the_same_key_with_other_items_is_another_write() -> None:
    async with api() as (http, shards, _):
        headers = {"idempotency-key": "k"}
        for item_ids in ([1], [2], [1]):
            assert (await delete(http, item_ids, headers=headers)).json()["deleted"] == 1
        assert shards[0].seq == 2
        await http.put("/v1/items", json=item(), headers=headers)
        assert shards[0].seq == 3


async def test_large_batches_are_split_in_a_thread_and_whole() -> None:
    async with api() as (http, shards, _):
        count = 3000
        content = {
            "item_ids": packed(np.arange(count), "<i8"),
            "vectors": packed(np.tile(VECTOR, (count, 1)), "<f4"),
        }
        response = await http.put("/v1/items", content=msgpack.packb(content), headers=MSGPACK)
        body = unpacked(response.content)
        assert (body["rows"], body["created"], body["updated"]) == (count, count - ROWS, ROWS)
        assert sum(len(shard.ids) for shard in shards) == count


async def test_metrics_of_writes() -> None:
    async with api() as (http, shards, service):
        await http.put("/v1/items", json=item())
        await delete(http, [1, 50])
        shards[0].write_error = ErrorReply(code="read_only", message="x")
        await delete(http, [1])
        values = {
            (each.metric.name, *each.labels): each.value
            for each in service.recorder.drain()
            if "writ" in each.metric.name
        }
        assert values.pop(("shardline_write_ms", "upsert")) > 0
        assert values.pop(("shardline_write_ms", "delete")) > 0
        assert values == {
            ("shardline_writes", "upsert", "ok"): 1,
            ("shardline_writes", "delete", "ok"): 1,
            ("shardline_writes", "delete", "read_only"): 1,
            ("shardline_written_rows", "upsert"): 1,
            ("shardline_written_rows", "delete"): 2,
        }


# Primaries: the tables change while a write waits


async def test_a_write_waits_for_a_primary() -> None:
    async with api() as (http, shards, service):
        routes = [shard.shard_route for shard in shards]
        none = [replace(route, primary=None) for route in routes]
        await service.apply(make_table(none, DIM, version=2, boundaries=(15, 30, 45)))
        task = asyncio.create_task(http.put("/v1/items", json=item()))
        await asyncio.sleep(0.05)
        assert not task.done()
        assert not writes_of(shards[0])
        await service.apply(make_table(routes, DIM, version=3, boundaries=(15, 30, 45)))
        assert (await task).status_code == 200
        await service.apply(make_table(none, DIM, version=4, boundaries=(15, 30, 45)))
        response = await http.put("/v1/items", json=item())
        assert (response.status_code, response.json()["code"]) == (503, "not_primary")


async def test_only_the_primary_is_written_to_and_its_successor_after_it() -> None:
    ids, vectors = make_rows(ROWS, DIM)
    async with running_replicas(ids, vectors, 1, 3) as [replicas]:
        service = SearchService(CONFIG, SECRET, load_encoder=lambda _table: None)
        route = replicated(replicas)
        await service.apply(make_table([replace(route, primary=1)], DIM))
        transport = httpx.ASGITransport(app=create_app(service, CONFIG))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            assert (await http.put("/v1/items", json=item())).status_code == 200
            assert [len(writes_of(each)) for each in replicas] == [0, 1, 0]
            # it says that it is none any more: the write waits for the next table
            replicas[1].write_error = ErrorReply(code="not_primary", message="no")
            task = asyncio.create_task(http.put("/v1/items", json=item()))
            await until(lambda: len(writes_of(replicas[1])) == 2)
            await service.apply(make_table([replace(route, primary=2)], DIM, version=2))
            assert (await task).status_code == 200
            assert [len(writes_of(each)) for each in replicas] == [0, 2, 1]
            # it dies with the write: the successor gets it with the same key
            replicas[2].gate.clear()
            task = asyncio.create_task(http.put("/v1/items", json=item()))
            await until(lambda: len(writes_of(replicas[2])) == 2)
            await replicas[2].kill()
            await service.apply(make_table([replace(route, primary=0)], DIM, version=3))
            assert (await task).status_code == 200
            assert writes_of(replicas[0])[0].key == writes_of(replicas[2])[1].key
        await service.close()


@contextlib.asynccontextmanager
async def next_generation(shards=2, **changes):
    """(shards, table) of generation 2, with other boundaries than ``api`` has."""
    ids, vectors = make_rows(ROWS, DIM)
    async with running_shards(ids, vectors, shards, generation=2) as found:
        yield found, make_table(found, DIM, version=2, generation=2, **changes)


async def held_up(http, shards, request):
    """A write, by its task, of which shard 0 has acknowledged its part and the others have not."""
    for shard in shards[1:]:
        shard.write_error = ErrorReply(code="not_primary", message="sealed")
    task = asyncio.create_task(request)
    await until(lambda: all(writes_of(shard) for shard in shards))
    return task


async def test_a_write_under_way_crosses_to_the_next_generation_once() -> None:
    """What is acknowledged is not sent again; the rest is split by the boundaries of the next."""
    async with api() as (http, shards, service), next_generation() as (after, table):
        items = [{"item_id": n, "vector": [float(n), *VECTOR[1:]]} for n in (3, 20, 40, 50, 20)]
        items[-1]["vector"][0] = 21.0
        request = http.put("/v1/items", json={"items": items}, headers={"idempotency-key": "k"})
        task = await held_up(http, shards, request)
        await service.apply(table)
        body = (await task).json()
        assert (body["rows"], body["updated"], body["duplicates"]) == (4, 4, 1)
        assert (body["generation"], body["seq"]) == (2, [1, 1])
        sent = [each.item_ids.tolist() for shard in after for each in writes_of(shard)]
        assert sent == [[20], [40, 50]]
        assert writes_of(after[0])[0].vectors[0, 0] == 21.0
        assert [each.item_ids.tolist() for each in writes_of(shards[0])] == [[3]]
        assert service.writes.taken == 0


async def test_a_delete_under_way_crosses_too() -> None:
    async with api() as (http, shards, service), next_generation(1) as (after, table):
        task = await held_up(http, shards, delete(http, [3, 20, 40, 50, 999]))
        await service.apply(table)
        body = (await task).json()
        assert (body["rows"], body["deleted"], body["missing"]) == (5, 4, 1)
        assert [each.item_ids.tolist() for each in writes_of(after[0])] == [[20, 40, 50, 999]]


@pytest.mark.parametrize("named", [{}, {"model_version": "m1"}])
async def test_vectors_do_not_cross_to_another_model(named) -> None:
    async with (
        api() as (http, shards, service),
        next_generation(model_version="m2") as (after, table),
    ):
        items = [{"item_id": n, "vector": VECTOR} for n in (3, 20, 40, 50)]
        task = await held_up(http, shards, http.put("/v1/items", json={"items": items} | named))
        await service.apply(table)
        response = await task
        problem = response.json()
        assert (response.status_code, problem["field"]) == (409, "model_version")
        assert problem["applied_items"] == 1
        assert {each["shard"] for each in problem["failed"]} == {1, 2, 3}
        assert not any(writes_of(shard) for shard in after)


async def test_vectors_must_name_their_model_while_two_get_the_writes() -> None:
    async with api(other_model="m2") as (http, shards, _):
        response = await http.put("/v1/items", json=item())
        problem = response.json()
        assert (response.status_code, problem["field"]) == (409, "model_version")
        assert "m1" in problem["expected"] and "m2" in problem["hint"]
        assert not any(writes_of(shard) for shard in shards)
        named = item() | {"model_version": "m1"}
        assert (await http.put("/v1/items", json=named)).status_code == 200
        assert (await delete(http, [1])).status_code == 200


async def test_a_write_that_fails_elsewhere_does_not_cross() -> None:
    async with api() as (http, shards, service), next_generation() as (after, table):
        items = {"items": [{"item_id": n, "vector": VECTOR} for n in (3, 20, 40, 50)]}
        shards[0].gate.clear()
        task = await held_up(http, shards, http.put("/v1/items", json=items))
        shards[0].write_error = ErrorReply(code="store_full", message="no room")
        await service.apply(table)
        shards[0].gate.set()
        response = await task
        assert (response.status_code, response.json()["code"]) == (507, "store_full")
        assert not any(writes_of(shard) for shard in after)


async def test_a_write_names_the_epoch_of_the_primary_in_its_table() -> None:
    async with api() as (http, shards, service):
        routes = [replace(shard.shard_route, primary_epoch=9) for shard in shards]
        await service.apply(make_table(routes, DIM, version=2, boundaries=(15, 30, 45)))
        assert (await http.put("/v1/items", json=item())).status_code == 200
        assert (await delete(http, [50])).status_code == 200
        assert [writes_of(shards[n])[0].epoch for n in (0, 3)] == [9, 9]


async def test_a_write_that_waits_for_a_connection_is_not_encoded_in_vain(monkeypatch) -> None:
    encoded = []
    encode_frame = primary.encode_frame

    def counted(request_id, message):
        encoded.append(message)
        return encode_frame(request_id, message)

    monkeypatch.setattr(primary, "encode_frame", counted)
    async with api() as (http, shards, service):
        await shards[0].kill()
        await until(lambda: service._fanout.snapshot.connected_shards == SHARDS - 1)
        task = asyncio.create_task(http.put("/v1/items", json=item() | {"timeout_ms": 9000}))
        await until(lambda: service.writes.taken == 1)
        await asyncio.sleep(0.2)
        assert encoded == []
        await shards[0].start(shards[0].port)
        assert (await task).status_code == 200
        assert len(encoded) == 1


@pytest.mark.parametrize("generation", [1, 2])
async def test_a_write_that_was_sent_and_cannot_be_sent_again_is_of_unknown_outcome(
    generation,
) -> None:
    """Nor to the primary of another generation, which there is none of."""
    async with api() as (http, shards, service):
        shards[0].gate.clear()
        body = item() | {"timeout_ms": 600}
        task = asyncio.create_task(http.put("/v1/items", json=body))
        await until(lambda: writes_of(shards[0]))
        routes = [replace(moved(shard), primary=None) for shard in shards]
        table = make_table(routes, DIM, version=2, generation=generation, boundaries=(15, 30, 45))
        await service.apply(table)
        await shards[0].kill()
        response = await task
        assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
        assert "it may have been applied" in response.json()["failed"][0]["text"]


async def test_a_write_whose_answer_is_lost_with_its_generation_is_sent_to_the_next() -> None:
    async with api() as (http, shards, service), next_generation() as (after, table):
        shards[0].gate.clear()
        task = asyncio.create_task(http.put("/v1/items", json=item()))
        await until(lambda: writes_of(shards[0]))
        await service.apply(table)
        await shards[0].kill()
        assert (await task).json()["generation"] == 2
        assert len(writes_of(after[0])) == 1


@pytest.mark.parametrize(("text", "in_loop"), [("x", True), ("x" * (100 << 10), False)])
async def test_few_but_large_items_are_worked_on_in_threads(monkeypatch, text, in_loop) -> None:
    threads = []

    def noted(function):
        def call(*args):
            threads.append(threading.current_thread())
            return function(*args)

        return call

    monkeypatch.setattr(write_service, "upsert_parts", noted(write_service.upsert_parts))
    monkeypatch.setattr(primary, "encode_frame", noted(primary.encode_frame))
    async with api() as (http, shards, _):
        response = await http.put("/v1/items", json=item(attributes={"title": text}))
        assert response.status_code == 200
        assert shards[0].attributes[1] == {"title": text}
    assert [each is threading.main_thread() for each in threads] == [in_loop, in_loop]


# What searches see of writes


async def test_the_cache_gives_nothing_older_than_a_write_of_this_router() -> None:
    async with api() as (http, _, service):
        ask = {"vectors": [VECTOR], "k": 2}
        before = (await http.post("/v1/search", json=ask)).json()
        assert before["seq"] == [0, 0, 0, 0]
        assert (await http.post("/v1/search", json=ask)).json()["ids"] == before["ids"]
        assert service.status()["cache"]["hits"] == 1
        await http.put("/v1/items", json=item(item_id=500, vector=[100.0] * DIM))
        after = (await http.post("/v1/search", json=ask)).json()
        assert after["ids"][0][0] == 500
        assert after["seq"] == [0, 0, 0, 1]


async def test_the_seq_of_an_answer_tells_who_did_not_answer() -> None:
    async with api() as (http, shards, _):
        shards[2].error = ErrorReply(code="overloaded", message="x")
        for headers in ({}, {"accept": "application/msgpack"}):
            response = await http.post("/v1/search", json={"vectors": [VECTOR]}, headers=headers)
            body = response.json() if not headers else unpacked(response.content)
            assert body["seq"] == [0, 0, None, 0]
        shards[2].error = None
        answer = await http.post("/v1/search", json={"vectors": [VECTOR], "min_seq": body["seq"]})
        assert answer.status_code == 200


async def test_an_item_brings_its_attributes() -> None:
    async with api() as (http, shards, _):
        await http.put("/v1/items", json=item(attributes={"title": "new"}))
        body = (await http.get("/v1/items/1")).json()
        assert (body["attributes"], body["seq"]) == ({"title": "new"}, 1)
        shards[0].bad_values = b"\xc1"
        response = await http.get("/v1/items/1")
        assert (response.status_code, response.json()["code"]) == (503, "unavailable")


async def test_a_query_of_an_older_generation_leaves_the_numbers_of_the_new_one_alone() -> None:
    async with api() as (http, shards, service):
        for shard in shards:
            shard.seq = 7
            shard.gate.clear()
        ask = {"vectors": [VECTOR], "timeout_ms": 10_000}
        task = asyncio.create_task(http.post("/v1/search", json=ask))
        await until(lambda: all(shard.requests for shard in shards))
        ids, vectors = make_rows(ROWS, DIM)
        async with running_shards(ids, vectors, SHARDS, generation=2) as successors:
            await service.apply(make_table(successors, DIM, version=2, generation=2))
            for shard in shards:
                shard.gate.set()
            old = (await task).json()
            assert (old["generation"], old["seq"]) == (1, [7, 7, 7, 7])
            for _ in range(2):
                new = (await http.post("/v1/search", json=ask)).json()
                assert (new["generation"], new["seq"]) == (2, [0, 0, 0, 0])
            assert service.status()["cache"]["hits"] == 1


async def test_parts_of_one_shard_wait_their_turn_instead_of_being_refused(monkeypatch) -> None:
    monkeypatch.setattr("shardline.router.written.MAX_WRITTEN_ROWS", 2)
    monkeypatch.setattr("shardline.router.fanout.write_room.WRITE_ROOM_BYTES", 1)
    async with api() as (http, shards, _):
        shards[0].gate.clear()
        asked = asyncio.create_task(delete(http, [1, 2, 3, 4, 5]))
        await until(lambda: writes_of(shards[0]))
        body = item() | {"timeout_ms": 50}
        late = await http.put("/v1/items", json=body)
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        assert "other writes took all the time" in late.json()["failed"][0]["text"]
        assert len(writes_of(shards[0])) == 1
        shards[0].gate.set()
        response = await asked
        assert (response.status_code, response.json()["deleted"]) == (200, 5)
        assert len(writes_of(shards[0])) == 3
