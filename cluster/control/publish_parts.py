"""What a publish needs of others: the mirror of writes, and the gate. Behind protocols, with fakes
in the tests."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeAlias

from shardline.cluster.rollover.gate import GateFigure, GateReport
from shardline.cluster.rollover.mirror_progress import MirrorProgress
from shardline.shards.core.messages import ReplicaKey, RoutingTable
from shardline.shards.live.takeover import Takeover, TakeoverLook

Bounds: TypeAlias = Mapping[str, Any]


class Mirror(Protocol):
    """Brings the writes of one generation to another, for as long as it is not stopped."""

    async def progress(self) -> MirrorProgress:
        """How far it is."""

    async def drain(self, final: tuple[int, ...], timeout_s: float) -> MirrorProgress:
        """How far it is when the target has so many writes of each shard, or the time is up."""

    async def stop(self) -> None:
        """Ends it."""


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

    async def parting(
        self, live: RoutingTable, candidate: RoutingTable
    ) -> Callable[[], Awaitable[None]]:
        """For a switch that brings no writes over, while no mirror runs. What it returns is called
        when the live one is sealed: a mirror back begins behind what the candidate has then.

        Raises:
            ShardlineError, OSError: the candidate cannot be read, or the store takes no note; what
                is returned too.
        """

    def check_bounds(self, bounds: Bounds) -> None:
        """Raises InvalidInput: they do not go with what the cluster was started with."""

    async def run_gate(
        self,
        live: RoutingTable,
        candidate: RoutingTable,
        mirrored: MirrorProgress | None,
        bounds: Bounds,
    ) -> GateReport:
        """Measures both, and judges the candidate. bounds: as of ``PublishOptions``.

        Raises:
            ShardlineError: it cannot be measured.
        """

    async def takeovers(
        self, live: RoutingTable, generation: int, token: str
    ) -> tuple[Takeover, ...]:
        """The order to each shard of the live generation to take over the index of another.

        Raises:
            VersionMismatch, InvalidInput: it cannot be: ``check_takeover``.
            WritesLost: the rows of the live one have writes which those of the other lack.
            NotFound, CorruptFile, NewerFormat, OSError: of the files.
        """

    async def take_over(self, key: ReplicaKey, order: Takeover) -> None:
        """Has a primary begin. Raises: as ``ShardActor.take_over``; RayError, TimeoutError: it does
        not answer."""

    async def taken_over(self, key: ReplicaKey) -> TakeoverLook | None:
        """How far a replica is; None: it does not answer."""

    async def mark(self, key: ReplicaKey) -> None:
        """Has a primary log a write that changes nothing. Raises: as ``take_over``."""

    async def judge_files(self, live: RoutingTable, generation: int, bounds: Bounds) -> GateReport:
        """As ``run_gate``, of a generation that is not loaded."""

    def judge_unreplayed(self, rows: int, bounds: Bounds) -> GateFigure:
        """The figure of the gate that says how many written rows the candidate lacks."""
