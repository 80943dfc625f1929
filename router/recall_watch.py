"""How good the answers are that this router gives: some queries are asked again, exactly.

Every now and then one of the queries that were just served is asked twice at once: as it was, and
with every row scored (``SearchOptions.exact``). Only answers of the same writes are compared: where
a shard was written in between, the sample is dropped. Queries with parameters of their own are left
out: they say how good an answer their caller wanted, not how good the index is. So are those with a
filter, which are searched in other ways.

The newest vectors that were served are kept too, a few per second, for who judges another index by
them.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from shardline.router.fanout.coalesce import LaneKey
from shardline.router.fanout.fanout import Fanout
from shardline.router.query import Merged
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.messages import (
    MAX_SERVED_AT_ONCE,
    NO_PARAMS,
    Quality,
    RouterNews,
    SearchOptions,
    ServedQueries,
)
from shardline.shards.core.metrics import RECALL, RECALL_SAMPLES, Recorder
from shardline.shards.core.recall import count_matches
from shardline.shards.core.schema import FloatArray, Ranked

logger = logging.getLogger(__name__)

WINDOW = 256  # samples that recall is taken over: 21 minutes at one per 5 s
MAX_WATCHED_K = 100  # results of a sample that are compared
TIMEOUT_S = 30.0  # of an exact search, which waits for others and reads every row
# An exact search may take a core for its time: at most this share of it, whatever the interval.
MAX_SHARE = 0.05
SERVED_S = 0.3  # between two queries whose vectors are kept: 16 in the time of an announcement
SERVED = 64


@dataclass(frozen=True, slots=True)
class _Sample:
    hits: int
    wanted: int
    k: int
    at: float  # Unix seconds


class RecallWindow:
    """The newest WINDOW samples of one generation."""

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self._samples: deque[_Sample] = deque(maxlen=WINDOW)

    def add(self, found: Ranked, exact: Ranked, at: float) -> None:
        """The answers to one query, (1, k) each, of the same rows; at: Unix seconds."""
        hits, wanted = count_matches(found, exact)
        if wanted:
            self._samples.append(_Sample(hits, wanted, exact.ids.shape[1], at))

    def quality(self) -> Quality | None:
        """None: there is no sample yet."""
        if not self._samples:
            return None
        return Quality(
            generation=self.generation,
            recall=sum(each.hits for each in self._samples)
            / sum(each.wanted for each in self._samples),
            queries=len(self._samples),
            k=int(np.median([each.k for each in self._samples])),
            since=self._samples[0].at,
        )


class RecallWatch:
    """All methods run in the router's event loop; ``interval_s`` 0: nothing is asked again."""

    def __init__(
        self,
        fanout: Fanout,
        recorder: Recorder,
        interval_s: float,
        rng: random.Random,
        *,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._fanout = fanout
        self._recorder = recorder
        self._interval_s = interval_s
        self._rng = rng
        self._now, self._wall = now, wall
        self._window = RecallWindow(generation=0)
        self._look_at = now() + interval_s if interval_s else float("inf")
        self._keep_at = now()
        self._due_at = min(self._look_at, self._keep_at)
        self._task: asyncio.Task[None] | None = None
        self._served: deque[FloatArray] = deque(maxlen=SERVED)
        self._untold = 0  # of these, the newest that no announcement has had
        self._model_version = ""

    def offer(self, lane: LaneKey, queries: FloatArray, answer: Merged) -> None:
        """queries (n, dim) were answered just now. Costs a look at the clock for nearly all."""
        now = self._now()
        if now < self._due_at or lane.params != NO_PARAMS or lane.options.exact:
            return
        if lane.options.filter:
            return
        row = self._rng.randrange(len(queries))
        query = queries[row : row + 1].copy()  # a view would keep its whole frame alive
        if now >= self._keep_at:
            self._keep(lane.snapshot.table.model_version, query)
            self._keep_at = now + SERVED_S
        if now >= self._look_at and self._task is None and not answer.coverage.degraded:
            ids, scores = answer.ranked.rows(slice(row, row + 1))
            given = Ranked(ids.copy(), scores.copy())
            self._task = asyncio.ensure_future(self._look(lane, query, given, answer.seq))
            self._task.add_done_callback(self._looked)
        self._due_at = self._keep_at if self._task else min(self._look_at, self._keep_at)

    def quality(self) -> Quality | None:
        """Of the generation that is served; None: not known yet."""
        snapshot = self._fanout.snapshot
        if snapshot is None or snapshot.table.generation != self._window.generation:
            return None
        return self._window.quality()

    def news(self) -> RouterNews:
        """For an announcement; queries that were told are not told again."""
        count = min(self._untold, MAX_SERVED_AT_ONCE)
        newest = list(self._served)[len(self._served) - count :]
        self._untold = 0
        served = None
        if newest:
            vectors = np.concatenate(newest)
            served = ServedQueries(model_version=self._model_version, vectors=vectors)
        return RouterNews(quality=self.quality(), served=served)

    def refresh_metrics(self) -> None:
        quality = self.quality()
        if quality is not None:
            self._recorder.set(RECALL, quality.recall)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _keep(self, model_version: str, query: FloatArray) -> None:
        if model_version != self._model_version:
            self._served.clear()
            self._model_version, self._untold = model_version, 0
        self._served.append(query)
        self._untold = min(self._untold + 1, SERVED)

    async def _look(
        self, lane: LaneKey, query: FloatArray, given: Ranked, seq: tuple[int | None, ...]
    ) -> None:
        began = self._now()
        try:
            outcome = await self._compared(lane, query, given, seq)
        except ShardlineError as error:  # overload, a shard that is away: another time
            logger.debug("a query was not watched: %s", error)
            outcome = "unanswered"
        self._recorder.count(RECALL_SAMPLES, outcome)
        ended = self._now()
        self._look_at = ended + max(self._interval_s, (ended - began) / MAX_SHARE)

    async def _compared(
        self, lane: LaneKey, query: FloatArray, given: Ranked, seq: tuple[int | None, ...]
    ) -> str:
        """Asks again, both ways at once, because the shards may have been written since."""
        with self._fanout.pin() as snapshot:
            generation = snapshot.table.generation
            if generation != lane.snapshot.table.generation:
                return "changed"
            until = self._fanout.clock.time() + TIMEOUT_S
            least = tuple(each or 0 for each in seq)
            again = lane._replace(
                snapshot=snapshot, min_coverage=1.0, options=SearchOptions(min_seq=least)
            )
            exactly = again._replace(
                k=min(lane.k, MAX_WATCHED_K), options=SearchOptions(min_seq=least, exact=True)
            )
            exact, fresh = await _both(
                self._fanout.search(query, exactly, deadline=until),
                self._fanout.search(query, again, deadline=until),
            )
        same = [a for a, of in ((given, seq), (fresh.ranked, fresh.seq)) if of == exact.seq]
        if not same:
            return "changed"
        if self._window.generation != generation:
            self._window = RecallWindow(generation)
        width = exact.ranked.ids.shape[1]
        found = Ranked(same[0].ids[:, :width], same[0].scores[:, :width])
        self._window.add(found, exact.ranked, self._wall())
        return "compared"

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._task = None
        self._due_at = min(self._look_at, self._keep_at)
        if not task.cancelled() and task.exception() is not None:
            logger.error("the watch of recall failed", exc_info=task.exception())
            self._look_at = self._now() + max(self._interval_s, TIMEOUT_S)


async def _both(one: Awaitable[Merged], other: Awaitable[Merged]) -> tuple[Merged, Merged]:
    """Waits for both, also where one fails: they use a table that is pinned until then."""
    first, second = await asyncio.gather(one, other, return_exceptions=True)
    for each in (first, second):
        if isinstance(each, BaseException):
            raise each
    assert isinstance(first, Merged)
    assert isinstance(second, Merged)
    return first, second
