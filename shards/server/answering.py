"""Answering queued requests: whoever searches, the loop thread or the search thread, does it here.

A request whose budget has run out while it waited is dropped unsearched; one that is wrong gets an
``ErrorReply`` and harms no other. Used by one thread at a time.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from shardline.shards.core.errors import DeadlineExceeded, ShardlineError
from shardline.shards.core.messages import ErrorReply, ReplicaKey
from shardline.shards.core.metrics import BATCH_QUERIES, SEARCH_MS, SHARD_REFUSED, Recorder
from shardline.shards.server.handlers import Handler, Work, in_time
from shardline.shards.server.recent_share import RecentShare
from shardline.shards.server.search_queue import PIECE_MS, BackgroundSearch
from shardline.shards.server.shard import Shard
from shardline.shards.wire.frames import Message

logger = logging.getLogger(__name__)

ESTIMATE_DECAY = 0.5  # so that one dear request (a large k, many lists) is not forgotten at once


@dataclass(slots=True)
class ServerStats:
    """Counters since the start; each is written by one thread at a time."""

    requests: int = 0
    batches: int = 0
    overloaded: int = 0
    expired: int = 0
    failed: int = 0


class Answerer:
    """``ms_per_row`` is what a query is estimated to take, ``background_ms_per_row`` one of a
    background search, which has more of them at once; infinite before the first. Both are of
    queries without a filter: what one with a filter takes says nothing of others.
    """

    def __init__(
        self, shard: Shard, key: ReplicaKey, recorder: Recorder, stats: ServerStats
    ) -> None:
        self.ms_per_row = math.inf
        self.background_ms_per_row = math.inf
        self._others = RecentShare()
        self._shard = shard
        self._recorder = recorder
        self._stats = stats
        self._labels = key.labels

    def answer(self, batch: Sequence[Work]) -> list[tuple[Work, Message | None]]:
        """A reply for each request, in no order; None if it would exceed ``reply_bytes``."""
        now = time.monotonic()
        stats = self._stats
        stats.requests += len(batch)
        stats.batches += 1
        if len(batch) == 1 and batch[0].deadline > now:
            (work,) = batch
            (message,) = self._answer(work.handler, batch)
            return [(work, message)]
        answered: list[tuple[Work, Message | None]] = []
        by_kind: dict[tuple[type, bool], list[Work]] = {}
        for work in batch:
            if work.deadline <= now and work.handler.may_expire:
                stats.expired += 1
                error = DeadlineExceeded("the request's time ran out before the search")
                answered.append((work, error_reply(error)))
            else:
                by_kind.setdefault((type(work.request), work.has_filter), []).append(work)
        for works in by_kind.values():
            answered += zip(works, self._answer(works[0].handler, works), strict=True)
        return answered

    def answer_piece(self, search: BackgroundSearch) -> Message | None:
        """Searches the next piece of a background search; its reply, or None if there is more."""
        work, stats = search.work, self._stats
        stats.requests += search.done == 0
        stats.batches += 1
        if work.deadline <= time.monotonic():
            stats.expired += 1
            return error_reply(DeadlineExceeded("the request's time ran out before the search"))
        estimate = search.ms_per_row if work.has_filter else self.background_ms_per_row
        rows = max(1, int(PIECE_MS / estimate))
        piece = in_time(work).rows(slice(search.done, search.done + rows))
        started = time.perf_counter()
        try:
            (reply,) = self._shard.search_batch([piece])
        except Exception:  # as in ``_answer``
            logger.exception("a request failed")
            stats.failed += 1
            return INTERNAL_ERROR
        if isinstance(reply, ShardlineError):
            stats.expired += isinstance(reply, DeadlineExceeded)
            return error_reply(reply)
        took_ms = (time.perf_counter() - started) * 1e3
        self._observe(took_ms, len(piece.queries))
        estimate = followed(estimate, took_ms / len(piece.queries))
        if work.has_filter:
            search.ms_per_row = estimate
        else:
            self.background_ms_per_row = estimate
        search.done += len(piece.queries)
        search.replies.append(reply)
        if search.done < work.rows:
            return None
        return search.reply(self._others.at(time.monotonic()))

    def refresh_metrics(self) -> None:
        """Sets the counters of what was refused, for an export; any thread."""
        for why in ("overloaded", "expired", "failed"):
            self._recorder.total(SHARD_REFUSED, getattr(self._stats, why), *self._labels, why)

    def _answer(self, handler: Handler, works: Sequence[Work]) -> list[Message | None]:
        """Of requests of one kind, in order; searches have all a filter, or none has."""
        started = time.perf_counter()
        assert handler.answer is not None, "writes have a thread of their own"
        try:
            replies = handler.answer(self._shard, works)
        except Exception:  # a bug of ours must cost these answers, not the search thread
            logger.exception("a request failed")
            self._stats.failed += len(works)
            return [INTERNAL_ERROR] * len(works)
        took_ms = (time.perf_counter() - started) * 1e3
        messages: list[Message | None] = []
        rows, is_refused = 0, False
        for work, reply in zip(works, replies, strict=True):
            rows += work.rows
            if isinstance(reply, ShardlineError):
                is_refused = True
                self._stats.expired += isinstance(reply, DeadlineExceeded)
                reply = error_reply(reply)
            messages.append(reply)
        if handler.is_search and not is_refused:  # a refusal costs nothing
            if not works[0].has_filter:
                self.ms_per_row = learned(self.ms_per_row, took_ms / rows)
            self._others.add(took_ms / 1e3, time.monotonic())
            self._observe(took_ms, rows)
        return messages

    def _observe(self, took_ms: float, rows: int) -> None:
        self._recorder.observe(SEARCH_MS, took_ms, *self._labels)
        self._recorder.observe(BATCH_QUERIES, rows, *self._labels)


def learned(ms_per_row: float, measured: float) -> float:
    """An estimate with a measurement taken in: it rises at once and falls slowly."""
    return measured if math.isinf(ms_per_row) else max(measured, ESTIMATE_DECAY * ms_per_row)


def followed(ms_per_row: float, measured: float) -> float:
    """An estimate that follows measurements by a factor of two at most: one search that was held up
    must not make the next pieces tiny, which cost more per query."""
    if math.isinf(ms_per_row):
        return measured
    return min(max(measured, ms_per_row / 2), ms_per_row * 2)


def error_reply(error: ShardlineError) -> ErrorReply:
    """What travels of an error."""
    return ErrorReply(code=error.code, message=error.details, field=error.field)


INTERNAL_ERROR = ErrorReply(code=ShardlineError.code, message="internal error of the shard")
