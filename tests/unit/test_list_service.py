"""The lists of a store as routers see them: fresh, cached, bounded; stores that hang or fail."""

import asyncio
import errno
import threading
from threading import get_ident

import numpy as np
import pytest

from shardline.router.limits import resolve
from shardline.router.list_names import MAX_EXCLUDE_LISTS
from shardline.router.lists import list_service as service_module
from shardline.router.lists.list_cache import ENTRY_BYTES, CachedList, ListCache
from shardline.router.lists.list_change import ListChange, changed
from shardline.router.lists.list_disk import ListDisk
from shardline.router.lists.list_file import StoredList
from shardline.router.lists.list_service import FORGET_S, MAX_IDS_OF_ALL, MAX_LOOKS, Lists
from shardline.router.lists.list_store import ListStore
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import (
    DeadlineExceeded,
    InvalidInput,
    ListsUnavailable,
    ReadOnly,
    StoreFull,
    Unavailable,
)
from shardline.shards.core.metrics import LIST_READS, LIST_WRITES, Recorder
from tests.list_disk import WatchedDisk, failing_at, new_store

FRESH_S = 0.1


class Router:
    """One router's lists, with a clock that stands."""

    def __init__(self, root, *, config=RouterConfig(), disk=None):
        self.clock = [100.0]
        self.recorder = Recorder()
        now = lambda: self.clock[0]  # noqa: E731
        self.lists = Lists(config, self.recorder, lambda: root, disk=disk or ListDisk(), now=now)

    @property
    def until(self):
        return asyncio.get_running_loop().time() + 10

    async def put(self, name, *numbers):
        return await self.lists.put(name, np.array(numbers, np.int64), self.until)

    async def add(self, name, *numbers):
        given = ListChange(add=np.array(numbers, np.int64), remove=np.array([], np.int64))
        return await self.lists.change(name, given, self.until)

    async def ids(self, name):
        return (await self.lists.read(name, self.until)).ids.tolist()

    async def excluded(self, *names, queries=1, config=RouterConfig()):
        query = resolve(config, item_ids=list(range(queries)), exclude_lists=names)
        found = (await self.lists.excluding(query, self.until)).excluded
        return [ids.tolist() for ids in found]

    def reads(self):
        samples = [each for each in self.recorder.drain() if each.metric is LIST_READS]
        return {each.labels[0]: each.value for each in samples}


async def test_a_change_of_another_router_is_seen_after_its_time_and_not_before(tmp_path):
    root = new_store(tmp_path)
    one, other = Router(root), Router(root)
    await one.put("a", 1)
    assert await other.ids("a") == [1]
    await one.add("a", 2)
    assert await one.ids("a") == [1, 2]
    other.clock[0] += FRESH_S * 0.99
    assert await other.ids("a") == [1]
    other.clock[0] += FRESH_S * 0.02
    assert await other.ids("a") == [1, 2]
    await one.lists.delete("a", one.until)
    other.clock[0] += 2 * FRESH_S
    assert await other.ids("a") == []


async def test_that_a_list_does_not_exist_is_remembered_as_long(tmp_path):
    root = new_store(tmp_path)
    one, other = Router(root), Router(root)
    assert await other.ids("a") == []
    await one.put("a", 1)
    assert await other.ids("a") == []
    other.clock[0] += 2 * FRESH_S
    assert await other.ids("a") == [1]


async def test_without_time_to_be_fresh_every_read_looks(tmp_path):
    root = new_store(tmp_path)
    one, other = Router(root), Router(root, config=RouterConfig(lists_fresh_ms=0))
    for number in range(3):
        await one.put("a", number)
        assert await other.ids("a") == [number]
        other.clock[0] += 1e-6


async def test_what_is_counted(tmp_path):
    router = Router(new_store(tmp_path))
    await router.ids("a")
    await router.put("a", 1)
    await router.ids("a")
    router.clock[0] += 2 * FRESH_S
    await router.ids("a")
    await Router(tmp_path / "lists").put("a", 2)
    router.clock[0] += 2 * FRESH_S
    await router.ids("a")
    with pytest.raises(InvalidInput):
        await router.put("a", *range(10_001))
    samples = list(router.recorder.drain())
    reads = {each.labels: each.value for each in samples if each.metric is LIST_READS}
    assert reads == {("read",): 2, ("cached",): 1, ("unchanged",): 1}
    writes = {each.labels: each.value for each in samples if each.metric is LIST_WRITES}
    assert writes == {("put", "ok"): 1, ("put", "invalid_input"): 1}


