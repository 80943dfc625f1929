"""The lists of a store: versions, changes of many writers, disks that fail."""

import errno
import os
import random
import threading
import time

import numpy as np
import pytest

from shardline.router.lists.list_change import ListChange, changed, deleted, replaced
from shardline.router.lists.list_count import RECOUNT_S, ListCount
from shardline.router.lists.list_disk import ListDisk
from shardline.router.lists.list_file import ABSENT, StoredList, encode_list
from shardline.router.lists.list_names_page import MAX_LISTED, check_position, names_page
from shardline.router.lists.list_paths import bucket_of, lists_folder, versions_in
from shardline.router.lists.list_store import ListStore
from shardline.shards.core.errors import (
    CorruptFile,
    InvalidInput,
    ListsUnavailable,
    ShardlineError,
    Unavailable,
)
from tests.list_disk import POINTS, WatchedDisk, failing_at, new_store

LIMIT = 100


def ids(*numbers):
    return np.array(sorted(numbers), np.int64)


def put(store, name, *numbers, until=None, make_room=lambda _: None):
    until = time.monotonic() + 10 if until is None else until
    return store.write(name, replaced(ids(*numbers), LIMIT), until, make_room)


def change(store, name, add=(), remove=(), make_room=lambda _: None):
    given = ListChange(add=ids(*add), remove=ids(*remove))
    return store.write(name, changed(given, LIMIT), time.monotonic() + 10, make_room)


def delete(store, name):
    return store.write(name, deleted, time.monotonic() + 10, lambda _: None)


@pytest.fixture
def root(tmp_path):
    return new_store(tmp_path)


def held(root, name):
    """What a process that starts now finds."""
    found = ListStore(root).newest(name)
    return set(found.ids.tolist()) if found.exists else None


def files(root):
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_a_list_is_created_changed_read_and_deleted(root):
    store = ListStore(root)
    assert store.newest("a") is ABSENT
    written = put(store, "a", 3, 1)
    assert (written.before.exists, written.now.version) == (False, 1)
    assert store.newest("a").ids.tolist() == [1, 3]
    assert change(store, "a", add=[2], remove=[3, 9]).now.ids.tolist() == [1, 2]
    assert store.newest("a", known=2) is None
    assert store.newest("a", known=1).version == 2
    gone = delete(store, "a")
    assert (gone.before.exists, gone.now.exists) == (True, False)
    assert not delete(store, "a").before.exists
    assert held(root, "a") is None
    assert put(store, "a").now.version == 4
    assert held(root, "a") == set()


def test_what_changes_nothing_makes_no_version(root):
    store = ListStore(root)
    assert change(store, "a", remove=[1]).now is ABSENT
    assert delete(store, "a").now is ABSENT
    put(store, "a", 1, 2)
    assert put(store, "a", 1, 2).now.version == 1
    assert change(store, "a", add=[2], remove=[9]).now.version == 1


def test_lists_are_told_apart_and_each_keeps_two_versions(root):
    store = ListStore(root)
    for name in ("a", ".a", "..a", "%2Ea".replace("%", "_"), "A"):
        for number in range(5):
            put(store, name, number)
        folder = store.folder(name)
        assert versions_in(path.name for path in folder.iterdir()) == [4, 5]
        assert held(root, name) == {4}
    assert not list((root / "tmp").iterdir())


def test_any_sequence_of_changes_is_as_with_a_dict(root):
    rng, model, store = random.Random(5), {}, ListStore(root)
    names = ["a", "b", "seen:1"]
    for _ in range(400):
        name = rng.choice(names)
        some = [rng.randrange(30) for _ in range(rng.randrange(6))]
        kind = rng.randrange(10)
        before = model.get(name)
        if kind < 3:
            written, model[name] = put(store, name, *set(some)), set(some)
        elif kind < 8:
            add, remove = set(some[::2]), set(some[1::2]) - set(some[::2])
            written = change(store, name, add=add, remove=remove)
            if before is not None or add:
                model[name] = (before or set()) - remove | add
        else:
            written = delete(store, name)
            model.pop(name, None)
        assert written.before.exists == (before is not None)
        assert written.now.exists == (name in model)
        assert held(root, name) == model.get(name)


