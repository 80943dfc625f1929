"""A publish where there is no room for two generations: each shard of the live one takes over the
index of its counterpart, one after the other. A task of the controller, as ``publish_run``.

The live generation keeps its number, its log and its processes, so no answer mixes generations,
and a write is acknowledged as ever. Until the end some shards search the one index and some the
other; models are the same, so their scores compare.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict

from ray.exceptions import RayError

from shardline.cluster.control.leading import primary_key
from shardline.cluster.control.outlook import not_ready
from shardline.cluster.control.publish_run import LOOK_S, RunTools
from shardline.cluster.control.publish_state import PublishOptions, PublishStage
from shardline.shards.core.errors import (
    GateFailed,
    ShardlineError,
    Unavailable,
    error_of,
    last_line,
)
from shardline.shards.core.messages import ReplicaKey
from shardline.shards.live.takeover import Takeover, TakeoverLook

# A replica that could not load what its primary has made tries again after a minute.
ASK_AGAIN_S = 90.0


class PublishInTurn:
    """``to_live`` is all of it. What has been done of it by a controller that died, say, is not
    done again."""

    def __init__(self, tools: RunTools, options: PublishOptions) -> None:
        self._tools = tools
        self._options = options
        self._decisions = tools.decisions

    async def to_live(self) -> None:
        """Returns once all replicas of all shards search the index of the generation.

        Raises:
            GateFailed: a figure is outside its bound; nothing has been changed.
            ShardlineError, OSError, RayError: it could not be measured, or a shard has not taken
                its index over; those before it have.
        """
        await self._settled()
        await self._tools.ended()
        parts, table = self._tools.parts, self._decisions.placement.table
        orders = await parts.takeovers(table, self._options.generation)
        if self._options.has_gate:
            await self._judged()
        for done, order in enumerate(orders):
            await _ShardInTurn(self._tools, self._options, order, done, len(orders)).taken_over()

    async def _settled(self) -> None:
        """A controller that has just begun hears of the live generation first."""
        ready = lambda: self._decisions.placement.settled  # noqa: E731
        if not await self._decisions.until(ready, self._tools.load_s):
            raise not_ready(self._decisions.placement, self._tools.load_s)

    async def _judged(self) -> None:
        text = "measuring it in its files"
        await self._tools.tell(stage=PublishStage.GATE, text=text, done=0, total=0)
        report = await self._tools.parts.judge_files(
            self._decisions.placement.table, self._options.generation, self._options.bounds
        )
        await self._tools.tell(figures=tuple(asdict(each) for each in report.figures))
        if not report.ok:
            raise GateFailed(
                f"generation {self._options.generation} did not pass the gate: "
                + "; ".join(report.reasons),
                hint="--skip-gate REASON publishes it all the same",
            )


class _ShardInTurn:
    """One shard, the ``done``-th of ``total``."""

    def __init__(
        self, tools: RunTools, options: PublishOptions, order: Takeover, done: int, total: int
    ) -> None:
        self._tools, self._order = tools, order
        self._generation = options.generation
        self._shard, self._total = done, total
        self._asked: dict[ReplicaKey, float] = {}  # primaries, and when

    async def taken_over(self) -> None:
        """Raises: as ``PublishInTurn.to_live``."""
        deadline = time.monotonic() + self._tools.load_s
        said = ""
        while True:
            placement = self._tools.decisions.placement
            keys = [s.key for s in placement.staying() if s.key.shard == self._shard]
            looks = dict(zip(keys, await self._looks(keys), strict=True))
            if keys and all(each and each.index_of == self._generation for each in looks.values()):
                return
            primary = primary_key(placement, self._shard)
            if primary is not None and (look := looks.get(primary)) is not None:
                said = await self._seen(primary, look) or said
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"shard {self._shard} has not taken over the index of generation "
                    f"{self._generation}",
                    expected=f"within {self._tools.load_s:g} s",
                    got=said or "not every replica of it answers",
                )
            await self._tools.tell(
                stage=PublishStage.LOADING,
                text=f"shard {self._shard} takes its index over" + (f": {said}" if said else ""),
                done=self._shard,
                total=self._total,
            )
            await asyncio.sleep(LOOK_S)

    async def _seen(self, primary: ReplicaKey, look: TakeoverLook) -> str:
        """Has the primary begin, unless it has; what hinders it now. Raises: it failed."""
        asked_s = self._asked.get(primary)
        if asked_s is not None and look.failure is not None:
            raise error_of(look.failure.code, look.failure.text)
        is_waiting = asked_s is not None and time.monotonic() < asked_s + ASK_AGAIN_S
        if look.index_of == self._generation or look.is_busy or is_waiting:
            return ""
        try:
            await self._tools.parts.take_over(primary, self._order)
        except (ShardlineError, RayError, TimeoutError) as error:
            return last_line(error)
        self._asked[primary] = time.monotonic()
        return ""

    async def _looks(self, keys: Sequence[ReplicaKey]) -> list[TakeoverLook | None]:
        return list(await asyncio.gather(*map(self._tools.parts.taken_over, keys)))
