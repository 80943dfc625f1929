"""Disks of lists for tests: one that fails at a call, and one that ends its process there.

The calls of a disk are its methods; each is one point before it and one after it.
"""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardline.router.lists.list_disk import ListDisk

CALLS = ("make_folder", "write_new", "link", "rename_folder", "sync_folder", "sync_path", "remove")
POINTS = tuple(f"{when} {call}" for call in CALLS for when in ("before", "after"))


class WatchedDisk(ListDisk):
    """``at`` is called with each point that is passed, and how often it was; it may raise."""

    def __init__(self, at: Callable[[str, int], None]) -> None:
        self._at = at
        self._passed: dict[str, int] = {}

    def _pass(self, point: str) -> None:
        self._passed[point] = self._passed.get(point, 0) + 1
        self._at(point, self._passed[point])


def _watched(call: str) -> Callable[..., Any]:
    def method(self: WatchedDisk, *arguments: Any) -> Any:
        self._pass(f"before {call}")
        done = getattr(ListDisk, call)(self, *arguments)
        self._pass(f"after {call}")
        return done

    return method


for _call in CALLS:
    setattr(WatchedDisk, _call, _watched(_call))


def failing_at(point: str, number: int = errno.ENOSPC) -> WatchedDisk:
    """Fails each time that this point is passed."""

    def fail(passed: str, _count: int) -> None:
        if passed == point:
            raise OSError(number, os.strerror(number), "/secret/path")

    return WatchedDisk(fail)


def killed_at(point: str, count: int = 1) -> WatchedDisk:
    """Ends the process by SIGKILL, when the point is passed for this time."""

    def kill(passed: str, passes: int) -> None:
        if passed == point and passes == count:
            os.kill(os.getpid(), signal.SIGKILL)

    return WatchedDisk(kill)


def new_store(folder: Path) -> Path:
    """The folder of the lists of a new store, which is there as far as lists can tell."""
    (folder / "generations" / "000001").mkdir(parents=True)
    return folder / "lists"
