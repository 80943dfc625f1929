"""The promise of DESIGN: the merged answer of S shards is the answer of one index over all rows.

It is shown on what ``cluster.build`` makes, from ids in no order. It holds because every shard's
index is the same trained template plus its own rows. Exact copies of
vectors are in the corpus, so that ties inside a shard and across shards are met.
"""

from pathlib import Path

import faiss
import numpy as np
import pytest

from shardline.bench.vectors import clustered, manifold
from shardline.cluster.build import build_generation
from shardline.cluster.store import Store
from shardline.router.merge import merge_top_k
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.recall import exact_scores, recall_at_k
from shardline.shards.core.schema import Metric, Ranked
from shardline.shards.index.main_index import MainIndex
from shardline.shards.storage.generation import (
    INDEX_NAME,
    ITEM_IDS_NAME,
    read_item_ids,
    shard_folder,
)
from tests.engine import plan_of, write_set
from tests.reference import assert_answer_order, assert_same_answers

ROWS, DIM, QUERIES = 3000, 32, 12
KINDS = {
    "flat": {"kind": "flat"},
    "ivf": {"kind": "ivf", "nlist": 16, "nprobe": 4},
    "pq": {"kind": "pq", "m": 8, "nbits": 6},
    "ivfpq": {"kind": "ivfpq", "nlist": 16, "nprobe": 4, "m": 8, "nbits": 6},
    "sq8": {"kind": "sq8"},
    "pca-ivf": {"kind": "ivf", "nlist": 16, "nprobe": 4, "pca": 16, "rerank": "none"},
}
SHARDS = [1, 2, 3, 4, 7]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rows = np.concatenate(
        [manifold(ROWS // 2, DIM, 6, seed=1), clustered(ROWS // 2, DIM, 30, seed=2)]
    )
    rng = np.random.default_rng(3)
    copies = rng.choice(ROWS, 400, replace=False)
    rows[copies] = rows[rng.choice(copies, 40)[rng.integers(0, 40, 400)]]  # 40 groups of copies
    return rows


@pytest.fixture(scope="module")
def queries(vectors: np.ndarray) -> np.ndarray:
    own = vectors[np.random.default_rng(4).choice(ROWS, QUERIES // 2, replace=False)]
    return np.concatenate([own, manifold(QUERIES // 2, DIM, 6, seed=1, stream=1)])


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """Item ids with gaps and in no order: neither row numbers nor ascending."""
    return np.random.default_rng(5).choice(10**9, ROWS, replace=False).astype(np.int64)


@pytest.fixture(scope="module")
def answer_of(tmp_path_factory, vectors, queries, ids):
    """(kind fields, metric, shards, k) -> the merged answer, from generations built once."""
    store = Store(tmp_path_factory.mktemp("store"))
    kept: dict[tuple, list[tuple[MainIndex, np.ndarray]]] = {}

    def shards(fields: dict, metric: Metric, num_shards: int) -> list:
        corpus = store.root / "sets" / metric.value
        if not corpus.exists():
            write_set(corpus, vectors, ids, metric=metric, rows_per_file=1000)
        key = (tuple(fields.items()), metric, num_shards)
        if key not in kept:
            built = build_generation(store, corpus, plan_of(num_shards, **fields))
            folder = store.generation(built.generation)
            kept[key] = [load(folder, built, shard) for shard in range(num_shards)]
        return kept[key]

    def answer(fields: dict, metric: Metric, num_shards: int, k: int) -> Ranked:
        parts = []
        for main, own_ids in shards(fields, metric, num_shards):
            rows, scores = main.search(queries, k, SearchParams())
            parts.append(Ranked(np.where(rows < 0, -1, own_ids[rows]), scores))
        return merge_top_k(parts, k)

    return answer


def load(folder: Path, built, shard: int) -> tuple[MainIndex, np.ndarray]:
    place = folder / shard_folder(shard)
    main = MainIndex.load(
        place / INDEX_NAME, metric=built.metric, defaults=built.index.search_params
    )
    return main, read_item_ids(place / ITEM_IDS_NAME, rows=built.shards[shard].rows)


@pytest.mark.parametrize("k", [10, 100])
@pytest.mark.parametrize("num_shards", SHARDS)
@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("kind", KINDS)
def test_merged_answers_equal_one_index(answer_of, kind, metric, num_shards, k) -> None:
    whole = answer_of(KINDS[kind], metric, 1, k)
    merged = answer_of(KINDS[kind], metric, num_shards, k)
    assert_same_answers(merged, whole, rtol=1e-5)
    assert_answer_order(merged)
    assert_answer_order(whole)


@pytest.mark.parametrize("num_shards", [2, 7])
def test_more_results_than_rows_of_a_shard(answer_of, num_shards) -> None:
    whole = answer_of(KINDS["flat"], Metric.COSINE, 1, 2000)
    merged = answer_of(KINDS["flat"], Metric.COSINE, num_shards, 2000)
    assert_same_answers(merged, whole, rtol=1e-5)


@pytest.mark.parametrize("rerank", ["fp16", "fp32"])
@pytest.mark.parametrize("num_shards", SHARDS)
def test_reranked_fastscan_only_gains(answer_of, vectors, queries, ids, num_shards, rerank) -> None:
    """Each shard re-ranks as many candidates as the one index did in all: nothing is lost.

    Scores are exact, so an item has the same score in both answers; the merged answer may hold
    better items that the one index's 8-bit scores had missed.
    """
    fields = {"kind": "ivfpq-fs", "nlist": 16, "nprobe": 4, "rerank": rerank, "rerank_factor": 4}
    item_ids = ids
    whole_ids, whole_scores = answer_of(fields, Metric.COSINE, 1, 50)
    ids, scores = answer_of(fields, Metric.COSINE, num_shards, 50)
    assert_answer_order(Ranked(ids, scores))
    assert (scores >= whole_scores - 1e-5).all()
    order = np.argsort(item_ids)
    exact = [
        exact_scores(
            queries, vectors, order[np.searchsorted(item_ids[order], found)], Metric.COSINE
        )
        for found in (ids, whole_ids)
    ]
    assert recall_at_k(*exact) > 0.9
    for at in range(QUERIES):
        known = dict(zip(whole_ids[at].tolist(), whole_scores[at].tolist(), strict=True))
        both = [slot for slot, item in enumerate(ids[at].tolist()) if item in known]
        expected = [known[int(ids[at][slot])] for slot in both]
        np.testing.assert_allclose(scores[at][both], expected, rtol=1e-5, atol=1e-6)
