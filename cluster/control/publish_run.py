"""One publish, stage by stage: a task of the controller. What went wrong is raised, and nothing is
undone here: ``publishing`` does that."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass

from shardline.cluster.control.beside import Opener
from shardline.cluster.control.decisions import Decisions
from shardline.cluster.control.fleet_state import Beside, Role
from shardline.cluster.control.leading import primary_key
from shardline.cluster.control.mirrors import Mirrors
from shardline.cluster.control.outlook import not_ready, raise_if_hopeless
from shardline.cluster.control.placement_state import Placement
from shardline.cluster.control.publish_parts import PublishParts
from shardline.cluster.control.publish_state import PublishKind, PublishOptions, PublishStage
from shardline.cluster.control.publish_switch import switch
from shardline.cluster.rollover.gate import GateReport
from shardline.cluster.rollover.mirror_progress import MirrorProgress
from shardline.shards.core.errors import (
    GateFailed,
    Unavailable,
    error_of,
)
from shardline.shards.core.messages import RoutingTable

LOOK_S = 0.2  # between two looks at how far it is
FEW = 64  # writes: with no more to bring over, a switch need not wait for long
TROUBLE_S = 60.0  # of a mirror that does not go on


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTools:
    """What a run works with. load_s: in which a generation is to be loaded. ended: raises nothing
    once what is beside the live generation may be ended. opening: notes what is to be loaded.
    written: as of ``Publishing``. tell: changes of the progress. no_way_back: notes that no
    generation can be returned to any more."""

    decisions: Decisions
    opener: Opener
    parts: PublishParts
    mirrors: Mirrors
    load_s: float
    ended: Callable[[], Awaitable[None]]
    opening: Callable[[PublishOptions], Awaitable[None]]
    written: Callable[[], int | None]
    tell: Callable[..., Awaitable[None]]
    no_way_back: Callable[[], None]


async def until_settled(tools: RunTools) -> None:
    """A controller that has just begun hears of the live generation first. Raises as ``not_ready``:
    not in time."""
    decisions = tools.decisions
    if not await decisions.until(lambda: decisions.placement.settled, tools.load_s):
        raise not_ready(decisions.placement, tools.load_s)


async def told(tools: RunTools, report: GateReport, generation: int) -> None:
    """The figures are those of the publish. Raises GateFailed: one is outside its bound."""
    await tools.tell(figures=tuple(asdict(each) for each in report.figures))
    if not report.ok:
        raise GateFailed(
            f"generation {generation} did not pass the gate: " + "; ".join(report.reasons),
            hint="--skip-gate REASON publishes it all the same",
        )


class PublishRun:
    """``to_live`` is all of it."""

    def __init__(self, tools: RunTools, options: PublishOptions) -> None:
        self._tools = tools
        self._options = options
        self._decisions = tools.decisions
        self._report: GateReport | None = None  # of the gate; None: it was not asked

    async def to_live(self) -> None:
        """Returns once the generation is live.

        Raises:
            GateFailed: a figure is outside its bound.
            ShardlineError, OSError, RayError: it could not be loaded, measured or made live.
        """
        await until_settled(self._tools)
        if not self._is_loaded:
            await self._load()
        await self._wait_loaded()
        mirror, mirrored = None, None
        part: Callable[[], Awaitable[None]] = _nothing
        if self._beside.placement.rules.writes:
            if self._options.with_writes:
                mirrored = await self._replayed()
                mirror = await self._tools.mirrors.between(*self._tables)
            else:
                await self._tools.mirrors.stop()  # of one that was kept: nobody writes to it now
                part = await self._tools.parts.parting(*self._tables)
        if self._options.has_gate:
            await self._judged(mirrored)
        await self._tell(PublishStage.SWITCHING, "holding writes for a moment")
        await switch(
            self._decisions,
            self._options.generation,
            mirror,
            on_try=self._on_try,
            on_drained=self._on_drained,
            on_parting=part,
        )

    @property
    def _beside(self) -> Beside:
        """Raises Unavailable: it was ended meanwhile."""
        beside = self._decisions.fleet.beside
        if beside is None or beside.generation != self._options.generation:
            raise Unavailable(
                "the generation was ended while it was being loaded or measured",
                got="the live one needs the room that it had, after a host was lost",
                hint="add a host, then publish again",
            )
        return beside

    @property
    def _is_loaded(self) -> bool:
        beside = self._decisions.fleet.beside
        return beside is not None and beside.generation == self._options.generation

    async def _load(self) -> None:
        options, opener = self._options, self._tools.opener
        await self._tools.ended()
        event = await asyncio.to_thread(
            opener.beside,
            options.generation,
            Role.CANDIDATE,
            is_mirrored=options.with_writes,
        )
        await self._tools.opening(options)
        await self._decisions.take(event)

    async def _wait_loaded(self) -> None:
        """Every replica answers, and every shard has one that takes writes."""
        deadline = time.monotonic() + self._tools.load_s
        while not _is_served(self._beside.placement):
            placement = self._beside.placement
            raise_if_hopeless(placement)
            staying = placement.staying()
            answering = sum(state.answers for state in staying)
            text = "loading its shards beside the live ones"
            await self._tell(PublishStage.LOADING, text, answering, len(staying))
            if time.monotonic() > deadline:
                raise _not_served(placement, self._tools.load_s)
            await asyncio.sleep(LOOK_S)

    @property
    def _tables(self) -> tuple[RoutingTable, RoutingTable]:
        """Of the live generation, and of the one to be live."""
        return self._decisions.placement.table, self._beside.placement.table

    async def _replayed(self) -> MirrorProgress:
        """Once there is little left to bring over.

        Raises:
            GateFailed: a part of what it lacks is not to be brought over.
            Unavailable: nothing is, by how it was loaded.
        """
        if not self._beside.is_mirrored:
            raise Unavailable(
                f"generation {self._options.generation} is not brought the writes of the live one",
                hint="`shardline publish --finish` ends it, and after that it can be loaded anew",
            )
        calm_at = time.monotonic()
        while True:
            found = await self._tools.mirrors.look(*self._tables)
            if found.is_apart and self._options.kind is PublishKind.PUBLISH:
                raise _apart(*self._tables)
            done, written = sum(found.positions), self._tools.written()
            # a log whose end has not been read is counted by a guess
            total = sum(found.ends) if written is None else max(done, written)
            text = "bringing writes over" if found.trouble is None else found.trouble.text
            await self._tell(PublishStage.REPLAYING, text, done, total)
            await self._tools.tell(unreplayed=found.unreplayed, examples=found.examples)
            if found.trouble is None:
                calm_at = time.monotonic()
                if found.behind <= FEW:
                    return found
            elif found.is_hopeless or time.monotonic() - calm_at > TROUBLE_S:
                raise error_of(found.trouble.code, found.trouble.text)
            await asyncio.sleep(LOOK_S)

    async def _judged(self, mirrored: MirrorProgress | None) -> None:
        await self._tell(PublishStage.GATE, "measuring it beside the live one")
        await self._judged_by(await self._gate(mirrored))

    def _gate(self, mirrored: MirrorProgress | None) -> Awaitable[GateReport]:
        live, candidate = self._tables
        return self._tools.parts.run_gate(live, candidate, mirrored, self._options.bounds)

    async def _judged_by(self, report: GateReport) -> None:
        self._report = report
        await told(self._tools, report, self._options.generation)

    async def _on_drained(self, reached: MirrorProgress) -> None:
        """Rows that came after the gate may have been left out too."""
        await self._tools.tell(unreplayed=reached.unreplayed, examples=reached.examples)
        if self._report is not None:
            figure = self._tools.parts.judge_unreplayed(reached.unreplayed, self._options.bounds)
            await self._judged_by(self._report.with_figure(figure))

    async def _on_try(self, number: int, said: str) -> None:
        text = said or "holding writes for a moment"
        await self._tell(PublishStage.SWITCHING, text, number, number)

    async def _tell(self, stage: PublishStage, text: str, done: int = 0, total: int = 0) -> None:
        await self._tools.tell(stage=stage, text=text, done=done, total=total)


async def _nothing() -> None:
    return


def _apart(live: RoutingTable, coming: RoutingTable) -> GateFailed:
    """The error that one of them went live without the writes of the other."""
    number = coming.generation
    return GateFailed(
        f"generation {live.generation} went live without the writes of {number}, and has some of "
        f"its own that {number} may lack",
        hint=f"`shardline rollback` returns to what {number} had, with all that was written since; "
        "`shardline build --from-live` makes a generation that has what is live now",
    )


def _is_served(placement: Placement) -> bool:
    if not placement.ready or not placement.settled:
        return False
    shards = [route.shard for route in placement.table.shards]
    return not placement.rules.writes or all(primary_key(placement, shard) for shard in shards)


def _not_served(placement: Placement, timeout_s: float) -> Unavailable:
    """The error that the time is up: who does not answer, or why nobody takes writes."""
    if not placement.ready:
        return not_ready(placement, timeout_s)
    failed = [known.failed.text for known in placement.leading.values() if known.failed is not None]
    return Unavailable(
        f"not every shard of generation {placement.table.generation} takes writes",
        expected=f"within {timeout_s:g} s",
        got=failed[0] if failed else None,
    )
