"""Answering queued requests: whoever searches, the loop thread or the search thread, does it here.

A request whose budget has run out while it waited is dropped unsearched; one that is wrong gets an
``ErrorReply`` and harms no other. Used by one thread at a time.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from shardline.shards.core.errors import DeadlineExceeded, ShardlineError
from shardline.shards.core.messages import ErrorReply, FetchRequest, SearchRequest
from shardline.shards.core.metrics import BATCH_QUERIES, SEARCH_MS, SHARD_REFUSED, Recorder
from shardline.shards.server.shard import Shard
from shardline.shards.wire.frames import Message

logger = logging.getLogger(__name__)

ESTIMATE_DECAY = 0.5  # so that one dear request (a large k, many lists) is not forgotten at once

Request: TypeAlias = SearchRequest | FetchRequest


class Asker(Protocol):
    """Whoever waits for a reply."""

    def reply(self, request_id: int, message: Message) -> None: ...


@dataclass(slots=True)
class Work:
    """A queued request of ``rows`` queries or ids; ``deadline`` in seconds of time.monotonic."""

    asker: Asker
    request_id: int
    request: Request
    rows: int
    deadline: float


@dataclass(slots=True)
class ServerStats:
    """Counters since the start; each is written by one thread at a time."""

    requests: int = 0
    batches: int = 0
    overloaded: int = 0
    expired: int = 0
    failed: int = 0


class Answerer:
    """``ms_per_row`` is what a query is estimated to take; infinite before the first."""

    def __init__(self, shard: Shard, recorder: Recorder, stats: ServerStats) -> None:
        self.ms_per_row = math.inf
        self._shard = shard
        self._recorder = recorder
        self._stats = stats
        self._label = str(shard.shard)

    def answer(self, batch: Sequence[Work]) -> list[tuple[Work, Message]]:
        """A reply for each request, in no order."""
        now = time.monotonic()
        stats = self._stats
        stats.requests += len(batch)
        stats.batches += 1
        answered: list[tuple[Work, Message]] = []
        searches: list[Work] = []
        requests: list[SearchRequest] = []
        for work in batch:
            request = work.request
            if work.deadline <= now:
                stats.expired += 1
                error = DeadlineExceeded("the request's time ran out before the search")
                answered.append((work, error_reply(error)))
            elif isinstance(request, SearchRequest):
                searches.append(work)
                requests.append(request)
            else:
                answered.append((work, self._fetch(request)))
        if requests:
            rows = sum([work.rows for work in searches])
            answered += zip(searches, self._search(requests, rows), strict=True)
        return answered

    def refresh_metrics(self) -> None:
        """Sets the counters of what was refused, for an export; any thread."""
        for why in ("overloaded", "expired", "failed"):
            self._recorder.total(SHARD_REFUSED, getattr(self._stats, why), self._label, why)

    def _search(self, requests: Sequence[SearchRequest], rows: int) -> list[Message]:
        started = time.perf_counter()
        try:
            replies = self._shard.search_batch(requests)
        except Exception:  # a bug of ours must cost these answers, not the search thread
            logger.exception("search failed")
            self._stats.failed += len(requests)
            return [_INTERNAL_ERROR] * len(requests)
        took_ms = (time.perf_counter() - started) * 1e3
        messages: list[Message] = [
            error_reply(reply) if isinstance(reply, ShardlineError) else reply for reply in replies
        ]
        if ErrorReply not in map(type, messages):  # a refusal costs nothing
            self._learn(took_ms / rows)
            self._recorder.observe(SEARCH_MS, took_ms, self._label)
            self._recorder.observe(BATCH_QUERIES, rows, self._label)
        return messages

    def _learn(self, ms_per_row: float) -> None:
        """Takes a measurement into the estimate, which rises at once and falls slowly."""
        if math.isinf(self.ms_per_row):
            self.ms_per_row = ms_per_row
        else:
            self.ms_per_row = max(ms_per_row, ESTIMATE_DECAY * self.ms_per_row)

    def _fetch(self, request: FetchRequest) -> Message:
        try:
            return self._shard.fetch(request)
        except ShardlineError as error:
            return error_reply(error)
        except Exception:
            logger.exception("fetch failed")
            self._stats.failed += 1
            return _INTERNAL_ERROR


def error_reply(error: ShardlineError) -> ErrorReply:
    """What travels of an error."""
    return ErrorReply(code=error.code, message=error.details, field=error.field)


_INTERNAL_ERROR = ErrorReply(code=ShardlineError.code, message="internal error of the shard")
