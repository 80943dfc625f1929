"""A gc and the start of a cluster keep out of each other's way, on one machine or on two."""

import json
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from shardline.cluster.commands import gc as gc_command
from shardline.cluster.commands import generations as generations_command
from shardline.cluster.commands import serve as serve_command
from shardline.cluster.config import load_config
from shardline.cluster.housekeeping.removals import Removal, removals
from shardline.cluster.serving import deployment
from shardline.cluster.serving.deployment import Started, serving
from shardline.cluster.serving.endpoint import (
    NOTE_NAME,
    Endpoint,
    find_endpoint,
    leave_note,
    refuse_if_served,
    serving_now,
)
from shardline.cluster.serving.served import served_generation
from shardline.cluster.serving.start_lock import LOCK, removing, starting
from shardline.cluster.store import Store
from shardline.shards.core.errors import InvalidInput, NotFound, Unavailable
from tests.live_store import LiveStore, live_store


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> LiveStore:
    """Generations 1 to 3, of which 3 is live."""
    made = live_store(tmp_path_factory.mktemp("original"), 1)
    made.run("snapshot", made.store.root.parent / "s")
    for _ in range(2):
        made.run("restore", made.store.root.parent / "s")
    assert made.number == 3
    return made


@pytest.fixture
def store(original: LiveStore, tmp_path: Path) -> LiveStore:
    return original.copied(tmp_path)


def endpoint(number: int, **changes: Any) -> Endpoint:
    started = psutil.Process().create_time()
    note = Endpoint(url="http://127.0.0.1:1", generation=number, pid=os.getpid(), started=started)
    return replace(note, **changes)


def test_the_lock(tmp_path: Path) -> None:
    store = Store(tmp_path)
    refused = pytest.raises(Unavailable, match="a cluster is starting")
    with starting(store), starting(store), refused, removing(store):
        raise AssertionError
    with removing(store):
        with pytest.raises(Unavailable, match=r"gc` or .* is at work"), starting(store):
            raise AssertionError
        with pytest.raises(Unavailable, match=r"gc` or .* is at work"), removing(store):
            raise AssertionError
    with removing(store), pytest.raises(ZeroDivisionError), starting(Store(tmp_path / "none")):
        1 / 0  # noqa: B018


def test_a_disk_without_locks_starts_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr("shardline.cluster.serving.start_lock.fcntl.flock", unsupported)
    entered = []
    with starting(Store(tmp_path)):
        entered.append(1)
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).mkdir()
    with starting(Store(tmp_path)):
        entered.append(2)
    assert entered == [1, 2]


def test_what_a_starting_cluster_loads_stays(
    store: LiveStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asked for generation 1, which nothing on record names until it serves."""
    refused: list[str] = []

    def start_serving(*args: object, **kwargs: object) -> Started:
        for command in (("gc", "--keep", "0"), ("generations", "delete", "1")):
            with pytest.raises(Unavailable, match="a cluster is starting") as error:
                store.run(*command)
            refused.append(error.value.message)
        return Started(generation=1, urls=("http://127.0.0.1:1",), key_file=None)

    monkeypatch.setattr(deployment, "start_serving", start_serving)
    monkeypatch.setattr(deployment, "stop_serving", lambda **_: None)
    config = load_config(None, [f"store={store.store.root}"])
    with serving(config, generation=1) as served:
        assert len(refused) == 2
        assert served.host == platform.node()
        store.run("gc", "--keep", "0")
        assert store.store.generation_numbers() == [1, 3]
        with pytest.raises(InvalidInput, match="generation 1 is being served"):
            store.run("generations", "delete", "1")
    store.run("gc", "--keep", "0")
    assert store.store.generation_numbers() == [3]
    assert not (store.store.root / NOTE_NAME).exists()


def test_the_command_holds_it_from_its_first_look_on(
    store: LiveStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_serving(*args: object) -> None:
        store.run("gc", "--keep", "0")

    monkeypatch.setattr(serve_command, "check_serving", check_serving)
    with pytest.raises(Unavailable, match="a cluster is starting"):
        store.run("serve", "--generation", "1", "--insecure")
    with removing(store.store), pytest.raises(Unavailable, match="is at work"):
        store.run("serve", "--generation", "1", "--insecure")


def test_one_that_serves_by_the_time_of_a_removal(
    store: LiveStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk whose locks do not keep it apart."""

    def meanwhile(*args: Any) -> list[Removal]:
        found = removals(*args)
        leave_note(store.store, endpoint(1))
        return found

    monkeypatch.setattr(gc_command, "removals", meanwhile)
    removed = json.loads(store.run("gc", "--keep", "0", "--json"))["removed"]
    assert [Path(each["path"]).name for each in removed] == ["000002"]
    assert store.store.generation_numbers() == [1, 3]


def test_what_a_launched_cluster_serves_stays(
    store: LiveStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its controller alone knows, where it was started with `serve --generation`."""
    monkeypatch.setattr(generations_command, "served_generation", lambda *args, **kwargs: 1)
    with pytest.raises(InvalidInput, match="generation 1 is being served"):
        store.run("generations", "delete", "1")
    states = [each["state"] for each in json.loads(store.run("generations", "list", "--json"))]
    assert states == ["served", "", "live"]
    store.run("generations", "delete", "2")
    assert store.store.generation_numbers() == [1, 3]


def test_a_cluster_that_does_not_answer_keeps_nobody_from_the_list(
    store: LiveStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object, **kwargs: object) -> None:
        raise Unavailable("the controller does not answer")

    monkeypatch.setattr(generations_command, "served_generation", away)
    assert len(json.loads(store.run("generations", "list", "--json"))) == 3
    with pytest.raises(Unavailable, match="does not answer"):
        store.run("generations", "delete", "1")


def test_of_a_cluster_on_another_host_nobody_can_tell(store: LiveStore) -> None:
    """Its process has a number there, which may be that of any process here."""
    leave_note(store.store, endpoint(1, host="elsewhere"))
    assert serving_now(store.store) is None
    refuse_if_served(store.store)
    with pytest.raises(NotFound, match=r"no cluster on this host .* one on host elsewhere was"):
        find_endpoint(store.store)
    with pytest.raises(Unavailable, match=r"host elsewhere .* remove .*serving\.json"):
        served_generation(load_config(None, [f"store={store.store.root}"]))
    for command in (("gc", "--keep", "0"), ("gc", "--erase"), ("generations", "delete", "1")):
        with pytest.raises(Unavailable, match="host elsewhere"):
            store.run(*command)
    assert store.store.generation_numbers() == [1, 2, 3]
    leave_note(store.store, endpoint(1, host=platform.node()))
    assert served_generation(load_config(None, [f"store={store.store.root}"])) == 1
