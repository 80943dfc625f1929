"""Brings the writes of one generation to another, and goes on doing so while they come.

Rounds: the next records of every shard, joined to batches, written to the primaries of the target,
all acknowledged; then the next. So an item's writes arrive in the order in which they were made.
Every round is noted before it is sent (``replayed_note``); a kill at any moment costs nothing.
Whatever fails is tried again until ``stop``; ``progress`` tells what it is. Only that another
mirror was opened in its place ends it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from shardline.cluster.rollover.fitting import fitting
from shardline.cluster.rollover.mirror_plan import (
    ItemEncoder,
    Joined,
    Unreplayed,
    joined,
    parts_of,
    translated,
)
from shardline.cluster.rollover.mirror_progress import MirrorProgress
from shardline.cluster.rollover.mirror_source import SourceShard, gathered
from shardline.cluster.rollover.mirror_term import MirrorReplaced, MirrorTerm
from shardline.cluster.rollover.replayed_note import Replayed, key_prefix, new_run
from shardline.router.written import Part
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.messages import Absence, RoutingTable, WriteReply
from shardline.shards.core.schema import IdArray
from shardline.shards.live.records import Record

logger = logging.getLogger(__name__)

# Of the records of a round, and of one shard's among them: ten thousand rows at 128 dimensions.
ROUND_BYTES, SHARD_BYTES = 64 << 20, 8 << 20
LOOK_S = 0.02  # between two looks at logs in which nothing was new
PAUSE_S = (0.1, 2.0)  # after a failure: the first, and the longest
OTHER_ERROR = "error"  # code of an error that is none of ours: of a disk, say


class Target(Protocol):
    """The generation that is written to; ``rollover.fanout_target`` has the real one."""

    async def table(self) -> RoutingTable:
        """A table of it, when there is one: for its partition, dimension and metric."""

    async def deliver(self, part: Part, /) -> WriteReply:
        """The acknowledgement of its primary. Raises ShardlineError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What is brought where. source_live, target_live: the folders of what was written to the two.
    term: by which notes are written there. columns: the names of the target's attributes. checked:
    those whose values it may refuse, because the source has another type for them. other_model:
    vectors are made anew, by ``encoder``; None: it has none. target_seqs: how many writes its
    shards have had before this begins. back: whether the source has all of those but ``lacking``,
    for a mirror in the other direction."""

    source: int
    target: int
    source_live: Path
    target_live: Path
    term: MirrorTerm
    columns: tuple[str, ...]
    checked: pa.Schema
    other_model: bool
    encoder: ItemEncoder | None
    target_seqs: tuple[int, ...]
    back: bool
    lacking: Unreplayed


def trouble_of(error: Exception) -> Absence:
    return Absence(getattr(error, "code", OTHER_ERROR), str(error) or repr(error))


class Mirror:
    """``run`` until ``stop``; all methods in one event loop, files and vectors in its threads."""

    def __init__(
        self,
        route: Route,
        sources: Sequence[SourceShard],
        target: Target,
        start: Replayed,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """sources: of every shard, in order, behind ``start.seqs``."""
        assert tuple(source.seq for source in sources) == start.seqs
        self._route = route
        self._sources = tuple(sources)
        self._target = target
        self._done = start
        self._noted = start  # what it begins with is found again without a note
        self._target_seqs = list(route.target_seqs)
        self._trouble: Absence | None = None
        self._sleep = sleep
        self._rounds = 0
        self._shard_bytes = min(SHARD_BYTES, ROUND_BYTES // len(self._sources))
        self._is_stopped = False
        self._moved = asyncio.Condition()

    def progress(self) -> MirrorProgress:
        ends = zip(self._sources, self._done.seqs, strict=True)
        return MirrorProgress(
            positions=self._done.seqs,
            ends=tuple(max(source.end_seq, seq) for source, seq in ends),
            rows=self._done.rows,
            unreplayed=self._done.unreplayed.rows,
            examples=self._done.unreplayed.examples,
            trouble=self._trouble,
            target_seqs=tuple(self._target_seqs),
            is_apart=self._done.is_apart,
        )

    async def run(self) -> None:
        """Goes on until ``stop``, or until another mirror was opened in its place. First it sends
        again what may have been under way."""
        resent = self._done.sending if self._done.sending != self._done.seqs else None
        failures = 0
        while not self._is_stopped:
            try:
                if resent is not None:
                    is_done = await self._resend(resent)
                    resent = None if is_done else resent
                else:
                    is_done = await self._round()
            except MirrorReplaced as error:
                logger.warning("writes to generation %d: %s", self._route.target, error)
                self._trouble = trouble_of(error)
                return
            except Exception as error:  # noqa: BLE001  a bug is told too: a publish waits for this
                await self._paused(error, failures)
                failures += 1
                continue
            self._trouble, failures = None, 0
            if not is_done:
                await self._sleep(LOOK_S)

    async def drain(self, final: Sequence[int], timeout_s: float) -> MirrorProgress:
        """How far it is when the target has the first ``final`` writes of every shard, the last
        ones of a sealed generation, or the time is up; if it has them, the way back is noted.

        Raises:
            MirrorReplaced: another mirror was opened in its place.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._moved:
                await self._moved.wait_for(lambda: self.progress().has(final))
        progress = self.progress()
        if progress.has(final) and self._route.back:
            try:
                live, note = self._route.source_live, self._way_back()
                await asyncio.to_thread(self._route.term.write_note, live, note)
            except OSError as error:
                logger.warning("writes are brought back from an earlier one on: %s", error)
        return progress

    def _way_back(self) -> Replayed:
        """The note of a mirror in the other direction, which need not bring back what came from
        here."""
        seqs = tuple(self._target_seqs)
        return Replayed(
            generation=self._route.target,
            seqs=seqs,
            sending=seqs,
            run=new_run(),
            unreplayed=self._route.lacking,
            back=self._done.seqs,
        )

    async def stop(self) -> None:
        """``run`` returns after the round that is under way, or its next failure."""
        self._is_stopped = True

    async def _resend(self, sending: tuple[int, ...]) -> bool:
        """What was under way when another process was killed, exactly as it was; whether all."""
        is_done = True
        for source, until in zip(self._sources, sending, strict=True):
            if source.seq < until:
                records = await asyncio.to_thread(source.take, 0, until)
                if records:
                    await self._send([(source, records)])
                is_done = is_done and bool(records)
        return is_done

    async def _round(self) -> bool:
        """Whether there was anything to do."""
        self._rounds = (self._rounds + 1) % len(self._sources)
        taken, error = await asyncio.to_thread(
            gathered, self._sources, self._shard_bytes, self._rounds
        )
        if taken:
            await self._send(taken)
        elif self._noted != self._done:
            await self._note(self._done)
        if error is not None:
            raise error
        return bool(taken)

    async def _send(self, taken: Sequence[tuple[SourceShard, list[Record]]]) -> None:
        """Until all of it is acknowledged, or the mirror stopped: what was taken comes once."""
        failures = 0
        while not self._is_stopped:
            try:
                await self._sent(taken)
            except MirrorReplaced:
                raise
            except Exception as error:  # noqa: BLE001  what was taken must not be passed over
                await self._paused(error, failures)
                failures += 1
            else:
                return

    async def _sent(self, taken: Sequence[tuple[SourceShard, list[Record]]]) -> None:
        """One attempt; another one sends the same with the same keys."""
        table = await self._target.table()
        seqs, sending = list(self._done.seqs), list(self._done.sending)
        for source, records in taken:
            seqs[source.shard] = sending[source.shard] = records[-1].seq
        after = replace(self._done, seqs=tuple(seqs), sending=tuple(sending))
        await self._note(replace(self._done, sending=after.sending))
        planned = await asyncio.gather(
            *(asyncio.to_thread(self._planned, source, records, table) for source, records in taken)
        )
        for _, rows, refused in planned:
            unreplayed = after.unreplayed.and_(refused)
            after = replace(after, rows=after.rows + rows, unreplayed=unreplayed)
        outcomes = await asyncio.gather(
            *(self._delivered(part) for parts, _, _ in planned for part in parts),
            return_exceptions=True,
        )
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        self._trouble = None
        if self._route.back:
            after = replace(after, back=tuple(self._target_seqs))
        async with self._moved:
            self._done = after
            self._moved.notify_all()

    def _planned(
        self, source: SourceShard, records: list[Record], table: RoutingTable
    ) -> tuple[list[Part], int, IdArray]:
        """Parts, the rows in them, and the ids of items that cannot be replayed. In a thread."""
        changes: Joined = joined(records)
        refused = np.empty(0, np.int64)
        if self._route.other_model:
            changes, refused = translated(changes, self._route.encoder, table)
        changes, unfit = fitting(changes, self._route.checked)
        refused = np.concatenate((refused, unfit))
        first, last = records[0].seq, records[-1].seq
        key = f"{key_prefix(self._done.run)}{source.shard}-{first}-{last}"
        return parts_of(changes, table, self._route.columns, key), changes.rows, refused

    async def _delivered(self, part: Part) -> None:
        reply = await self._target.deliver(part)
        self._target_seqs[part.shard] = max(self._target_seqs[part.shard], reply.seq)

    async def _note(self, replayed: Replayed) -> None:
        """Raises MirrorReplaced, OSError."""
        live = self._route.target_live
        await asyncio.to_thread(self._route.term.write_note, live, replayed)
        self._noted = replayed

    async def _paused(self, error: Exception, failures: int) -> None:
        """Tells what is wrong, and waits before the next attempt; failures: those before it."""
        known = isinstance(error, ShardlineError | OSError)
        trouble = trouble_of(error)
        if trouble != self._trouble:
            logger.warning(
                *("writes to generation %d wait: %s", self._route.target, trouble.text),
                exc_info=None if known else error,
            )
        self._trouble = trouble
        await self._sleep(min(PAUSE_S[0] * 2 ** min(failures, 10), PAUSE_S[1]))
