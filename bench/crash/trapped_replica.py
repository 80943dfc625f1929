"""A replica of the shard as a process: loads what is on disk, follows or leads, serves a socket.

The same parts as in ``shards.process.shard_actor``, without Ray, with points (``points``) around
what they do. Orders come over a pipe.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from shardline.bench.crash.compactor import KILLED, Compaction
from shardline.bench.crash.points import Order, Trap, TrappedFiles
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.messages import WriteReply
from shardline.shards.live import changeover
from shardline.shards.live.changeover import Changeover
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.loading import Loaded, load_caught_up
from shardline.shards.live.state import ShardState
from shardline.shards.live.write_group import WriteRequest
from shardline.shards.live.writes import ShardWrites
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer
from shardline.shards.storage.generation import read_generation

SHARD = 0
TITLE = "title"
# shorter than in service, so that a run sees as many changes as possible
PAUSE_S = 0.1  # after a compaction that failed
LOOK_S = 0.2  # of followers, for a newer main index
KEEP_LOG_MIB = 0.05  # so little that trims put segments aside, and remove those put aside before


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a replica's process is started with. min_rows: written rows that make a compaction
    due; compactor: the address of the process that compacts."""

    generation: str
    replica: int
    secret: bytes
    compactor: str
    min_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """items: vector (bytes) and title of every item that is found; rows: how many the state says
    it has."""

    seq: int
    rows: int
    items: dict[int, tuple[bytes, str | None]]


def contents_of(state: ShardState) -> Contents:
    kept = state.ids_by_row[:-1]
    if state.selection is not None:
        kept = kept[state.selection.live]
    ids = np.concatenate((kept, state.delta.ids))
    found, vectors = state.fetch(ids)
    answer = state.attributes_of(found, [TITLE], np.inf, 1 << 30)
    assert answer is not None
    titles = [title for part in msgpack.Unpacker(BytesIO(answer[1])) for title in part]
    rows = zip(found.tolist(), vectors, titles, strict=True)
    items = {item: (vector.tobytes(), title) for item, vector, title in rows}
    return Contents(seq=state.seq, rows=state.rows, items=items)


def load(generation: Path, trap: Trap) -> tuple["TrappedShard", "TrappedWrites", int]:
    """As a process that starts; the last is the seq of the main index."""
    manifest = read_generation(generation)
    loaded = load_caught_up(generation, manifest, SHARD)
    shard = TrappedShard(trap, manifest.generation, loaded.state)
    writes = TrappedWrites(trap, shard, live_folder(generation, SHARD), loaded)
    return shard, writes, loaded.main_seq


class TrappedShard(Shard):
    """The swap of the state is a point."""

    def __init__(self, trap: Trap, generation: int, state: ShardState) -> None:
        self._trap = trap
        super().__init__(shard=SHARD, generation=generation, state=state)

    @property
    def state(self) -> ShardState:
        return self._state

    @state.setter
    def state(self, state: ShardState) -> None:
        self._trap.reach("swap.state", "before")
        self._state = state
        self._trap.reach("swap.state", "after")


class TrappedWrites(ShardWrites):
    """Tells the trap what it does."""

    def __init__(self, trap: Trap, shard: Shard, folder: Path, loaded: Loaded) -> None:
        config = LiveConfig(keep_log_mib=KEEP_LOG_MIB)
        super().__init__(shard, folder, keys=loaded.keys, config=config, files=TrappedFiles(trap))
        self._trap = trap

    def lead(self, epoch: int) -> int:
        with self._trap.doing("lead"):
            return super().lead(epoch)

    def catch_up(self) -> int:
        with self._trap.doing("follow"):
            return super().catch_up()

    def write(self, requests: Sequence[WriteRequest]) -> list[WriteReply | ShardlineError]:
        with self._trap.doing("write"):
            replies = super().write(requests)
            self._trap.reach("answer.group", "before")
            return replies

    def adopt(self, loaded: Loaded) -> bool:
        with self._trap.doing("adopt"), _removals(self._trap):
            return super().adopt(loaded)


