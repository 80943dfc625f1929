"""Clients that write while processes are killed.

Every writer owns its items, sends one write after the other, and repeats one that was not
acknowledged, with the same key, until it is: at once, or later, when others have come between. So
the journal has in the end the number (seq) of every write that can have an effect, and what the
shard must hold follows from it alone.
"""

import random
import threading
import time
from collections.abc import Callable

import msgpack
import numpy as np

from shardline.bench.crash.shard_cluster import Cluster, Primary
from shardline.bench.journal import Journal, Log, Write, vectors_of
from shardline.bench.shard_link import ShardLink
from shardline.shards.core.errors import (
    DeltaFull,
    NotPrimary,
    Overloaded,
    ProtocolError,
    ReadOnly,
    StoreFull,
    Unavailable,
)
from shardline.shards.core.messages import (
    DeleteRequest,
    ErrorReply,
    FetchReply,
    FetchRequest,
    UpsertRequest,
    WriteReply,
)
from shardline.shards.wire.frames import Message

DIM = 8
LOG: Log = (1, 0)  # of the one shard
OWN_ITEMS = 60  # new ids of each writer
BUILT_ITEMS = 20  # of each writer in the generation
NEW_ITEMS = 1_000_000  # ids from here on are not in the generation
MAX_ITEMS = 6  # of one write
TIMEOUT_S = 10.0
HANGS_S = 60.0  # without a reply, and without an end of the connection
PAUSE_S = 0.002
REFUSALS = (NotPrimary, ReadOnly, StoreFull, DeltaFull, Overloaded, Unavailable)


