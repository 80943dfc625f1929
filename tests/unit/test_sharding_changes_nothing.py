"""The promise of DESIGN: the merged answer of S shards is the answer of one index over all rows.

It holds because every shard's index is the same trained template plus its own rows. Exact copies of
vectors are in the corpus, so that ties inside a shard and across shards are met.
"""

import faiss
import numpy as np
import pytest

from shardline.bench.vectors import clustered, manifold, recall_at_k
from shardline.router.merge import merge_top_k
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import Metric
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexSpec
from shardline.shards.index.template import build_shard_index, train_template, write_index
from tests.reference import assert_answer_order, assert_same_answers

ROWS, DIM, QUERIES = 3000, 32, 12
KINDS = {
    "flat": {"kind": "flat"},
    "ivf": {"kind": "ivf", "nlist": 16, "nprobe": 4},
    "pq": {"kind": "pq", "m": 8},
    "ivfpq": {"kind": "ivfpq", "nlist": 16, "nprobe": 4, "m": 8},
    "sq8": {"kind": "sq8"},
    "pca-ivf": {"kind": "ivf", "nlist": 16, "nprobe": 4, "pca": 16, "rerank": "none"},
}
SHARDS = [1, 2, 3, 4, 7]
Answer = tuple[np.ndarray, np.ndarray]


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
    """Ascending item ids with gaps: not the row numbers."""
    return np.sort(np.random.default_rng(5).choice(10**9, ROWS, replace=False)).astype(np.int64)


@pytest.fixture(scope="module")
def answer_of(tmp_path_factory, vectors, queries, ids):
    """(kind fields, metric, shards, k) -> the merged answer, from files built once."""
    kept: dict[tuple, list[tuple[MainIndex, np.ndarray]]] = {}

    def mains(fields: dict, metric: Metric, num_shards: int) -> list:
        key = (tuple(fields.items()), metric, num_shards)
        if key not in kept:
            folder = tmp_path_factory.mktemp("index")
            resolved = resolve(IndexSpec(**fields), rows=ROWS, dim=DIM, metric=metric)
            template = train_template(resolved, vectors, metric=metric, seed=0, threads=1)
            write_index(template, folder / "template.faiss")
            kept[key] = []
            for shard, rows in enumerate(np.array_split(np.arange(ROWS), num_shards)):
                out = folder / f"{shard}.faiss"
                build_shard_index(
                    folder / "template.faiss", vectors[rows], out, metric=metric, threads=1
                )
                main = MainIndex.load(out, metric=metric, defaults=resolved.search_params)
                kept[key].append((main, ids[rows]))
        return kept[key]

    def answer(fields: dict, metric: Metric, num_shards: int, k: int) -> Answer:
        scores, found = [], []
        for main, own_ids in mains(fields, metric, num_shards):
            part_scores, rows = main.search(queries, k, SearchParams())
            scores.append(part_scores)
            found.append(np.where(rows < 0, -1, own_ids[rows]))
        return merge_top_k(scores, found, k)

    return answer


@pytest.mark.parametrize("k", [10, 100])
@pytest.mark.parametrize("num_shards", SHARDS)
@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("kind", KINDS)
def test_merged_answers_equal_one_index(answer_of, kind, metric, num_shards, k) -> None:
    whole = answer_of(KINDS[kind], metric, 1, k)
    merged = answer_of(KINDS[kind], metric, num_shards, k)
    assert_same_answers(merged, whole, rtol=1e-5)
    assert_answer_order(*merged)
    assert_answer_order(*whole)


@pytest.mark.parametrize("num_shards", [2, 7])
def test_more_results_than_rows_of_a_shard(answer_of, num_shards) -> None:
    whole = answer_of(KINDS["flat"], Metric.COSINE, 1, 2000)
    merged = answer_of(KINDS["flat"], Metric.COSINE, num_shards, 2000)
    assert_same_answers(merged, whole, rtol=1e-5)


@pytest.mark.parametrize("rerank", ["fp16", "fp32"])
@pytest.mark.parametrize("num_shards", SHARDS)
def test_reranked_fastscan_only_gains(answer_of, num_shards, rerank) -> None:
    """Each shard re-ranks as many candidates as the one index did in all: nothing is lost.

    Scores are exact, so an item has the same score in both answers; the merged answer may hold
    better items that the one index's 8-bit scores had missed.
    """
    fields = {"kind": "ivfpq-fs", "nlist": 16, "nprobe": 4, "rerank": rerank}
    whole_scores, whole_ids = answer_of(fields, Metric.COSINE, 1, 50)
    scores, ids = answer_of(fields, Metric.COSINE, num_shards, 50)
    assert_answer_order(scores, ids)
    assert (scores >= whole_scores - 1e-5).all()
    assert recall_at_k(ids, whole_ids) > 0.9
    for at in range(QUERIES):
        known = dict(zip(whole_ids[at].tolist(), whole_scores[at].tolist(), strict=True))
        both = [slot for slot, item in enumerate(ids[at].tolist()) if item in known]
        expected = [known[int(ids[at][slot])] for slot in both]
        np.testing.assert_allclose(scores[at][both], expected, rtol=1e-5, atol=1e-6)
