"""Unit tests run without Ray, and leave no thread, child process, socket or session folder."""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from tests.index_kinds import one_thread, queries, vectors  # noqa: F401 - fixtures

# helpers of multiprocessing, which stay until the interpreter ends
PYTHONS_OWN = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
ENDS_WITHIN_S = 2.0  # what was told to end may take so long to be gone


@pytest.fixture(autouse=True)
def ray_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("unit tests may not start Ray")

    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """What module-wide fixtures have started stays for the other tests of the module."""
    threads, children, sockets = set(threading.enumerate()), _children(), _sockets()
    yield
    for thread in set(threading.enumerate()) - threads:
        thread.join(ENDS_WITHIN_S)
        assert not thread.is_alive(), f"the test left {thread} running"
    _, alive = psutil.wait_procs(_children() - children, timeout=ENDS_WITHIN_S)
    assert not alive, f"the test left processes: {alive}"
    deadline = time.monotonic() + ENDS_WITHIN_S  # a server closes its end a moment later
    while len(_sockets()) > len(sockets) and time.monotonic() < deadline:
        threading.Event().wait(0.005)
    assert len(_sockets()) <= len(sockets), f"the test left sockets: {_sockets() - sockets}"


@pytest.fixture(scope="session", autouse=True)
def no_session_folder_is_left() -> Iterator[None]:
    yield
    left = list(Path(tempfile.gettempdir()).glob(f"shardline-{os.getpid()}-*"))
    assert not left


def _children() -> set[psutil.Process]:
    """By the kernel's own list: asking every process of the machine takes 10 ms."""
    found = set()
    for listing in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):  # it ends just now
            for pid in listing.read_text().split():
                child = psutil.Process(int(pid))
                if not any(helper in " ".join(child.cmdline()) for helper in PYTHONS_OWN):
                    found.add(child)
    return found


def _sockets() -> set[str]:
    """The open sockets of this process, as the kernel names them."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except FileNotFoundError:  # the descriptor of this look itself
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found
