"""Writers of lists as processes that are killed: what they acknowledged is there, nothing is torn,
and no change of others is lost."""

import os
import random
import signal
import time

import numpy as np
import pytest

from shardline.router.lists.list_change import ListChange, changed, deleted
from shardline.router.lists.list_disk import DISK
from shardline.router.lists.list_store import ListStore
from tests.list_disk import POINTS, WatchedDisk, killed_at, new_store

PATIENCE_S = 60.0
BEFORE = {1, 2}
REACHED = [point for point in POINTS if not point.endswith("make_folder")]


def add(root, name, number, disk=DISK):
    given = ListChange(add=np.array([number], np.int64), remove=np.array([], np.int64))
    until = time.monotonic() + PATIENCE_S
    return ListStore(root, disk).write(name, changed(given, 1000), until, lambda _: None)


def held(root, name):
    found = ListStore(root).newest(name)
    return set(found.ids.tolist()) if found.exists else set()


def in_process(work):
    """A child that runs the work and ends, whatever comes of it; its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid):
    _, status = os.waitpid(pid, 0)
    return status


@pytest.mark.parametrize("point", REACHED)
def test_a_writer_killed_at_any_point_leaves_the_list_as_before_or_after(tmp_path, point):
    root = new_store(tmp_path)
    for name, reached in (
        ("old", "rename_folder" not in point),
        ("new", "link" not in point and "remove" not in point and "sync_folder" not in point),
    ):
        if name == "old":
            for number in sorted(BEFORE):
                add(root, name, number)
        before = held(root, name)
        status = ended(in_process(lambda name=name: add(root, name, 7, killed_at(point))))
        assert os.WIFSIGNALED(status) == reached
        if not reached:
            assert os.WEXITSTATUS(status) == 0
            assert held(root, name) == before | {7}
        assert held(root, name) in (before, before | {7})
        add(root, name, 8)
        add(root, name, 9)
        assert held(root, name) - {7} == before | {8, 9}


def test_deletes_and_changes_killed_at_any_point(tmp_path):
    root = new_store(tmp_path)
    for point in REACHED:
        add(root, "a", 1)

        def delete(point=point):
            store = ListStore(root, killed_at(point))
            store.write("a", deleted, time.monotonic() + PATIENCE_S, lambda _: None)

        ended(in_process(delete))
        assert held(root, "a") in (set(), {1})


def test_writers_that_are_killed_at_random_lose_nothing_that_they_acknowledged(tmp_path):
    """Each adds numbers of its own to the same list, and says so through a pipe once it is done."""
    root, rng, writers = new_store(tmp_path), random.Random(11), 4
    acknowledged, tried = set(), set()
    for turn in range(3):
        reading, writing = os.pipe()
        pids = []
        for writer in range(writers):
            numbers = [turn * 1000 + writer * 100 + each for each in range(12)]
            tried |= set(numbers)
            # the last of them lives to its end
            point = rng.choice(REACHED) if writer < writers - 1 else "never"
            passes = rng.randrange(1, 8)

            def work(numbers=numbers, point=point, passes=passes, writing=writing):
                disk = killed_at(point, passes)
                for number in numbers:
                    add(root, "a", number, disk)
                    os.write(writing, b"%d\n" % number)

            pids.append(in_process(work))
        os.close(writing)
        with os.fdopen(reading) as answers:
            acknowledged |= {int(line) for line in answers}
        statuses = [ended(pid) for pid in pids]
        assert statuses[-1] == 0
        assert all(status in (0, signal.SIGKILL) for status in statuses)
        assert acknowledged <= held(root, "a") <= tried
    assert len(acknowledged) >= 36


def test_all_changes_of_processes_that_are_not_killed_are_there(tmp_path):
    root, writers, rounds = new_store(tmp_path), 4, 15

    def work(writer):
        for each in range(rounds):
            add(root, "a", writer * 100 + each)

    pids = [in_process(lambda writer=writer: work(writer)) for writer in range(writers)]
    assert [ended(pid) for pid in pids] == [0] * writers
    assert held(root, "a") == {w * 100 + each for w in range(writers) for each in range(rounds)}


def test_a_reader_beside_writers_sees_whole_versions_that_only_grow(tmp_path):
    root = new_store(tmp_path)

    def work():
        for each in range(60):
            add(root, "a", each)

    pid = in_process(work)
    store, sizes, version = ListStore(root), [0], -1
    while sizes[-1] < 60:
        found = store.newest("a", known=version)
        if found is not None and found.exists:
            version = found.version
            sizes.append(len(found.ids))
            assert found.ids.tolist() == list(range(len(found.ids)))
            assert len(found.ids) == version
    assert ended(pid) == 0
    assert sizes == sorted(sizes)


def test_the_kill_is_a_kill(tmp_path):
    passed = []
    disk = WatchedDisk(lambda point, count: passed.append((point, count)))
    add(new_store(tmp_path), "a", 1, disk)
    assert ("after rename_folder", 1) in passed
    status = ended(in_process(lambda: add(tmp_path / "lists", "b", 1, killed_at(passed[-1][0]))))
    assert os.WTERMSIG(status) == signal.SIGKILL
