"""Items written by features, through the whole ASGI app: what shards get, and what is refused."""

import asyncio
import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import msgpack
import numpy as np
import pytest

from shardline.router.fanout.snapshot import load_item_encoder
from shardline.router.featured_writes import encoded
from shardline.router.http import feature_values
from shardline.router.http.api import create_app
from shardline.router.http.media import Media
from shardline.router.http.write_codec import decode_upsert
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.router.written import upsert_parts
from shardline.shards.core.encoder_files import CONFIG, write_encoder
from shardline.shards.core.files import sha256_of
from shardline.shards.core.messages import ErrorReply, UpsertRequest
from tests.fake_encoder import (
    ITEM_FEATURES,
    FakeEncoder,
    item_encoder_parts,
    item_vector,
    small_item_encoder,
)
from tests.fake_shard import SECRET, make_rows, make_table, running_shards, until
from tests.http_bodies import packed, unpacked

DIM = 8
ROWS, SHARDS = 60, 4  # ids 45 and above are of shard 3
CONFIG_FAST = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, write_timeout_ms=10_000)
MSGPACK = {"content-type": "application/msgpack"}
VECTOR = [9.0] + [0.0] * (DIM - 1)
EXPECTED = item_vector(DIM, 1, 0, 1, 2, 1)  # of ITEM_FEATURES
SONG = ITEM_FEATURES | {"category": "song", "size": 0, "tags": ["x", "y"]}


@contextlib.asynccontextmanager
async def api(load_items=lambda _table: small_item_encoder(DIM), **table):
    """(http client, shards, service) over ROWS rows in SHARDS shards."""
    ids, vectors = make_rows(ROWS, DIM)
    async with running_shards(ids, vectors, SHARDS) as shards:
        service = SearchService(
            CONFIG_FAST,
            SECRET,
            load_encoder=lambda _table: FakeEncoder(DIM),
            load_items=load_items,
        )
        await service.apply(make_table(shards, DIM, **table))
        transport = httpx.ASGITransport(app=create_app(service, CONFIG_FAST))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            yield http, shards, service
        await service.close()


def writes_of(shard):
    return [each for each in shard.requests if isinstance(each, UpsertRequest)]


def by_features(features=ITEM_FEATURES, item_id=70, **more):
    return {"items": [{"item_id": item_id, "features": features} | more]}


async def test_items_are_encoded_and_features_become_attributes() -> None:
    async with api() as (http, shards, _):
        items = [
            {"item_id": 70, "features": ITEM_FEATURES},
            {"item_id": 71, "features": SONG, "attributes": {"title": "b", "category": None}},
        ]
        response = await http.put("/v1/items", json={"items": items, "model_version": "m1"})
        assert response.status_code == 200, response.text
        assert response.json()["created"] == 2
        (sent,) = writes_of(shards[3])
        expected = [EXPECTED, item_vector(DIM, 0, 1, 2, 0, 1)]
        np.testing.assert_allclose(sent.vectors, expected, atol=1e-6)
        assert shards[3].attributes == {
            70: {"category": "film", "size": 2, "released": None, "tags": ["x"], "title": None},
            71: {"category": None, "size": 0, "released": None, "tags": ["x", "y"], "title": "b"},
        }
        found = (await http.post("/v1/search", json={"item_ids": [70], "k": 70})).json()
        assert 71 in found["ids"][0]


