"""A generation with all its replicas in this process, without Ray and sockets: what the controller
and the shards' processes do, step by step, and one mirror from such a generation to another."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shardline.cluster.control.opening import empty_table
from shardline.cluster.rollover.mirror_opening import MirrorOrder, open_mirror
from shardline.cluster.rollover.mirror_progress import MirrorProgress
from shardline.cluster.store import Store
from shardline.router.written import Part
from shardline.shards.core.errors import (
    InvalidInput,
    NotFound,
    NotPrimary,
    ShardlineError,
    WritesLost,
)
from shardline.shards.core.messages import RoutingTable, WriteReply
from shardline.shards.live.changeover import LOOK_S, Changeover
from shardline.shards.live.compaction import compact
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.loading import load_caught_up
from shardline.shards.live.writes import ShardWrites
from shardline.shards.server.shard import Shard
from shardline.shards.storage.generation import read_generation
from tests.live_shard import contents

CONFIG = LiveConfig(compact_min_rows=1, compact_share=1e-9)  # any change makes one due
TURNS = 4  # a compaction begins, is seen to have ended, is loaded, is swapped in
LIFE_S = 20.0  # far above what a mirror takes, so that one that hangs fails its test


class Killed(BaseException):
    """The process of a mirror ends here."""


@dataclass(frozen=True)
class Ended:
    """A compaction that has ended, as ``changeover.Running``."""

    code: int

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int:
        return self.code


def compaction_here(generation: Path, shard: int, until: int) -> Ended:
    try:
        compact(generation, shard, until=until)
    except InvalidInput:  # every item is deleted
        return Ended(1)
    return Ended(0)


class Member:
    """The process of one replica."""

    def __init__(self, folder: Path, shard: int) -> None:
        self._folder, self._shard = folder, shard
        self._now_s = 0.0
        self.start()

    def start(self) -> None:
        folder, shard = self._folder, self._shard
        manifest = read_generation(folder)
        loaded = load_caught_up(folder, manifest, shard)
        self.shard = Shard(shard=shard, generation=manifest.generation, state=loaded.state)
        self.writes = ShardWrites(
            self.shard,
            live_folder(folder, shard),
            keys=loaded.keys,
            config=CONFIG,
            clock=lambda: self._now_s,
        )
        self.changeover = Changeover(
            folder,
            shard,
            main_seq=loaded.main_seq,
            config=CONFIG,
            start=compaction_here,
            clock=lambda: self._now_s,
        )

    def restart(self) -> None:
        """Killed, and started again."""
        self.writes.close()
        self.start()

    def turn(self) -> None:
        """What the thread that writes does once, a second after the last time."""
        self._now_s += LOOK_S
        self.writes.notice_successor()
        try:
            self.writes.catch_up()
        except NotFound:  # trimmed: what it misses is in a main index
            assert not self.writes.leads
        loaded = self.changeover.turn(self.writes.state, leads=self.writes.leads)
        if loaded is not None:
            assert self.writes.adopt(loaded)
            self.changeover.main_seq = loaded.main_seq
        for thread in threading.enumerate():
            if thread.name == "shard-changeover":
                thread.join()

    def change_over(self) -> None:
        """To the newest main index; the primary makes one first."""
        for _ in range(TURNS):
            self.turn()
        assert self.changeover.trouble is None

    def catch_up(self) -> None:
        """Behind it is the state of its shard, if nobody writes. One that led notices first that
        another one leads."""
        self._now_s += LOOK_S
        self.writes.notice_successor()
        try:
            self.writes.catch_up()
        except NotFound:
            self.change_over()

    def lead(self, epoch: Callable[[], int]) -> int:
        """Raises as ``ShardWrites.lead``."""
        try:
            return self.writes.lead(epoch())
        except NotFound:
            self.change_over()
            return self.writes.lead(epoch())

    def seal(self, epoch: Callable[[], int]) -> int:
        try:
            return self.writes.seal(epoch())
        except NotFound:
            self.change_over()
            return self.writes.seal(epoch())


class LoadedGeneration:
    """All replicas of all shards; ``leaders`` knows the primary of each shard, None: there is
    none."""

    def __init__(self, store: Store, number: int, replicas: int) -> None:
        self.number, self.folder = number, store.generation(number)
        self.manifest = read_generation(self.folder)
        self._store = store
        self.table: RoutingTable = empty_table(store, self.folder, self.manifest, "c")
        self.members = [
            [Member(self.folder, entry.shard) for _ in range(replicas)]
            for entry in self.manifest.shards
        ]
        self.leaders: list[Member | None] = [None] * len(self.members)
        self.settle()

    @property
    def seqs(self) -> tuple[int, ...]:
        return tuple(leader.writes.seq for leader in self.leaders if leader is not None)

    def next_epoch(self) -> int:
        epoch = self._store.counter() + 1
        self._store.raise_counter(epoch)
        return epoch

    def settle(self) -> None:
        """Every shard gets a primary."""
        for shard, leader in enumerate(self.leaders):
            if leader is None:
                self.elect(shard, 0)

    def elect(self, shard: int, which: int) -> None:
        """The primary before it is not told."""
        member = self.members[shard][which % len(self.members[shard])]
        member.lead(self.next_epoch)
        self.leaders[shard] = member

    def seal(self, which: int) -> tuple[int, ...]:
        """By any replica of each shard; primaries are not told."""
        self.leaders = [None] * len(self.leaders)
        return tuple(
            replicas[(which + shard) % len(replicas)].seal(self.next_epoch)
            for shard, replicas in enumerate(self.members)
        )

    def restart(self, shard: int, which: int) -> None:
        member = self.members[shard][which % len(self.members[shard])]
        if self.leaders[shard] is member:
            self.leaders[shard] = None
        member.restart()

    def deliver(self, part: Part) -> WriteReply:
        """To the primary. Raises ShardlineError: as the shard answers."""
        leader = self.leaders[part.shard]
        if leader is None:
            raise NotPrimary("none now")
        (reply,) = leader.writes.write([part.message])
        if isinstance(reply, ShardlineError):
            raise reply
        return reply

    def contents(self) -> dict[int, bytes]:
        """The vector of every item, as primaries hold them; each shard has only its own."""
        found: dict[int, bytes] = {}
        for shard, leader in enumerate(self.leaders):
            assert leader is not None
            here = contents(leader.shard)
            if here:
                homes = self.table.partition.shard_of(np.array(list(here)))
                assert set(homes.tolist()) == {shard}
            found |= here
        return found

    def close(self) -> None:
        for replicas in self.members:
            for member in replicas:
                member.changeover.stop()
                member.writes.close()


@dataclass(frozen=True)
class Late:
    """What a mirror was sending when it was killed: it arrives at any time, or never."""

    generation: int
    part: Part


class MirrorTarget:
    """The generation that a mirror writes to, as its ``Target``."""

    def __init__(self, loaded: LoadedGeneration, late: list[Late], kill_at: int | None) -> None:
        self._loaded, self._late, self._left = loaded, late, kill_at

    async def table(self) -> RoutingTable:
        return self._loaded.table

    async def deliver(self, part: Part, /) -> WriteReply:
        leader = self._loaded.leaders[part.shard]
        assert leader is not None
        # as a router's table names it: a primary elected since then refuses it
        part = replace(part, message=replace(part.message, epoch=leader.writes.epoch))
        try:
            self._step()
        except Killed:
            self._late.append(Late(self._loaded.number, part))
            raise
        reply = self._loaded.deliver(part)
        self._step()
        return reply

    def _step(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise Killed


async def no_sleep(seconds: float) -> None:
    await asyncio.sleep(0)


def is_lost(progress: MirrorProgress) -> bool:
    return progress.trouble is not None and progress.trouble.code == NotFound.code


def mirrored(
    store: Store,
    source: int,
    to: LoadedGeneration,
    final: Sequence[int],
    *,
    late: list[Late],
    kill_at: int | None = None,
    is_sealed: bool = False,
) -> MirrorProgress:
    """One life of a mirror: until the target has ``final``, or writes are lost. is_sealed: those
    are the last ones of the source.

    Raises:
        Killed: before step ``kill_at``, two per part.
        WritesLost: the target lacks writes that the source's log does not have.
    """
    order = MirrorOrder(
        store=str(store.root),
        source=source,
        target=to.number,
        controller="",
        secret=b"",
    )

    async def live() -> MirrorProgress:
        mirror = open_mirror(order, MirrorTarget(to, late, kill_at), None)
        mirror._sleep = no_sleep
        run = asyncio.create_task(mirror.run())
        async with asyncio.timeout(LIFE_S):
            while not (run.done() or mirror.progress().has(final) or is_lost(mirror.progress())):
                await asyncio.sleep(0.0005)
        if is_sealed and mirror.progress().has(final):
            await mirror.drain(final, LIFE_S)
        await mirror.stop()
        await run
        return mirror.progress()

    progress = asyncio.run(live())
    if is_lost(progress):
        assert progress.trouble is not None
        raise WritesLost(progress.trouble.text)
    return progress
