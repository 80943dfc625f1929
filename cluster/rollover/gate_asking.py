"""How the gate asks a generation: every row, of the newest table, and again what is refused for a
moment, because a replica is restarted, say, or routers watch their recall at the same time."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from shardline.router.fanout.coalesce import LaneKey
from shardline.router.fanout.fanout import Fanout
from shardline.router.query import Merged
from shardline.shards.core.errors import DeadlineExceeded, Unavailable
from shardline.shards.core.messages import SearchOptions
from shardline.shards.core.schema import FloatArray

logger = logging.getLogger(__name__)

K = 100  # of recall and overlap: what builds tune for
TIMEOUT_S = 60.0  # of one question to all shards; an exact one reads every row
TRIES = 5
PAUSE_S = 1.0  # between two

T = TypeVar("T")


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """Asks TRIES times. Raises Unavailable: refused the last time too; DeadlineExceeded: at once,
    for another minute would bring no more."""
    for _ in range(TRIES - 1):
        try:
            return await ask()
        except DeadlineExceeded:
            raise
        except Unavailable as error:
            logger.info("the gate asks again: %s", error)
            await asyncio.sleep(PAUSE_S)
    return await ask()


async def asked(fanout: Fanout, queries: FloatArray, k: int = K, *, exact: bool = False) -> Merged:
    """queries (n, dim). Raises: as ``patiently``."""
    return await patiently(lambda: _asked_once(fanout, queries, k, exact=exact))


async def took_ms(fanout: Fanout, query: FloatArray, clock: Callable[[], float]) -> float:
    """Milliseconds until one query (dim,) is answered, when it is not refused. Raises: as
    ``patiently``."""

    async def timed() -> float:
        began = clock()
        await _asked_once(fanout, query[None], K, exact=False)
        return (clock() - began) * 1e3

    return await patiently(timed)


async def _asked_once(fanout: Fanout, queries: FloatArray, k: int, *, exact: bool) -> Merged:
    with fanout.pin() as snapshot:
        options = SearchOptions(exact=exact)
        lane = LaneKey(snapshot=snapshot, k=k, min_coverage=1.0, options=options)
        deadline = fanout.clock.time() + TIMEOUT_S
        return await fanout.search(queries, lane, deadline=deadline)
