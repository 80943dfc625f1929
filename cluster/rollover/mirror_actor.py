"""The Ray actor in which a mirror runs. Detached, so that writes are brought over while the
controller restarts; Ray restarts it, and it goes on from the note that it keeps in the store.

A thin shell around ``Mirror`` and the tables of the generation that it writes to.
"""

import asyncio
import logging
import random
import time
from contextlib import suppress
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from shardline.cluster.rollover.controller_tables import table_of
from shardline.cluster.rollover.fanout_target import FanoutTarget
from shardline.cluster.rollover.mirror import Mirror, trouble_of
from shardline.cluster.rollover.mirror_opening import MirrorOrder, TargetEncoder, open_mirror
from shardline.cluster.rollover.mirror_progress import MirrorProgress
from shardline.router.fanout.fanout import Fanout
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import ShardlineError, Unavailable
from shardline.shards.core.messages import RoutingTable

logger = logging.getLogger(__name__)

MIRROR_PREFIX = "shardline-mirror-"
STOP_S = 15.0  # for the round that is under way
ANSWER_S = 10.0  # of its process, which may be starting
END_LOOK_S = 0.1  # between two looks for the name of an actor that was ended
END_S = 30.0  # within which its name is free
OPEN_PAUSE_S = 2.0  # before files that could not be read are tried again


class MirrorActor:
    """Brings writes over from its start until ``stop``."""

    def __init__(self, order: MirrorOrder) -> None:
        self._order = order
        fanout = Fanout(order.secret, RouterConfig(), random.Random())
        self._target = FanoutTarget(order.target, fanout)
        self._mirror: Mirror | None = None
        self._failure: Exception | None = None  # why it could not begin
        self._has_tried = asyncio.Event()
        self._is_stopped = False
        self._tasks = [
            asyncio.ensure_future(self._run()),
            asyncio.ensure_future(self._target.follow(self._table_after)),
        ]

    async def between(self) -> tuple[int, int]:
        """Source and target."""
        return self._order.source, self._order.target

    async def progress(self) -> MirrorProgress:
        """How far it is. That it cannot read what it begins with is its trouble; it goes on
        trying."""
        await self._has_tried.wait()
        if self._mirror is None:
            assert self._failure is not None
            return MirrorProgress(positions=(), ends=(), trouble=trouble_of(self._failure))
        return self._mirror.progress()

    async def drain(self, final: tuple[int, ...], timeout_s: float) -> MirrorProgress:
        """As ``Mirror.drain``.

        Raises:
            ShardlineError, OSError: it cannot read what it begins with; a bug, as it came.
        """
        await self._has_tried.wait()
        if self._mirror is None:
            assert self._failure is not None
            raise self._failure
        return await self._mirror.drain(final, timeout_s)

    async def stop(self) -> None:
        """Ends it after the round that is under way, STOP_S at the latest; the process stays until
        Ray ends it."""
        self._is_stopped = True
        run, follow = self._tasks
        if self._mirror is not None:
            await self._mirror.stop()
            await asyncio.wait([run], timeout=STOP_S)
        for task in (run, follow):
            task.cancel()
        await self._target.close()

    async def _run(self) -> None:
        while self._mirror is None and not self._is_stopped:
            try:
                encoder = await asyncio.to_thread(TargetEncoder.of, await self._target.table())
                self._mirror = await asyncio.to_thread(
                    open_mirror, self._order, self._target, encoder
                )
                self._has_tried.set()
                await self._mirror.run()
            except Exception as error:  # a bug is told too: a publish waits for this
                known = isinstance(error, ShardlineError | OSError)
                logger.error(
                    "the mirror cannot begin: %s", error, exc_info=None if known else error
                )
                self._failure = error
                self._has_tried.set()
                await asyncio.sleep(OPEN_PAUSE_S)

    async def _table_after(self, version: int, timeout_s: float) -> RoutingTable | None:
        order = self._order
        return await table_of(order.controller, order.target, version, timeout_s)


class RunningMirror:
    """A mirror as the controller reaches it."""

    def __init__(self, handle: "ActorHandle[Any]") -> None:
        self._handle = handle

    async def progress(self) -> MirrorProgress:
        """As ``MirrorActor.progress``; waits where Ray restarts its process.

        Raises:
            RayError: its process cannot be started.
        """
        found: MirrorProgress = await self._handle.progress.remote()
        return found

    async def drain(self, final: tuple[int, ...], timeout_s: float) -> MirrorProgress:
        """As ``MirrorActor.drain``.

        Raises:
            RayError: with its error as the cause, or its process cannot be started.
        """
        found: MirrorProgress = await self._handle.drain.remote(final, timeout_s)
        return found

    async def stop(self) -> None:
        """Ends it and its process, whether it answers or not."""
        with suppress(RayError, TimeoutError):
            async with asyncio.timeout(STOP_S + ANSWER_S):
                await self._handle.stop.remote()
        await asyncio.to_thread(ray.kill, self._handle)  # blocks while Ray's head is away


async def start_mirror(order: MirrorOrder, digest: str) -> RunningMirror:
    """The mirror of the cluster with this digest: the one that runs, if it is between the same two
    generations, or a new one. There are never two: one in each direction would go round in a
    circle, and undo newer writes.

    Raises:
        Unavailable: the one before does not end.
    """
    ends_at = time.monotonic() + END_S
    while (running := await end_mirror(digest, but=(order.source, order.target))) is None:
        if await asyncio.to_thread(_existing, digest) is None:
            break
        if time.monotonic() > ends_at:
            raise Unavailable("the mirror of other generations does not end")
        await asyncio.sleep(END_LOOK_S)
    if running is not None:
        return running
    actor = ray.remote(MirrorActor).options(
        name=f"{MIRROR_PREFIX}{digest}",
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=100,
        num_cpus=0,
    )
    return RunningMirror(await asyncio.to_thread(actor.remote, order))


async def end_mirror(digest: str, but: tuple[int, int] | None) -> RunningMirror | None:
    """Ends the mirror of the cluster with this digest, unless it is between these generations,
    from the first to the second; that one, if it runs."""
    running = await asyncio.to_thread(_existing, digest)  # blocks while Ray's head is away
    if running is None:
        return None
    if but is not None:
        with suppress(RayError, TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                if await running.between.remote() == but:
                    return RunningMirror(running)
    await RunningMirror(running).stop()
    return None


def _existing(digest: str) -> "ActorHandle[Any] | None":
    with suppress(ValueError):
        return ray.get_actor(f"{MIRROR_PREFIX}{digest}")
    return None
