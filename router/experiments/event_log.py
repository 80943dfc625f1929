"""Events of one router on their way to the store: what waits is written as one file, durably.

As with a shard's log, what has come together shares one fsync: an event that comes while nothing
is written goes out at once, and the next file holds all that came meanwhile, GAP_S after the last
one began: callers wait no longer, because their requests take room from searches in HAProxy. Small
files are merged. Callers' events are acknowledged when their file is durable; the router's own are
not waited for, and may be lost with the process.
"""

import asyncio
import errno
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shardline.router.experiments.stored_event import Event
from shardline.router.hanging import start
from shardline.shards.core.errors import (
    CorruptFile,
    DeadlineExceeded,
    NotFound,
    Overloaded,
    ReadOnly,
    StoreFull,
    Unavailable,
)
from shardline.shards.core.files import HOST
from shardline.shards.core.metrics import EVENTS, Recorder

logger = logging.getLogger(__name__)

GAP_S = 0.05  # between the beginnings of two files
OWN_GAPS = 20  # so many of them, where nobody waits
MAX_WAITING = 100_000  # events; more are refused, own ones dropped
MAX_WAITING_BYTES = 32 << 20  # of the requests that brought them
COMPLAIN_S = 60.0  # between two lines of log on events that were not stored
CLOSE_S = 5.0  # for what waits to be written when the router stops
MEASURE_S = 60.0  # how often the size of all events of the store is looked at
ROOM = 2  # of the configured size: beyond it nothing is stored, until gc has made room
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
RUN_BYTES = 4
STORED, DROPPED = "stored", "dropped"
MERGED = 60  # files that become one
MERGES = 3  # how often an event is copied: a file per second is 24 a day after two merges
SMALL_BYTES = 256 << 10  # a larger file is not merged: of those there are few


@dataclass(slots=True)
class _Batch:
    """Events that will be in one file, the bytes of the requests that brought them, and who waits
    for it."""

    events: list[Event] = field(default_factory=list)
    size: int = 0
    waiting: "list[asyncio.Future[None]]" = field(default_factory=list)


