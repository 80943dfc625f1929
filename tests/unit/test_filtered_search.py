"""Searches among the rows of a filter: against brute force, for all kinds, shares and shapes."""

import gc
import weakref

import faiss
import numpy as np
import pytest

from shardline.bench.vectors import clustered
from shardline.shards.core.errors import DeadlineExceeded, InvalidInput
from shardline.shards.core.messages import NO_PARAMS, SearchParams
from shardline.shards.core.recall import exact_scores, recall_at_k
from shardline.shards.core.schema import EMPTY_ID, EMPTY_SCORE, Metric, Ranked
from shardline.shards.index import filtered_search
from shardline.shards.index.exact import exact_top_k
from shardline.shards.index.list_scan import ListWalk
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.selection import Selection
from tests.engine import build_main
from tests.index_kinds import DIM, FULL, KINDS, ROWS
from tests.reference import assert_answer_order, assert_same_answers, brute_force, recall_by_ids

pytestmark = pytest.mark.usefixtures("one_thread")

K = 10
EXACT = ["flat", "ivf", "ivfpq-fs-fp32"]
RNG = np.random.default_rng(3)
MASKS = {
    "all": np.ones(ROWS, np.bool_),
    "none": np.zeros(ROWS, np.bool_),
    "the first": np.arange(ROWS) == 0,
    "the last": np.arange(ROWS) == ROWS - 1,
    "few": RNG.random(ROWS) < 0.02,
    "some": RNG.random(ROWS) < 0.2,
    "most": RNG.random(ROWS) < 0.9,
    "copies": (np.arange(ROWS) >= 95) & (np.arange(ROWS) < 115),
}


@pytest.fixture(scope="module")
def built(vectors: np.ndarray) -> dict[str, MainIndex]:
    return {name: build_main(vectors, **fields) for name, fields in KINDS.items()}


@pytest.fixture(params=["all scored", "searched"])
def way(request: pytest.FixtureRequest, built, monkeypatch) -> str:
    """Whether rows are so few that all are scored, or the index is searched."""
    for main in built.values():
        monkeypatch.setattr(main._filtered, "_copied", ROWS if "all" in request.param else 0)
        monkeypatch.setattr(main._filtered, "_copied_again", main._filtered._copied)
    return request.param


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_rows_that_match_and_k_of_them_where_there_are(
    built, queries, way, kind, mask
) -> None:
    got = built[kind].search_filtered(queries, K, NO_PARAMS, Selection.of(MASKS[mask]))
    assert got.ids.shape == got.scores.shape == (len(queries), K)
    assert (got.ids.dtype, got.scores.dtype) == (np.int64, np.float32)
    assert_answer_order(got)
    found = got.ids[got.ids >= 0]
    assert MASKS[mask][found].all()
    assert ((got.ids >= 0).sum(axis=1) == min(K, MASKS[mask].sum())).all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("all_scored", [True, False])
