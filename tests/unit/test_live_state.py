"""States of a shard under writes, against a dict and brute force: every index kind and metric."""

import faiss
import numpy as np
import pytest

from shardline.bench.vectors import manifold
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import Metric, Ranked
from shardline.shards.live.records import Record
from shardline.shards.live.state import ShardState, apply
from tests.engine import build_main
from tests.live_model import Model, delete, upsert
from tests.reference import assert_answer_order, assert_same_answers

ROWS, DIM = 400, 8
FULL = SearchParams(nprobe=2048, ef_search=1024, rerank_factor=64)
KINDS = {
    "flat": {"kind": "flat"},
    "ivf": {"kind": "ivf", "nlist": 4},
    "hnsw": {"kind": "hnsw"},
    "pq": {"kind": "pq", "m": 4, "nbits": 6, "rerank": "none"},
    "pq-rerank": {"kind": "pq", "m": 4, "nbits": 6, "rerank": "fp32"},
    "ivfpq": {"kind": "ivfpq", "nlist": 4, "m": 4, "nbits": 6},
    "ivfpq-fs": {"kind": "ivfpq-fs", "nlist": 4, "m": 4, "rerank": "fp32"},
    "sq8": {"kind": "sq8"},
}
# with FULL these re-rank, or score exactly, every row: the answer is the exact one
EXACT = ["flat", "ivf", "pq-rerank", "ivfpq-fs"]
IDS = np.sort(np.random.default_rng(2).choice(10**6, ROWS, replace=False)).astype(np.int64)
VECTORS = manifold(ROWS, DIM, 4, seed=1)
OTHERS = manifold(600, DIM, 4, seed=1, stream=1)
QUERIES = manifold(5, DIM, 4, seed=1, stream=2)
NEW_IDS = np.arange(10**6, 10**6 + 50)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


@pytest.fixture(scope="module")
def states() -> dict[tuple[str, Metric], ShardState]:
    return {
        (kind, metric): ShardState.of(build_main(VECTORS, metric=metric, **fields), IDS)
        for kind, fields in KINDS.items()
        for metric in Metric
    }


def random_records(rng: np.random.Generator, count: int, first: int = 1) -> list[Record]:
    """Upserts of old, new and repeated ids, and deletes of ids that exist or not."""
    pool = np.concatenate([rng.choice(IDS, 60, replace=False), NEW_IDS])
    records = []
    for seq in range(first, first + count):
        ids = rng.choice(pool, rng.integers(1, 12), replace=False)
        if rng.random() < 0.35:
            records.append(delete(seq, ids))
        else:
            records.append(upsert(seq, ids, OTHERS[rng.choice(600, len(ids), replace=False)]))
    return records


def parts_of(rng: np.random.Generator, records: list[Record]) -> list[list[Record]]:
    cuts = np.sort(rng.integers(0, len(records) + 1, 6)).tolist()
    return [records[a:b] for a, b in zip([0, *cuts], [*cuts, len(records)], strict=True)]


def assert_as_model(state: ShardState, model: Model, k: int, metric: Metric) -> None:
    expected = model.answer(QUERIES, k, metric)
    together = state.search(QUERIES, k, FULL)
    alone = [state.search(query[None], k, FULL) for query in QUERIES]
    assert_same_answers(together, expected)
    assert_answer_order(together)
    assert_same_answers(Ranked(*map(np.concatenate, zip(*alone, strict=True))), expected)
    assert state.rows == len(model.items)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("kind", EXACT)
def test_exact_kinds_equal_brute_force_over_what_was_written(states, kind, metric) -> None:
    rng = np.random.default_rng([3, EXACT.index(kind)])
    records = random_records(rng, 60)
    state, model = states[kind, metric], Model(IDS, VECTORS)
    for part in parts_of(rng, records):
        state, applied = apply(state, part)
        assert applied == [model.apply(record) for record in part]
        for k in (1, 10, 100, ROWS + 60):
            assert_as_model(state, model, k, metric)
    assert state.seq == 60


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in EXACT])
def test_approximate_kinds_return_live_items_and_every_written_one(states, kind, metric) -> None:
    """Scores of main are estimates there; those of written rows are exact, and none is missed."""
    rng = np.random.default_rng(4)
    state, model = states[kind, metric], Model(IDS, VECTORS)
    records = random_records(rng, 60)
    state, applied = apply(state, records)
    assert applied == [model.apply(record) for record in records]
    written = {int(i) for record in records for i in record.change.item_ids} & set(model.items)
    for queries in (QUERIES, QUERIES[:1]):
        everything = state.search(queries, len(model.items) + 10, FULL)
        assert_answer_order(everything)
        some = state.search(queries, 50, FULL)
        assert_answer_order(some)
        assert (some.ids >= 0).all()
        exact = model.answer(queries, len(model.items), metric)
        for at in range(len(queries)):
            found = everything.ids[at][everything.ids[at] >= 0]
            assert set(found.tolist()) <= set(model.items)
            if kind != "hnsw":
                assert set(found.tolist()) == set(model.items)
            assert written <= set(found.tolist())
            true = dict(zip(exact.ids[at].tolist(), exact.scores[at].tolist(), strict=True))
            scores = dict(
                zip(everything.ids[at].tolist(), everything.scores[at].tolist(), strict=True)
            )
            for item in written:
                assert scores[item] == pytest.approx(true[item], rel=1e-4, abs=1e-5)
            np.testing.assert_array_equal(some.ids[at], everything.ids[at][:50])