def test_no_change_of_writers_at_the_same_time_is_lost(root):
    writers, rounds, failures = 6, 12, []

    def write(number):
        store = ListStore(root)
        try:
            for turn in range(rounds):
                change(store, "a", add=[number * rounds + turn])
        except (OSError, ShardlineError) as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert held(root, "a") == set(range(writers * rounds))
    assert ListStore(root).newest("a").version == writers * rounds


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_changes_nothing_before_the_change_can_be_seen(root, point, number):
    put(ListStore(root), "a", 1)
    put(ListStore(root), "a", 1, 2)
    shown = (
        "after link",
        "before sync_folder",
        "after sync_folder",
        "before sync_path",
        "after sync_path",
    )
    for name, call in (("a", "link"), ("new", "rename_folder")):
        before = held(root, name)
        try:
            written = change(ListStore(root, failing_at(point, number)), name, add=[7])
        except OSError as error:
            assert error.errno == number
            allowed = (
                [before]
                if point not in (*shown, f"after {call}")
                else [before, (before or set()) | {7}]
            )
            assert held(root, name) in allowed
        else:
            assert written.now.ids.tolist() == sorted((before or set()) | {7})
        assert list((root / "tmp").glob("*")) == []
        # and the next one makes it
        change(ListStore(root), name, add=[7])
        assert held(root, name) == (before or set()) | {7}


def test_a_writer_whose_folder_was_removed_meanwhile_looks_again(root):
    """What `shardline gc` does to a list that was deleted, between a writer's look and its link."""
    put(ListStore(root), "a", 1)
    delete(ListStore(root), "a")
    folder = ListStore(root).folder("a")

    def collect(point, count):
        if (point, count) == ("before link", 1):
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
            put(ListStore(root), "a", 5)  # in a new folder, as version 1

    change(ListStore(root, WatchedDisk(collect)), "a", add=[7])
    assert held(root, "a") == {5, 7}


def test_a_folder_without_a_version_is_replaced_and_its_late_writer_looks_again(root):
    put(ListStore(root), "a", 1)
    delete(ListStore(root), "a")
    folder = ListStore(root).folder("a")

    def empty(point, count):
        if (point, count) == ("before link", 1):
            for path in folder.iterdir():
                path.unlink()
            change(ListStore(root), "a", add=[5])

    change(ListStore(root, WatchedDisk(empty)), "a", add=[7])
    assert held(root, "a") == {5, 7}


def test_two_that_create_a_list_at_the_same_time_both_count(root):
    def create(point, count):
        if (point, count) == ("before rename_folder", 1):
            change(ListStore(root), "a", add=[5])

    written = change(ListStore(root, WatchedDisk(create)), "a", add=[7])
    assert (held(root, "a"), written.now.version) == ({5, 7}, 2)


def test_a_writer_that_lists_old_files_goes_by_the_name_that_was_taken(root, monkeypatch):
    """As on NFS, which may list a folder as it was a second ago."""
    store = ListStore(root)
    put(store, "a", 1)
    stale = [path.name for path in store.folder("a").iterdir()]
    change(ListStore(root), "a", add=[2])
    monkeypatch.setattr(os, "listdir", lambda _: stale)
    assert change(store, "a", add=[3]).now.version == 3
    monkeypatch.undo()
    assert held(root, "a") == {1, 2, 3}


def test_a_link_that_comes_so_late_that_its_name_is_free_again_is_no_version(root):
    store = ListStore(root)
    put(store, "a", 1)

    def overtake(point, count):
        if (point, count) == ("before link", 1):
            for number in (2, 3, 4):
                change(ListStore(root), "a", add=[number])
            assert not (store.folder("a") / "000000000002.ids").exists()

    written = change(ListStore(root, WatchedDisk(overtake)), "a", add=[7])
    assert (held(root, "a"), written.now.version) == ({1, 2, 3, 4, 7}, 5)


