"""What a publish needs of others: the mirror of writes, and the gate. Behind protocols, with fakes
in the tests."""

from dataclasses import dataclass
from typing import Any, Protocol

from shardline.shards.core.messages import Absence, RoutingTable


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorProgress:
    """positions: of each shard of the source, how many of its writes the target has. ends: how many
    there are. rows: items written. unreplayed: items that only a vector of another model is known
    of; examples: some of their ids. trouble: why it does not go on now; None: it does.
    """

    positions: tuple[int, ...]
    ends: tuple[int, ...]
    rows: int = 0
    unreplayed: int = 0
    examples: tuple[int, ...] = ()
    trouble: Absence | None = None

    @property
    def behind(self) -> int:
        """Writes that the target does not have yet."""
        pairs = zip(self.positions, self.ends, strict=True)
        return sum(max(0, end - position) for position, end in pairs)


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

    async def run_gate(
        self, live: RoutingTable, candidate: RoutingTable, mirrored: MirrorProgress | None
    ) -> GateReport:
        """Measures both, and judges the candidate.

        Raises:
            ShardlineError: it cannot be measured.
        """


class Mirrors:
    """The mirror of this controller: there is one at most."""

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
            self._mirror = await self._parts.start_mirror(source, target)
            self._between = wanted
        return self._mirror

    @property
    def is_running(self) -> bool:
        return self._mirror is not None

    async def stop(self) -> None:
        """Ends it; nothing if there is none."""
        mirror, self._mirror, self._between = self._mirror, None, None
        if mirror is not None:
            await mirror.stop()