async def test_a_search_leaves_out_what_is_in_any_of_its_lists(tmp_path):
    router = Router(new_store(tmp_path))
    await router.put("blocked", 1, 5)
    await router.put("seen:17", 5, 9)
    assert await router.excluded("blocked") == [[1, 5]]
    assert await router.excluded("seen:17", "blocked", "blocked", queries=3) == [[1, 5, 9]] * 3
    assert await router.excluded("nobody") == []
    assert await router.excluded("nobody", "blocked") == [[1, 5]]


async def test_too_many_ids_of_all_lists_are_refused(tmp_path):
    config = RouterConfig(max_listed_ids=4)
    router = Router(new_store(tmp_path), config=config)
    await router.put("a", 1, 2, 3)
    await router.put("b", 3, 4)
    await router.put("c", 5)
    assert await router.excluded("a", "b") == [[1, 2, 3, 4]]
    with pytest.raises(InvalidInput) as caught:
        await router.excluded("a", "b", "c")
    assert (caught.value.field, caught.value.got) == ("exclude_lists", "5")
    assert MAX_EXCLUDE_LISTS == 16


async def test_many_that_ask_for_a_list_look_once(tmp_path, monkeypatch):
    router = Router(new_store(tmp_path))
    await Router(tmp_path / "lists").put("a", 1)
    looks, go = [], threading.Event()
    newest = ListStore.newest

    def slow(self, name, known=-1):
        looks.append(name)
        go.wait(10)
        return newest(self, name, known)

    monkeypatch.setattr(ListStore, "newest", slow)
    asked = [asyncio.create_task(router.ids("a")) for _ in range(50)]
    while not looks:
        await asyncio.sleep(0)
    go.set()
    assert await asyncio.gather(*asked) == [[1]] * 50
    assert looks == ["a"]


async def test_a_look_that_began_before_a_write_does_not_undo_it(tmp_path, monkeypatch):
    router = Router(new_store(tmp_path))
    await router.put("a", 1)
    router.clock[0] += 2 * FRESH_S
    began, go = threading.Event(), threading.Event()
    newest = ListStore.newest

    def slow(self, name, known=-1):
        found = newest(self, name, known)
        began.set()
        go.wait(10)
        return found

    monkeypatch.setattr(ListStore, "newest", slow)
    asked = asyncio.create_task(router.ids("a"))
    while not began.is_set():
        await asyncio.sleep(0)
    router.clock[0] += FRESH_S / 2
    await router.put("a", 2)
    go.set()
    await asked
    assert await router.ids("a") == [2]


async def test_a_look_that_is_too_old_for_who_waits_is_followed_by_another(tmp_path, monkeypatch):
    router, looks = Router(new_store(tmp_path)), []
    newest = ListStore.newest

    def slow(self, name, known=-1):
        looks.append(router.clock[0])
        found = newest(self, name, known)
        if len(looks) == 1:
            router.clock[0] += 2 * FRESH_S  # so long did this one take
        return found

    monkeypatch.setattr(ListStore, "newest", slow)
    first = asyncio.create_task(router.ids("a"))
    while not looks or router.clock[0] == 100.0:
        await asyncio.sleep(0)
    assert await router.ids("a") == []
    await first
    assert looks == [100.0, 100.0 + 2 * FRESH_S]


async def test_a_list_made_anew_after_a_long_time_is_not_taken_for_the_old_one(tmp_path):
    root = new_store(tmp_path)
    router = Router(root)
    await Router(root).put("a", 1)
    assert await router.ids("a") == [1]
    folder = ListStore(root).folder("a")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    await Router(root).put("a", 2)  # version 1 again
    router.clock[0] += FORGET_S + 1
    assert await router.ids("a") == [2]