def test_another_late_link_does_not_pass_for_the_version_that_was_seen(root):
    store = ListStore(root)
    put(store, "a", 1)
    change(store, "a", add=[2])

    def overtake(point, count):
        if (point, count) == ("before link", 1):
            for number in (3, 4, 5):
                change(ListStore(root), "a", add=[number])
            seen = store.folder("a") / "000000000002.ids"
            assert not seen.exists()
            late = StoredList(version=2, ids=ids(1, 99))
            seen.write_bytes(encode_list("a", late))

    written = change(ListStore(root, WatchedDisk(overtake)), "a", add=[7])
    assert (held(root, "a"), written.now.version) == ({1, 2, 3, 4, 5, 7}, 6)


def test_a_writer_that_is_always_late_gives_up(root):
    put(ListStore(root), "a", 1)
    others = iter(range(100, 200))

    def overtake(point, _count):
        if point == "before link":
            change(ListStore(root), "a", add=[next(others)])

    with pytest.raises(Unavailable):
        put(ListStore(root, WatchedDisk(overtake)), "a", 7, until=time.monotonic() + 0.05)
    assert 7 not in held(root, "a")


def test_a_damaged_version_is_refused_and_can_be_replaced(root):
    store = ListStore(root)
    put(store, "a", 1)
    change(store, "a", add=[2])
    path = store.folder("a") / "000000000002.ids"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFile):
        store.newest("a")
    with pytest.raises(CorruptFile):
        change(store, "a", add=[3])
    written = put(store, "a", 4)
    assert (written.before.exists, written.now.version, held(root, "a")) == (True, 3, {4})


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused(root, make):
    store = ListStore(root)
    put(store, "a", 1)
    make(store.folder("a") / "000000000002.ids")
    with pytest.raises(CorruptFile):
        store.newest("a")


def test_a_folder_with_files_of_others_is_an_error_and_no_endless_loop(root):
    store = ListStore(root)
    folder = store.folder("a")
    folder.mkdir(parents=True)
    (folder / "README").write_text("not ours")
    assert not store.newest("a").exists
    with pytest.raises(OSError, match="none of a list's"):
        put(store, "a", 1)
    (folder / "README").unlink()
    put(store, "a", 1)
    assert held(root, "a") == {1}


def test_no_name_becomes_free_while_an_older_one_is_taken(root, monkeypatch):
    put(ListStore(root), "a", 1)
    change(ListStore(root), "a", add=[2])
    disk = failing_at("before remove", errno.EIO)
    for number in (3, 4, 5):
        change(ListStore(root, disk), "a", add=[number])
    names = {path.name for path in ListStore(root).folder("a").iterdir()}
    assert versions_in(names) == [1, 2, 3, 4, 5]
    change(ListStore(root), "a", add=[6])
    names = {path.name for path in ListStore(root).folder("a").iterdir()}
    assert versions_in(names) == [5, 6]


def test_a_list_of_a_newer_program_is_among_the_names(root):
    store = ListStore(root)
    put(store, "a", 1)
    path = store.folder("a") / "000000000001.ids"
    content = bytearray(path.read_bytes())
    content[8] = 2  # its format version
    path.write_bytes(content)
    assert names_page(store, "", "", 10).names == ["a"]


def test_a_store_that_is_not_there_is_not_one_without_lists(tmp_path):
    (tmp_path / "mount").mkdir()
    store = ListStore(tmp_path / "mount" / "lists")
    for ask in (
        lambda: store.newest("a"),
        lambda: put(store, "a", 1),
        lambda: names_page(store, "", "", 10),
    ):
        with pytest.raises(FileNotFoundError):
            ask()
    assert list((tmp_path / "mount").iterdir()) == []


