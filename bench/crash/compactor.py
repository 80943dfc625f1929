"""Compactions in processes of their own, begun by one process that has all modules loaded.

A replica asks for one over a Unix socket, as it would start a program; the compaction outlives a
replica that is killed, as the program would. Forked from a process without threads, it begins in
milliseconds instead of a second.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from shardline.bench.crash.points import Order, Trap
from shardline.shards.live import compaction
from shardline.shards.live.compaction import compact

KILLED = -signal.SIGKILL
ENDS_WITHIN_S = 30.0


def serve(address: str) -> None:
    """Until ``stop`` comes; then ends when the last compaction has."""
    with Listener(address, "AF_UNIX") as listener:
        while True:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            with listener.accept() as asker:
                try:
                    order = asker.recv()
                except EOFError:  # the replica has been killed
                    continue
                if order is None:
                    break
                if os.fork() == 0:
                    _run(asker, *order)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


def stop(address: str) -> None:
    with Client(address, "AF_UNIX") as asker:
        asker.send(None)


class Compaction:
    """One that is under way: a ``changeover.Running``."""

    def __init__(
        self, address: str, generation: Path, shard: int, until: int, order: Order | None
    ) -> None:
        self._asker = Client(address, "AF_UNIX")
        self._asker.send((str(generation), shard, until, order))
        self._pid: int | None = None
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None and self._asker.poll():
            self._receive()
        return self._code

    def terminate(self) -> None:
        self.kill()

    def kill(self) -> None:
        while self._pid is None and self._code is None:
            self._receive()
        if self._code is None and self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        while self._code is None:
            self._receive()
        return self._code

    def _receive(self) -> None:
        try:
            self._pid, self._code = self._asker.recv()
        except (EOFError, ConnectionResetError):
            self._code = KILLED
        if self._code is not None:
            self._asker.close()


def _run(asker: Connection, generation: str, shard: int, until: int, order: Order | None) -> None:
    """Does not return."""
    code = 1
    try:
        asker.send((os.getpid(), None))
        with trapped(order):
            compact(Path(generation), shard, until=until)
        code = 0
    except BaseException as error:  # noqa: BLE001  it is the end of this process
        print(f"compaction: {error!r}", flush=True)  # noqa: T201
    finally:
        with contextlib.suppress(OSError):
            asker.send((os.getpid(), code))
        os._exit(code)


@contextlib.contextmanager
def trapped(order: Order | None) -> Iterator[None]:
    """The steps of a compaction are points."""
    trap = Trap()
    trap.scope = "compact"
    trap.arm(order)

    def step(inner: Callable[..., Any], place: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            trap.reach(place, "before")
            result = inner(*args, **kwargs)
            trap.reach(place, "after")
            return result

        return run

    def rename(source: Any, target: Any, **kwargs: Any) -> None:
        place = "rename.stage" if Path(target).name.startswith(".") else "rename.main"
        step(plain_rename, place)(source, target, **kwargs)

    plain_rename = os.rename
    steps: dict[tuple[Any, str], Callable[..., Any]] = {
        (os, "rename"): rename,
        (os, "replace"): step(os.replace, "replace.file"),
        (os, "fsync"): step(os.fsync, "sync.file"),
    }
    for name, place in (
        ("build_compacted_index", "build.index"),
        ("write_item_ids", "write.ids"),
        ("write_attributes", "write.attributes"),
        ("write_main", "write.manifest"),
    ):
        steps[compaction, name] = step(getattr(compaction, name), place)
    plain = {(module, name): getattr(module, name) for module, name in steps}
    for (module, name), function in steps.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name), function in plain.items():
            setattr(module, name, function)