async def test_a_list_made_anew_is_not_taken_for_the_deleted_one(tmp_path):
    root = new_store(tmp_path)
    router = Router(root)
    await Router(root).put("a", 1)
    await Router(root).lists.delete("a", router.until)
    assert await router.ids("a") == []
    folder = ListStore(root).folder("a")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    await Router(root).put("a", 1)
    await Router(root).add("a", 2)  # version 2, as the one that said that it was deleted
    router.clock[0] += 2 * FRESH_S
    assert await router.ids("a") == [1, 2]


async def test_a_write_that_changes_nothing_knows_no_more_than_its_look(tmp_path, monkeypatch):
    root = new_store(tmp_path)
    router = Router(root)
    await Router(root).put("a", 1)
    before = ListStore._newest_before

    def overtaken(self, *arguments):
        found = before(self, *arguments)
        monkeypatch.setattr(ListStore, "_newest_before", before)
        given = ListChange(add=np.array([2], np.int64), remove=np.array([], np.int64))
        ListStore(root).write("a", changed(given, 10), 1e12, lambda _: None)
        router.clock[0] += 2 * FRESH_S
        return found

    monkeypatch.setattr(ListStore, "_newest_before", overtaken)
    await router.put("a", 1)
    assert await router.ids("a") == [1, 2]


async def test_ids_of_all_queries_together_are_bounded_before_any_work(tmp_path, monkeypatch):
    config = RouterConfig(max_batch=4096)
    router = Router(new_store(tmp_path), config=config)
    await router.put("a", *range(5000))
    monkeypatch.setattr(service_module, "with_excluded", lambda *_: pytest.fail("too much work"))
    with pytest.raises(InvalidInput) as caught:
        await router.excluded("a", queries=1024, config=config)
    assert caught.value.got == str(1024 * 5000)
    assert MAX_IDS_OF_ALL < 1024 * 5000


async def test_lists_of_many_ids_are_joined_outside_the_event_loop(tmp_path, monkeypatch):
    router, config = Router(new_store(tmp_path)), RouterConfig()
    for name in "abcd":
        await router.put(name, *range(9000))
    threads = []
    union = service_module._union
    monkeypatch.setattr(
        service_module, "_union", lambda lists: threads.append(get_ident()) or union(lists)
    )
    assert len((await router.excluded(*"abcd", config=config))[0]) == 9000
    await router.excluded("a", "b", config=config)
    assert [thread == get_ident() for thread in threads] == [False, True]


async def test_pages_of_names_that_hang_leave_searches_alone(tmp_path, monkeypatch):
    router, go = Router(new_store(tmp_path)), threading.Event()
    monkeypatch.setattr(service_module, "names_page", lambda *_: go.wait(30))
    soon = asyncio.get_running_loop().time() + 0.05
    asked = [router.lists.names("", "", 10, soon) for _ in range(MAX_LOOKS + 5)]
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(each) for each in found} == {ListsUnavailable}
    assert await router.ids("a") == []
    go.set()


async def test_looks_that_nobody_waits_for_do_not_pile_up(tmp_path, monkeypatch):
    router, go = Router(new_store(tmp_path)), threading.Event()

    def hang(self, name, known=-1):
        go.wait(30)
        return StoredList()

    monkeypatch.setattr(ListStore, "newest", hang)
    monkeypatch.setattr(service_module, "MAX_WAITING", 50)
    for turn in range(10):
        soon = asyncio.get_running_loop().time() + 0.01
        asked = [router.lists.read(f"l{turn}-{n}", soon) for n in range(20)]
        await asyncio.gather(*asked, return_exceptions=True)
    assert len(router.lists._looks) == 50
    go.set()
    await router.lists.close()


async def test_without_a_thread_a_read_fails_and_keeps_no_room(tmp_path, monkeypatch):
    router = Router(new_store(tmp_path))

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(service_module, "start", refuse)
        for number in range(2 * MAX_LOOKS):
            with pytest.raises(ListsUnavailable):
                await router.ids(f"l{number}")
    assert await router.ids("a") == []