class Writer:
    """A thread that writes; ``pause`` returns when nothing is under way."""

    def __init__(self, number: int, cluster: Cluster, journal: Journal, seed: int) -> None:
        self._number, self._cluster, self._journal, self._seed = number, cluster, journal, seed
        self._random = random.Random(f"{seed}-{number}")
        first, built = NEW_ITEMS + number * OWN_ITEMS, number * BUILT_ITEMS
        self._items = [*range(first, first + OWN_ITEMS), *range(built, built + BUILT_ITEMS)]
        self._written = 0
        self._newest = 0  # number of the last acknowledged write
        self._left: list[Write] = []  # given up for now
        self._link: ShardLink | None = None
        self._linked_to: Primary | None = None
        self._request = 0
        self._is_ended = False
        self._may_run, self._is_idle = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"writer-{number}", daemon=True)

    def start(self) -> None:
        self._may_run.set()
        self._thread.start()

    def begin_pause(self) -> None:
        self._is_idle.clear()
        self._may_run.clear()

    def is_idle(self, timeout_s: float) -> bool:
        return self._is_idle.wait(timeout_s)

    def resume(self) -> None:
        self._may_run.set()

    def end(self) -> None:
        self._is_ended = True
        self._may_run.set()
        self._thread.join()
        self._unlink()

    def _run(self) -> None:
        try:
            while not self._is_ended:
                if not self._may_run.is_set():
                    while self._left and not self._is_ended:
                        self._write(self._left.pop(0), may_leave=False)
                    self._is_idle.set()
                    self._may_run.wait()
                elif self._left and self._random.random() < 0.05:
                    self._write(self._left.pop(0), may_leave=True)
                else:
                    self._write(self._next(), may_leave=True)
                time.sleep(self._random.random() * PAUSE_S)
        except Exception as error:  # noqa: BLE001  a writer that ends silently would hide the rest
            self._journal.violation(f"writer {self._number} failed: {error!r}")
            self._is_idle.set()

    def _next(self) -> Write:
        self._written += 1
        items = self._random.sample(self._items, self._random.randint(1, MAX_ITEMS))
        return Write(
            writer=self._number,
            number=self._written,
            items=items,
            is_upsert=self._random.random() < 0.7,
            floor={LOG: self._newest},
        )

    def _write(self, write: Write, *, may_leave: bool) -> None:
        """Until it is acknowledged; or until the primary is gone, sometimes."""
        while not self._is_ended:
            write.attempts += 1
            reply = self._attempt(self._request_of(write))
            if isinstance(reply, WriteReply):
                self._acknowledged(write, reply)
                return
            if isinstance(reply, ErrorReply):
                self._refused(write, reply)
            elif may_leave and self._random.random() < 0.3:
                self._left.append(write)
                return
            time.sleep(0.01)

    def _acknowledged(self, write: Write, reply: WriteReply) -> None:
        write.reply = reply
        self._newest = max(self._newest, reply.seq)
        self._journal.acknowledge(write, {LOG: reply.seq})
        is_newest = reply.seq == self._newest  # else later writes may have changed its items
        if is_newest and self._random.random() < 0.1:
            self._read(write)
        if self._random.random() < 0.05:
            self._repeat(write)

    def _repeat(self, write: Write) -> None:
        """Sends what was acknowledged once more: the same answer must come."""
        reply = self._attempt(self._request_of(write))
        if isinstance(reply, WriteReply):
            self._journal.repeats += 1
            if reply != write.reply:
                self._journal.violation(f"write {write.key}: {write.reply}, repeated {reply}")
        elif reply is not None:
            self._refused(write, reply)

    def _read(self, write: Write) -> None:
        """What was acknowledged must be visible where it was; nobody else writes these items."""
        link = self._link
        if link is None:
            return
        ids = np.array(write.items, np.int64)
        found = self._exchange(link, FetchRequest(item_ids=ids, timeout_ms=TIMEOUT_S * 1e3))
        if not isinstance(found, FetchReply):
            return
        self._journal.reads += 1
        expected = ids if write.is_upsert else ids[:0]
        vectors = vectors_of(self._seed, write, DIM)
        is_same = np.array_equal(found.item_ids, expected)
        if not is_same or (write.is_upsert and not np.array_equal(found.vectors, vectors)):
            self._journal.violation(f"write {write.key} was acknowledged and is not seen")

    def _refused(self, write: Write, reply: ErrorReply) -> None:
        self._journal.refused(reply.code)
        if reply.code not in {each.code for each in REFUSALS}:
            raise RuntimeError(f"write {write.key}: {reply}")

    def _request_of(self, write: Write) -> UpsertRequest | DeleteRequest:
        ids = np.array(write.items, np.int64)
        if not write.is_upsert:
            return DeleteRequest(item_ids=ids, key=write.key, timeout_ms=TIMEOUT_S * 1e3)
        titles = {"title": [write.title(item) for item in write.items]}
        return UpsertRequest(
            item_ids=ids,
            vectors=vectors_of(self._seed, write, DIM),
            attributes=msgpack.packb(titles),
            key=write.key,
            timeout_ms=TIMEOUT_S * 1e3,
        )

    def _attempt(self, request: UpsertRequest | DeleteRequest) -> WriteReply | ErrorReply | None:
        """The reply; None: there is no primary, or it has gone before it replied."""
        link = self._linked()
        if link is None:
            return None
        reply = self._exchange(link, request)
        assert reply is None or isinstance(reply, WriteReply | ErrorReply)
        return reply

    def _exchange(self, link: ShardLink, request: Message) -> Message | None:
        """Half of the time it waits for a primary that was replaced: that one must not acknowledge
        what its successor does not know."""
        is_patient = self._random.random() < 0.5
        self._request += 1
        until = time.monotonic() + HANGS_S
        try:
            link.send(self._request, request)
            while time.monotonic() < until and not self._is_ended:
                received = link.receive(0.02)
                if received is not None and received[0] == self._request:
                    return received[1]
                if not is_patient and self._cluster.primary != self._linked_to:
                    break
            else:
                if not self._is_ended:
                    self._journal.violation(f"no reply within {HANGS_S} s")
        except Unavailable:
            pass
        self._unlink()
        return None

    def _linked(self) -> ShardLink | None:
        primary = self._cluster.primary
        if self._link is not None and primary == self._linked_to:
            return self._link
        self._unlink()
        if primary is None:
            return None
        try:
            self._link = ShardLink(primary.address, self._cluster.secret, timeout_s=TIMEOUT_S)
        except (Unavailable, ProtocolError):
            return None
        self._linked_to = primary
        return self._link

    def _unlink(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


def paused(writers: list[Writer], keep_serving: Callable[[], object], timeout_s: float) -> bool:
    """Whether every writer came to rest, with all its writes acknowledged; ``keep_serving`` is
    called meanwhile."""
    for writer in writers:
        writer.begin_pause()
    until = time.monotonic() + timeout_s
    for writer in writers:
        while not writer.is_idle(0.05):
            keep_serving()
            if time.monotonic() > until:
                return False
    return True
