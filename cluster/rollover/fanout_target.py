"""A generation as what is written to: its primaries, by the routing tables of its controller."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from shardline.router.fanout.fanout import Fanout
from shardline.router.fanout.primary import Delivery
from shardline.router.written import Part
from shardline.shards.core.errors import ShardlineError, Unavailable
from shardline.shards.core.messages import RoutingTable, WriteReply

logger = logging.getLogger(__name__)

ATTEMPT_S = 10.0  # for one part: a shard under load that has to write 16 MiB takes a second
POLL_S = 20.0  # one long poll for a newer table
PAUSE_S = 1.0  # after a poll that failed

# (version) -> a table of the generation of a higher version; None: none came in time
TableAfter = Callable[[int, float], Awaitable[RoutingTable | None]]


class FanoutTarget:
    """``follow`` in a task of its own; all methods in one event loop. As ``mirror.Target``."""

    def __init__(self, generation: int, fanout: Fanout) -> None:
        self._generation = generation
        self.fanout = fanout
        self._has_table = asyncio.Event()
        self.failure: Exception | None = None  # why no table came, the last time that it was asked

    async def table(self) -> RoutingTable:
        await self._has_table.wait()
        with self.fanout.pin() as snapshot:
            return snapshot.table

    async def deliver(self, part: Part, /) -> WriteReply:
        """As ``Delivery.send``."""
        deadline = self.fanout.clock.time() + ATTEMPT_S
        delivery = Delivery(self.fanout, self._generation, part.shard, deadline, in_loop=False)
        return await delivery.send(part.message)

    async def apply(self, table: RoutingTable) -> None:
        """Raises Unavailable: a table of another generation."""
        if table.generation != self._generation:
            raise Unavailable(
                "the table of another generation",
                expected=str(self._generation),
                got=str(table.generation),
            )
        await self.fanout.apply(table, None)
        self._has_table.set()

    async def follow(self, table_after: TableAfter) -> None:
        """Applies every newer table, for good; while none comes the one in use serves on."""
        version = 0
        while True:
            try:
                table = await table_after(version, POLL_S)
                if table is not None:
                    await self.apply(table)
                    version = table.version
                self.failure = None
            except Exception as error:  # noqa: BLE001  a controller that restarts, say
                self._has_failed(error)
                await asyncio.sleep(PAUSE_S)

    async def close(self) -> None:
        await self.fanout.close()

    def _has_failed(self, error: Exception) -> None:
        """Logs what is not what the last attempt failed with; a bug with its traceback."""
        if repr(error) != repr(self.failure):
            known = isinstance(error, ShardlineError | OSError)
            logger.warning(
                "no table of generation %d: %s",
                *(self._generation, error),
                exc_info=None if known else error,
            )
        self.failure = error
