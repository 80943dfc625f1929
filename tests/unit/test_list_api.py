"""Named lists over HTTP: bodies in both formats, keys, bad input, and searches that name lists."""

import contextlib
import errno

import httpx
import msgpack
import numpy as np
import pytest

from shardline.router.http.api import create_app
from shardline.router.http.api_keys import Key, Keyring, Scope
from shardline.router.http.auth import AuthSettings, Guard
from shardline.router.list_names import MAX_EXCLUDE_LISTS
from shardline.router.lists.list_store import ListStore
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from tests.fake_shard import SECRET, make_rows, make_table, running_shards
from tests.http_bodies import packed, unpacked
from tests.list_disk import failing_at, new_store

DIM = 8
CONFIG = RouterConfig(max_list_ids=100, max_listed_ids=150, max_body_bytes=1 << 16)
MSGPACK = {"content-type": "application/msgpack"}
KEYS = {scope: letter * 43 for scope, letter in zip(Scope, "swa", strict=True)}


@contextlib.asynccontextmanager
async def api(tmp_path, config=CONFIG, guard=None):
    """(http client, service) over 60 rows in 4 shards, and a store."""
    ids, vectors = make_rows(60, DIM)
    root = new_store(tmp_path)
    async with running_shards(ids, vectors, 4) as shards:
        service = SearchService(config, SECRET, load_encoder=lambda _: None)
        place = str(root.parent / "generations" / "000001")
        await service.apply(make_table(shards, DIM, generation_dir=place))
        transport = httpx.ASGITransport(app=create_app(service, config, guard))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            yield http, service
        await service.close()


async def test_a_list_in_json(tmp_path):
    async with api(tmp_path) as (http, _):
        made = await http.put("/v1/lists/seen:17", json={"item_ids": [9, 3, 3]})
        assert made.status_code == 200
        body = made.json()
        assert body.pop("request_id") == made.headers["x-request-id"]
        assert body.pop("took_ms") > 0
        assert body == {"name": "seen:17", "version": 1, "ids": 2, "existed": False}
        changed = await http.post("/v1/lists/seen:17", json={"add": [5], "remove": [3]})
        assert changed.json()["version"] == 2
        assert changed.json()["existed"]
        read = (await http.get("/v1/lists/seen:17")).json()
        assert (read["name"], read["version"], read["item_ids"]) == ("seen:17", 2, [5, 9])
        gone = (await http.delete("/v1/lists/seen:17")).json()
        assert (gone["existed"], gone["version"], gone["ids"]) == (True, None, 0)
        again = await http.delete("/v1/lists/seen:17")
        assert (again.status_code, again.json()["existed"]) == (200, False)
        missing = await http.get("/v1/lists/seen:17")
        assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
        head = await http.head("/v1/lists")
        assert (head.status_code, head.content) == (200, b"")


async def test_a_list_in_msgpack(tmp_path):
    async with api(tmp_path) as (http, _):
        for given in ([4, 2], packed([4, 2], "<i8"), packed([4, 2], "<i4")):
            body = msgpack.packb({"item_ids": given})
            made = await http.put("/v1/lists/a", content=body, headers=MSGPACK)
            assert made.headers["content-type"] == "application/msgpack"
            assert unpacked(made.content)["ids"] == 2
        read = await http.get("/v1/lists/a", headers={"accept": "application/msgpack"})
        found = unpacked(read.content)
        assert found["item_ids"].tolist() == [2, 4]
        assert found["item_ids"].dtype == np.int64
        page = await http.get("/v1/lists", headers={"accept": "application/msgpack"})
        assert unpacked(page.content)["names"] == ["a"]


async def test_names_come_in_pages(tmp_path):
    async with api(tmp_path) as (http, _):
        for number in range(12):
            await http.put(f"/v1/lists/seen:{number}", json={"item_ids": [number]})
        found, after = [], ""
        while after is not None:
            page = await http.get(
                "/v1/lists", params={"prefix": "seen:1", "limit": 2, "after": after}
            )
            assert page.status_code == 200, page.text
            found += page.json()["names"]
            after = page.json()["next"]
        assert sorted(found) == ["seen:1", "seen:10", "seen:11"]


BAD_NAMES = ["a%2Fb", "a/b", "a%20b", "a%00", "a%0A", "%C3%A4", "a" * 129, "%2E%2E", "", "a%25"]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "DELETE"])
async def test_what_is_no_name_is_400(tmp_path, method, name):
    async with api(tmp_path) as (http, _):
        # as bytes, because a client takes .. out of a path
        scope_path = httpx.URL("http://router").copy_with(raw_path=f"/v1/lists/{name}".encode())
        content = None if method in ("GET", "DELETE") else b'{"item_ids": [1]}'
        headers = {"content-type": "application/json"} if content else {}
        response = await http.request(method, scope_path, content=content, headers=headers)
        assert response.status_code == 400, response.text
        assert response.json()["field"] == "name"
        assert not (tmp_path / "lists").exists()


