"""Experiments and events of both clients, against a real HTTP server over fake shards."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgpack
import pandas as pd
import pytest

from shardline.router.client.event_calls import event_requests, read_events
from shardline.router.contract import MAX_EVENTS
from shardline.router.experiments.event_files import event_files
from shardline.router.experiments.event_files import read_events as read_file
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import InvalidInput, NotFound, ProtocolError
from tests.client_pair import KINDS
from tests.live_router import running_router
from tests.unit.test_experiments import DEPTH, NPROBE

CONFIG = RouterConfig(
    backoff_base_ms=1, backoff_max_ms=5, experiments=(NPROBE, DEPTH), write_timeout_ms=10_000
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "events"


@pytest.fixture
def router(folder: Path):
    with running_router(CONFIG, events_folder=folder) as router:
        router.service.events._gap_s = 0.0
        yield router


@pytest.fixture(params=KINDS)
def client(router, request):
    with request.param(router.url) as client:
        yield client


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [row for path in event_files(folder) for row in read_file(path).to_pylist()]
    return [row for row in found if row["event"] == kind]


def test_a_search_with_a_key_says_its_arms(router, client) -> None:
    answer = client.search(item_ids=[3], experiment_key="user-1")
    assert answer.arms == dict(router.service.experiments.arms_of("user-1"))
    assert answer.ids.shape[1] == {"ten": 10, "five": 5}[answer.arms["depth"]]
    assert client.search(item_ids=[3]).arms == {}


def test_events_are_stored_each_with_an_id(router, client, folder: Path) -> None:
    at = datetime(2026, 3, 1, 12, tzinfo=UTC)
    sent = [
        {"key": "u", "event": "click", "item_id": 5, "at": at, "value": None},
        {"request_id": "r", "event": "click", "event_id": "mine"},
    ]
    assert client.send_events(sent) == 2
    assert client.send_events(pd.DataFrame({"key": ["u"], "event": ["click"]})) == 1
    first, second, third = rows(folder, "click")
    assert (first["at"], first["item_id"], first["value"]) == (at, 5, None)
    assert second["event_id"] == "mine"
    assert len({first["event_id"], third["event_id"], None}) == 3
    assert client.send_events([]) == 0


def test_a_wrong_event_is_named(client) -> None:
    for bad, field in (
        ({"key": "u"}, "events[0].event"),
        (5, "events[0]"),
        ({"key": "u", "event": "click", "at": datetime(2026, 3, 1)}, "events[0].at"),
        ({"key": "u", "event": "click", "item_id": {1}}, "events"),
    ):
        with pytest.raises(InvalidInput) as caught:
            client.send_events([bad])
        assert caught.value.field == field


def test_without_a_store_the_client_is_told() -> None:
    with (
        running_router(CONFIG) as router,
        KINDS[0](router.url) as client,
        pytest.raises(NotFound, match="no events are stored here"),
    ):
        client.send_events([{"key": "u", "event": "click"}])


def test_more_than_a_server_takes_at_once_goes_in_several_requests() -> None:
    events = [{"key": "u", "event": "click"}] * (2 * MAX_EVENTS + 1)
    bodies = [msgpack.unpackb(body)["events"] for body in event_requests(events)]
    assert [len(each) for each in bodies] == [MAX_EVENTS, MAX_EVENTS, 1]
    assert len({event["event_id"] for body in bodies for event in body}) == len(events)


def test_what_is_no_answer_to_events_is_refused() -> None:
    for body in (b"", b"\xc0", msgpack.packb({}), msgpack.packb({"events": "x"})):
        with pytest.raises(ProtocolError):
            read_events(body)
