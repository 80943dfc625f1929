"""Choosing search parameters: what is measured, how answers of shards merge, what is cheapest."""

import faiss
import numpy as np
import pytest

from shardline.bench.vectors import manifold
from shardline.cluster.tuning import (
    RERANK_FACTORS,
    Answered,
    Measured,
    advice,
    choose,
    cost_us,
    ladder_of,
    measured,
    sweep,
)
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.recall import exact_scores
from shardline.shards.core.schema import Metric
from shardline.shards.index.exact import exact_top_k
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import MEASURED_K, IndexSpec, ResolvedIndex
from tests.engine import build_main

ROWS, DIM = 4000, 16


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def resolved(**fields) -> tuple[IndexSpec, ResolvedIndex]:
    spec = IndexSpec(**fields)
    return spec, resolve(spec, rows=ROWS, dim=DIM, metric=Metric.COSINE)


@pytest.mark.parametrize(
    ("fields", "depths", "factors"),
    [
        ({"kind": "flat"}, (None,), (None,)),
        ({"kind": "pq"}, (None,), (None,)),
        ({"kind": "pq", "rerank": "fp16"}, (None,), RERANK_FACTORS),
        ({"kind": "ivf", "nlist": 20}, (1, 2, 4, 8, 16, 20), (None,)),
        ({"kind": "ivf", "nlist": 16}, (1, 2, 4, 8, 16), (None,)),
        ({"kind": "ivf", "nlist": 1}, (1,), (None,)),
        ({"kind": "ivf", "nlist": 16, "nprobe": 3}, (3,), (None,)),
        ({"kind": "ivfpq-fs", "nlist": 4}, (1, 2, 4), RERANK_FACTORS),
        ({"kind": "ivfpq-fs", "nlist": 4, "rerank_factor": 5}, (1, 2, 4), (5,)),
        ({"kind": "hnsw"}, (128, 256, 512, 1024, 2048), (None,)),
        ({"kind": "hnsw", "ef_search": 70}, (70,), (None,)),
        ({"kind": "factory", "factory": "IVF8,SQ8,RFlat"}, (1, 2, 4, 8), RERANK_FACTORS),
    ],
)
def test_what_is_left_open_is_measured(fields: dict, depths: tuple, factors: tuple) -> None:
    ladder = ladder_of(*resolved(**fields))
    assert (ladder.depths, ladder.factors) == (depths, factors)
    for params in ladder.rung(depths[0]):
        assert (params.nprobe is None) == (fields["kind"] in ("flat", "pq", "hnsw"))
        assert (params.ef_search is None) == (fields["kind"] != "hnsw")


@pytest.fixture(scope="module")
def swept() -> dict:
    """Three shards of one corpus, asked with everything, and one index over all of it."""
    vectors, queries = manifold(ROWS, DIM, 8, seed=1), manifold(40, DIM, 8, seed=1, stream=1)
    fields = {"kind": "ivfpq-fs", "nlist": 16, "m": 8}
    ladder = ladder_of(*resolved(**fields))
    shards, exact = [], []
    for own in np.array_split(np.random.default_rng(0).permutation(ROWS), 3):
        main = build_main(vectors[own], **fields)
        _, best = exact_top_k(queries, vectors[own], MEASURED_K, Metric.COSINE)
        answers = sweep(
            main,
            vectors[own],
            queries,
            ladder,
            exact=best,
            share=1 / 3,
            target=0.98,
            metric=Metric.COSINE,
        )
        shards.append((own, main, answers))
        exact.append(best)
    kth = np.sort(np.concatenate(exact, axis=1), axis=1)[:, -MEASURED_K:]
    return {"vectors": vectors, "queries": queries, "shards": shards, "exact": kth}


