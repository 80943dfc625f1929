"""The note that says where a store is served."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.endpoint import (
    NOTE_NAME,
    Endpoint,
    find_endpoint,
    is_alive,
    leave_note,
    refuse_if_served,
    remove_note,
)
from cluster.store import Store
from shards.errors import CorruptFile, NotFound, Unavailable


@pytest.fixture
def mine() -> Endpoint:
    """A cluster that this test process serves."""
    started = psutil.Process().create_time()
    return Endpoint(url="http://127.0.0.1:1", generation=1, pid=os.getpid(), started=started)


def test_a_note_is_found_and_refuses_a_second_cluster(tmp_path: Path, mine: Endpoint) -> None:
    store = Store(tmp_path)
    refuse_if_served(store)
    leave_note(store, mine)
    assert find_endpoint(store) == mine
    with pytest.raises(Unavailable, match="served at http://127"):
        refuse_if_served(store)
    remove_note(store, mine)
    with pytest.raises(NotFound, match="no cluster is serving"):
        find_endpoint(store)


def test_a_reused_pid_is_not_the_cluster(tmp_path: Path, mine: Endpoint) -> None:
    store = Store(tmp_path)
    leave_note(store, replace(mine, started=mine.started - 1000))
    refuse_if_served(store)
    with pytest.raises(NotFound, match="is gone"):
        find_endpoint(store)


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