@pytest.mark.parametrize("media", ["json", "msgpack"])
async def test_columns_are_encoded_as_items_are(media: str) -> None:
    features = {
        "category": ["film", "song", None],
        "size": [2.0, 0.0, 7.0],
        "released": [None, 1_400_000_000, "2014-05-13T16:53:20"],
        "tags": [["x"], [], None],
    }
    content = {"item_ids": [70, 71, 72], "features": features, "attributes": {"title": list("abc")}}
    async with api() as (http, shards, _):
        if media == "json":
            response = await http.put("/v1/items", json=content)
        else:
            content["item_ids"] = packed([70, 71, 72], "<i8")
            features["size"] = packed([2, 0, 7], "<f4")
            response = await http.put("/v1/items", content=msgpack.packb(content), headers=MSGPACK)
            assert unpacked(response.content)["created"] == 3
        assert response.status_code == 200, response.text
        (sent,) = writes_of(shards[3])
        expected = [EXPECTED, item_vector(DIM, 0, 1), item_vector(DIM, 0, 0, 0, 7)]
        np.testing.assert_allclose(sent.vectors, expected, atol=1e-6)
        columns = msgpack.unpackb(sent.attributes)
        moment = "2014-05-13T16:53:20"
        assert columns["released"] == [None, moment, moment]
        assert columns["size"] == [2, 0, 7] and {type(each) for each in columns["size"]} == {int}
        assert columns["title"] == ["a", "b", "c"]


async def test_many_items_are_encoded_in_another_thread() -> None:
    async with api() as (http, shards, _):
        items = [{"item_id": 100 + n, "features": ITEM_FEATURES | {"size": n}} for n in range(300)]
        assert (await http.put("/v1/items", json={"items": items})).status_code == 200
        (sent,) = writes_of(shards[3])
        expected = [item_vector(DIM, 1, 0, 1, min(n, 10), 1) for n in range(300)]
        np.testing.assert_allclose(sent.vectors, expected, atol=1e-6)


def without(name: str) -> dict:
    return {key: value for key, value in ITEM_FEATURES.items() if key != name}


COLUMNS = {name: [value] for name, value in ITEM_FEATURES.items()}
BAD = [
    (by_features(without("size")), "items[0].features.size", "expected all of category, released"),
    (by_features(ITEM_FEATURES | {"sise": 1}), "items[0].features.sise", "expected one of"),
    (by_features(ITEM_FEATURES | {"size": "2"}), "items[0].features.size", "got str"),
    (by_features(ITEM_FEATURES | {"tags": ["x", 1]}), "items[0].features.tags[1]", "got int"),
    (by_features(ITEM_FEATURES | {"tags": {}}), "items[0].features.tags", "a list of them"),
    (by_features([1]), "items[0].features", "a map of features"),
    (by_features(dict.fromkeys(ITEM_FEATURES) | {"released": 0}), "items[0].features", "of zeros"),
    (by_features(None), "items[0].features", "a map of features"),
    (by_features(ITEM_FEATURES, -1), "items[0].item_id", ""),
    (by_features(ITEM_FEATURES, 1.0), "items[0].item_id", ""),
    (by_features(ITEM_FEATURES, vector=VECTOR), "items[0].vector", "got both"),
    (by_features(ITEM_FEATURES, attributes=[1]), "items[0].attributes", ""),
    (
        {"items": [*by_features()["items"], {"item_id": 1, "vector": VECTOR}]},
        "items[1].vector",
        "features, as items[0] has",
    ),
    (
        {"items": [{"item_id": 1, "vector": VECTOR}, *by_features()["items"]]},
        "items[1].features",
        "vector, as items[0] has",
    ),
    ({"item_ids": [1], "features": COLUMNS, "vectors": [VECTOR]}, "vectors", "got both"),
    ({"item_ids": [1]}, "vectors", "or features instead"),
    ({"features": COLUMNS}, "features", "items, or item_ids and vectors or features"),
    (by_features() | {"features": COLUMNS}, "features", "one form"),
    ({"item_ids": [1], "features": [1]}, "features", "a map of names to lists"),
    ({"item_ids": [1, 2], "features": COLUMNS}, "features.category", "2 values"),
    ({"item_ids": [1], "features": COLUMNS | {"size": 2}}, "features.size", "a value per item"),
    ({"item_ids": [1], "features": COLUMNS | {"size": [True]}}, "features.size[0]", "got bool"),
    ({"item_ids": [1], "features": COLUMNS | {"tags": [[1]]}}, "features.tags[0][0]", "got int"),
    ({"item_ids": [1], "features": COLUMNS | {"x": [1]}}, "features.x[0]", "unknown feature"),
    ({"item_ids": [1], "features": {}}, "features.category[0]", "missing feature"),
]