BAD_BODIES = [
    ("PUT", {}, "item_ids"),
    ("PUT", {"item_ids": 7}, "item_ids"),
    ("PUT", {"item_ids": [1.5]}, "item_ids[0]"),
    ("PUT", {"item_ids": [1, True]}, "item_ids[1]"),
    ("PUT", {"item_ids": ["1"]}, "item_ids[0]"),
    ("PUT", {"item_ids": [None]}, "item_ids[0]"),
    ("PUT", {"item_ids": [1, -1]}, "item_ids[1]"),
    ("PUT", {"item_ids": [2**63]}, "item_ids"),
    ("PUT", {"item_ids": [[1]]}, "item_ids[0]"),
    ("PUT", {"item_ids": list(range(101))}, "item_ids"),
    ("PUT", {"item_ids": [1], "add": [2]}, "add"),
    ("PUT", [1], "body"),
    ("POST", {}, "add"),
    ("POST", {"add": [], "remove": []}, "add"),
    ("POST", {"add": [1, 2], "remove": [2, 3]}, "remove"),
    ("POST", {"add": [-1]}, "add[0]"),
    ("POST", {"remove": [0.0]}, "remove[0]"),
    ("POST", {"add": list(range(60, 160))}, "add"),
    ("POST", {"item_ids": [1]}, "item_ids"),
    ("POST", {"add": None}, "add"),
]


@pytest.mark.parametrize("media", ["json", "msgpack"])
@pytest.mark.parametrize(("method", "body", "field"), BAD_BODIES, ids=repr)
async def test_bad_input_is_400_names_the_field_and_changes_nothing(
    tmp_path, method, body, field, media
):
    async with api(tmp_path) as (http, _):
        await http.put("/v1/lists/a", json={"item_ids": list(range(50))})
        if media == "json":
            response = await http.request(method, "/v1/lists/a", json=body)
        else:
            content = msgpack.packb(body)
            response = await http.request(method, "/v1/lists/a", content=content, headers=MSGPACK)
        assert response.status_code == 400, response.text
        assert response.json()["field"] == field
        read = (await http.get("/v1/lists/a")).json()
        assert (read["version"], read["item_ids"]) == (1, list(range(50)))


def array_of_ids(ids, dtype):
    return {"content": msgpack.packb({"item_ids": packed(ids, dtype)}), "headers": MSGPACK}


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"\xc1", "headers": MSGPACK}, 400),
        ({"content": b"[1]", "headers": {"content-type": "text/csv"}}, 415),
        ({"content": b"[1]"}, 415),
        ({"json": {"item_ids": [1]}, "headers": {"accept": "text/html"}}, 406),
        ({"json": {"item_ids": [2**40] * 6000}}, 413),
        (array_of_ids([[1]], "<i8"), 400),
        (array_of_ids([1], "<f4"), 400),
        (array_of_ids(range(101), "<i8"), 400),
    ],
)
async def test_bodies_that_are_none(tmp_path, options, status):
    async with api(tmp_path) as (http, _):
        assert (await http.put("/v1/lists/a", **options)).status_code == status
        assert not (tmp_path / "lists").exists()


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"after": "nowhere"}, "after"),
        ({"after": "00/../x"}, "after"),
        ({"prefix": "a/b"}, "prefix"),
        ({"prefix": "\n"}, "prefix"),
    ],
)
async def test_bad_pages_are_400(tmp_path, params, field):
    async with api(tmp_path) as (http, _):
        response = await http.get("/v1/lists", params=params)
        assert (response.status_code, response.json()["field"]) == (400, field)


@pytest.mark.parametrize(
    ("method", "path", "needed"),
    [
        ("GET", "/v1/lists", Scope.SEARCH),
        ("GET", "/v1/lists/a", Scope.SEARCH),
        ("PUT", "/v1/lists/a", Scope.WRITE),
        ("POST", "/v1/lists/a", Scope.WRITE),
        ("DELETE", "/v1/lists/a", Scope.WRITE),
        ("PATCH", "/v1/lists/a", Scope.ADMIN),
        ("DELETE", "/v1/lists", Scope.ADMIN),
    ],
)
async def test_keys(tmp_path, method, path, needed):
    guard = Guard(AuthSettings(keyring=Keyring.of([Key(s, key) for s, key in KEYS.items()])))
    async with api(tmp_path, guard=guard) as (http, _):
        assert (await http.request(method, path)).status_code == 401
        for scope, key in KEYS.items():
            response = await http.request(method, path, headers={"authorization": f"Bearer {key}"})
            assert (response.status_code == 403) == (not scope.covers(needed))


