"""How many lists a query needs: against the lists in which its best rows lie."""

import faiss
import numpy as np
import pytest

from shardline.bench.vectors import clustered, manifold
from shardline.shards.core.schema import EMPTY_SCORE, Metric
from shardline.shards.index.exact import exact_top_k
from shardline.shards.index.filtered_search import LIKELY_DEPTH
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.probing import Lists, NearLists
from tests.engine import build_main

ROWS, DIM, K = 20_000, 32, 50
NONE = np.empty(0, np.int64)
CORPORA = {
    "clustered": lambda rows, stream: clustered(rows, DIM, 200, 3, first_row=stream << 20),
    "manifold": lambda rows, stream: manifold(rows, DIM, 8, 3, stream=stream),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


@pytest.fixture(scope="module", params=CORPORA)
def corpus(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    make = CORPORA[request.param]
    return make(ROWS, 0), make(50, 1)


@pytest.fixture(scope="module", params=[*Metric, "pca"])
def main(corpus, request: pytest.FixtureRequest) -> MainIndex:
    if request.param == "pca":
        return build_main(corpus[0], kind="ivf", nlist=128, pca=24)
    return build_main(corpus[0], metric=request.param, kind="ivf", nlist=128)


def lists_of(main: MainIndex) -> Lists:
    return Lists(main.layers, main._stored, main.metric)


def test_each_row_lies_in_the_list_that_it_is_assigned_to(corpus, main) -> None:
    lists = lists_of(main)
    assigned = main.layers.base.quantizer.assign(lists._inner(corpus[0]), 1)[:, 0]
    np.testing.assert_array_equal(lists.of_row, assigned)
    some = np.arange(0, ROWS, 7)
    counts = np.bincount(assigned[some], minlength=128)
    filled = lists.filled(some)
    np.testing.assert_array_equal(filled.rows, counts[counts > 0])
    numbers = np.arange(128) if filled.numbers is None else filled.numbers
    np.testing.assert_array_equal(numbers, np.flatnonzero(counts))


@pytest.mark.parametrize("share", [1, 0.3, 0.05])
def test_the_lists_needed_hold_nearly_all_of_the_best_and_are_not_many_more(
    corpus, main, share
) -> None:
    vectors, queries = corpus
    mask = np.random.default_rng(1).random(ROWS) < share
    rows = np.flatnonzero(mask)
    best = exact_top_k(queries, vectors[rows], K, main.metric)
    lists = lists_of(main)
    matching = np.bincount(lists.of_row[rows], minlength=lists.count)
    near = lists.near(queries, lists.filled(rows))
    lasts = best.scores[:, -1]
    needed = np.array([each.needed(K, last, NONE) for each, last in zip(near, lasts, strict=True)])
    order = np.flatnonzero(matching)[
        np.argsort(-lists._scored(lists._inner(queries))[0][:, matching > 0], axis=1)
    ]
    rank = np.argsort(order, axis=1)  # of every list, by query
    place = np.searchsorted(np.flatnonzero(matching), lists.of_row[rows[best.ids]])
    ranks = np.take_along_axis(rank, place, axis=1)
    assert (ranks < np.maximum(needed, 2)[:, None]).mean() >= 0.9
    enough = np.quantile(ranks, 0.99, axis=1) + 1
    assert np.median(needed) <= max(8, 4 * np.median(enough))


def test_a_look_at_the_next_nearest_list_alone_never_ends_a_search_too_soon(
    corpus, main, monkeypatch
) -> None:
    lists = lists_of(main)
    mask = np.random.default_rng(1).random(ROWS) < 0.3
    near = lists.near(corpus[1][:20], lists.filled(np.flatnonzero(mask)))
    asked = [
        (each, score, each.order[:visited])
        for each in near
        for score in (EMPTY_SCORE, *np.quantile(each.scores, (0.5, 0.99)), each.scores.max() + 1)
        for visited in (0, 1, 8, 127, 128)
    ]
    quick = [each.needed(K, score, visited) for each, score, visited in asked]
    monkeypatch.setattr(NearLists, "_beyond", lambda self, last, visited: np.inf)
    assert quick == [each.needed(K, score, visited) for each, score, visited in asked]
    assert min(quick) == 0 < max(quick)


def test_an_empty_slot_needs_all_lists(corpus, main) -> None:
    lists = lists_of(main)
    for near in lists.near(corpus[1][:2], lists.filled(np.arange(ROWS))):
        assert near.needed(K, EMPTY_SCORE, NONE) >= len(near.rows) - 2


def test_no_more_lists_are_needed_than_all(corpus, main) -> None:
    lists = lists_of(main)
    (near,) = lists.near(corpus[1][:1], lists.filled(np.arange(ROWS)))
    assert near.needed(K, EMPTY_SCORE, near.order) == 0
    some = near.nearest(7)
    assert sorted(some) == sorted(near.order[:7]) == sorted(near.nearest(7))
    held = np.cumsum(near.rows[near.order])
    assert held[near.holding(900) - 1] >= 900 > held[near.holding(900) - 2]


def test_the_score_estimated_before_a_search_leads_to_about_the_lists_needed(corpus, main) -> None:
    """Among the rows outside a query's nearest lists, which few lists say nothing about."""
    vectors, queries = corpus
    lists, ratios = lists_of(main), []
    for query in queries[:20, None]:
        nearest = np.argsort(-lists._scored(lists._inner(query))[0][0])[:16]
        rows = np.flatnonzero(~np.isin(lists.of_row, nearest))
        (near,) = lists.near(query, lists.filled(rows))
        likely = near.likely(LIKELY_DEPTH * K)
        if main.metric is Metric.L2:
            assert likely == -np.inf
            continue
        _, exact = exact_top_k(query, vectors[rows], K, main.metric)
        ratios.append(near.needed(K, likely, NONE) / near.needed(K, exact[0, -1], NONE))
    assert main.metric is Metric.L2 or 0.4 <= np.median(ratios) <= 2.5, ratios
