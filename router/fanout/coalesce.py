"""Searches that arrive while another is under way leave together, as one frame to every shard.

An idle lane asks at once. While a frame is under way, compatible searches (same table, k, params
and coverage, whatever they exclude) wait in its lane; they leave when it is answered, or after
HOLD_MS, so that a slow shard holds up nobody. Under load a frame, four sends and four replies then
serve many queries.
Each search keeps its own deadline, and is answered with what has come by then.
"""

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from shardline.router.fanout.ask import Ask
from shardline.router.fanout.clock import Clock, Deadline, running_clock
from shardline.router.fanout.snapshot import TableSnapshot
from shardline.router.merge import merge_top_k
from shardline.router.query import Merged
from shardline.shards.core.errors import DeadlineExceeded
from shardline.shards.core.exclusions import Excluded, joined_excluded
from shardline.shards.core.messages import (
    NO_OPTIONS,
    NO_PARAMS,
    RoutingTable,
    SearchOptions,
    SearchParams,
    SearchReply,
    SearchRequest,
)
from shardline.shards.core.metrics import FRAME_QUERIES, SHARD_MISSING, SHARD_MS, Recorder
from shardline.shards.core.schema import FloatArray, IdArray, Ranked
from shardline.shards.wire.frames import encode_frame

HOLD_MS = 5.0  # the longest a frame under way holds back the searches behind it
MAX_FRAME_ROWS = 256  # queries in one frame; a larger request travels alone
# Ids that these exclude, 512 KB: more would hold up the others of the frame
MAX_FRAME_EXCLUDED = 1 << 16
# Elements sorted in the event loop, about 10 ms; a larger merge goes to a thread so that other
# requests, health checks among them, are not held up.
MERGE_IN_LOOP = 200_000


class LaneKey(NamedTuple):
    """What searches must have in common to share a frame: all but their queries and deadlines.

    A tuple, because every search hashes one several times.
    """

    snapshot: TableSnapshot
    k: int
    min_coverage: float
    params: SearchParams = NO_PARAMS
    options: SearchOptions = NO_OPTIONS