class EventLog:
    """All methods run in the router's event loop. ``folder`` None, or ``limit_bytes`` 0: nothing is
    stored, and who wants it is told so."""

    def __init__(
        self,
        folder: Path | None,
        limit_bytes: int,
        recorder: Recorder,
        *,
        gap_s: float = GAP_S,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder if limit_bytes else None
        self._limit_bytes = limit_bytes
        self._recorder = recorder
        self._gap_s = gap_s
        self._wall = wall
        self._batch = _Batch()
        self._writing: asyncio.Task[None] | None = None
        self._under_way = _Batch()  # what is being written
        self._complained_at = float("-inf")
        self._lost_quietly = 0  # events not stored since then
        self._number = 0
        self._began_at = float("-inf")
        self._measured_at = float("-inf")
        self._bytes = 0
        self._is_closed = False
        # files that are to be merged, by how often they were: numbers without gaps, of one day
        self._small: list[list[Path]] = [[] for _ in range(MERGES)]
        # of one run: files of two must never have the same name
        self._run = f"{HOST}-{secrets.token_hex(RUN_BYTES)}"

    @property
    def is_kept(self) -> bool:
        return self._folder is not None

    def note(self, event: Event) -> None:
        """One of the router's own, if there is room; it will be written, or counted as dropped."""
        if self._folder is None:
            return
        if self._is_closed or self._waiting() >= MAX_WAITING:
            self._recorder.count(EVENTS, DROPPED)
            return
        self._batch.events.append(event)
        self._begin()

    async def add(self, events: Sequence[Event], timeout_s: float, *, size: int) -> None:
        """Returns when all of them are durable, in one file. size: bytes of the request.

        Raises:
            NotFound: this router stores no events. Unavailable: it is stopping. Overloaded: too
                many wait already.
            StoreFull, ReadOnly: they cannot be acknowledged. DeadlineExceeded: nobody knows yet.
        """
        if self._folder is None:
            raise NotFound(
                "no events are stored here", hint="set router.events_mib, and serve a store"
            )
        if self._is_closed:
            raise Unavailable("this router is stopping")
        is_large = self._batch.size + self._under_way.size + size > MAX_WAITING_BYTES
        if is_large or self._waiting() + len(events) > MAX_WAITING:
            raise Overloaded(
                "too many events at once",
                expected=f"<= {MAX_WAITING:,}, and {MAX_WAITING_BYTES >> 20} MiB of requests, that "
                "wait for the disk",
            )
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._batch.events.extend(events)
        self._batch.size += size
        self._batch.waiting.append(stored)
        self._begin()
        await asyncio.wait([stored], timeout=timeout_s)
        if not stored.done():
            stored.cancel()
            raise DeadlineExceeded(
                "the events are not on the disk yet; whether they will be is not known",
                hint="send them again with the same event_id: they count once",
            )
        stored.result()

    async def close(self) -> None:
        """Writes what waits. Returns when that is done, or has failed."""
        self._is_closed = True
        if self._writing is not None:
            self._gap_s = 0.0
            await asyncio.wait([self._writing], timeout=CLOSE_S)

    def _waiting(self) -> int:
        """Events."""
        return len(self._batch.events) + len(self._under_way.events)

    def _begin(self) -> None:
        if self._writing is None:
            self._writing = asyncio.ensure_future(self._write_waiting())
            self._writing.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._writing = None
        if not task.cancelled() and task.exception() is not None:
            logger.error("events are not written", exc_info=task.exception())

    async def _write_waiting(self) -> None:
        """Until nothing waits."""
        clock = asyncio.get_running_loop().time
        while self._batch.events:
            while (pause_s := self._began_at + self._pause_s() - clock()) > 0:
                await asyncio.sleep(min(pause_s, self._gap_s))  # until then somebody may wait
            self._began_at = clock()
            batch, self._batch = self._batch, _Batch()
            self._under_way = batch
            await self._write(batch)
            self._under_way = _Batch()
            for merges in range(MERGES):
                if len(self._small[merges]) >= MERGED:
                    await self._merge(merges)

    def _pause_s(self) -> float:
        return self._gap_s * (1 if self._batch.waiting else OWN_GAPS)

    async def _write(self, batch: _Batch) -> None:
        try:
            await start(lambda: self._store(batch.events), "events")
        except Exception as error:  # noqa: BLE001  whatever it is, who waits is told
            self._forget_small()  # its number may be a file, and may be none
            refusal = _refusal(error)
            self._complain(len(batch.events), refusal)
            self._recorder.count(EVENTS, DROPPED, by=len(batch.events))
            for each in batch.waiting:
                if not each.done():
                    each.set_exception(refusal)
                    each.exception()  # seen: whoever waited may have given up
            return
        self._recorder.count(EVENTS, STORED, by=len(batch.events))
        for each in batch.waiting:
            if not each.done():
                each.set_result(None)

    def _complain(self, events: int, refusal: Exception) -> None:
        """In the log, now and then: a disk that is full stays so for more than one file."""
        self._lost_quietly += events
        now = asyncio.get_running_loop().time()
        if now >= self._complained_at + COMPLAIN_S:
            logger.error("%d events were not stored: %s", self._lost_quietly, refusal)
            self._complained_at, self._lost_quietly = now, 0

    def _store(self, events: Sequence[Event]) -> None:
        """In a thread; one at a time."""
        # pyarrow takes 30 MB of memory, which a router that stores no events need not have
        from shardline.router.experiments.event_files import days_of, write_events

        assert self._folder is not None
        now = self._wall()
        if not 0 <= now - self._measured_at < MEASURE_S:
            days = days_of(self._folder)
            self._bytes = sum(_size(path) for day in days for path in day.iterdir())
            self._measured_at = now
        if self._bytes > ROOM * self._limit_bytes:
            raise StoreFull(
                "the store holds as many events as it may",
                expected=f"<= {ROOM * self._limit_bytes:,} bytes, twice router.events_mib",
                got=f"{self._bytes:,} bytes",
                hint="`shardline gc` removes the oldest days",
            )
        self._number += 1
        path = write_events(self._folder, self._run, self._number, events, now)
        size = _size(path)
        self._bytes += size
        if any(each[0].parent != path.parent for each in self._small if each):
            self._forget_small()
        self._keep_small(path, size, 0)

    def _keep_small(self, path: Path, size: int, merges: int) -> None:
        if size > SMALL_BYTES:
            self._forget_small()
        elif merges < MERGES:
            self._small[merges].append(path)

    def _forget_small(self) -> None:
        """Files that come later are not merged with those that there are."""
        self._small = [[] for _ in range(MERGES)]

    async def _merge(self, merges: int) -> None:
        """Files that were merged so often become one, and may be merged once more."""
        parts, self._small[merges] = self._small[merges], []
        try:
            path = await start(lambda: _merged(parts), "events")
            self._keep_small(path, _size(path), merges + 1)
        except (OSError, CorruptFile) as error:  # they stay as they are, and count as they are
            logger.error("%d files of events were not merged: %s", len(parts), error)
        except Exception:  # a bug: what waits is to be written nevertheless
            logger.exception("%d files of events were not merged", len(parts))


def _merged(parts: Sequence[Path]) -> Path:
    from shardline.router.experiments.event_files import merge_files  # as in ``_store``

    return merge_files(parts)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # gc takes it just now
        return 0


def _refusal(error: Exception) -> Exception:
    if not isinstance(error, OSError):
        return error
    kind = StoreFull if error.errno in FULL else ReadOnly
    # the file may be there, and the sync of a folder above it have failed
    return kind(
        f"events cannot be stored: {error}",
        hint="some may have been: send them again with the same event_id, which counts once",
    )
