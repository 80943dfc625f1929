"""Carries out what the rules order, and tells them how it went. Knows Ray, and decides nothing."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from functools import partial

from ray.exceptions import RayError

from shardline.cluster.control.events import (
    Announce,
    End,
    Event,
    Instruction,
    Lead,
    Place,
    Seal,
)
from shardline.cluster.control.placement_state import ReplicaState
from shardline.cluster.control.shard_actors import ShardActors
from shardline.cluster.control.tasks import Tasks
from shardline.shards.core.messages import ReplicaKey

logger = logging.getLogger(__name__)

RETRY_S = 1.0  # before Ray, or the store, is asked again for what it has refused


class Orders:
    """Those under way are tasks of ``tasks``.

    state_of: a replica's, as it is now; None: nobody wants it. take: of an event.
    """

    def __init__(
        self,
        shards: ShardActors,
        tasks: Tasks,
        *,
        state_of: Callable[[ReplicaKey], ReplicaState | None],
        take: Callable[[Event], Awaitable[None]],
    ) -> None:
        self._shards = shards
        self._tasks = tasks
        self._state_of = state_of
        self._take = take

    def carry_out(self, instruction: Instruction) -> None:
        """Begins to."""
        if isinstance(instruction, Announce):
            self._tasks.spawn(self._shards.announce(instruction.key))
        elif isinstance(instruction, End):
            self._tasks.spawn(self._end(instruction))
        elif isinstance(instruction, Lead):
            self._tasks.spawn(self._lead(instruction))
        elif isinstance(instruction, Seal):
            self._tasks.spawn(self._seal(instruction))
        else:
            assert isinstance(instruction, Place)
            self._tasks.spawn(self._place(instruction))

    async def end_others(self, kept: Callable[[], Collection[int]]) -> None:
        """Ends the shards of other generations than these."""
        await self._until_done(
            lambda: self._shards.end_others(kept()), "shards of other generations"
        )

    async def _place(self, place: Place) -> None:
        """Creates the replica's actor, or finds it alive if this controller is a restarted one."""
        await asyncio.sleep(place.after_s)
        state = self._state_of(place.key)
        if state is None or state.node_id != place.node_id:
            return  # its host has gone since
        failed = await asyncio.to_thread(self._shards.place, place.key, place.node_id)
        if self._state_of(place.key) is None:  # nobody wants it any more
            await self._end(End(key=place.key, node_id=place.node_id))
        elif failed is not None:
            await self._told(failed)

    async def _lead(self, lead: Lead) -> None:
        await self._told(await self._shards.lead(lead.key, lead.epoch))

    async def _seal(self, seal: Seal) -> None:
        await self._told(await self._shards.seal(seal.key, seal.epoch))

    async def _told(self, event: Event) -> None:
        """Until it is on record: nobody would hear of it again."""
        while True:
            try:
                await self._take(event)
                return
            except OSError as error:
                logger.warning("not on record yet: %s: %s", event, error)
            await asyncio.sleep(RETRY_S)

    async def _end(self, end: End) -> None:
        """An actor that nobody knows of would keep its memory for ever."""
        ending = partial(self._shards.end_replica, end.key, end.node_id)
        await self._until_done(ending, f"replica {end.key}")

    async def _until_done(self, end: Callable[[], None], what: str) -> None:
        """Tries until Ray has taken the order."""
        while True:
            try:
                await asyncio.to_thread(end)
                return
            except RayError as error:
                logger.warning("%s: not ended yet: %s", what, error)
            await asyncio.sleep(RETRY_S)
