"""Answers that come out short though there are more items are asked for once more, exactly."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shardline.router.contract import Coverage
from shardline.router.fanout.coalesce import LaneKey
from shardline.router.finding import Finder
from shardline.router.query import Merged, QueryKind, ResolvedQuery
from shardline.shards.core.errors import Overloaded
from shardline.shards.core.messages import NO_OPTIONS, NO_PARAMS, SearchOptions, SearchParams
from shardline.shards.core.schema import EMPTY_ID, EMPTY_SCORE, Ranked

K = 4
ROWS = 10


class Shards:
    """As a fan-out: of query n the first n items, or exactly all; the lanes that were asked."""

    def __init__(self, trouble: Exception | None = None) -> None:
        self.lanes: list[LaneKey] = []
        self.asked: list[int] = []
        self.trouble = trouble

    async def search(self, vectors: Any, lane: LaneKey, **_: Any) -> Merged:
        self.lanes.append(lane)
        self.asked.append(len(vectors))
        if lane.options.exact and self.trouble is not None:
            raise self.trouble
        found = np.where(lane.options.exact, K, vectors[:, 0].astype(int))[:, None]
        ids = np.where(np.arange(K) < found, np.arange(K), EMPTY_ID)
        scores = np.where(ids == EMPTY_ID, EMPTY_SCORE, -np.arange(K)).astype(np.float32)
        coverage = Coverage(
            shards_asked=2, shards_answered=2, rows_asked=ROWS, rows_answered=ROWS, degraded=()
        )
        seq = (7, 9) if lane.options.exact else (8, 8)
        return Merged(ranked=Ranked(ids, scores), coverage=coverage, search_ms=1.0, seq=seq)


async def found(shards: Shards, queries: list[int], **changes: Any) -> Merged:
    watch = SimpleNamespace(offer=lambda *_: None)
    finder = Finder(shards, watch, cache_bytes=0)  # type: ignore[arg-type]
    vectors = np.array(queries, np.float32)[:, None]
    query = ResolvedQuery(
        kind=QueryKind.VECTORS,
        values=vectors,
        k=K,
        timeout_ms=1000.0,
        min_coverage=0.0,
        params=NO_PARAMS,
        options=NO_OPTIONS,
    )
    snapshot: Any = SimpleNamespace(table=SimpleNamespace(generation=1))
    return await finder.find(snapshot, vectors, K, replace(query, **changes), 1e9)


async def test_queries_that_are_short_are_asked_exactly_and_the_others_stay() -> None:
    shards = Shards()
    merged = await found(shards, [4, 1, 0, 4])
    assert (merged.ranked.ids != EMPTY_ID).all()
    assert shards.asked == [4, 2]
    assert [lane.options.exact for lane in shards.lanes] == [False, True]
    assert merged.seq == (7, 8), "as old as its oldest part"


async def test_whole_answers_cost_nothing() -> None:
    shards = Shards()
    await found(shards, [4, 4])
    assert shards.asked == [2]


@pytest.mark.parametrize(
    "changes",
    [{"params": SearchParams(nprobe=1)}, {"options": SearchOptions(exact=True)}],
    ids=["parameters", "exact"],
)
async def test_who_says_what_is_visited_gets_that(changes: dict[str, Any]) -> None:
    shards = Shards()
    await found(shards, [1], **changes)
    assert len(shards.lanes) == 1


async def test_an_answer_that_cannot_be_filled_in_time_stays_short() -> None:
    merged = await found(Shards(Overloaded("too many")), [1])
    assert (merged.ranked.ids[0] != EMPTY_ID).sum() == 1
