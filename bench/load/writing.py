"""A writer beside a load: rows of its own at a rate, and whether each acknowledged one is there.

It upserts new items in small requests on schedule (open loop), and deletes some of them later.
Looked at are all its items, by GET: at any time, and at the end, when every write is acknowledged.
Then it deletes them all, so that the rows are those of before.
"""

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from shardline.bench.http_writer import CODED, OK, HttpWriter, Kept, look_at
from shardline.bench.journal import ABSENT, Journal, Versions, Write, vectors_of
from shardline.cluster.serving.endpoint import Address
from shardline.router.client.retries import Retry
from shardline.router.client.sync_client import Client
from shardline.shards.core.errors import DataError

ITEMS_PER_WRITE = 10
DELETES = 0.2  # share of writes, each of half as many items
# ids of its items, at random from here on: of no corpus that counts its rows
FIRST_ITEM = 1 << 40
ID_ROOM = 1 << 40
TIMELINE_S = 1.0
PAUSE_S = 0.05  # after an attempt that was not acknowledged
DRAINED_S = 60.0
LOOK_PAUSE_S = 0.001  # between two GETs
CLIENT_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """at_s: when it was sent; code: OK, or an error's; rows: of its write."""

    at_s: float
    took_ms: float
    rows: int
    code: str


@dataclass(slots=True, kw_only=True)
class Writing:
    """From ``begin`` to ``end``, in a thread."""

    address: Address
    dim: int
    model_version: str
    rows_per_s: float
    seed: int = field(default_factory=lambda: secrets.randbelow(1 << 31))
    attempts: list[Attempt] = field(default_factory=list)
    looks: list[dict[str, Any]] = field(default_factory=list)
    journal: Journal = field(default_factory=Journal)
    _items: list[int] = field(default_factory=list)  # that were written, or are to be
    _versions: Versions = field(default_factory=lambda: Versions({}))
    _is_over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _zero_s: float = 0.0

    def check(self) -> None:
        """Whether this endpoint takes writes with this key. Raises ShardlineError: it does not."""
        with self._client(Retry()) as client:
            client.delete([FIRST_ITEM - 1])  # nobody's

    def begin(self, at_s: float) -> None:
        """at_s: what the load's clock shows now. Again: nothing."""
        if not self._threads:
            self._zero_s = time.monotonic() - at_s
            self._in_thread(self._write_on)

    def clock(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self._zero_s

    def stop(self) -> None:
        """Ends the schedule, and waits until every write is acknowledged, or time is over."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def look_beside(self, after: str) -> None:
        """``look`` in a thread."""
        self._in_thread(partial(self.look, after))

    def _in_thread(self, task: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=task))
        self._threads[-1].start()

    def look(self, after: str) -> None:
        """Asks for every item written so far, one after the other, and notes what is missing."""
        at_s = self.clock()
        items = list(self._items)
        with self._client(Retry()) as client:
            kept = look_at(client, self._versions, items, least_cosine=CODED, pause_s=LOOK_PAUSE_S)
        self.looks.append(_looked(after, at_s, kept))

    def end(self) -> None:
        """``stop``, a last look, and all items deleted. Raises DataError: they are not."""
        self.stop()
        self.look("the end")
        if not self._items:
            return
        with self._client(Retry()) as client:
            client.delete(self._items)
            again = client.delete(self._items).deleted
        if again:
            raise DataError("items came back after they were deleted", got=str(again))

    def report(self) -> dict[str, Any]:
        """Ready for JSON. lost: acknowledged items that were missed in any look."""
        done = [each for each in self.attempts if each.code == OK]
        times = np.percentile([each.took_ms for each in done] or [0.0], (50, 99))
        return {
            "rows_per_s": self.rows_per_s,
            "acknowledged_writes": self.journal.writes,
            "acknowledged_rows": sum(each.rows for each in done),
            "acknowledged_p50_ms": round(float(times[0]), 2),
            "acknowledged_p99_ms": round(float(times[1]), 2),
            "refused": self.journal.refusals,
            "unknown": self.journal.unknown,
            "lost": sum(look["lost"] for look in self.looks),
            "returned": sum(look["returned"] for look in self.looks),
            "violations": self.journal.violations,
            "looks": self.looks,
            "timeline": acknowledged_per_s(self.attempts, TIMELINE_S),
        }

    def _client(self, retry: Retry) -> Client:
        return Client(self.address.url, CLIENT_TIMEOUT_S, key=self.address.key, retry=retry)

    def _write_on(self) -> None:
        rng = np.random.default_rng(self.seed)
        run = secrets.token_hex(8)
        with self._client(Retry(attempts=1)) as client:
            writer = HttpWriter(
                number=0,
                run=run,
                client=client,
                journal=self.journal,
                versions=self._versions,
                vectors=lambda write: vectors_of(self.seed, write, self.dim),
                model_version=self.model_version,
            )
            interval_s = ITEMS_PER_WRITE / self.rows_per_s
            first_s, number = self.clock(), 0
            while not self._is_over.wait(max(0.0, first_s + number * interval_s - self.clock())):
                self._until_acknowledged(writer, self._next(writer, rng))
                number += 1

    def _next(self, writer: HttpWriter, rng: np.random.Generator) -> Write:
        if self._items and rng.random() < DELETES:
            chosen = rng.choice(self._items, ITEMS_PER_WRITE // 2, replace=False)
            return writer.write(chosen.tolist(), is_upsert=False)
        chosen = FIRST_ITEM + rng.integers(ID_ROOM, size=ITEMS_PER_WRITE)
        new = [item for item in dict.fromkeys(chosen.tolist()) if item not in self._versions]
        self._versions.add(dict.fromkeys(new, ABSENT))
        self._items += new
        return writer.write(new, is_upsert=True)

    def _until_acknowledged(self, writer: HttpWriter, write: Write) -> None:
        """Later ones wait for it: what comes after a refusal is late, and is sent all the same."""
        until: float | None = None
        while True:
            began_s = self.clock()
            code = writer.attempt(write)
            took_ms = 1e3 * (self.clock() - began_s)
            rows = len(write.items)
            self.attempts.append(Attempt(at_s=began_s, took_ms=took_ms, rows=rows, code=code))
            if code == OK:
                return
            if self._is_over.is_set() and until is None:
                until = self.clock() + DRAINED_S
            if until is not None and self.clock() > until:
                self.journal.violation(f"write {write.key} was not acknowledged: {code}")
                return
            time.sleep(PAUSE_S)


def _looked(after: str, at_s: float, kept: Kept) -> dict[str, Any]:
    return {
        "after": after,
        "at_s": round(at_s, 2),
        "items": kept.asked,
        "lost": len(kept.lost),
        "returned": len(kept.returned),
        "unanswered": len(kept.unanswered),
        "lost_items": kept.lost[:10],
        "returned_items": kept.returned[:10],
    }


def acknowledged_per_s(
    attempts: Sequence[Attempt], bin_s: float
) -> tuple[list[float], list[float]]:
    """Beginnings of bins in seconds, and the rows per second that were acknowledged in each."""
    done = [(each.at_s + each.took_ms / 1e3, each.rows) for each in attempts if each.code == OK]
    if not done:
        return [], []
    edges = np.arange(0, max(at for at, _ in done) + bin_s, bin_s)
    at, rows = zip(*done, strict=True)
    counts, _ = np.histogram(at, edges, weights=rows)
    return edges[:-1].tolist(), (counts / bin_s).tolist()
