"""The lists of the store as one router sees them: read through a cache, changed, and named in
searches.

What was read is good for ``router.lists_fresh_ms`` after the moment at which the look began; then
one look at the list's folder tells whether there is a newer version. So every router goes by a
change at the latest that long after it was acknowledged, and the one that made it at once. The
store is looked at in threads: it may hang. A search that cannot know what a list holds fails.

Lives in one event loop.
"""

import asyncio
import errno
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from shardline.router.excluded import with_excluded
from shardline.router.hanging import start
from shardline.router.lists.list_cache import CachedList, ListCache
from shardline.router.lists.list_change import ListChange, changed, deleted, replaced
from shardline.router.lists.list_count import ListCount
from shardline.router.lists.list_disk import DISK, ListDisk
from shardline.router.lists.list_file import StoredList
from shardline.router.lists.list_names_page import NamesPage, names_page
from shardline.router.lists.list_store import Change, ListStore, Written
from shardline.router.query import ResolvedQuery
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import (
    CorruptFile,
    DeadlineExceeded,
    InvalidInput,
    ListsUnavailable,
    NewerFormat,
    ReadOnly,
    ShardlineError,
    StoreFull,
)
from shardline.shards.core.metrics import LIST_READS, LIST_WRITES, Recorder
from shardline.shards.core.schema import IdArray

logger = logging.getLogger(__name__)

MAX_LOOKS = 32  # threads at the store at a time, of searches and reads; each may hang with it
MAX_WRITING = 16  # the same of writes
MAX_PAGING = 2  # the same of pages of names, each of which takes long
MAX_WAITING = 1024  # looks that are under way or wait; more names at a time than are in use
# Ids of all queries together, that are put together in the event loop, in 2 ms or so
IDS_IN_LOOP = 32_768
# After which a version number does not tell whether a list is as it was: it may have been deleted,
# removed by `shardline gc`, a day later at the earliest, and made anew
FORGET_S = 3600.0
# Of lists, for all queries of a request: 16 MiB, a quarter of a frame
MAX_IDS_OF_ALL = 1 << 21
FULL = {errno.ENOSPC, errno.EDQUOT}
T = TypeVar("T")


