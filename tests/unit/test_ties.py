"""Equal scores at the end of an answer: those of the lowest ids, for any number of shards.

Against brute force over vectors of small integers, whose products are exact in any order and batch.
"""

import faiss
import numpy as np
import pytest

from shardline.cluster.build import build_generation
from shardline.cluster.store import Store
from shardline.router.merge import merge_top_k
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import Metric, Ranked, in_order
from shardline.shards.index import main_index
from shardline.shards.index.stages import without_rerank
from shardline.shards.live.state import ShardState, apply
from tests.engine import build_main, plan_of, write_set
from tests.live_model import upsert
from tests.unit.test_sharding_changes_nothing import load

ROWS, DIM, K = 1500, 8, 50
SHARDS = [1, 2, 3, 4, 7]
KINDS = {
    "flat": {"kind": "flat"},
    "ivf": {"kind": "ivf", "nlist": 8, "nprobe": 8},
    "ivfpq-fs fp32": {
        "kind": "ivfpq-fs", "nlist": 8, "nprobe": 8, "rerank": "fp32", "rerank_factor": 30,
    },
}  # fmt: skip


def corpora() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    integers = rng.integers(-3, 4, (ROWS, DIM)).astype(np.float32)
    integers[~integers.any(axis=1)] = 1
    return {
        "three copies": np.tile(integers[: ROWS // 3], (3, 1)),
        "all equal": np.tile(integers[:1], (ROWS, 1)),
        "few values": np.sign(integers) + (np.sign(integers) == 0),
        "a hundred copies": np.repeat(integers[:15], 100, axis=0),
    }


CORPORA = corpora()
QUERIES = np.random.default_rng(2).integers(-2, 3, (25, DIM)).astype(np.float32)
IDS = np.random.default_rng(3).choice(10**9, ROWS, replace=False).astype(np.int64)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def first_of_all(vectors: np.ndarray, metric: Metric, k: int = K) -> Ranked:
    """By definition: score descending, then id ascending."""
    if metric is Metric.L2:
        scores = -((QUERIES[:, None] - vectors[None]) ** 2).sum(axis=2)
    else:
        scores = QUERIES @ vectors.T
    order = np.lexsort((np.broadcast_to(IDS, scores.shape), -scores), axis=1)[:, :k]
    return Ranked(IDS[order], np.take_along_axis(scores, order, axis=1))


@pytest.mark.parametrize("metric", [Metric.DOT, Metric.L2])
@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_ties_at_the_cut_are_cut_by_id_for_any_number_of_shards(tmp_path, kind, corpus, metric):
    vectors = CORPORA[corpus]
    store = Store(tmp_path)
    folder = store.embeddings / "m1"
    write_set(folder, vectors, IDS, metric=metric)
    expected = first_of_all(vectors, metric)
    for num_shards in SHARDS:
        built = build_generation(store, folder, plan_of(num_shards, **KINDS[kind]))
        parts = []
        for shard in range(num_shards):
            main, ids = load(store.generation(built.generation), built, shard)
            found = main.search(QUERIES, K, SearchParams())
            alone = [main.search(query[None], K, SearchParams()) for query in QUERIES]
            np.testing.assert_array_equal(found.ids, np.concatenate([each.ids for each in alone]))
            parts.append(Ranked(np.where(found.ids < 0, -1, ids[found.ids]), found.scores))
        merged = merge_top_k(parts, K)
        np.testing.assert_array_equal(merged.ids, expected.ids)
        np.testing.assert_array_equal(merged.scores, expected.scores)


def test_the_largest_id_loses_ties_in_main_and_delta_and_between_shards() -> None:
    largest = 2**63 - 1
    alike = np.ones((4, DIM), np.float32)
    low, high = np.array([0, 5, 9, 11]), np.array([largest - 3, largest - 2, largest - 1, largest])
    main = build_main(alike, metric=Metric.DOT, kind="flat")
    for ids in (low, high):
        for written in ([largest], [largest - 1, 7], [0, 1, 2, 3, largest]):
            records = [upsert(1, written, alike[:1].repeat(len(written), 0))]
            state, _ = apply(ShardState.of(main, ids), records)
            expected = sorted({*ids.tolist(), *written})
            for k in range(1, len(expected) + 2):
                got = state.search(QUERIES, k, SearchParams())
                wanted = [*expected, -1][:k]
                assert got.ids.tolist() == [wanted] * len(QUERIES)
    parts = [
        Ranked(np.array([[largest, -1]]), np.array([[1.0, -np.inf]], np.float32)),
        Ranked(np.array([[4, largest - 1]]), np.array([[1.0, 1.0]], np.float32)),
    ]
    assert merge_top_k(parts, 4).ids.tolist() == [[4, largest - 1, largest, -1]]
    assert in_order(*parts[1]).ids.tolist() == [[4, largest - 1]]
    infinite = np.full((1, 3), -np.inf, np.float32)
    assert in_order(np.array([[-1, largest, 3]]), infinite).ids.tolist() == [[3, largest, -1]]


@pytest.mark.parametrize("k", [1, 2, 99, 100, 101, 1024, ROWS - 1, ROWS, ROWS + 5])
def test_any_k(k: int) -> None:
    order = np.argsort(IDS)
    main = build_main(CORPORA["three copies"][order], metric=Metric.DOT, kind="flat")
    rows, _ = main.search(QUERIES, k, SearchParams())
    expected = first_of_all(CORPORA["three copies"], Metric.DOT, k).ids
    assert rows.shape == (len(QUERIES), k)
    np.testing.assert_array_equal(IDS[order][rows[:, : min(k, ROWS)]], expected)


def test_reranked_candidates_are_cut_by_id_too() -> None:
    """As far as the candidates go: here they are all rows."""
    order = np.argsort(IDS)
    vectors = CORPORA["a hundred copies"]
    main = build_main(vectors[order], metric=Metric.DOT, **KINDS["ivfpq-fs fp32"])
    rows, _ = main.search(QUERIES, K, SearchParams())
    np.testing.assert_array_equal(IDS[order][rows], first_of_all(vectors, Metric.DOT).ids)


def test_a_tie_without_end_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(main_index, "MAX_TIED", 300)
    asked = []
    main = build_main(CORPORA["all equal"], metric=Metric.DOT, kind="flat")
    inner = main._search
    monkeypatch.setattr(
        main, "_search", lambda q, k, fetch, *rest: asked.append(fetch) or inner(q, k, fetch, *rest)
    )
    found = main.search(QUERIES, K, SearchParams())
    assert asked == [K + 1, 204, 300]
    assert (found.scores[:, :1] == found.scores).all()
    assert (np.diff(found.ids) > 0).all()


def test_a_long_tie_costs_few_searches(monkeypatch) -> None:
    """Half of the rows are equal: far more than an answer, and than are looked at."""
    vectors = np.random.default_rng(5).random((40_000, DIM), np.float32) - 1
    vectors[::2] = 1
    main = build_main(vectors, metric=Metric.DOT, kind="flat")
    asked = []
    inner = main._search
    monkeypatch.setattr(
        main, "_search", lambda q, k, fetch, *rest: asked.append(fetch) or inner(q, k, fetch, *rest)
    )
    found = main.search(vectors[:1], 10, SearchParams())
    assert asked == [11, 44, 1408, main_index.MAX_TIED]
    assert (found.scores == DIM).all()


def test_no_tie_costs_no_second_search(monkeypatch) -> None:
    vectors = np.random.default_rng(4).random((ROWS, DIM), np.float32)
    main = build_main(vectors, metric=Metric.DOT, kind="flat")
    monkeypatch.setattr(main, "_close_ties", None)
    main.search(vectors[:20], K, SearchParams())


def test_fastscan_alone_is_not_asked_for_more(monkeypatch) -> None:
    whole = build_main(CORPORA["few values"], metric=Metric.DOT, **KINDS["ivfpq-fs fp32"])
    codes = without_rerank(whole._layers.whole)
    main = main_index.MainIndex(codes, metric=Metric.DOT, defaults=SearchParams(nprobe=8))
    monkeypatch.setattr(main, "_close_ties", None)
    assert main.search(QUERIES, K, SearchParams()).ids.shape == (len(QUERIES), K)
