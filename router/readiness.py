"""Asks every shard whether it answers, for /readyz: seldom, and without waiting for late ones."""

import asyncio
from contextlib import suppress

from shardline.router.fanout.fanout import Fanout
from shardline.shards.core.errors import Unavailable

# How long a caller waits for the first answer: Kubernetes gives a probe a second by default.
# Without one, what is known decides: a shard is late after late_after_ms.
HEAR_S = 0.25
HEARD_S = 0.1  # /readyz needs no key: however often it is asked, shards are asked so often


class Readiness:
    """One question at a time, which all callers share."""

    def __init__(self, fanout: Fanout) -> None:
        self._fanout = fanout
        self._hearing: asyncio.Task[None] | None = None
        self._heard = asyncio.Event()  # some shard has answered the question that goes on
        self._heard_at = -HEARD_S

    async def hear(self) -> None:
        """Returns with the first answer, or after HEAR_S. The question goes on until those that do
        not answer are known to be late; none is asked within HEARD_S of the last."""
        loop = asyncio.get_running_loop()
        if self._hearing is None and loop.time() - self._heard_at >= HEARD_S:
            self._heard = asyncio.Event()
            self._hearing = asyncio.create_task(self._hear(self._heard))
        if self._hearing is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(HEAR_S):
                    await self._heard.wait()

    async def ended(self) -> None:
        """Returns when no question goes on; closing the connections ends one."""
        if self._hearing is not None:
            await self._hearing

    async def _hear(self, heard: asyncio.Event) -> None:
        try:
            with suppress(Unavailable), self._fanout.pin() as snapshot:
                await self._fanout.hear(snapshot, heard)
        finally:
            heard.set()
            self._heard_at = asyncio.get_running_loop().time()
            self._hearing = None