@pytest.mark.parametrize(("body", "field", "words"), BAD)
async def test_bad_input_is_400_names_the_field_and_reaches_no_shard(body, field, words) -> None:
    async with api() as (http, shards, service):
        response = await http.put("/v1/items", json=body)
        problem = response.json()
        assert (response.status_code, problem["code"]) == (400, "invalid_input")
        assert problem["field"] == field
        told = [problem["detail"], f"expected {problem.get('expected')}"]
        assert words in "; ".join([*told, f"got {problem.get('got')}"])
        assert not any(writes_of(shard) for shard in shards)
        assert service.writes.taken == 0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"size": [float("nan")]}, "features.size[0]"),
        ({"tags": [[b"x"]]}, "features.tags[0]"),
        ({"size": packed(3.0, "<f4")}, "features.size"),
    ],
)
async def test_bad_values_in_msgpack_are_400_too(change, field) -> None:
    async with api() as (http, shards, _):
        content = msgpack.packb({"item_ids": [1], "features": COLUMNS | change})
        response = await http.put("/v1/items", content=content, headers=MSGPACK)
        assert (response.status_code, response.json()["field"]) == (400, field)
        assert not any(writes_of(shard) for shard in shards)


async def test_features_that_would_take_too_long_are_413(monkeypatch) -> None:
    monkeypatch.setattr(feature_values, "MAX_VALUES", 10)
    async with api() as (http, _, _):
        many = by_features(ITEM_FEATURES | {"tags": ["x"] * 11})
        columns = {"item_ids": [1, 2, 3], "features": {n: v * 3 for n, v in COLUMNS.items()}}
        for body in (many, columns):
            response = await http.put("/v1/items", json=body)
            assert (response.status_code, response.json()["code"]) == (413, "payload_too_large")
            assert "send the items in several requests" in response.json()["hint"]


async def test_a_generation_without_an_item_encoder_says_what_to_do() -> None:
    async with api(load_items=lambda _table: None) as (http, _, _):
        problem = (await http.put("/v1/items", json=by_features())).json()
        assert (problem["status"], problem["field"]) == (400, "features")
        assert "has no item encoder" in problem["detail"]
        assert "export the model again and build a generation from it" in problem["hint"]
        body = {"items": [{"item_id": 1, "vector": VECTOR}]}
        assert (await http.put("/v1/items", json=body)).status_code == 200
        assert (await http.get("/v1/status")).json()["item_encoder"] is None


async def test_items_for_another_model_are_409() -> None:
    async with api() as (http, _, _):
        response = await http.put("/v1/items", json=by_features() | {"model_version": "m0"})
        problem = response.json()
        assert (response.status_code, problem["code"]) == (409, "version_mismatch")
        assert (problem["expected"], problem["got"]) == ("m1", "m0")


async def test_an_encoder_of_another_model_is_refused() -> None:
    async with api(load_items=lambda _table: small_item_encoder(DIM, "m0")) as (http, _, _):
        problem = (await http.put("/v1/items", json=by_features())).json()
        assert (problem["status"], problem["code"]) == (503, "version_mismatch")
        assert (problem["expected"], problem["got"]) == ("m1", "m0")


async def test_the_status_names_the_features_of_items() -> None:
    async with api() as (http, _, _):
        told = (await http.get("/v1/status")).json()["item_encoder"]
        assert told["model_version"] == "m1"
        assert [each["name"] for each in told["features"]] == [
            "category",
            "tags",
            "size",
            "released",
        ]
        assert {each["kind"] for each in told["features"]} == {
            "categorical",
            "multi_valued",
            "numeric",
        }