async def test_a_search_leaves_out_the_items_of_its_lists(tmp_path, monkeypatch):
    async with api(tmp_path) as (http, service):
        await http.put("/v1/lists/blocked", json={"item_ids": [3, 1]})
        await http.put("/v1/lists/seen:17", json={"item_ids": [7]})
        asked = []
        find = service._finder.find

        async def watched(snapshot, vectors, k, query, *rest):
            asked.append([ids.tolist() for ids in query.excluded])
            return await find(snapshot, vectors, k, query, *rest)

        monkeypatch.setattr(service._finder, "find", watched)
        body = {"item_ids": [1, 2], "k": 3, "exclude_lists": ["blocked", "seen:17", "unknown"]}
        response = await http.post("/v1/search", json=body)
        assert response.status_code == 200, response.text
        # an item that is asked with is left out anyway, and does not count as excluded
        assert asked == [[[3, 7], [1, 3, 7]]]
        await http.post("/v1/search", json={"item_ids": [1], "exclude_lists": ["unknown"]})
        assert asked[1:] == [[]]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ("blocked", "exclude_lists"),
        ([7], "exclude_lists[0]"),
        (["ok", "a/b"], "exclude_lists[1]"),
        ([".."], "exclude_lists[0]"),
        (["a"] * (MAX_EXCLUDE_LISTS + 1), "exclude_lists"),
        (["a", "b"], "exclude_lists"),  # too many ids
    ],
)
async def test_wrong_lists_of_a_search_are_400(tmp_path, given, field):
    async with api(tmp_path) as (http, _):
        await http.put("/v1/lists/a", json={"item_ids": list(range(100))})
        await http.put("/v1/lists/b", json={"item_ids": list(range(100, 151))})
        response = await http.post("/v1/search", json={"item_ids": [1], "exclude_lists": given})
        assert (response.status_code, response.json()["field"]) == (400, field)


async def test_a_search_that_cannot_know_its_lists_is_503(tmp_path):
    async with api(tmp_path) as (http, _):
        await http.put("/v1/lists/a", json={"item_ids": [1]})
        folder = ListStore(tmp_path / "lists").folder("b")
        folder.mkdir(parents=True)
        (folder / "000000000001.ids").write_bytes(b"x" * 40)
        body = {"item_ids": [1], "exclude_lists": ["a", "b"]}
        response = await http.post("/v1/search", json=body)
        assert (response.status_code, response.json()["code"]) == (503, "lists_unavailable")
        assert response.headers["retry-after"]
        assert str(tmp_path) not in response.text
        body = {"item_ids": [1], "exclude_lists": ["a"]}
        assert (await http.post("/v1/search", json=body)).status_code == 200
        assert (await http.get("/v1/lists/b")).json()["code"] == "lists_unavailable"
        assert (await http.put("/v1/lists/b", json={"item_ids": []})).status_code == 200
        assert (await http.get("/v1/lists/b")).json()["item_ids"] == []


async def test_more_writes_than_allowed_are_429(tmp_path):
    async with api(tmp_path, CONFIG.model_copy(update={"max_writes_in_flight": 1})) as (
        http,
        service,
    ):
        with service.writes.admit():
            response = await http.put("/v1/lists/a", json={"item_ids": [1]})
            assert (response.status_code, response.json()["code"]) == (429, "overloaded")
            assert (await http.get("/v1/lists")).status_code == 200


@pytest.mark.parametrize(
    ("number", "status", "code"),
    [(errno.ENOSPC, 507, "store_full"), (errno.EIO, 503, "read_only")],
)
@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE"])
async def test_a_disk_that_fails_is_507_or_503_and_nothing_has_changed(
    tmp_path, method, number, status, code
):
    async with api(tmp_path) as (http, service):
        await http.put("/v1/lists/a", json={"item_ids": [1]})
        service.lists._opened[0]._disk = failing_at("before write_new", number)
        body = {"PUT": {"item_ids": [2]}, "POST": {"add": [2]}, "DELETE": None}[method]
        response = await http.request(method, "/v1/lists/a", json=body)
        assert (response.status_code, response.json()["code"]) == (status, code)
        assert "secret" not in response.text
        assert (await http.get("/v1/lists/a")).json()["item_ids"] == [1]
        assert ListStore(tmp_path / "lists").newest("a").ids.tolist() == [1]
