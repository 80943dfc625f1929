"""Writes through the whole ASGI app: real codec, real service, fake shards on sockets."""

import contextlib

import httpx
import msgpack

from shardline.router.http.api import create_app
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.messages import DeleteRequest, UpsertRequest
from tests.fake_shard import SECRET, make_rows, make_table, running_shards
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