def test_exact_kinds_equal_brute_force(
    vectors, queries, kind, metric, mask, all_scored, monkeypatch
) -> None:
    main = build_main(vectors, metric=metric, **KINDS[kind])
    for name in ("_copied", "_copied_again"):
        monkeypatch.setattr(main._filtered, name, ROWS if all_scored else 0)
    params = SearchParams(nprobe=8, rerank_factor=64)
    got = main.search_filtered(queries, 30, params, Selection.of(MASKS[mask]))
    excluded = np.flatnonzero(~MASKS[mask]).tolist()
    expected = brute_force(queries, vectors, np.arange(ROWS), 30, metric, excluded)
    assert_same_answers(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_filter_of_a_tenth_loses_little(built, vectors, queries, way, kind) -> None:
    if kind in ("pq", "ivfpq", "pca-ivf", "pca-pq", "ivf-sq8"):
        pytest.skip("its codes alone lose more")
    mask = np.random.default_rng(8).random(ROWS) < 0.1
    got = built[kind].search_filtered(queries, K, NO_PARAMS, Selection.of(mask))
    excluded = np.flatnonzero(~mask).tolist()
    exact = brute_force(queries, vectors, np.arange(ROWS), K, Metric.COSINE, excluded)
    assert recall_by_ids(got.ids, exact.ids) >= 0.95


@pytest.mark.parametrize("kind", ["flat", "ivfpq-fs", "pq"])
def test_ties_are_ordered_by_row(built, vectors, way, kind) -> None:
    got = built[kind].search_filtered(vectors[:1], 4, FULL, Selection.of(MASKS["copies"]))
    assert got.ids[0].tolist() == [100, 101, 102, 103]


@pytest.mark.parametrize("kind", ["flat", "ivf", "pq", "ivfpq-fs-fp32", "hnsw"])
def test_rows_hidden_more_and_more_leave_what_a_filter_has_derived(
    built, vectors, queries, way, kind
) -> None:
    main, mask = built[kind], MASKS["some"]
    matching, hidden = Selection.of(mask), Selection.without(np.array([5]), rows=ROWS)
    states = [hidden]
    for start in (10, 200, 300):
        states.append(states[-1].excluding(np.arange(start, start + 50)))
    for at in (0, 1, 1, 3, 2, 0):  # states of before are still searched by who holds them
        chosen = matching & states[at]
        got = main.search_filtered(queries, K, FULL, chosen)
        kept = mask & states[at].live
        assert kept[got.ids].all()
        assert chosen.num_selected == kept.sum()
        if kind != "pq":
            expected = brute_force(
                queries, vectors, np.arange(ROWS), K, Metric.COSINE, np.flatnonzero(~kept).tolist()
            )
            if kind != "hnsw":
                assert_same_answers(got, expected, rtol=1e-4, atol=1e-5)


def test_what_is_kept_of_filters_is_bounded(built, queries, monkeypatch) -> None:
    entry = filtered_search.ENTRY_BYTES + 10 * DIM * 4
    monkeypatch.setattr(filtered_search, "KEPT_BYTES", 4 * entry)
    main = built["flat"]
    kept = main._filtered._derived
    for first in range(0, 100, 10):
        mask = (np.arange(ROWS) >= first) & (np.arange(ROWS) < first + 10)
        got = main.search_filtered(queries, K, NO_PARAMS, Selection.of(mask))
        assert sorted(got.ids[0]) == list(range(first, first + 10))
        assert main._filtered._bytes == sum(each.bytes for each in kept.values())
        assert all(each.bytes > entry for each in list(kept.values())[-1:])
    assert 2 <= len(kept) <= 4


def test_what_a_look_raises_ends_a_filtered_search(built, queries, monkeypatch) -> None:
    def look() -> None:
        raise DeadlineExceeded("over")

    half = Selection.of(np.arange(ROWS) % 2 == 0)
    monkeypatch.setattr(built["ivf"]._filtered, "_copied", 0)
    monkeypatch.setattr(built["ivf"]._filtered, "_copied_again", 0)
    with pytest.raises(DeadlineExceeded):
        built["ivf"].search_filtered(queries, K, NO_PARAMS, half, look)
    found = built["ivf"].search_filtered(queries, K, NO_PARAMS, half)
    # one that has found nothing reads all rows that match
    shape = len(queries), K
    nothing = Ranked(np.full(shape, EMPTY_ID), np.full(shape, EMPTY_SCORE, np.float32))
    monkeypatch.setattr(built["ivf"]._filtered, "_in_lists", lambda *_: nothing)
    with pytest.raises(DeadlineExceeded):
        built["ivf"].search_filtered(queries, K, NO_PARAMS, half, look)
    assert found.ids.shape == shape


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivfpq-fs-fp32", "ivfpq-fs"])
@pytest.mark.parametrize(("metric", "value"), [(Metric.L2, 1e19), (Metric.DOT, 3e38)])
@pytest.mark.parametrize("share", [2, 40])
def test_a_query_whose_scores_overflow_finds_no_row_twice(
    vectors, way, kind, metric, value, share
) -> None:
    main = build_main(vectors, metric=metric, **KINDS[kind])
    query = np.full((1, DIM), value, np.float32)
    mask = np.arange(ROWS) % share == 0
    for got in (
        main.search_filtered(query, K, NO_PARAMS, Selection.of(mask)),
        main.search_exactly(query, K, Selection.of(mask), lambda: None),
    ):
        found = got.ids[got.ids != EMPTY_ID]
        assert len(set(found.tolist())) == len(found)
        assert mask[found].all()
        assert (got.scores[got.ids == EMPTY_ID] == EMPTY_SCORE).all()


def test_parameters_and_dimension_are_checked(built, queries) -> None:
    one = Selection.of(MASKS["the first"])
    with pytest.raises(InvalidInput, match="out of range"):
        built["flat"].search_filtered(queries, K, SearchParams(nprobe=0), one)
    with pytest.raises(InvalidInput, match="wrong dimension"):
        built["flat"].search_filtered(queries[:, :3], K, NO_PARAMS, one)


CLUSTERS, LARGE, WIDE = 100, 10_000, 32
LARGE_KINDS = {
    "ivf": {"kind": "ivf", "nlist": 128, "nprobe": 2},
    "ivfpq-fs": {"kind": "ivfpq-fs", "nlist": 128, "nprobe": 2, "rerank_factor": 1},
    "pca-ivfpq-fs": {"kind": "ivfpq-fs", "nlist": 128, "nprobe": 2, "pca": 24},
    "hnsw": {"kind": "hnsw", "ef_search": 64},
}


@pytest.fixture(scope="module")
def large() -> tuple[np.ndarray, np.ndarray]:
    rows = clustered(LARGE, WIDE, CLUSTERS, seed=5)
    return rows, clustered(40, WIDE, CLUSTERS, seed=5, first_row=1 << 20)


@pytest.fixture(scope="module", params=[Metric.COSINE, Metric.L2])
def large_built(large, request: pytest.FixtureRequest) -> dict[str, MainIndex]:
    kinds = LARGE_KINDS.items()
    return {name: build_main(large[0], metric=request.param, **kind) for name, kind in kinds}


def recall_of(main: MainIndex, large, mask: np.ndarray, asked: np.ndarray) -> float:
    """Of the second and later searches of that filter, one query at a time."""
    vectors, queries = large[0], large[1][asked]
    chosen, k = Selection.of(mask), 20
    found = [main.search_filtered(query[None], k, NO_PARAMS, chosen).ids[0] for query in queries]
    exact = exact_top_k(queries, vectors[mask], k, main.metric).scores
    return recall_at_k(exact_scores(queries, vectors, np.array(found), main.metric), exact)


@pytest.mark.parametrize("kind", LARGE_KINDS)
@pytest.mark.parametrize("share", [0.5, 0.2, 0.1, 0.02])
def test_random_filters_lose_little(large, large_built, kind, share, monkeypatch) -> None:
    """Of a tenth of the rows the two lists that find the best of all find half, at most."""
    main, mask = large_built[kind], np.random.default_rng(9).random(LARGE) < share
    if kind != "hnsw":
        monkeypatch.setattr(main._filtered, "_copied", 100)
        monkeypatch.setattr(main._filtered, "_copied_again", 100)
    assert recall_of(main, large, mask, np.arange(40)) >= 0.95


@pytest.mark.parametrize("kind", LARGE_KINDS)
@pytest.mark.parametrize("categories", [1, 3, 10])
def test_filters_far_from_the_query_lose_little(
    large, large_built, kind, categories, monkeypatch
) -> None:
    """Rows of one category, or of half of all without the query's own."""
    vectors, queries = large
    trained = faiss.Kmeans(WIDE, 20, niter=5, seed=1)
    trained.train(vectors)
    of_row, of_query = (trained.index.search(each, 1)[1][:, 0] for each in (vectors, queries))
    main, recalls = large_built[kind], []
    if kind != "hnsw":
        monkeypatch.setattr(main._filtered, "_copied", 100)
        monkeypatch.setattr(main._filtered, "_copied_again", 100)
    for own in np.unique(of_query):
        others = np.random.default_rng(own).permutation(np.delete(np.arange(20), own))
        mask = np.isin(of_row, others[:categories])
        recalls.append(recall_of(main, large, mask, np.flatnonzero(of_query == own)))
    assert np.mean(recalls) >= 0.95


def test_one_query_that_goes_far_does_not_send_the_next_one(large, monkeypatch) -> None:
    """Whose results lie near: it visits as many lists as a search without a filter."""
    vectors, queries = large
    main = build_main(vectors, kind="ivf", nlist=64, nprobe=2)
    for name in ("_copied", "_copied_again"):
        monkeypatch.setattr(main._filtered, name, 100)
    steps: list[int] = []
    walk = ListWalk.to
    monkeypatch.setattr(
        ListWalk, "to", lambda self, *step: (steps.append(step[0]), walk(self, *step))[1]
    )
    of_row = main.layers.base.quantizer.search(vectors, 1)[1][:, 0]
    ranked = main.layers.base.quantizer.search(queries, 64)[1]
    chosen = Selection.of(~np.isin(of_row, ranked[0, :8]))  # far from the first query alone
    assert np.isin(ranked[1:, 0], ranked[0, :8]).mean() < 0.5
    near = queries[~np.isin(ranked[:, :4], ranked[0, :8]).any(axis=1)][:1]
    main.search_filtered(near, 1, NO_PARAMS, chosen)
    usual, steps[:] = list(steps), []
    for _ in range(2):
        main.search_filtered(queries[:1], 1, NO_PARAMS, chosen)
        assert max(steps) > max(usual)
    steps.clear()
    main.search_filtered(near, 1, NO_PARAMS, chosen)
    assert steps == usual
    for _ in range(8):  # where nearly all go far, they begin with what that takes
        main.search_filtered(queries[:1], 1, NO_PARAMS, chosen)
    steps.clear()
    main.search_filtered(near, 1, NO_PARAMS, chosen)
    assert max(steps) > max(usual)


@pytest.mark.parametrize("kind", ["ivf", "ivfpq-fs"])
def test_a_query_gets_the_same_answer_alone_and_in_a_batch(
    large, large_built, kind, monkeypatch
) -> None:
    main, queries = large_built[kind], large[1]
    chosen = Selection.of(np.random.default_rng(2).random(LARGE) < 0.9)
    monkeypatch.setattr(main._filtered, "_copied", 0)
    monkeypatch.setattr(main._filtered, "_copied_again", 0)
    together = main.search_filtered(queries, 20, NO_PARAMS, chosen)
    alone = [main.search_filtered(query[None], 20, NO_PARAMS, chosen) for query in queries]
    np.testing.assert_array_equal(together.ids, np.concatenate([each.ids for each in alone]))
    assert_answer_order(together)


def test_a_filter_that_comes_again_and_again_is_copied_where_that_saves_time(
    large, monkeypatch
) -> None:
    monkeypatch.setattr(filtered_search, "COPIES_MS", 1e6)
    main = build_main(large[0], **LARGE_KINDS["ivfpq-fs"])
    filtered = main._filtered
    filtered._copied, filtered._copied_again = 100, LARGE
    chosen = Selection.of(np.arange(LARGE) % 3 == 0)
    asked = []

    def ask(times: int) -> None:
        for _ in range(times):
            main.search_filtered(large[1][:1], 20, NO_PARAMS, chosen)
            asked.append(filtered._derived[chosen].copies is not None)

    ask(filtered_search.COPIED_AFTER + 2)
    assert not any(asked)
    monkeypatch.setattr(filtered_search, "COPIES_MS", 0.0)
    ask(2)
    assert asked[-2:] == [True, True]
    another = Selection.of(np.arange(LARGE) % 3 == 1)
    main.search_filtered(large[1][:4], 20, NO_PARAMS, another)
    assert filtered._derived[another].copies is None  # used too rarely so far
    main.search_filtered(
        large[1][:1], 20, NO_PARAMS, chosen & Selection.without(chosen.selected()[:3], rows=LARGE)
    )
    assert len(filtered._derived) == 2


def test_filters_that_take_turns_do_not_drive_out_each_others_copies(large, monkeypatch) -> None:
    monkeypatch.setattr(filtered_search, "COPIES_MS", 0.0)
    main = build_main(large[0], **LARGE_KINDS["ivfpq-fs"])
    filtered = main._filtered
    filtered._copied, filtered._copied_again = 100, LARGE
    third = LARGE // 3 * main._stored.row_bytes
    monkeypatch.setattr(filtered_search, "KEPT_BYTES", 2 * third + third // 2)
    chosen = [Selection.of(np.arange(LARGE) % 3 == rest) for rest in range(3)]

    def ask(which: list[Selection], times: int) -> list[bool]:
        for _ in range(times):
            for each in which:
                main.search_filtered(large[1][:1], 20, NO_PARAMS, each)
        kept = [filtered._derived.get(each) for each in chosen]
        return [each is not None and each.copies is not None for each in kept]

    assert ask(chosen, 4 * filtered_search.COPIED_AFTER) == [True, True, False]
    # one that is used far more often than another takes its place
    assert ask(chosen[1:], 8 * filtered_search.COPIED_AFTER) == [False, True, True]
    # and so does one that came when the others were used no more, however often they had been
    chosen[0] = Selection.of(np.arange(LARGE) % 3 == 0)
    assert ask(chosen[:1], filtered_search.COPIED_AFTER + 1)[0]


def test_an_index_is_gone_with_the_last_reference_to_it(large) -> None:
    """It holds a shard's memory; the garbage collector would come much later."""
    main = build_main(large[0], **LARGE_KINDS["ivf"])
    main.search_filtered(large[1][:2], 20, NO_PARAMS, Selection.of(np.arange(LARGE) % 2 == 0))
    seen = weakref.ref(main)
    gc.disable()
    try:
        del main
        assert seen() is None
    finally:
        gc.enable()


def test_a_large_k_and_a_small_one(large, large_built) -> None:
    mask = np.random.default_rng(4).random(LARGE) < 0.9
    for kind in ("ivf", "ivfpq-fs"):
        for k in (1, 2048):
            got = large_built[kind].search_filtered(large[1], k, NO_PARAMS, Selection.of(mask))
            assert (got.ids >= 0).all()
            assert mask[got.ids].all()
            assert_answer_order(got)