async def test_a_damaged_item_encoder_fails_only_writes_by_features(tmp_path: Path) -> None:
    folder = tmp_path / "item_encoder"
    folder.mkdir()
    write_encoder(folder, *item_encoder_parts(DIM))
    checksum = sha256_of(folder / CONFIG)
    shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((folder / CONFIG).read_text())
    content["features"][0]["values"] = ["song", "film"]
    (folder / CONFIG).write_text(json.dumps(content))
    table = {"generation_dir": str(tmp_path), "item_encoder_checksum": checksum}
    async with api(load_item_encoder, **table) as (http, _, service):
        problem = (await http.put("/v1/items", json=by_features())).json()
        assert (problem["status"], problem["code"]) == (503, "encoder_unavailable")
        assert str(tmp_path) not in str(problem)
        body = {"items": [{"item_id": 1, "vector": VECTOR}]}
        assert (await http.put("/v1/items", json=body)).status_code == 200
        searched = await http.post("/v1/search", json={"features": [{"slope": 1.0}], "k": 3})
        assert searched.status_code == 200
        (warning,) = (await http.get("/v1/status")).json()["warnings"]
        assert (warning["about"], warning["code"]) == ("item_encoder", "corrupt_file")
        assert not await service.mend_encoder()
        shutil.copytree(tmp_path / "copy", folder, dirs_exist_ok=True)
        assert await service.mend_encoder()
        assert (await http.put("/v1/items", json=by_features())).status_code == 200
        assert service.status()["warnings"] == []


def test_a_repeated_write_is_known_by_its_features_not_its_vectors() -> None:
    """Of another router vectors may differ in the last bit; the same key must be the same write."""
    table = make_table([], DIM, boundaries=())
    body = json.dumps(by_features()).encode()
    given = encoded(decode_upsert(body, Media.JSON, CONFIG_FAST), small_item_encoder(DIM))
    nearly = replace(given, vectors=np.nextafter(given.vectors, np.float32(2)))
    other = json.dumps(by_features(SONG)).encode()
    changed = encoded(decode_upsert(other, Media.JSON, CONFIG_FAST), small_item_encoder(DIM))
    keys = [
        part.message.key
        for each in (given, nearly, changed)
        for part in upsert_parts(each, table, "mine")
    ]
    assert keys[0] == keys[1] != keys[2]


async def test_a_write_under_way_is_encoded_by_the_model_that_goes_live() -> None:
    """The log keeps the features, so that the next model can do the same with what is done."""

    def load_items(table):
        return small_item_encoder(DIM, model_version=table.model_version)

    ids, vectors = make_rows(ROWS, DIM)
    async with (
        api(load_items) as (http, shards, service),
        running_shards(ids, vectors, 1, generation=2) as after,
    ):
        shards[0].write_error = ErrorReply(code="not_primary", message="sealed")
        items = [{"item_id": n, "features": ITEM_FEATURES} for n in (3, 70)]
        task = asyncio.create_task(http.put("/v1/items", json={"items": items}))
        await until(lambda: writes_of(shards[0]) and writes_of(shards[3]))
        table = make_table(after, DIM, version=2, generation=2, model_version="m2")
        await service.apply(table)
        body = (await task).json()
        assert (body["rows"], body["generation"], body["model_version"]) == (2, 2, "m2")
        (acknowledged,), (crossed,) = writes_of(shards[3]), writes_of(after[0])
        assert (acknowledged.item_ids.tolist(), crossed.item_ids.tolist()) == ([70], [3])
        assert msgpack.unpackb(acknowledged.features) == [ITEM_FEATURES]
        assert msgpack.unpackb(crossed.features) == [ITEM_FEATURES]
        np.testing.assert_allclose(crossed.vectors, [EXPECTED], atol=1e-6)


async def test_by_features_no_model_is_to_be_named_while_two_get_the_writes() -> None:
    async with api(other_model="m2") as (http, _, _):
        assert (await http.put("/v1/items", json=by_features())).status_code == 200
