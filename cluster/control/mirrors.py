"""The mirror of a cluster: started, looked at, replaced by one in the other direction, ended."""

import asyncio

from ray.exceptions import ActorDiedError, RayError, RayTaskError

from shardline.cluster.control.publish_parts import Mirror, PublishParts
from shardline.cluster.control.shard_actors import reason_of
from shardline.cluster.rollover.mirror_progress import MirrorProgress
from shardline.cluster.rollover.mirror_term import MirrorReplaced
from shardline.shards.core.errors import ShardlineError, Unavailable
from shardline.shards.core.messages import Absence, RoutingTable

STOP_S = 30.0  # of a mirror: it ends a round first, and may not answer
ANSWER_S = 5.0  # within which it says how far it is


class Mirrors:
    """There is one at most. With one in each direction every write would go round for ever, so no
    other is left when one is started. Whoever calls waits for those who came before."""

    def __init__(self, parts: PublishParts) -> None:
        self._parts = parts
        self._lock = asyncio.Lock()
        self._between: tuple[int, int] | None = None
        self._mirror: Mirror | None = None
        self.seen: MirrorProgress | None = None  # by the newest look at the one that runs
        self.may_be_left = False  # one that was to be stopped: that failed, or was cut short

    async def between(self, source: RoutingTable, target: RoutingTable) -> Mirror:
        """The one from source to target; another one is stopped first. Raises: as its start, or as
        ``stop``."""
        wanted = source.generation, target.generation
        async with self._lock:
            if self._mirror is not None and self._between != wanted:
                await self._stop()
            if self._mirror is None:
                await self._parts.end_mirrors(but=wanted)
                self._mirror = await self._parts.start_mirror(source, target)
                self._between = wanted
            return self._mirror

    async def look(self, source: RoutingTable, target: RoutingTable) -> MirrorProgress:
        """How far the one from source to target is; that it does not answer is a trouble. Where
        its process has ended for good, or another one was opened in its place by a controller that
        woke up late, say, a new one is started with the next look.

        Raises: as ``between``.
        """
        mirror = await self.between(source, target)
        try:
            async with asyncio.timeout(ANSWER_S):
                found = await mirror.progress()
        except (TimeoutError, RayError, ShardlineError, OSError) as error:
            if isinstance(error, ActorDiedError) and self._mirror is mirror:
                self._mirror = self._between = None
            found = MirrorProgress(positions=(), ends=(), trouble=_trouble(error))
        if found.trouble is not None and found.trouble.code == MirrorReplaced.code:
            await self._replaced(mirror)
        self.seen = found
        return found

    async def _replaced(self, mirror: Mirror) -> None:
        async with self._lock:
            if self._mirror is mirror:
                await self._stop()

    async def stop(self) -> None:
        """Ends it, after the writes that it has under way.

        Raises:
            Unavailable: it does not end. RayError: whether it has ended is not known.
        """
        async with self._lock:
            await self._stop()

    async def _stop(self) -> None:
        mirror, self._mirror, self._between = self._mirror, None, None
        self.seen = None
        self.may_be_left = True
        try:
            if mirror is not None:
                async with asyncio.timeout(STOP_S):
                    await mirror.stop()
        except TimeoutError as error:
            raise Unavailable(
                "the mirror of other generations does not end",
                expected=f"within {STOP_S:g} s",
                hint="it is ended once Ray's head answers: try again then",
            ) from error
        finally:
            await self._parts.end_mirrors(but=None)
            self.may_be_left = False


def _trouble(error: Exception) -> Absence:
    """Of a mirror that does not say how far it is: because it cannot begin, or does not answer."""
    reason = reason_of(error)
    is_told = isinstance(error, RayTaskError) or reason.code != Unavailable.code
    return reason if is_told else Absence(reason.code, f"the mirror does not answer: {reason.text}")