async def test_a_store_that_hangs_fails_searches_in_time_and_takes_so_many_threads(
    tmp_path, monkeypatch
):
    router, go, hanging = Router(new_store(tmp_path)), threading.Event(), []

    def hang(self, name, known=-1):
        hanging.append(name)
        go.wait(30)
        return StoredList()

    monkeypatch.setattr(ListStore, "newest", hang)
    soon = asyncio.get_running_loop().time() + 0.05
    asked = [router.lists.read(f"l{n}", soon) for n in range(MAX_LOOKS + 20)]
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(each) for each in found} == {ListsUnavailable}
    assert len(hanging) == MAX_LOOKS
    go.set()
    assert await router.ids("l1") == []
    await router.lists.close()


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EIO, ReadOnly),
        (errno.EROFS, ReadOnly),
    ],
)
async def test_a_disk_that_takes_nothing_is_an_error_without_its_path(tmp_path, number, kind):
    root = new_store(tmp_path)
    await Router(root).put("a", 1)
    router = Router(root, disk=failing_at("before write_new", number))
    with pytest.raises(kind) as caught:
        await router.add("a", 2)
    assert type(caught.value) is kind
    assert "secret" not in str(caught.value)
    assert await router.ids("a") == [1]
    assert [each.labels for each in router.recorder.drain() if each.metric is LIST_WRITES] == [
        ("change", kind.code)
    ]


async def test_a_list_that_cannot_be_read_fails_the_search_that_names_it(tmp_path):
    root = new_store(tmp_path)
    router = Router(root)
    await router.put("good", 1)
    await Router(root).put("bad", 2)
    path = ListStore(root).folder("bad") / "000000000001.ids"
    path.write_bytes(b"nonsense")
    with pytest.raises(ListsUnavailable) as caught:
        await router.excluded("good", "bad")
    assert "bad" in caught.value.message
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(ListsUnavailable):
        await router.add("bad", 3)
    await router.put("bad", 4)
    assert await router.excluded("good", "bad") == [[1, 4]]


async def test_a_store_that_is_not_there_fails_searches(tmp_path):
    router = Router(tmp_path / "gone" / "lists")
    with pytest.raises(ListsUnavailable):
        await router.excluded("a")
    with pytest.raises(ListsUnavailable):
        await router.lists.names("", "", 10, router.until)
    with pytest.raises(ReadOnly):
        await router.put("a", 1)


async def test_where_the_store_is_may_not_be_known_yet():
    def unknown():
        raise Unavailable("no routing table yet")

    lists = Lists(RouterConfig(), Recorder(), unknown)
    with pytest.raises(Unavailable):
        await lists.read("a", asyncio.get_running_loop().time() + 1)


async def test_a_write_that_takes_too_long_is_said_to_be_unknown(tmp_path):
    go = threading.Event()
    disk = WatchedDisk(lambda point, _: go.wait(30) if point == "before link" else None)
    root = new_store(tmp_path)
    await Router(root).put("a", 1)
    router = Router(root, disk=disk)
    soon = asyncio.get_running_loop().time() + 0.05
    with pytest.raises(DeadlineExceeded):
        await router.lists.put("a", np.array([2], np.int64), soon)
    go.set()
    while await Router(root).ids("a") != [2]:
        await asyncio.sleep(0)


async def test_writes_of_one_list_by_one_router_all_count(tmp_path):
    router = Router(new_store(tmp_path))
    written = await asyncio.gather(*(router.add("a", number) for number in range(40)))
    assert await router.ids("a") == list(range(40))
    assert sorted(each.now.version for each in written) == list(range(1, 41))


def test_the_cache_keeps_what_was_used_last_within_its_bytes():
    def entry(order, size=10):
        return CachedList(StoredList(version=1, ids=np.arange(size)), order, order)

    cache = ListCache(3 * (ENTRY_BYTES + 80))
    for name in "abc":
        cache.put(name, entry(1))
    cache.get("a")
    cache.put("d", entry(1))
    assert [name for name in "abcd" if cache.get(name)] == ["a", "c", "d"]
    assert cache.put("a", entry(0, 5)) is cache.get("a")
    assert len(cache.get("a").stored.ids) == 10  # an older one replaces nothing
    cache.put("a", entry(2, 5))
    assert cache.bytes == 3 * ENTRY_BYTES + 2 * 80 + 40
    cache.put("huge", entry(1, 1000))
    assert (cache.get("huge"), cache.bytes) == (None, 0)