def test_recall_is_that_of_the_merged_answer(swept: dict) -> None:
    """Against a plain union of the shards' answers, by ids: this corpus has no ties."""
    vectors, queries = swept["vectors"], swept["queries"]
    points = measured([answers for _, _, answers in swept["shards"]], swept["exact"])
    common = set.intersection(*(set(answers) for _, _, answers in swept["shards"]))
    assert len(common) >= 4
    truth = np.argsort(-(queries @ vectors.T), axis=1)[:, :MEASURED_K]
    for point in points:
        if point.params not in common:
            continue
        hits = 0
        for at, query in enumerate(queries):
            found = []
            for own, main, _ in swept["shards"]:
                rows, scores = main.search(query[None], MEASURED_K, point.params)
                found += [
                    (-value, int(own[row]))
                    for value, row in zip(scores[0], rows[0], strict=True)
                    if row >= 0
                ]
            top = {item for _, item in sorted(found)[:MEASURED_K]}
            hits += len(top & set(truth[at].tolist()))
        assert point.recall == pytest.approx(hits / truth.size, abs=2e-3), point
        assert point.ms > 0


def test_recall_rises_with_depth_and_the_target_is_within_reach(swept: dict) -> None:
    points = measured([answers for _, _, answers in swept["shards"]], swept["exact"])
    by_params = {(p.params.nprobe, p.params.rerank_factor): p.recall for p in points}
    assert by_params[1, 1] < 0.9
    assert max(by_params.values()) >= 0.98
    assert by_params[1, 1] < by_params[2, 1] < by_params[4, 1]


def answered(scores: list[list[float]], exact: list[list[float]], ms: float = 1.0) -> Answered:
    return Answered(np.array(scores, np.float32), np.array(exact, np.float32), ms)


def test_a_shard_that_stopped_early_is_taken_with_its_highest_answer() -> None:
    one, two = SearchParams(nprobe=1, rerank_factor=1), SearchParams(nprobe=2, rerank_factor=2)
    full = answered([[0.9, 0.8]], [[0.9, 0.8]], 1.0)
    poor, good = (
        answered([[0.3, 0.2]], [[0.3, 0.2]], 2.0),
        answered([[0.7, 0.6]], [[0.7, 0.6]], 5.0),
    )
    exact = np.array([[0.9, 0.8, 0.7, 0.6]], np.float32)
    found = {
        point.params: point for point in measured([{one: full}, {one: poor, two: good}], exact)
    }
    assert (found[one].recall, found[one].ms) == (0.5, 3.0)
    assert (found[two].recall, found[two].ms) == (1.0, 6.0)


def test_estimates_push_right_results_out_of_the_merged_answer() -> None:
    """A shard whose codes overestimate fills the answer with rows that are none of the best."""
    right = answered([[0.5, 0.4]], [[0.5, 0.4]])
    over = answered([[0.9, 0.8]], [[0.1, 0.1]])
    exact = np.array([[0.5, 0.4]], np.float32)
    (point,) = measured([{SearchParams(): right}, {SearchParams(): over}], exact)
    assert point.recall == 0.0


def test_shards_that_tie_share_the_answer_in_any_way() -> None:
    """Copies of one vector in two shards: the merged answer takes either's, all of them hits."""
    copies = answered([[0.9, 0.9, 0.9]], [[0.9, 0.9, 0.9]])
    (point,) = measured([{SearchParams(): copies}] * 2, np.float32([[0.9, 0.9, 0.9]]))
    assert point.recall == 1.0
    mixed = answered([[0.9, 0.2, 0.1]], [[0.9, 0.2, 0.1]])
    exact = np.float32([[0.9, 0.9, 0.2]])  # one of two that tie on the last place
    (point,) = measured([{SearchParams(): mixed}] * 2, exact)
    assert point.recall == 1.0


def test_fewer_rows_than_wanted_are_divided_by_how_many_there_are() -> None:
    own = answered([[0.9, -np.inf, -np.inf]], [[0.9, -np.inf, -np.inf]])
    none = answered([[-np.inf] * 3], [[-np.inf] * 3])
    exact = np.float32([[0.9, 0.8, -np.inf]])
    (point,) = measured([{SearchParams(): own}, {SearchParams(): none}], exact)
    assert point.recall == 0.5


