"""What a publish needs of others: the mirror of writes, and the gate. Behind protocols, with fakes
in the tests."""

import asyncio
from dataclasses import dataclass
from typing import Any, Protocol

from shardline.cluster.rollover.mirror_progress import MirrorProgress
from shardline.shards.core.messages import RoutingTable

STOP_S = 30.0  # of a mirror: it ends a round first, and may not answer


class Mirror(Protocol):
    """Brings the writes of one generation to another, for as long as it is not stopped."""

    async def progress(self) -> MirrorProgress:
        """How far it is."""

    async def drain(self, final: tuple[int, ...], timeout_s: float) -> MirrorProgress:
        """How far it is when the target has so many writes of each shard, or the time is up."""

    async def stop(self) -> None:
        """Ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """figures: each {"figure", "value", "bound", "ok"}. failed: a sentence for each that is not."""

    figures: tuple[dict[str, Any], ...]
    failed: tuple[str, ...] = ()


class PublishParts(Protocol):
    """Where a publish gets them."""

    async def start_mirror(self, source: RoutingTable, target: RoutingTable) -> Mirror:
        """Of the two generations: the one that runs already, or a new one.

        Raises:
            ShardlineError: there can be none; the text says why.
        """

    async def end_mirrors(self, but: tuple[int, int] | None) -> None:
        """Ends every mirror of the cluster, those too that a controller before this has started,
        but the one between these generations.

        Raises:
            RayError: not all of them.
        """

    async def run_gate(
        self, live: RoutingTable, candidate: RoutingTable, mirrored: MirrorProgress | None
    ) -> GateReport:
        """Measures both, and judges the candidate.

        Raises:
            ShardlineError: it cannot be measured.
        """


class Mirrors:
    """The mirror of the cluster: there is one at most. With one in each direction every write would
    go round for ever, so no other is left when one is started."""

    def __init__(self, parts: PublishParts) -> None:
        self._parts = parts
        self._between: tuple[int, int] | None = None
        self._mirror: Mirror | None = None

    async def between(self, source: RoutingTable, target: RoutingTable) -> Mirror:
        """The one from source to target; another one is stopped first. Raises: as its start."""
        wanted = source.generation, target.generation
        if self._mirror is not None and self._between != wanted:
            await self.stop()
        if self._mirror is None:
            await self._parts.end_mirrors(but=wanted)
            self._mirror = await self._parts.start_mirror(source, target)
            self._between = wanted
        return self._mirror

    async def stop(self) -> None:
        """Ends it, after the writes that it has under way."""
        mirror, self._mirror, self._between = self._mirror, None, None
        try:
            if mirror is not None:
                async with asyncio.timeout(STOP_S):
                    await mirror.stop()
        finally:
            await self._parts.end_mirrors(but=None)