class Lists:
    """``root`` says where the lists are; it raises ShardlineError while that is not known."""

    def __init__(
        self,
        config: RouterConfig,
        recorder: Recorder,
        root: Callable[[], Path],
        *,
        disk: ListDisk = DISK,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._recorder = recorder
        self._root = root
        self._disk = disk
        self._now = now
        self._opened: tuple[ListStore, ListCount] | None = None
        self._cache = ListCache(config.lists_cache_bytes)
        self._looks: dict[str, asyncio.Task[CachedList]] = {}
        self._looking = asyncio.Semaphore(MAX_LOOKS)
        self._writing = asyncio.Semaphore(MAX_WRITING)
        self._paging = asyncio.Semaphore(MAX_PAGING)
        # writes of one list one after the other: side by side all but one would begin anew
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def close(self) -> None:
        """Looks that hang are left behind."""
        for look in self._looks.values():
            look.cancel()
        await asyncio.gather(*self._looks.values(), return_exceptions=True)

    async def excluding(self, query: ResolvedQuery, deadline: float) -> ResolvedQuery:
        """The query without the items of the lists that it names. deadline: of the event loop.

        Raises:
            ListsUnavailable: a list could not be read in time. InvalidInput: too many ids.
        """
        found = await self._current(query.exclude_lists, deadline)
        lists = [each.ids for each in found if each.ids.size]
        if not lists:
            return query
        num_ids = sum(map(len, lists))
        ids = await _off_loop(num_ids if len(lists) > 1 else 0, _union, lists)
        self._refuse_many(len(ids), len(query.values))
        own = sum(map(len, query.excluded))
        work = own + len(ids) * len(query.values) if own else len(ids)
        excluding: ResolvedQuery = await _off_loop(work, with_excluded, query, ids)
        return excluding

    def _refuse_many(self, num_ids: int, queries: int) -> None:
        limit = self._config.max_listed_ids
        if num_ids > limit:
            raise InvalidInput(
                "too many ids in these lists together",
                field="exclude_lists",
                expected=f"<= {limit} different ids, router.max_listed_ids",
                got=str(num_ids),
                hint="name fewer lists, or filter by an attribute",
            )
        if num_ids * queries > MAX_IDS_OF_ALL:
            raise InvalidInput(
                "too many ids for all queries together",
                field="exclude_lists",
                expected=f"queries x ids in lists <= {MAX_IDS_OF_ALL}",
                got=str(num_ids * queries),
                hint="send the queries in several requests",
            )

    async def read(self, name: str, deadline: float) -> StoredList:
        """Raises ListsUnavailable: as ``excluding``."""
        return (await self._current((name,), deadline))[0]

    async def names(self, prefix: str, after: str, limit: int, deadline: float) -> NamesPage:
        """As ``names_page``. Raises ListsUnavailable."""
        store, _ = self._store()
        try:
            return await self._in_time(
                self._paging, lambda: names_page(store, prefix, after, limit), deadline
            )
        except TimeoutError as error:
            raise ListsUnavailable("the lists were not read in time") from error
        except OSError as error:
            logger.error("names of lists: %s", error)
            raise ListsUnavailable("lists cannot be read now", got=error.strerror) from error

    async def put(self, name: str, ids: IdArray, deadline: float) -> Written:
        """Replaces the list, or creates it. ids: rising, each once.

        Raises:
            InvalidInput: beyond a limit. StoreFull, ReadOnly: the store does not take it.
            ListsUnavailable: it could not be written in time; whether it was is not known.
        """
        return await self._write("put", name, replaced(ids, self._config.max_list_ids), deadline)

    async def change(self, name: str, given: ListChange, deadline: float) -> Written:
        """Adds and removes ids; a list that does not exist is taken for an empty one. Raises: as
        ``put``."""
        change = changed(given, self._config.max_list_ids)
        return await self._write("change", name, change, deadline)

    async def delete(self, name: str, deadline: float) -> Written:
        """Raises: as ``put``."""
        return await self._write("delete", name, deleted, deadline)

    async def _write(self, kind: str, name: str, change: Change, deadline: float) -> Written:
        code = "failed"
        try:
            written = await self._written(name, change, deadline)
            code = "ok"
        except ShardlineError as error:
            code = error.code
            raise
        finally:
            self._recorder.count(LIST_WRITES, kind, code)
        return written

    async def _written(self, name: str, change: Change, deadline: float) -> Written:
        store, count = self._store()
        until = self._now() + deadline - asyncio.get_running_loop().time()
        turn = self._turns.setdefault(name, asyncio.Lock())
        try:
            async with asyncio.timeout_at(deadline):
                await turn.acquire()
            try:
                written = await self._in_time(
                    self._writing,
                    lambda: store.write(name, change, until, count.make_room),
                    deadline,
                )
            finally:
                turn.release()
        except TimeoutError as error:
            raise DeadlineExceeded(
                "the list was not written in time, as far as is known", hint="repeat the request"
            ) from error
        except (OSError, CorruptFile, NewerFormat) as error:
            raise _unwritten(name, error) from error
        entry = CachedList(written.now, written.linked_after, written.linked_before)
        self._cache.put(name, entry)
        return written

    async def _current(self, names: Sequence[str], deadline: float) -> list[StoredList]:
        """As they are now, or were ``lists_fresh_ms`` ago at the most."""
        since = self._now() - self._config.lists_fresh_ms / 1000
        found: dict[str, StoredList] = {}
        missing: list[str] = []
        for name in dict.fromkeys(names):
            entry = self._cache.get(name)
            if entry is None or entry.seen_at < since:
                missing.append(name)
            else:
                found[name] = entry.stored
        if found:
            self._recorder.count(LIST_READS, "cached", by=len(found))
        while missing:  # a look that had begun too early is followed by one more
            entries = await self._looked(missing, deadline)
            fresh = {name: each.stored for name, each in entries.items() if each.seen_at >= since}
            found |= fresh
            missing = [name for name in missing if name not in fresh]
        return [found[name] for name in names]

    async def _looked(self, names: Sequence[str], deadline: float) -> dict[str, CachedList]:
        looks = {name: self._look_of(name) for name in names}
        left = max(0.0, deadline - asyncio.get_running_loop().time())
        _, late = await asyncio.wait(looks.values(), timeout=left)
        entries = {}
        for name, look in looks.items():
            if look in late:
                raise ListsUnavailable(f"the list {name} was not read in time", got="no answer")
            try:
                entries[name] = look.result()
            except (OSError, CorruptFile, NewerFormat) as error:
                raise _unread(name, error) from error
        return entries

    def _look_of(self, name: str) -> "asyncio.Task[CachedList]":
        """The look under way, or one that begins; one per list, whoever waits for it.

        Raises:
            ListsUnavailable: too many are under way, because the store does not answer, say.
        """
        look = self._looks.get(name)
        if look is None:
            if len(self._looks) >= MAX_WAITING:
                raise ListsUnavailable("too many lists are being read", got="no answer")
            look = self._looks[name] = asyncio.create_task(self._look(name))
            look.add_done_callback(lambda done: self._ended(name, done))
        return look

    def _ended(self, name: str, look: "asyncio.Task[CachedList]") -> None:
        del self._looks[name]
        if not look.cancelled():
            look.exception()  # seen: whoever waited may have given up

    async def _look(self, name: str) -> CachedList:
        store, _ = self._store()
        await self._looking.acquire()
        began, known = self._now(), self._cache.get(name)
        if known is not None and began - known.seen_at > FORGET_S:
            known = None
        # of a deleted list the folder may be gone soon, and one made anew counts from 1
        is_telling = known is not None and not known.stored.is_gone
        version = known.stored.version if known is not None and is_telling else -1
        looking = _started(self._looking, lambda: store.newest(name, version))
        await asyncio.wait([looking])
        found = looking.result()
        self._recorder.count(LIST_READS, "unchanged" if found is None else "read")
        if found is None:
            assert known is not None
            found = known.stored
        return self._cache.put(name, CachedList(found, began, began))

    async def _in_time(self, room: asyncio.Semaphore, work: Callable[[], T], deadline: float) -> T:
        """What the work returns. It keeps its place in ``room`` until it ends, even if nobody waits
        for it any more: on a store that hangs only so many threads hang.

        Raises:
            TimeoutError, and what the work raises.
        """
        async with asyncio.timeout_at(deadline):
            await room.acquire()
        working = _started(room, work)
        left = max(0.0, deadline - asyncio.get_running_loop().time())
        await asyncio.wait([working], timeout=left)
        if not working.done():
            raise TimeoutError
        return working.result()

    def _store(self) -> tuple[ListStore, ListCount]:
        """Raises ShardlineError: it is not known where the store is."""
        root = self._root()
        if self._opened is None or self._opened[0].root != root:
            count = ListCount(root, self._config.max_lists)
            self._opened = ListStore(root, self._disk, self._now), count
            self._cache = ListCache(self._config.lists_cache_bytes)
        return self._opened


def _started(room: asyncio.Semaphore, work: Callable[[], T]) -> "asyncio.Future[T]":
    """The work in a thread, which gives back its place in ``room`` when it ends.

    Raises:
        ListsUnavailable: there can be no more threads.
    """
    try:
        working = start(work, "list")
    except RuntimeError as error:
        room.release()
        raise ListsUnavailable("no thread for a look at the store", got=str(error)) from error
    working.add_done_callback(lambda _: room.release())
    return working


async def _off_loop(num_ids: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns; of many ids it runs in a thread."""
    if num_ids <= IDS_IN_LOOP:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)


def _union(lists: Sequence[IdArray]) -> IdArray:
    return lists[0] if len(lists) == 1 else np.unique(np.concatenate(lists))


def _unread(name: str, error: Exception) -> ListsUnavailable:
    logger.error("list %s: %s", name, error)
    if isinstance(error, OSError):  # without the path, which is nobody's business
        return ListsUnavailable(f"the list {name} cannot be read now", got=error.strerror)
    return ListsUnavailable(
        f"the list {name} is damaged, or of a newer program",
        hint="replace it: PUT /v1/lists/{name}; the router's log names the file",
    )


def _unwritten(name: str, error: Exception) -> ShardlineError:
    if isinstance(error, OSError):
        logger.error("list %s was not written: %s", name, error)
        kind = StoreFull if error.errno in FULL else ReadOnly
        return kind("lists cannot be written now", got=error.strerror)
    return _unread(name, error)
