"""The note that says where a store is served."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from shardline.cluster.cli import Settings
from shardline.cluster.commands.address import address_of
from shardline.cluster.serving.endpoint import (
    NOTE_NAME,
    Address,
    Endpoint,
    find_endpoint,
    is_alive,
    leave_note,
    refuse_if_served,
    remove_note,
    serving_now,
)
from shardline.cluster.serving.reaching import note_served
from shardline.cluster.serving.serving_keys import CLIENT_VARIABLE, add_key
from shardline.cluster.store import Store
from shardline.router.http.api_keys import Scope
from shardline.shards.core.errors import ConfigError, CorruptFile, NotFound, Unavailable


@pytest.fixture
def mine() -> Endpoint:
    """A cluster that this test process serves."""
    started = psutil.Process().create_time()
    return Endpoint(url="http://127.0.0.1:1", generation=1, pid=os.getpid(), started=started)


def test_a_note_is_found_and_refuses_a_second_cluster(tmp_path: Path, mine: Endpoint) -> None:
    store = Store(tmp_path)
    refuse_if_served(store)
    assert serving_now(store) is None
    leave_note(store, mine)
    assert serving_now(store) == mine
    assert find_endpoint(store) == mine
    with pytest.raises(Unavailable, match="served already, generation 1 at http://127"):
        refuse_if_served(store)
    remove_note(store, mine)
    with pytest.raises(NotFound, match="no cluster is serving"):
        find_endpoint(store)


def test_a_reused_pid_is_not_the_cluster(tmp_path: Path, mine: Endpoint) -> None:
    store = Store(tmp_path)
    leave_note(store, replace(mine, started=mine.started - 1000))
    refuse_if_served(store)
    assert serving_now(store) is None
    with pytest.raises(NotFound, match="is gone"):
        find_endpoint(store)


def test_a_note_that_a_publish_has_changed_is_removed(tmp_path: Path, mine: Endpoint) -> None:
    store = Store(tmp_path)
    leave_note(store, mine)
    note_served(store, 2)
    assert find_endpoint(store) == replace(mine, generation=2)
    remove_note(store, mine)
    with pytest.raises(NotFound):
        find_endpoint(store)
    note_served(store, 3)
    assert list(tmp_path.iterdir()) == []


def test_the_note_of_another_cluster_stays(tmp_path: Path, mine: Endpoint) -> None:
    store = Store(tmp_path)
    leave_note(store, mine)
    remove_note(store, replace(mine, url="http://127.0.0.1:2"))
    assert find_endpoint(store) == mine


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen(["true"])
    psutil.Process(child.pid)
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert not is_alive(child.pid)
    child.wait()
    assert is_alive(os.getpid())


def test_a_damaged_note_is_named(tmp_path: Path) -> None:
    (tmp_path / NOTE_NAME).write_text("{")
    with pytest.raises(CorruptFile, match=NOTE_NAME):
        find_endpoint(Store(tmp_path))


def test_the_note_tells_where_the_key_is_and_never_the_key(tmp_path: Path, mine: Endpoint) -> None:
    store = Store(tmp_path)
    key_file = tmp_path / "keys"
    key = add_key(key_file, Scope.SEARCH).secret
    leave_note(store, replace(mine, key_file=str(key_file)))
    assert key not in (tmp_path / NOTE_NAME).read_text()
    address = find_endpoint(store).address
    assert address == Address(mine.url, key)
    assert address.headers == (("Authorization", f"Bearer {key}"),)
    assert key not in repr(address)
    assert mine.address == Address(mine.url, None)
    assert mine.address.headers == ()
    key_file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        _ = find_endpoint(store).address


def test_the_stores_key_goes_to_the_stores_cluster_only(
    tmp_path: Path, mine: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CLIENT_VARIABLE, raising=False)
    settings = Settings(store_path=tmp_path)
    own, other = tmp_path / "keys", tmp_path / "other"
    key, told = add_key(own, Scope.SEARCH).secret, add_key(other, Scope.SEARCH).secret
    leave_note(settings.store, replace(mine, key_file=str(own)))
    assert address_of(settings, None, None) == Address(mine.url, key)
    assert address_of(settings, "http://elsewhere", None) == Address("http://elsewhere", None)
    assert address_of(settings, mine.url, None) == Address(mine.url, None)
    for url in (None, "http://elsewhere"):
        assert address_of(settings, url, other) == Address(url or mine.url, told)
    monkeypatch.setenv(CLIENT_VARIABLE, "e" * 40)
    assert address_of(settings, None, None) == Address(mine.url, "e" * 40)
    assert address_of(settings, "http://elsewhere", None).key == "e" * 40
    assert address_of(settings, None, other).key == told


NOTE = {"url": "http://127.0.0.1:1", "generation": 1, "pid": 1, "started": 1.0, "key_file": None}
ODD_NOTES = {
    "no JSON": "{",
    "empty": "",
    "a list": "[]",
    "a number": "7",
    "a field more": json.dumps(NOTE | {"x": 1}),
    "a field less": json.dumps({"url": "http://127.0.0.1:1"}),
    **{
        f"{name} {value!r}": json.dumps(NOTE | {name: value})
        for name, values in {
            "pid": ["1", None, True, 0, -5, 1 << 40, 1.5],
            "generation": ["1", None],
            "started": ["now", None],
            "url": [7, None, "", "ftp://127.0.0.1:1", "http://", "http://127.0.0.1", "http://[::1"],
            "key_file": [7, "a\0b"],
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("content", ODD_NOTES.values(), ids=ODD_NOTES)
def test_whatever_a_damaged_note_says_is_one_line_and_stops_nobody(
    tmp_path: Path, mine: Endpoint, content: str
) -> None:
    store = Store(tmp_path)
    (tmp_path / NOTE_NAME).write_text(content)
    with pytest.raises(CorruptFile, match=r"not a note of ours; .*writes it anew") as refused:
        find_endpoint(store)
    assert "\n" not in str(refused.value)
    assert serving_now(store) is None
    refuse_if_served(store)
    remove_note(store, mine)
    assert not (tmp_path / NOTE_NAME).exists()
    leave_note(store, mine)
    assert find_endpoint(store) == mine