@pytest.mark.parametrize("fields", [{"kind": "ivf"}, {"kind": "ivfpq", "m": 4, "rerank": "none"}])
def test_a_sweep_over_copies_stops_where_a_list_holds_them(fields: dict) -> None:
    """By ids no depth would reach the target: of 300 copies, the exact hundred are arbitrary."""
    distinct = manifold(100, DIM, 8, seed=1)
    vectors, queries = np.tile(distinct, (300, 1)), distinct[:20]
    main = build_main(vectors, nlist=8, **fields)
    ladder = ladder_of(*resolved(nlist=8, **fields))
    _, exact = exact_top_k(queries, vectors, MEASURED_K, Metric.COSINE)
    answers = sweep(
        main,
        vectors,
        queries,
        ladder,
        exact=exact,
        share=1.0,
        target=0.98,
        metric=Metric.COSINE,
    )
    (shallow, *_) = measured([answers], exact)
    assert (shallow.params.nprobe, shallow.recall) == (1, 1.0)
    assert {params.nprobe for params in answers} == {1, ladder.default.nprobe}


def test_the_cheapest_that_reaches_the_target() -> None:
    def point(nprobe: int, factor: int, recall: float, ms: float = 1.0) -> Measured:
        return Measured(SearchParams(nprobe=nprobe, rerank_factor=factor), recall, ms)

    points = [point(1, 1, 0.9), point(8, 1, 0.985), point(2, 4, 0.99), point(64, 8, 1.0, 0.1)]
    _, index = resolved(kind="ivfpq-fs", nlist=64)
    cost = {each.params: cost_us(each.params, index, 100_000) for each in points}
    assert sorted(points, key=lambda each: cost[each.params]) == [points[i] for i in (0, 1, 2, 3)]
    assert choose(points, target=0.98, cost=cost) is points[1]  # whatever was measured in time
    assert choose(points, target=0.986, cost=cost) is points[2]
    assert choose(points[:2], target=0.99, cost=cost) is points[1]
    same = [point(2, 1, 0.99), point(1, 2, 0.99)]
    level = {each.params: 1.0 for each in same}
    assert choose(same, target=0.98, cost=level) is same[1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "ivfpq", "nbits": 4}, "index.rerank to fp16"),
        ({"kind": "ivf", "nprobe": 1}, "leave out index.nprobe,"),
        ({"kind": "ivfpq-fs"}, "index.kind ivf"),
    ],
)
def test_advice_names_what_would_help(fields: dict, words: str) -> None:
    assert words in advice(*resolved(**fields))


def test_few_results_rerank_as_many_candidates_as_were_measured() -> None:
    """Of codes that hold the best hundred, the best ten are not the first ten."""
    vectors, queries = manifold(ROWS, DIM, 8, seed=1), manifold(40, DIM, 8, seed=1, stream=1)
    main = build_main(vectors, kind="ivfpq-fs", nlist=4, nprobe=4, m=8, rerank_factor=2)
    _, truth = exact_top_k(queries, vectors, 10, Metric.COSINE)
    recalls = []
    for params in (SearchParams(), SearchParams(rerank_factor=2)):
        rows, _ = main.search(queries, 10, params)
        reached = exact_scores(queries, vectors, rows, Metric.COSINE) >= truth[:, -1:] - 1e-3
        recalls.append(reached.mean())
    assert recalls[0] > 0.95 > recalls[1]


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ({"kind": "ivf", "nlist": 64, "nprobe": 2}, SearchParams(nprobe=7)),
        ({"kind": "hnsw", "ef_search": 400}, SearchParams(ef_search=1400)),
    ],
)
def test_more_results_are_looked_for_in_proportion(fields: dict, given: SearchParams) -> None:
    """A default that was measured with 100 results would find few of 350."""
    vectors, queries = manifold(ROWS, DIM, 8, seed=1), manifold(20, DIM, 8, seed=1, stream=1)
    main = build_main(vectors, **fields)
    default, asked = (main.search(queries, 350, params) for params in (SearchParams(), given))
    np.testing.assert_array_equal(default[0], asked[0])
    np.testing.assert_array_equal(default[1], asked[1])
