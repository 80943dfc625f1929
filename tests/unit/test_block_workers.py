"""Threads of a batch job, and shards that are searched slice by slice."""

import threading
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from shardline.cluster.batch import loaded_shards
from shardline.cluster.batch.batch_job import Wanted
from shardline.cluster.batch.loaded_shards import LoadedShards, blocks_in_flight
from shardline.cluster.batch.pipeline import BlockWorkers
from shardline.cluster.batch.queries import Queries
from shardline.cluster.batch.spans import Span, spans_of
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import EMPTY_ID, Metric, normalise
from shardline.shards.index.main_index import search_threads, set_search_threads
from tests.batch_store import DIM, SHARDS, make_store
from tests.reference import brute_force

SOON = 30.0  # seconds: what is waited for takes milliseconds
ONE = Queries(ids=pa.array([0]))


def test_blocks_are_done_in_order_by_threads_with_their_share_of_faiss() -> None:
    done: list[tuple[int, int, int]] = []

    def search(span: Span, queries: Queries) -> int:
        return search_threads()

    def finish(span: Span, queries: Queries, found: int) -> tuple[int, int]:
        return found, len(queries)

    def note(span: Span, result: tuple[int, int]) -> None:
        done.append((span.number, *result))

    before = search_threads()
    with BlockWorkers(3, 2, search=search, finish=finish, done=note) as blocks:
        for span in spans_of(50, 1):
            blocks.put(span, ONE)
    assert done == [(number, 2, 1) for number in range(50)]
    assert search_threads() == before


def test_blocks_are_searched_while_others_are_written_and_few_are_held() -> None:
    is_written, searched = threading.Event(), threading.Semaphore(0)
    held: list[int] = []

    def search(span: Span, queries: Queries) -> None:
        held.append(span.number)
        searched.release()

    def finish(span: Span, queries: Queries, found: None) -> None:
        assert is_written.wait(SOON)

    def put_all(blocks: BlockWorkers[None, None]) -> None:
        for span in spans_of(20, 1):
            blocks.put(span, ONE)

    with BlockWorkers(1, 1, search=search, finish=finish, done=lambda *_: None) as blocks:
        feeder = threading.Thread(target=put_all, args=(blocks,))
        feeder.start()
        try:
            for _ in range(blocks_in_flight(1)):
                assert searched.acquire(timeout=SOON)
            assert held == list(range(blocks_in_flight(1)))  # no more until one is written
        finally:
            is_written.set()
            feeder.join(SOON)
    assert held == list(range(20))


@pytest.mark.parametrize("stage", ["search", "finish"])
def test_an_error_of_a_block_ends_the_job_and_its_threads(stage: str) -> None:
    def search(span: Span, queries: Queries) -> None:
        fail("search", span)

    def finish(span: Span, queries: Queries, found: None) -> None:
        fail("finish", span)

    def fail(where: str, span: Span) -> None:
        if where == stage and span.number == 4:
            raise OSError("no space left")

    done: list[int] = []
    before = threading.active_count()
    with (
        pytest.raises(OSError, match="no space"),
        BlockWorkers(
            2, 1, search=search, finish=finish, done=lambda span, _: done.append(span.number)
        ) as blocks,
    ):
        for span in spans_of(30, 1):
            blocks.put(span, ONE)
    assert done == [0, 1, 2, 3]
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("index", "has_lists"),
    [
        ({"kind": "flat"}, False),
        ({"kind": "ivf", "nlist": 8}, True),
        ({"kind": "ivf", "nlist": 8, "pca": DIM, "rerank": "none"}, False),
    ],
    ids=["flat", "ivf", "pca-ivf"],
)
@pytest.mark.parametrize("rows_at_once", [7, 1000])
def test_slices_and_their_order_change_no_answer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    index: dict[str, object],
    has_lists: bool,
    rows_at_once: int,
) -> None:
    set_search_threads(1)
    made = make_store(tmp_path, **index)
    loaded = LoadedShards.load(made.folder, range(SHARDS))
    drawn = np.random.default_rng(1).standard_normal((101, DIM))
    queries = normalise(drawn.astype(np.float32))
    grouped = loaded.shards[0].state.main.by_list(queries, 10, SearchParams(nprobe=8))
    assert (grouped is not None) == has_lists
    monkeypatch.setattr(loaded_shards, "SEARCHED_ROWS", rows_at_once)
    found = loaded.search(queries, Wanted(k=10, params=SearchParams(nprobe=8)))
    expected = brute_force(queries, made.vectors, made.ids, 10, Metric.COSINE)
    assert found.ids.tolist() == expected.ids.tolist()
    assert np.allclose(found.scores, expected.scores, atol=1e-5)


def test_queries_of_one_list_follow_each_other(tmp_path: Path) -> None:
    made = make_store(tmp_path, kind="ivf", nlist=8)
    shard = LoadedShards.load(made.folder, [0]).shards[0]
    grouped = shard.state.main.by_list(made.vectors, 10, SearchParams(nprobe=1))
    assert grouped is not None
    order = grouped.order
    assert sorted(order.tolist()) == list(range(len(made.vectors)))
    template = faiss.read_index(str(made.folder / "template.faiss"))
    lists = template.quantizer.assign(made.vectors, 1)[order, 0]
    assert (np.diff(lists) >= 0).all()
    assert len(set(lists.tolist())) == 8


def test_a_query_whose_lists_have_few_rows_gets_k_all_the_same(tmp_path: Path) -> None:
    """As served: only ``nprobe`` in the parameters says that what it visits is all."""
    made = make_store(tmp_path, kind="ivf", nlist=8, nprobe=1)
    loaded = LoadedShards.load(made.folder, range(SHARDS))
    k = len(made.ids) // 2
    found = loaded.search(made.vectors[:20], Wanted(k=k))
    assert (found.ids != EMPTY_ID).all()
    given = loaded.search(made.vectors[:20], Wanted(k=k, params=SearchParams(nprobe=1)))
    assert (given.ids == EMPTY_ID).any(axis=1).all()
