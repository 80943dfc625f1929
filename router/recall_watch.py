"""How good the answers are that this router gives: some queries are asked again, exactly.

Every now and then one of the queries that were just served is asked twice at once: as it was, and
with every row scored (``SearchOptions.exact``). Only answers of the same writes are compared: where
a shard was written in between, the sample is dropped. Queries with parameters of their own are left
out: they say how good an answer their caller wanted, not how good the index is. So are those with a
filter, which are searched in other ways. Those that have the parameters of an arm of an experiment
say how good the arm is: each arm has a window of samples of its own.

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

from shardline.router.experiments.assignment import Arms, Assignment
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
from shardline.shards.core.metrics import ARM_RECALL, RECALL, RECALL_SAMPLES, Recorder
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
Watched = tuple[str, str] | None  # whose recall: an arm's, or that of searches without parameters
OnSample = Callable[[Assignment, float], None]


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


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """One query (1, dim) and the answer that it was given, (1, k)."""

    lane: LaneKey
    query: FloatArray
    found: Ranked
    seq: tuple[int | None, ...]
    whose: list[Watched]
    assignment: Assignment | None


class RecallWatch:
    """All methods run in the router's event loop; ``interval_s`` 0: nothing is asked again.

    With arms, each window has its share of what is asked again, however few searches it has.
    """

    def __init__(
        self,
        fanout: Fanout,
        recorder: Recorder,
        interval_s: float,
        rng: random.Random,
        *,
        arms: Arms = (),
        on_sample: OnSample | None = None,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """on_sample: told of the recall of every sample that is an arm's."""
        self._fanout = fanout
        self._recorder = recorder
        self._interval_s = interval_s
        self._rng = rng
        self._now, self._wall = now, wall
        self._on_sample = on_sample
        self._windows: dict[Watched, RecallWindow] = {
            watched: RecallWindow(generation=0) for watched in (None, *arms)
        }
        self._turn_at: dict[Watched, float] = dict.fromkeys(self._windows, 0.0)
        self._look_at = now() + interval_s if interval_s else float("inf")
        self._keep_at = now()
        self._due_at = min(self._look_at, self._keep_at)
        self._task: asyncio.Task[None] | None = None
        self._served: deque[FloatArray] = deque(maxlen=SERVED)
        self._untold = 0  # of these, the newest that no announcement has had
        self._model_version = ""

    def offer(
        self,
        lane: LaneKey,
        queries: FloatArray,
        answer: Merged,
        assignment: Assignment | None = None,
    ) -> None:
        """queries (n, dim) were answered just now, in the arms of their assignment. Costs a look at
        the clock for nearly all."""
        now = self._now()
        if now < self._due_at or lane.options.exact or lane.options.filter:
            return
        whose = self._whose(lane, assignment)
        if not whose:
            return
        row = self._rng.randrange(len(queries))
        query = queries[row : row + 1].copy()  # a view would keep its whole frame alive
        if now >= self._keep_at:
            self._keep(lane.snapshot.table.model_version, query)
            self._keep_at = now + SERVED_S
        is_due = now >= self._look_at and any(now >= self._turn_at[each] for each in whose)
        if is_due and self._task is None and not answer.coverage.degraded:
            ids, scores = answer.ranked.rows(slice(row, row + 1))
            given = Ranked(ids.copy(), scores.copy())
            sample = _Given(lane, query, given, answer.seq, whose, assignment)
            self._task = asyncio.ensure_future(self._look(sample))
            self._task.add_done_callback(self._looked)
        self._due_at = self._keep_at if self._task else min(self._look_at, self._keep_at)

    def quality(self) -> Quality | None:
        """Of the generation that is served; None: not known yet."""
        return self._quality_of(None)

    def arm_qualities(self) -> dict[tuple[str, str], Quality | None]:
        """As ``quality``, of each arm."""
        return {arm: self._quality_of(arm) for arm in self._windows if arm is not None}

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
        for arm, found in self.arm_qualities().items():
            if found is not None:
                self._recorder.set(ARM_RECALL, found.recall, *arm)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _quality_of(self, whose: Watched) -> Quality | None:
        snapshot, window = self._fanout.snapshot, self._windows[whose]
        if snapshot is None or snapshot.table.generation != window.generation:
            return None
        return window.quality()

    def _whose(self, lane: LaneKey, assignment: Assignment | None) -> list[Watched]:
        """Whose recall a search says something of."""
        whose: list[Watched] = [None] if lane.params == NO_PARAMS else []
        if assignment is not None and assignment.is_whole:
            whose += [arm for arm in assignment.arms if arm in self._windows]
        return whose

    def _keep(self, model_version: str, query: FloatArray) -> None:
        if model_version != self._model_version:
            self._served.clear()
            self._model_version, self._untold = model_version, 0
        self._served.append(query)
        self._untold = min(self._untold + 1, SERVED)

    async def _look(self, sample: "_Given") -> None:
        began = self._now()
        try:
            outcome = await self._compared(sample)
        except ShardlineError as error:  # overload, a shard that is away: another time
            logger.debug("a query was not watched: %s", error)
            outcome = "unanswered"
        self._recorder.count(RECALL_SAMPLES, outcome)
        ended = self._now()
        pause_s = max(self._interval_s, (ended - began) / MAX_SHARE)
        self._look_at = ended + pause_s
        # one turn of each window in so many looks
        self._turn_at |= dict.fromkeys(sample.whose, ended + pause_s * len(self._windows))

    async def _compared(self, sample: "_Given") -> str:
        """Asks again, both ways at once, because the shards may have been written since."""
        lane, query, seq = sample.lane, sample.query, sample.seq
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
        same = [a for a, of in ((sample.found, seq), (fresh.ranked, fresh.seq)) if of == exact.seq]
        if not same:
            return "changed"
        width = exact.ranked.ids.shape[1]
        found = Ranked(same[0].ids[:, :width], same[0].scores[:, :width])
        for each in sample.whose:
            if self._windows[each].generation != generation:
                self._windows[each] = RecallWindow(generation)
            self._windows[each].add(found, exact.ranked, self._wall())
        assignment = sample.assignment
        if self._on_sample is not None and assignment is not None and assignment.is_whole:
            hits, wanted = count_matches(found, exact.ranked)
            if wanted:
                self._on_sample(assignment, hits / wanted)
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
