"""Named points in the processes of a shard that is written, where a trap ends, stops or fails them.

A point is ``<what the process does>.<operation>.<on what>.<before or after>``. What the process
does: ``lead`` (takes over), ``write`` (a group of writes, as primary), ``adopt`` (changes over to a
compacted main index, then trims), ``follow`` (applies what the primary wrote), ``compact`` (the
process that compacts). A trap is armed from outside for one point; the code of the shard knows
nothing of it.
"""

import errno
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from shardline.shards.live.log_files import LogFiles

NO_SCOPE = "start"


class Action(StrEnum):
    """What happens at a point."""

    KILL = "kill"
    STOP = "stop"  # SIGSTOP, until somebody sends SIGCONT
    TEAR = "tear"  # of a write: some of its bytes, then SIGKILL
    FULL = "full"  # ENOSPC, of a write after some of its bytes
    IO_ERROR = "io_error"  # EIO, likewise


ERRORS = {Action.FULL: errno.ENOSPC, Action.IO_ERROR: errno.EIO}
TEARING = (Action.TEAR, *ERRORS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The ``count``-th time that the process comes to ``point``."""

    point: str
    action: Action = Action.KILL
    count: int = 1


def _both(scope: str, *operations: str) -> list[str]:
    return [f"{scope}.{each}.{side}" for each in operations for side in ("before", "after")]


_NEW_SEGMENT = [
    f"{operation}.unfinished-segment"
    for operation in ("remove", "create", "write", "sync", "rename")
]
_EPOCH = [
    f"{operation}.unfinished-epoch" for operation in ("remove", "create", "write", "sync", "rename")
]
WRITE_POINTS = _both(
    "write", "write.segment", "sync.segment", "read.epoch", "swap.state", "answer.group"
)
LEAD_POINTS = _both(
    "lead",
    *("names.folder", "create.claim", "remove.claim", "sync_folder.folder"),
    *_EPOCH,
    *("read.epoch", "read.segment", *_NEW_SEGMENT, "swap.state"),
)
TORN_POINTS = _both("lead", "create.torn", "write.torn")
ADOPT_POINTS = _both(
    "adopt",
    *("read.segment", "swap.state", *_NEW_SEGMENT, "sync_folder.folder", "read.epoch"),
    *("rename.segment", "remove.segment", "unlink.main", "rmdir.main"),
)
FOLLOW_POINTS = _both("follow", "read.segment", "read.epoch", "swap.state")
COMPACT_POINTS = _both(
    "compact",
    *("rename.stage", "build.index", "write.ids", "write.attributes", "write.manifest"),
    *("sync.file", "replace.file", "rename.main"),
)
POINTS = [
    *(*WRITE_POINTS, *LEAD_POINTS, *TORN_POINTS),
    *(*ADOPT_POINTS, *FOLLOW_POINTS, *COMPACT_POINTS),
]


class Trap:
    """At most one order at a time; ``scope`` is what the thread that writes does now."""

    def __init__(self) -> None:
        self.scope = NO_SCOPE
        self._order: Order | None = None
        self._left = 0

    def arm(self, order: Order | None) -> None:
        self._left = order.count if order is not None else 0
        self._order = order

    @contextmanager
    def doing(self, scope: str) -> Iterator[None]:
        before, self.scope = self.scope, scope
        try:
            yield
        finally:
            self.scope = before

    def reach(self, place: str, side: str) -> None:
        """Raises OSError where the disk is to fail; does not return where the process is to end."""
        if (order := self._due(f"{self.scope}.{place}.{side}")) is None:
            return
        if order.action is Action.STOP:
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread stops at once
        elif order.action in ERRORS:
            raise OSError(ERRORS[order.action], os.strerror(ERRORS[order.action]))
        else:
            end_process()

    def torn(self, place: str, size: int) -> int | None:
        """How many bytes of a write are to be written before the next ``reach`` of its place, which
        ends the process or fails then; None: the write is not one of those."""
        order = self._order
        if order is None or order.point != f"{self.scope}.{place}.before":
            return None
        is_last = self._left == 1 and order.action in TEARING
        return random.randrange(size) if is_last else None

    def _due(self, point: str) -> Order | None:
        order = self._order
        if order is None or order.point != point:
            return None
        self._left -= 1
        if self._left:
            return None
        self._order = None
        return order


def end_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class TrappedFiles(LogFiles):
    """Every call is a point, before and after it."""

    def __init__(self, trap: Trap) -> None:
        self._trap = trap
        self._paths: dict[int, Path] = {}  # of open files

    def names(self, folder: Path) -> list[str]:
        with self._at("names.folder"):
            return super().names(folder)

    def create(self, path: Path) -> int:
        with self._at(f"create.{kind_of(path)}"):
            descriptor = super().create(path)
        self._paths[descriptor] = path
        return descriptor

    def write(self, descriptor: int, data: bytes | memoryview) -> int:
        place = f"write.{kind_of(self._paths[descriptor])}"
        part = self._trap.torn(place, len(data))
        if part is not None:
            super().write(descriptor, data[:part])
        with self._at(place):
            return super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        with self._at(f"sync.{kind_of(self._paths[descriptor])}"):
            super().sync(descriptor)

    def close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        super().close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        with self._at(f"rename.{kind_of(source)}"):
            super().rename(source, target)
        renamed = {fd: target for fd, path in self._paths.items() if path == source}
        self._paths.update(renamed)

    def sync_folder(self, folder: Path) -> None:
        with self._at("sync_folder.folder"):
            super().sync_folder(folder)

    def remove(self, path: Path) -> None:
        with self._at(f"remove.{kind_of(path)}"):
            super().remove(path)

    def read(self, path: Path, offset: int = 0, size: int = -1) -> bytes:
        with self._at(f"read.{kind_of(path)}"):
            return super().read(path, offset, size)

    @contextmanager
    def _at(self, place: str) -> Iterator[None]:
        self._trap.reach(place, "before")
        yield
        self._trap.reach(place, "after")


def kind_of(path: Path) -> str:
    """What a file of a shard's log is, in the names of points."""
    name = path.name
    for start, end, kind in (
        ("EPOCH", "EPOCH", "epoch"),
        ("EPOCH-", "", "claim"),
        (".EPOCH", "", "unfinished-epoch"),
        (".log-", "", "unfinished-segment"),
        ("log-", ".torn", "torn"),
        ("log-", ".seg", "segment"),
    ):
        if name.startswith(start) and name.endswith(end):
            return kind
    return "folder"