class TrappedServer(ShardServer):
    """The end of handing over replies is a point: some may have been sent."""

    trap: Trap

    def _deliver_writes(self, answered: Any) -> None:
        super()._deliver_writes(answered)
        with self.trap.doing("write"):
            self.trap.reach("answer.group", "after")


class Compactions:
    """Starts them; ``order`` is for the next one."""

    def __init__(self, address: str) -> None:
        self.order: Order | None = None
        self.killed = 0
        self._address = address

    def start(self, generation: Path, shard: int, until: int) -> "_Counted":
        order, self.order = self.order, None
        return _Counted(self, self._address, generation, shard, until, order)


class _Counted(Compaction):
    def __init__(
        self,
        compactions: Compactions,
        address: str,
        generation: Path,
        shard: int,
        until: int,
        order: Order | None,
    ) -> None:
        super().__init__(address, generation, shard, until, order)
        self._compactions = compactions

    def poll(self) -> int | None:
        code = super().poll()
        if code == KILLED:
            self._compactions.killed += 1
        return code


@contextmanager
def _removals(trap: Trap) -> Iterator[None]:
    """Around ``mains.remove_older``: each file of an older main index that goes is a point."""
    unlink, rmdir = os.unlink, os.rmdir

    def trapped_unlink(path: Any, **kwargs: Any) -> None:
        is_main = "main-" in str(path) or "dir_fd" in kwargs
        if is_main:
            trap.reach("unlink.main", "before")
        unlink(path, **kwargs)
        if is_main:
            trap.reach("unlink.main", "after")

    def trapped_rmdir(path: Any, **kwargs: Any) -> None:
        trap.reach("rmdir.main", "before")
        rmdir(path, **kwargs)
        trap.reach("rmdir.main", "after")

    os.unlink, os.rmdir = trapped_unlink, trapped_rmdir
    try:
        yield
    finally:
        os.unlink, os.rmdir = unlink, rmdir


def serve(pipe: Connection, setup: Setup) -> None:
    """A replica's process; ends with its parent's end of the pipe."""
    changeover.PAUSE_S, changeover.LOOK_S = PAUSE_S, LOOK_S
    logging.getLogger("shardline").setLevel(logging.CRITICAL)  # kills are what it is there for
    trap = Trap()
    generation = Path(setup.generation)
    shard, writes, main_seq = load(generation, trap)
    compactions = Compactions(setup.compactor)
    change = Changeover(
        generation,
        SHARD,
        main_seq=main_seq,
        config=LiveConfig(compact_share=1e-6, compact_min_rows=setup.min_rows),
        start=compactions.start,
    )
    server = TrappedServer(
        shard, secret=setup.secret, replica=setup.replica, writes=writes, changeover=change
    )
    server.trap = trap
    address = server.bind()
    server.start(1)
    pipe.send((0, address))
    with suppress(EOFError, OSError):  # the parent has ended
        while (order := pipe.recv()) is not None:
            number, name, argument = order
            pipe.send((number, _done(name, argument, server, trap, compactions)))
        server.stop()
    os._exit(0)  # nothing that was inherited from the process that forked is to be run


def _done(
    name: str, argument: Any, server: TrappedServer, trap: Trap, compactions: Compactions
) -> Any:
    if name == "lead":
        try:
            return server.lead(argument)
        except (ShardlineError, OSError) as error:
            return f"{type(error).__name__}: {error}"
    if name == "arm":
        trap.arm(argument)
    elif name == "compaction":
        compactions.order = argument
    elif name == "contents":
        return contents_of(server.shard.state)
    elif name == "state":
        thread = server._write_thread
        assert thread is not None
        assert thread.changeover is not None
        return {
            "leads": thread.writes.leading_epoch,
            "seq": server.shard.state.seq,
            "main_seq": thread.changeover.main_seq,
            "killed": compactions.killed,
            "trouble": [str(each) for each in (thread.writes.trouble, thread.changeover.trouble)],
        }
    return None


def fresh(pipe: Connection, generation: str) -> None:
    """A process that loads the shard, says what is in it, and ends."""
    try:
        shard, writes, _ = load(Path(generation), Trap())
        pipe.send(contents_of(shard.state))
        writes.close()
    except (ShardlineError, OSError) as error:
        pipe.send(f"{type(error).__name__}: {error}")
    os._exit(0)
