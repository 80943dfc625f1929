"""What of lists goes from a store: nothing that is in use, whoever writes at the same moment."""

import os
import random
import threading
import time

import numpy as np
import pytest

from shardline.cluster.commands.doctor import _lists
from shardline.cluster.housekeeping.removals import Kind, Policy, removals, remove
from shardline.cluster.store import Store
from shardline.router.lists.list_change import ListChange, changed, deleted
from shardline.router.lists.list_disk import DISK
from shardline.router.lists.list_removal import (
    KEEP_S,
    deleted_lists,
    left_by_writers,
    remove_deleted,
)
from shardline.router.lists.list_store import ListStore
from shardline.shards.core.errors import CorruptFile
from tests.list_disk import POINTS, WatchedDisk, failing_at, new_store

NOW = time.time()
LONG_AGO = NOW - KEEP_S - 1


def add(root, name, *numbers, disk=DISK):
    given = ListChange(add=np.array(numbers, np.int64), remove=np.array([], np.int64))
    until = time.monotonic() + 10
    return ListStore(root, disk).write(name, changed(given, 1000), until, lambda _: None)


def delete(root, name, disk=DISK):
    ListStore(root, disk).write(name, deleted, time.monotonic() + 10, lambda _: None)


def held(root, name):
    found = ListStore(root).newest(name)
    return set(found.ids.tolist()) if found.exists else set()


def age(root, to=LONG_AGO):
    for path in root.rglob("*"):
        os.utime(path, (to, to))


@pytest.fixture
def root(tmp_path):
    root = new_store(tmp_path)
    for name in ("kept", "gone", ".hidden"):
        add(root, name, 1)
        add(root, name, 2)
    for name in ("gone", ".hidden"):
        delete(root, name)
    return root


def test_deleted_lists_go_when_they_are_old_enough(root):
    age(root, NOW - KEEP_S + 1)
    assert list(deleted_lists(root.parent, NOW)) == []
    age(root)
    found = list(deleted_lists(root.parent, NOW))
    assert {path.name for path in found} == {"gone", "%2Ehidden"}
    assert all(remove_deleted(path, NOW) for path in found)
    assert {path.name for path in root.glob("[0-9a-f][0-9a-f]/*")} == {"kept"}
    assert held(root, "kept") == {1, 2}
    assert remove_deleted(found[0], NOW)  # somebody else was faster
    add(root, "gone", 9)
    assert held(root, "gone") == {9}


def test_a_list_that_is_written_again_stays(root):
    age(root)
    (folder,) = (path for path in deleted_lists(root.parent, NOW) if path.name == "gone")
    add(root, "gone", 9)
    assert not remove_deleted(folder, NOW)
    assert held(root, "gone") == {9}


@pytest.mark.parametrize("point", [each for each in POINTS if each.split()[1] != "make_folder"])
def test_a_write_at_any_point_of_a_removal_is_kept(root, point):
    age(root)
    folder = ListStore(root).folder("gone")

    def write(passed, count):
        if (passed, count) == (point, 1):
            add(root, "gone", 9)

    remove_deleted(folder, NOW, WatchedDisk(write))
    expected = {9} if point.split()[1] in ("remove", "sync_folder", "sync_path") else set()
    assert held(root, "gone") == expected
    add(root, "gone", 10)
    assert held(root, "gone") == expected | {10}


@pytest.mark.parametrize("point", ["before link", "after link", "before write_new"])
def test_a_removal_at_any_point_of_a_write_loses_nothing(root, point):
    age(root)
    folder = ListStore(root).folder("gone")

    def collect(passed, count):
        if (passed, count) == (point, 1):
            remove_deleted(folder, NOW)

    add(root, "gone", 9, disk=WatchedDisk(collect))
    assert held(root, "gone") == {9}


@pytest.mark.parametrize("point", POINTS)
def test_a_removal_that_fails_anywhere_brings_nothing_back(root, point):
    age(root)
    folder = ListStore(root).folder("gone")
    try:
        remove_deleted(folder, NOW, failing_at(point))
    except OSError:
        assert held(root, "gone") == set()
    add(root, "gone", 9)
    assert held(root, "gone") == {9}


def test_removals_beside_writers_lose_no_acknowledged_change(root):
    failures, stop = [], threading.Event()

    def collect():
        while not stop.is_set():
            for folder in deleted_lists(root.parent, time.time() + 2 * KEEP_S):
                remove_deleted(folder, time.time() + 2 * KEEP_S)

    def write(name):
        rng = random.Random(name)
        for number in range(25):
            add(root, name, number)
            if number not in held(root, name):
                failures.append((name, number))
            if rng.random() < 0.7:
                delete(root, name)
                if held(root, name):
                    failures.append((name, "deleted"))

    threads = [threading.Thread(target=write, args=(f"l{n}",)) for n in range(3)]
    collector = threading.Thread(target=collect)
    for thread in (*threads, collector):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    collector.join()
    assert failures == []


def test_what_killed_writers_have_left_goes_when_it_is_old_enough(root):
    store = ListStore(root)
    old = store.folder("kept") / "000000000001.ids"
    add(root, "kept", 3)
    assert not old.exists()
    old.write_bytes(b"left")
    (root / "tmp" / "file").write_bytes(b"half")
    (root / "tmp" / "folder").mkdir()
    assert list(left_by_writers(root.parent, NOW)) == []
    age(root)
    found = set(left_by_writers(root.parent, NOW))
    assert found == {old, root / "tmp" / "file", root / "tmp" / "folder"}


def test_gc_removes_them_and_nothing_else(root):
    (root / "tmp" / "folder").mkdir()
    age(root, time.time() - 2 * KEEP_S)
    store = Store(root.parent)
    policy = Policy(live=None, held=(), keep=2, keep_log_bytes=0)
    found = removals(store, policy)
    assert sorted(each.kind for each in found) == [
        *(Kind.LIST, Kind.LIST),
        *(Kind.UNFINISHED, Kind.UNFINISHED),  # the second one is the generation, which is none
    ]
    assert all(remove(store, each, lambda: ()) for each in found)
    assert removals(store, policy) == []
    assert {path.name for path in root.rglob("*") if path.is_file()} == {
        "000000000001.ids",
        "000000000002.ids",
    }
    assert held(root, "kept") == {1, 2}


def test_a_store_without_lists_has_nothing_to_remove(tmp_path):
    new_store(tmp_path)
    assert list(deleted_lists(tmp_path, NOW)) == list(left_by_writers(tmp_path, NOW)) == []


def test_doctor_reads_every_list(root):
    assert _lists(Store(root.parent)) == "1 lists, every checksum right"
    path = ListStore(root).folder("kept") / "000000000002.ids"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFile, match="kept"):
        _lists(Store(root.parent))
