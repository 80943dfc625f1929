"""A publish where there is no room for two generations: each shard of the live one takes over the
index of its counterpart, one after the other. A task of the controller, as ``publish_run``.

The live generation keeps its number, its log and its processes, so no answer mixes generations,
and a write is acknowledged as ever. Until the end some shards search the one index and some the
other; models are the same, so their scores compare.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

from ray.exceptions import RayError

from shardline.cluster.control.leading import primary_key
from shardline.cluster.control.publish_run import LOOK_S, RunTools, told, until_settled
from shardline.cluster.control.publish_state import PublishOptions, PublishStage
from shardline.shards.core.errors import ShardlineError, Unavailable, error_of, last_line
from shardline.shards.core.messages import ReplicaKey
from shardline.shards.live.takeover import Takeover, TakeoverLook

# A replica that could not load what its primary has made tries again after a minute.
ASK_AGAIN_S = 90.0


class PublishByShard:
    """``to_live`` is all of it. What has been done of it by a controller that died is not done
    again."""

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
        await until_settled(self._tools)
        table, parts = self._decisions.placement.table, self._tools.parts
        orders = await parts.takeovers(table, self._options.generation, self._options.token)
        if self._options.has_gate:
            text = "measuring it in its files"
            await self._tools.tell(stage=PublishStage.GATE, text=text, done=0, total=0)
            generation, bounds = self._options.generation, self._options.bounds
            report = await parts.judge_files(table, generation, bounds)
            await told(self._tools, report, generation)
        await self._tools.ended()
        self._tools.no_way_back()
        shards = [_Shard(self._tools, *each) for each in enumerate(orders)]
        is_changed = True
        while is_changed:  # a compaction that began before may have undone one
            is_changed = False
            for done, shard in enumerate(shards):
                is_changed |= await shard.taken_over(done, len(shards))


class _Shard:
    """The shard of this number."""

    def __init__(self, tools: RunTools, number: int, order: Takeover) -> None:
        self._tools, self._number, self._order = tools, number, order
        self._asked: dict[ReplicaKey, float] = {}  # primaries, and when
        self._is_marked = False  # since every replica has the new index

    async def taken_over(self, done: int, total: int) -> bool:
        """Returns once it has; whether it had to be ordered. Raises: as ``PublishByShard``."""
        deadline = time.monotonic() + self._tools.load_s
        is_ordered, said = False, ""
        self._asked.clear()
        while True:
            self._tools.decisions.guard()
            placement = self._tools.decisions.placement
            keys = [s.key for s in placement.staying() if s.key.shard == self._number]
            looks = dict(zip(keys, await self._looks(keys), strict=True))
            primary = primary_key(placement, self._number)
            has_all = all(each and each.token == self._order.token for each in looks.values())
            if primary is not None and (look := looks.get(primary)) is not None:
                if has_all and (self._is_marked or await self._mark(primary)):
                    return is_ordered
                begun, said = await self._seen(primary, look)
                is_ordered |= begun
            said = next((each.trouble for each in looks.values() if each and each.trouble), said)
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"shard {self._number} has not taken its index over",
                    expected=f"within {self._tools.load_s:g} s",
                    got=said or "not every replica of it answers, or none takes writes",
                )
            await self._tools.tell(
                stage=PublishStage.LOADING,
                text=f"shard {self._number} takes its index over" + (f": {said}" if said else ""),
                done=done,
                total=total,
            )
            await asyncio.sleep(LOOK_S)

    async def _seen(self, primary: ReplicaKey, look: TakeoverLook) -> tuple[bool, str]:
        """Has the primary begin, unless it has: whether that was done, and what hinders it. Raises:
        it failed."""
        asked_s = self._asked.get(primary)
        if asked_s is not None and look.failure is not None:
            raise error_of(look.failure.code, look.failure.text)
        is_waiting = asked_s is not None and time.monotonic() < asked_s + ASK_AGAIN_S
        if look.token == self._order.token or look.is_busy or is_waiting:
            return False, ""
        try:
            await self._tools.parts.take_over(primary, self._order)
        except (ShardlineError, RayError, TimeoutError) as error:
            return False, last_line(error)
        self._asked[primary], self._is_marked = time.monotonic(), False
        return True, ""

    async def _mark(self, primary: ReplicaKey) -> bool:
        """With one more write of the shard no router uses what it has answered before; whether it
        is logged."""
        with suppress(ShardlineError, RayError, TimeoutError):
            await self._tools.parts.mark(primary)
            self._is_marked = True
        return self._is_marked

    async def _looks(self, keys: Sequence[ReplicaKey]) -> list[TakeoverLook | None]:
        return list(await asyncio.gather(*map(self._tools.parts.taken_over, keys)))