def test_where_lists_are_follows_from_a_generation(tmp_path):
    assert lists_folder("/s/generations/000001").as_posix() == "/s/lists"
    with pytest.raises(ListsUnavailable):
        lists_folder("nowhere")


def test_too_many_ids_are_refused_and_a_list_that_is_too_long_may_shrink(root):
    store = ListStore(root)
    with pytest.raises(InvalidInput):
        put(store, "a", *range(LIMIT + 1))
    put(store, "a", *range(LIMIT))
    with pytest.raises(InvalidInput) as caught:
        change(store, "a", add=[LIMIT])
    assert (caught.value.field, caught.value.got) == ("add", str(LIMIT + 1))
    assert held(root, "a") == set(range(LIMIT))
    given = ListChange(add=ids(), remove=ids(0))
    written = store.write("a", changed(given, 10), time.monotonic() + 10, lambda _: None)
    assert len(written.now.ids) == LIMIT - 1


def test_no_more_lists_are_created_than_there_may_be(root):
    clock = [0.0]
    store, count = ListStore(root), ListCount(root, 20, lambda: clock[0])
    for number in range(20):
        put(store, f"l{number}", 1, make_room=count.make_room)
    with pytest.raises(InvalidInput) as caught:
        put(store, "one-more", 1, make_room=count.make_room)
    assert "max_lists" in caught.value.expected
    put(store, "l3", 1, 2, make_room=count.make_room)  # one that is there can be changed
    for path in store.folder("l7").iterdir():
        path.unlink()
    store.folder("l7").rmdir()
    with pytest.raises(InvalidInput):
        put(store, "one-more", 1, make_room=count.make_room)
    clock[0] += RECOUNT_S
    put(store, "one-more", 1, make_room=count.make_room)


def test_lists_of_others_are_counted_bucket_by_bucket(root):
    mine, count = ListStore(root), ListCount(root, 6)
    put(mine, "a", 1, make_room=count.make_room)
    same = [name for n in range(10_000) if bucket_of(name := f"x{n}") == bucket_of("a")]
    for name in same[:5]:
        put(ListStore(root), name, 1)
    with pytest.raises(InvalidInput):
        put(mine, same[5], 1, make_room=count.make_room)


def test_names_come_page_by_page_each_once(root):
    store = ListStore(root)
    names = {f"seen:{number}" for number in range(60)} | {"blocked", ".hidden"}
    for name in names:
        put(store, name, 1)
    delete(store, "seen:7")
    for prefix in ("", "seen:", "seen:1", "no"):
        for limit in (1, 7, 1000):
            found, after = [], ""
            while after is not None:
                page = names_page(store, prefix, check_position(after), limit)
                assert len(page.names) <= limit
                found += page.names
                after = page.next
            assert len(set(found)) == len(found)
            assert set(found) == {n for n in names if n.startswith(prefix)} - {"seen:7"}


def test_a_page_looks_at_so_many_names_and_no_more(root, monkeypatch):
    monkeypatch.setattr("shardline.router.lists.list_names_page.MAX_LISTED", 10)
    assert MAX_LISTED > 10
    store = ListStore(root)
    for number in range(40):
        put(store, f"seen:{number}", 1)
    pages, after, found = 0, "", []
    while after is not None:
        page = names_page(store, "seen:39", check_position(after), 1000)
        pages, after, found = pages + 1, page.next, found + page.names
    assert found == ["seen:39"]
    assert pages > 2


@pytest.mark.parametrize("position", ["x", "zz/", "00", "00/a/b", "00/..", "000/a"])
def test_what_is_no_position_is_refused(position):
    with pytest.raises(InvalidInput):
        check_position(position)


def test_the_disk_of_tests_has_every_call(root):
    own = {name for name in vars(ListDisk) if not name.startswith("_")}
    assert {point.split()[1] for point in POINTS} == own
