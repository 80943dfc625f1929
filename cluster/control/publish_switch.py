"""The end of a publish: the live generation is sealed, what it has is brought to the other, and the
two change places. Writes wait in the routers meanwhile, so each attempt is short, and the seal is
dropped again whatever comes of it."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from ray.exceptions import RayError

from shardline.cluster.control.decisions import Decisions
from shardline.cluster.control.events import SealAsked, SealDropped, Switched
from shardline.cluster.control.publish_parts import Mirror
from shardline.cluster.control.sealing import sealed_seqs
from shardline.cluster.control.term import Superseded
from shardline.cluster.rollover.mirror_progress import MirrorProgress
from shardline.shards.core.errors import Unavailable, last_line

logger = logging.getLogger(__name__)

SWITCH_S = 3.0  # of one attempt: routers hold a write for 4 s
PAUSE_S = 5.0  # between two: the writes that were held are taken meanwhile
TRIES = 3
ANSWER_S = 0.5  # within which a mirror says how far it is, once its time is up
RETRY_S = 0.5  # before the store is asked again for a number that the end of the seal needs


async def switch(
    decisions: Decisions,
    generation: int,
    mirror: Mirror | None,
    *,
    on_try: Callable[[int, str], Awaitable[None]],
    on_drained: Callable[[MirrorProgress], Awaitable[None]],
    on_parting: Callable[[], Awaitable[None]],
) -> None:
    """Makes the generation beside the live one. mirror: from the live one to it; None: nothing is
    brought to it. on_try: told of each attempt, with what became of the one before. on_drained:
    told what the mirror has brought once that is final. on_parting: told without a mirror, when
    nobody writes to either of the two. What these two raise is the end.

    Raises:
        Unavailable: no attempt succeeded; the generation before is live, and takes writes.
        OSError: the store takes no numbers, or not its new live generation.
        Superseded: another controller decides now.
    """
    said = ""
    for number in range(1, TRIES + 1):
        await on_try(number, said)
        try:
            await _attempt(decisions, generation, mirror, on_drained, on_parting)
            return
        except Superseded:
            raise
        except Unavailable as error:
            said = str(error)
            logger.warning("generation %d does not go live yet: %s", generation, said)
        finally:
            await _unsealed(decisions)
        if number < TRIES:
            await asyncio.sleep(PAUSE_S)
    raise Unavailable(f"generation {generation} did not go live in {TRIES} attempts", got=said)


async def _attempt(
    decisions: Decisions,
    generation: int,
    mirror: Mirror | None,
    on_drained: Callable[[MirrorProgress], Awaitable[None]],
    on_parting: Callable[[], Awaitable[None]],
) -> None:
    deadline = time.monotonic() + SWITCH_S
    await decisions.take(SealAsked(now_s=time.monotonic()))
    seqs = await _sealed(decisions, SWITCH_S)
    has: tuple[int, ...] = ()
    has_all = False
    if mirror is not None:
        reached = await _drained(mirror, seqs, max(0.0, deadline - time.monotonic()))
        if any(has < wants for has, wants in zip(reached.positions, seqs, strict=True)):
            behind = sum(seqs) - sum(reached.positions)
            trouble = "" if reached.trouble is None else f": {reached.trouble.text}"
            raise Unavailable(f"{behind} writes were not brought over in time{trouble}")
        await on_drained(reached)
        has, has_all = reached.target_seqs, not reached.unreplayed
    else:
        await on_parting()
    if time.monotonic() > deadline:
        raise Unavailable(f"it took longer than {SWITCH_S:g} s")
    now_s = time.monotonic()
    await decisions.take(
        Switched(generation=generation, now_s=now_s, is_mirrored=True, has=has, has_all=has_all)
    )
    if decisions.placement.table.generation != generation:
        raise Unavailable("not every shard of it answers")


async def _drained(mirror: Mirror, seqs: tuple[int, ...], timeout_s: float) -> MirrorProgress:
    """Raises Unavailable: it does not answer."""
    try:
        async with asyncio.timeout(timeout_s + ANSWER_S):
            return await mirror.drain(seqs, timeout_s)
    except (TimeoutError, RayError) as error:
        raise Unavailable("the mirror does not answer", got=last_line(error)) from error


async def _sealed(decisions: Decisions, timeout_s: float) -> tuple[int, ...]:
    """Of each shard, how many writes it has for good. Raises Unavailable: not in time."""
    await decisions.until(lambda: sealed_seqs(decisions.placement) is not None, timeout_s)
    seqs = sealed_seqs(decisions.placement)
    if seqs is not None:
        return seqs
    sealing = decisions.placement.sealing or {}
    open_shards = [shard for shard, each in sealing.items() if each.seq is None]
    reasons = [each.failed.text for each in sealing.values() if each.failed is not None]
    raise Unavailable(
        f"writes to shards {open_shards} could not be held"
        if sealing
        else "the controller has not heard of every shard yet",
        expected=f"within {timeout_s:g} s",
        got=reasons[0] if reasons else None,
    )


async def _unsealed(decisions: Decisions) -> None:
    """Until it is on record, and ``CURRENT`` too: nobody would take writes."""
    while decisions.placement.sealing is not None:
        try:
            await decisions.take(SealDropped(now_s=time.monotonic()))
        except OSError as error:
            logger.error("writes are still held, for the store fails: %s", error)
            await asyncio.sleep(RETRY_S)
