"""POST /v1/events through the whole app: what is stored, what is refused, by which key."""

import contextlib
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgpack
import pytest

from shardline.router.contract import MAX_EVENTS
from shardline.router.experiments.assignment import Experiments
from shardline.router.experiments.event_files import event_files, read_events
from shardline.router.experiments.stored_event import Event
from shardline.router.http import event_api
from shardline.router.http.api import create_app
from shardline.router.http.api_keys import Key, Keyring, Scope
from shardline.router.http.auth import AuthSettings, Guard
from shardline.router.http.event_api import DECODE_IN_LOOP, EVENTS_IN_LOOP
from shardline.router.http.event_codec import decode_events
from shardline.router.http.media import Media
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from tests.fake_encoder import FakeEncoder
from tests.fake_shard import SECRET, make_rows, make_table, running_shards
from tests.unit.test_experiments import NPROBE

DIM = 8
CONFIG = RouterConfig(experiments=(NPROBE,), backoff_base_ms=1, cache_bytes=0)


@contextlib.asynccontextmanager
async def api(folder: Path | None, config: RouterConfig = CONFIG, guard: Guard | None = None):
    ids, vectors = make_rows(60, DIM)
    async with running_shards(ids, vectors, 2) as shards:
        service = SearchService(
            config,
            SECRET,
            load_encoder=lambda _: FakeEncoder(DIM, "m1"),
            events_folder=folder,
        )
        service.events._gap_s = 0.0
        await service.apply(make_table(shards, DIM))
        transport = httpx.ASGITransport(app=create_app(service, config, guard))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            yield http, service
        await service.close()


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in event_files(folder) for row in read_events(path).to_pylist()]


async def test_events_are_stored_with_what_the_router_knows(tmp_path: Path) -> None:
    async with api(tmp_path) as (http, service):
        sent = [
            {"key": "user-1", "event": "click", "item_id": 5, "value": 1, "at": 1e9},
            {"request_id": "abc", "event": "buy", "at": "2026-03-01T12:30:00+01:00"},
            {"key": "u", "event": "view", "event_id": "x", "arms": {"probes": "few"}},
        ]
        response = await http.post("/v1/events", json={"events": sent})
        assert response.status_code == 200
        assert response.json() == {
            "events": 3,
            "request_id": response.headers["x-request-id"],
        }
        first, second, third = rows(tmp_path)
        assert (first["item_id"], first["value"]) == (5, 1.0)
        assert first["at"].timestamp() == 1e9
        assert first["arms"] == list(service.experiments.arms_of("user-1"))
        assert second["at"].isoformat() == "2026-03-01T11:30:00+00:00"
        assert (second["key"], second["arms"]) == (None, [])
        assert (third["event_id"], third["arms"]) == ("x", [("probes", "few")])
        packed = msgpack.packb({"events": sent[:1]})
        headers = {"content-type": "application/msgpack"}
        response = await http.post("/v1/events", content=packed, headers=headers)
        assert msgpack.unpackb(response.content)["events"] == 1


async def test_searches_in_experiments_are_stored_too(tmp_path: Path) -> None:
    async with api(tmp_path) as (http, service):
        body = {"item_ids": [3, 999], "k": 5, "experiment_key": "user-1"}
        answer = await http.post("/v1/search", json=body)
        await http.post("/v1/search", json={"item_ids": [3]})
        await service.events.close()
        (row,) = rows(tmp_path)
        assert (row["event"], row["key"]) == ("search", "user-1")
        assert row["request_id"] == answer.json()["request_id"]
        assert dict(row["arms"]) == answer.json()["arms"]
        assert (row["k"], row["queries"], row["results"]) == (5, 2, 5)
        assert row["took_ms"] > 0


async def test_a_share_of_the_keys_is_stored(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"event_share": 0.25})
    async with api(tmp_path, config) as (http, service):
        for number in range(100):
            for _ in range(2):
                body = {"item_ids": [3], "k": 2, "experiment_key": f"user-{number}"}
                await http.post("/v1/search", json=body)
        await service.events.close()
    keys = [row["key"] for row in rows(tmp_path)]
    assert 10 <= len(set(keys)) <= 40
    assert len(keys) == 2 * len(set(keys)), "of a key all searches, or none"


