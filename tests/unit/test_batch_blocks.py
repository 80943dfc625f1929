"""Blocks of a batch job: cut by row number, merged as by sorting, moved through threads."""

import threading
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardline.cluster.batch.loaded_shards import groups_of
from shardline.cluster.batch.pipeline import ahead
from shardline.cluster.batch.queries import Queries, cut
from shardline.cluster.batch.spans import (
    MAX_BLOCK_ROWS,
    MIN_BLOCK_ROWS,
    Span,
    default_block_rows,
    spans_of,
    waves_of,
)
from shardline.cluster.batch.top_k import merge_parts, without_own
from shardline.cluster.commands.batch import search_params
from shardline.cluster.commands.batch_progress import RateProgress
from shardline.shards.core.errors import DataError, InvalidInput, Unavailable
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import MAX_K, Ranked
from tests.reference import merge


@given(rows=st.integers(1, 5000), block=st.integers(1, 700))
def test_spans_cover_every_row_once(rows: int, block: int) -> None:
    spans = spans_of(rows, block)
    assert (spans[0].start, spans[-1].stop) == (0, rows)
    assert all(a.stop == b.start and b.number == a.number + 1 for a, b in pairwise(spans))
    assert {len(span) for span in spans[:-1]} <= {block}
    waves = waves_of(spans, 3)
    assert [span for wave in waves for span in wave] == spans
    assert max(map(len, waves)) <= 3


def test_blocks_are_smaller_for_more_results() -> None:
    sizes = [default_block_rows(k) for k in range(1, MAX_K + 1)]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[99], sizes[-1]) == (MAX_BLOCK_ROWS, MAX_BLOCK_ROWS, 512)
    assert min(sizes) >= MIN_BLOCK_ROWS
    with pytest.raises(InvalidInput):
        spans_of(0, 5)
    with pytest.raises(InvalidInput):
        spans_of(5, 0)


@given(data=st.data(), piece=st.integers(1, 40), block=st.integers(1, 40))
def test_pieces_of_any_length_become_the_blocks_asked_for(
    data: st.DataObject, piece: int, block: int
) -> None:
    rows = data.draw(st.integers(1, 120))
    wanted = [span for span in spans_of(rows, block) if data.draw(st.booleans())]

    def pieces(start: int) -> Iterator[Queries]:
        while start < rows:
            numbers = np.arange(start, min(start + piece, rows))
            yield Queries(ids=pa.array(numbers), own=numbers)
            start += piece

    found = list(cut(wanted, pieces))
    assert [span for span, _ in found] == wanted
    for span, queries in found:
        assert queries.ids.to_pylist() == list(range(span.start, span.stop))
        assert queries.own is not None
        assert queries.own.tolist() == queries.ids.to_pylist()


def test_queries_that_end_early_are_named() -> None:
    def pieces(start: int) -> Iterator[Queries]:
        yield Queries(ids=pa.array([1, 2]))

    with pytest.raises(DataError, match="fewer rows"):
        list(cut([Span(0, 0, 3)], pieces))


@given(
    seed=st.integers(0, 1 << 30),
    parts=st.integers(1, 5),
    k=st.integers(1, 9),
    values=st.integers(1, 30),
)
def test_merging_is_sorting(seed: int, parts: int, k: int, values: int) -> None:
    """Few different scores, so that many tie, within a part, between parts, and at the end."""
    rng = np.random.default_rng(seed)
    drawn = []
    for part in range(parts):
        ids = np.stack([rng.permutation(50)[:k] + 100 * part for _ in range(6)])
        ids[rng.random(ids.shape) < 0.2] = -1
        scores = rng.integers(0, values, ids.shape).astype(np.float32) / 7 - 1
        drawn.append(merge([Ranked(ids, np.where(ids < 0, -np.inf, scores).astype(np.float32))], k))
    merged, expected = merge_parts(drawn), merge(drawn, k)
    assert merged.ids.tolist() == expected.ids.tolist()
    assert merged.scores.tolist() == expected.scores.tolist()


def test_an_item_is_left_out_of_its_own_results() -> None:
    ranked = Ranked(
        np.array([[4, 5, 6], [5, 4, 6], [1, 2, 3]]),
        np.array([[3, 2, 1], [3, 2, 1], [3, 2, 1]], dtype=np.float32),
    )
    found = without_own(ranked, np.array([4, 4, 4]), 2)
    assert found.ids.tolist() == [[5, 6], [5, 6], [1, 2]]
    assert found.scores.tolist() == [[2, 1], [3, 1], [3, 2]]


def test_blocks_read_ahead_are_few_and_in_order() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    seen = []
    for number in ahead(numbers(), 2):
        assert len(made) <= number + 4
        seen.append(number)
    assert seen == list(range(20))


def test_what_fails_ahead_fails_where_it_is_asked_for() -> None:
    def numbers() -> Iterator[int]:
        yield 0
        raise DataError("row 1 is wrong")

    found = ahead(numbers())
    assert next(found) == 0
    with pytest.raises(DataError, match="row 1"):
        next(found)
    assert [each.name for each in threading.enumerate() if "ThreadPool" in each.name] == []


def test_groups_of_shards_fit_into_memory() -> None:
    assert groups_of([3, 3, 3], 20, 0) == [[0, 1, 2]]
    assert groups_of([3, 3, 3], 20, 8) == [[0, 1], [2]]
    assert groups_of([3, 3, 3], 20, 13) == [[0], [1], [2]]
    with pytest.raises(Unavailable, match="one shard"):
        groups_of([3, 3, 3], 20, 14)


def test_search_parameters_are_read_from_texts() -> None:
    assert search_params(("nprobe=32", "rerank_factor=2")) == SearchParams(
        nprobe=32, rerank_factor=2
    )
    for wrong in ("nprobe", "nprobe=", "nprobe=-1", "nprobe=x", "=3"):
        with pytest.raises(InvalidInput, match="name=number"):
            search_params((wrong,))


class Recorded:
    def __init__(self) -> None:
        self.details: list[str] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        pass

    def detail(self, text: str) -> None:
        self.details.append(text)


def test_the_rate_does_not_count_what_an_earlier_run_did() -> None:
    times = iter([10.0, 12.0])
    recorded = Recorded()
    progress = RateProgress(recorded, clock=lambda: next(times))  # type: ignore[arg-type]
    progress("resume", 500, 1000)
    progress("search", 500, 1000)
    progress("search", 700, 1000)
    assert recorded.details == ["100 queries/s, 3 s left"]