@dataclass(slots=True, eq=False)
class _Member:
    """One search. ``place`` is set when its frame leaves: the frame, and its rows in it. excluded:
    of each shard, by its number, what the queries exclude of its items; None: nothing at all.
    num_excluded: how many ids these are."""

    queries: FloatArray
    deadline: float
    ready: asyncio.Future[None]
    excluded: Sequence[Excluded | None] | None
    num_excluded: int
    timer: Deadline | None = None
    place: "tuple[_Frame, slice] | None" = None

    def of(self, shard: int) -> Excluded | None:
        """What the queries exclude of a shard's items."""
        return None if self.excluded is None else self.excluded[shard]

    def wake(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if not self.ready.done():
            self.ready.set_result(None)


@dataclass(slots=True, eq=False)
class _Frame:
    """What left together; merged once for all its members when every reply is in.

    excludes: whether some of its queries exclude items.
    holds_until: when it lets those past who wait behind it, on the clock; left_at: when it left,
    in seconds of ``time.perf_counter``, for the metrics.
    """

    ask: Ask
    rows: int
    members: list[_Member]
    holds_until: float
    left_at: float
    lets_past: asyncio.Handle | None = None
    merged: Ranked | None = None
    excludes: bool = False


@dataclass(slots=True, eq=False)
class _Lane:
    """held: by the frame under way that lets nobody past; None when the lane is free."""

    waiting: list[_Member] = field(default_factory=list)
    held: _Frame | None = None


class Coalescer:
    """All methods run in one event loop, which is the clock unless another is given."""

    def __init__(
        self, request_ids: Iterator[int], recorder: Recorder, clock: Clock | None = None
    ) -> None:
        self._given_clock = clock
        self._request_ids = request_ids
        self._recorder = recorder
        self._lanes: dict[LaneKey, _Lane] = {}

    @property
    def _clock(self) -> Clock:
        return self._given_clock or running_clock()

    async def search(
        self,
        queries: FloatArray,
        key: LaneKey,
        deadline: float,
        excluded: Sequence[Excluded | None] | None = None,
        num_excluded: int = 0,
    ) -> Merged:
        """queries (n, dim) float32; deadline on the clock. excluded, num_excluded: as of
        ``_Member``.

        Raises:
            InvalidInput: a shard says that the caller's request is wrong.
            DeadlineExceeded, Overloaded, Unavailable: no answer, or less coverage than asked for.
        """
        ready = asyncio.get_running_loop().create_future()
        member = _Member(queries, deadline, ready, excluded, num_excluded)
        lane = self._lanes.setdefault(key, _Lane())
        lane.waiting.append(member)
        if lane.held is None:
            self._depart(key, lane)
        else:
            self._limit_hold(key, lane, lane.held)
        if member.place is None or deadline < member.place[0].ask.deadline:
            member.timer = Deadline(self._clock, deadline, member.wake)
        try:
            await member.ready
        except asyncio.CancelledError:
            self._leave(lane, member)
            raise
        if member.place is None:
            lane.waiting.remove(member)
            raise DeadlineExceeded("deadline exceeded before the shards were asked")
        if not member.place[0].ask.done:  # its own deadline came first
            self._leave(lane, member)
        return await self._answer(*member.place, key)

    async def _answer(self, frame: _Frame, rows: slice, key: LaneKey) -> Merged:
        shape = (frame.rows, key.k)
        answered, coverage = frame.ask.collect(
            SearchReply, lambda reply: reply.ranked.ids.shape == shape
        )
        seq = tuple(frame.ask.seq)  # before others of the frame collect again
        if not key.options.exact:
            for shard in frame.ask.missing:
                self._recorder.count(SHARD_MISSING, str(shard))
        frame.ask.require(coverage, key.min_coverage)
        replies = [reply for _, reply in answered]
        is_background = key.options.background
        return Merged(
            ranked=await _merge(frame, rows, [reply.ranked for reply in replies], key.k),
            coverage=coverage,
            search_ms=max([reply.search_ms for reply in replies]),
            seq=seq,
            others_share=max([each.others_share for each in replies]) if is_background else None,
            matched=_matched(replies, rows) if key.options.filter else None,
            excluded=_excluded(replies, rows) if frame.excludes else None,
        )

    # Lanes

    def _depart(self, key: LaneKey, lane: _Lane) -> None:
        """Sends those who wait, as many as fit a frame; the frame then holds the lane."""
        members = _that_fit(lane.waiting)
        if not members:
            if self._lanes.get(key) is lane:
                del self._lanes[key]
            return
        del lane.waiting[: len(members)]
        queries, rows = members[0].queries, len(members[0].queries)
        if len(members) > 1:
            queries = np.concatenate([member.queries for member in members])
            rows = len(queries)
        clock = self._clock
        deadline = max([member.deadline for member in members])
        request_id = next(self._request_ids)
        ask = Ask(
            key.snapshot,
            request_id,
            deadline=deadline,
            enough=key.min_coverage,
            clock=clock,
            on_done=lambda: self._arrived(key, lane, frame),
        )
        now = clock.time()
        holds_until = now + HOLD_MS / 1000
        frame = lane.held = _Frame(ask, rows, members, holds_until, time.perf_counter())
        self._recorder.observe(FRAME_QUERIES, rows)
        start = 0
        for member in members:
            end = start + len(member.queries)
            member.place = frame, slice(start, end)
            frame.excludes |= member.num_excluded > 0
            start = end
        request = SearchRequest(
            queries=queries,
            k=key.k,
            timeout_ms=max(0.0, deadline - now) * 1000,
            params=key.params,
            options=key.options,
        )
        if lane.waiting:  # they did not fit
            self._limit_hold(key, lane, frame)
        frames = [encode_frame(request_id, request)]
        if frame.excludes:
            frames = _frames_excluding(frames[0], request_id, request, members, key.snapshot.table)
        ask.send(frames, request)

    def _limit_hold(self, key: LaneKey, lane: _Lane, frame: _Frame) -> None:
        """The frame under way lets those past who wait, once it has been under way for HOLD_MS."""
        if frame.lets_past is None:
            frame.lets_past = self._clock.call_at(
                frame.holds_until, self._release, key, lane, frame
            )

    def _arrived(self, key: LaneKey, lane: _Lane, frame: _Frame) -> None:
        if frame.lets_past is not None:
            frame.lets_past.cancel()
        if not key.options.exact:
            self._recorder.observe(SHARD_MS, (time.perf_counter() - frame.left_at) * 1000)
        for member in frame.members:
            member.wake()
        self._release(key, lane, frame)

    def _release(self, key: LaneKey, lane: _Lane, frame: _Frame) -> None:
        if lane.held is frame:
            lane.held = None
            if not lane.waiting:
                del self._lanes[key]
                return
            # not from here: frames that no shard takes end at once, each within the one before
            asyncio.get_running_loop().call_soon(self._next, key, lane)

    def _next(self, key: LaneKey, lane: _Lane) -> None:
        if lane.held is None:
            self._depart(key, lane)

    def _leave(self, lane: _Lane, member: _Member) -> None:
        """The caller waits no longer; a frame that nobody waits for is given up."""
        if member.timer is not None:
            member.timer.cancel()
        if member.place is None:
            if member in lane.waiting:
                lane.waiting.remove(member)
            return
        frame = member.place[0]
        if member in frame.members:
            frame.members.remove(member)
        if not frame.members:
            frame.ask.close()


def _that_fit(waiting: list[_Member]) -> list[_Member]:
    """The first of ``waiting`` and whoever fits a frame with it."""
    if len(waiting) == 1:  # as a rule
        return waiting[:]
    sizes = itertools.accumulate(len(member.queries) for member in waiting)
    counts = itertools.accumulate(member.num_excluded for member in waiting)
    count = sum(
        size <= MAX_FRAME_ROWS and ids <= MAX_FRAME_EXCLUDED
        for size, ids in zip(sizes, counts, strict=True)
    )
    return waiting[: max(1, count)]


def _frames_excluding(
    plain: bytes,
    request_id: int,
    request: SearchRequest,
    members: list[_Member],
    table: RoutingTable,
) -> list[bytes]:
    """A frame for each shard, with what queries exclude of its items; the plain one where that is
    nothing."""
    frames = []
    for route in table.shards:
        excluded = joined_excluded([(len(each.queries), each.of(route.shard)) for each in members])
        own = plain
        if excluded is not None:
            own = encode_frame(request_id, replace(request, excluded=excluded))
        frames.append(own)
    return frames


def _matched(replies: list[SearchReply], rows: slice) -> IdArray:
    """Of each query of a frame that has a filter, how many rows of all shards match it."""
    return np.full(rows.stop - rows.start, sum(reply.matched for reply in replies))


def _excluded(replies: list[SearchReply], rows: slice) -> IdArray:
    """Of each query, how many rows of all shards its exclusions left out."""
    counts = np.zeros(rows.stop - rows.start, np.int64)
    for reply in replies:
        if reply.excluded is not None:
            counts += reply.excluded[rows]
    return counts


async def _merge(frame: _Frame, rows: slice, parts: list[Ranked], k: int) -> Ranked:
    """The top k of these rows: once for the whole frame where it is complete and small."""
    if frame.ask.done and frame.rows * k * len(parts) <= MERGE_IN_LOOP:
        if frame.merged is None:
            frame.merged = merge_top_k(parts, k)
        return frame.merged.rows(rows)
    mine = [part.rows(rows) for part in parts]
    if (rows.stop - rows.start) * k * len(parts) > MERGE_IN_LOOP:
        return await asyncio.to_thread(merge_top_k, mine, k)
    return merge_top_k(mine, k)