CLICK = {"key": "u", "event": "click"}
BAD: dict[str, tuple[Any, str]] = {
    "no events": ({}, "events"),
    "a map": ({"events": {}}, "events"),
    "none": ({"events": []}, "events"),
    "too many": ({"events": [CLICK] * (MAX_EVENTS + 1)}, "events"),
    "unknown field of the body": ({"events": [CLICK], "key": "u"}, "key"),
    "not a map": ({"events": [CLICK, 5]}, "events[1]"),
    "unknown field": ({"events": [CLICK, {**CLICK, "item": 5}]}, "events[1].item"),
    "no kind": ({"events": [{"key": "u"}]}, "events[0].event"),
    "a kind with spaces": ({"events": [{**CLICK, "event": "a b"}]}, "events[0].event"),
    "the router's own": ({"events": [{**CLICK, "event": "search"}]}, "events[0].event"),
    "of nobody": ({"events": [{"event": "click"}]}, "events[0].key"),
    "negative": ({"events": [{**CLICK, "item_id": -1}]}, "events[0].item_id"),
    "a text": ({"events": [{**CLICK, "value": "1"}]}, "events[0].value"),
    "no zone": ({"events": [{**CLICK, "at": "2026-03-01T12:00:00"}]}, "events[0].at"),
    "no time": ({"events": [{**CLICK, "at": "yesterday"}]}, "events[0].at"),
    "milliseconds": ({"events": [{**CLICK, "at": 1.7e12}]}, "events[0].at"),
    "before 1970": ({"events": [{**CLICK, "at": -1}]}, "events[0].at"),
    "long key": ({"events": [{**CLICK, "key": "x" * 257}]}, "events[0].key"),
    "NUL in a key": ({"events": [{**CLICK, "key": "\0u"}]}, "events[0].key"),
    "NUL in an id": ({"events": [{**CLICK, "request_id": "r\0"}]}, "events[0].request_id"),
    "arms": ({"events": [{**CLICK, "arms": {"a": 1}}]}, "events[0].arms.a"),
    "names of arms": ({"events": [{**CLICK, "arms": {"a": "b c"}}]}, "events[0].arms.a"),
    "many arms": (
        {"events": [{**CLICK, "arms": {f"a{n}": "b" for n in range(17)}}]},
        "events[0].arms",
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_one_bad_event_refuses_all_and_stores_none(tmp_path: Path, case: str) -> None:
    body, field = BAD[case]
    async with api(tmp_path) as (http, _):
        response = await http.post("/v1/events", json=body)
        assert response.status_code == 400
        assert response.json()["field"] == field
        assert response.json()["code"] == "invalid_input"
    assert rows(tmp_path) == []


async def test_many_short_events_do_not_hold_the_event_loop() -> None:
    service = SimpleNamespace(experiments=Experiments(()))
    decoded = []

    def decode(*args: Any, **given: Any) -> list[Event]:
        decoded.append(threading.current_thread() is threading.main_thread())
        return decode_events(*args, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_api, "decode_events", decode)
        for count in (EVENTS_IN_LOOP, EVENTS_IN_LOOP + 1):
            body = json.dumps({"events": [CLICK] * count}).encode()
            assert len(body) < DECODE_IN_LOOP
            assert len(await event_api._decoded(service, body, Media.JSON)) == count
    assert decoded == [True, True, False], "the second begins in the loop, and moves"


async def test_without_a_store_events_are_refused() -> None:
    async with api(None) as (http, _):
        response = await http.post("/v1/events", json={"events": [CLICK]})
        assert (response.status_code, response.json()["code"]) == (404, "not_found")


async def test_storing_needs_a_key_that_writes(tmp_path: Path) -> None:
    keys = {scope: scope.value[0] * 43 for scope in (Scope.SEARCH, Scope.WRITE)}
    keyring = Keyring.of([Key(scope, key) for scope, key in keys.items()])
    async with api(tmp_path, guard=Guard(AuthSettings(keyring=keyring))) as (http, _):
        for scope, status in ((Scope.SEARCH, 403), (Scope.WRITE, 200)):
            headers = {"authorization": f"Bearer {keys[scope]}"}
            response = await http.post("/v1/events", json={"events": [CLICK]}, headers=headers)
            assert response.status_code == status
        assert (await http.post("/v1/events", json={"events": [CLICK]})).status_code == 401
