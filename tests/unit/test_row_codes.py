"""Filters whose rows are compared by codes: against brute force, and what is kept of them."""

import threading
import weakref

import numpy as np
import pytest

from shardline.bench.vectors import clustered
from shardline.shards.core.messages import NO_PARAMS, SearchParams
from shardline.shards.core.recall import exact_scores, recall_at_k
from shardline.shards.core.schema import EMPTY_ID, Metric, Ranked
from shardline.shards.index import filtered_search
from shardline.shards.index.exact import exact_top_k
from shardline.shards.index.filtered_search import FilteredSearch
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.row_codes import RowCodes
from shardline.shards.index.selection import Selection
from tests.engine import build_main
from tests.reference import assert_answer_order

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, DIM, CLUSTERS, K = 20_000, 32, 100, 20
KINDS = {
    "flat": {"kind": "flat"},
    "ivf": {"kind": "ivf", "nlist": 128, "nprobe": 2},
    "ivfpq-fs": {"kind": "ivfpq-fs", "nlist": 128, "nprobe": 2, "rerank_factor": 1},
}
RNG = np.random.default_rng(9)
MASKS = {"at random": RNG.random(ROWS) < 0.2, "half": np.arange(ROWS) % 2 == 0}


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    made = clustered(ROWS, DIM, CLUSTERS, seed=5)
    made[100:130] = made[100]  # copies
    return made


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return clustered(20, DIM, CLUSTERS, seed=5, first_row=1 << 20)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes whatever they save, of filters that were used once, of hundreds of rows."""
    monkeypatch.setattr(filtered_search, "COPIED_VALUES", 100 * DIM)
    monkeypatch.setattr(filtered_search, "CODED_AFTER", 0)
    monkeypatch.setattr(filtered_search, "CODED_GAIN", 0)


def filtered_of(main: MainIndex) -> FilteredSearch:
    return main._filtered


def coded(main: MainIndex, queries: np.ndarray, mask: np.ndarray) -> Selection:
    """The selection of a filter that is searched by codes from now on."""
    chosen = Selection.of(mask)
    main.search_filtered(queries[:1], K, NO_PARAMS, chosen)
    making = filtered_of(main)._coding
    assert making is not None
    making.join()
    main.search_filtered(queries[:1], K, NO_PARAMS, chosen)
    assert filtered_of(main)._derived[chosen].coded is not None
    return chosen


def recall_of(found: Ranked, queries: np.ndarray, vectors: np.ndarray, rows: np.ndarray,
              metric: Metric) -> float:  # fmt: skip
    exact = exact_top_k(queries, vectors[rows], K, metric).scores
    return recall_at_k(exact_scores(queries, vectors, found.ids, metric), exact)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("kind", KINDS)
def test_nearly_all_of_the_best_are_found(vectors, queries, kind, metric, mask) -> None:
    main = build_main(vectors, metric=metric, **KINDS[kind])
    chosen = coded(main, queries, MASKS[mask])
    found = main.search_filtered(queries, K, NO_PARAMS, chosen)
    assert_answer_order(found)
    assert MASKS[mask][found.ids].all()
    assert recall_of(found, queries, vectors, chosen.selected(), metric) >= 0.97
    alone = [main.search_filtered(query[None], K, NO_PARAMS, chosen) for query in queries]
    np.testing.assert_array_equal(found.ids, np.concatenate([each.ids for each in alone]))
    # a caller's factor may make it better, not worse than without codes
    one = main.search_filtered(queries, K, SearchParams(rerank_factor=1), chosen)
    np.testing.assert_array_equal(one.ids, found.ids)


def test_rows_that_are_hidden_or_excluded_do_not_come_back(vectors, queries) -> None:
    main, mask = build_main(vectors, **KINDS["ivfpq-fs"]), MASKS["half"]
    matching = coded(main, queries, mask)
    best = main.search_filtered(queries, K, NO_PARAMS, matching).ids
    hidden = Selection.without(np.unique(best), rows=ROWS)
    less = matching & hidden
    found = main.search_filtered(queries, K, NO_PARAMS, less)
    assert not np.isin(found.ids, best).any()
    assert recall_of(found, queries, vectors, less.selected(), Metric.COSINE) >= 0.97
    own = less.less(np.sort(found.ids[0]))  # what one query excludes besides
    again = main.search_filtered(queries[:1], K, NO_PARAMS, own)
    assert not np.isin(again.ids, np.concatenate((best[0], found.ids[0]))).any()
    assert recall_of(again, queries[:1], vectors, own.selected(), Metric.COSINE) >= 0.97


def test_where_many_rows_are_hidden_the_index_is_searched(vectors, queries, monkeypatch) -> None:
    main, mask = build_main(vectors, **KINDS["ivfpq-fs"]), MASKS["half"]
    matching = coded(main, queries, mask)
    rows = matching.selected()
    calls = []
    searched = FilteredSearch._searched
    monkeypatch.setattr(
        FilteredSearch, "_searched", lambda self, *args: calls.append(1) or searched(self, *args)
    )
    for share, by_index in ((9, False), (7, True)):
        hidden = Selection.without(rows[: len(rows) // share], rows=ROWS)
        calls.clear()
        found = main.search_filtered(queries, K, NO_PARAMS, matching & hidden)
        assert bool(calls) == by_index
        assert hidden.live[found.ids].all()


def test_more_results_than_rows_and_copies_in_order(vectors, queries) -> None:
    main, mask = build_main(vectors, **KINDS["ivfpq-fs"]), np.arange(ROWS) < 200
    chosen = coded(main, queries, mask)
    found = main.search_filtered(queries[:3], 300, NO_PARAMS, chosen)
    assert (np.sort(found.ids[:, :200], axis=1) == np.arange(200)).all()
    assert (found.ids[:, 200:] == EMPTY_ID).all()
    of_copy = main.search_filtered(vectors[100:101], 30, NO_PARAMS, chosen)
    assert of_copy.ids[0].tolist() == list(range(100, 130))


def test_a_tie_that_goes_on_beyond_the_candidates_is_closed(vectors, queries) -> None:
    same = vectors.copy()
    same[1000:3000] = same[1000]
    main = build_main(same, **KINDS["ivfpq-fs"])
    chosen = coded(main, queries, np.arange(ROWS) % 2 == 1)
    found = main.search_filtered(same[1000:1001], K, NO_PARAMS, chosen)
    assert found.ids[0].tolist() == list(range(1001, 1001 + 2 * K, 2))


def test_what_is_kept_counts_the_codes(vectors, queries) -> None:
    main = build_main(vectors, **KINDS["ivfpq-fs"])
    coded(main, queries, MASKS["half"])
    filtered = filtered_of(main)
    per_filter = sum(each.bytes for each in filtered._derived.values())
    assert filtered._bytes == per_filter + ROWS * RowCodes.row_bytes(DIM)
    assert per_filter > MASKS["half"].sum() * (4 + RowCodes.row_bytes(DIM))


def test_indexes_that_are_small_or_too_large_have_no_codes(vectors, queries, monkeypatch) -> None:
    def can(rows: np.ndarray) -> bool:
        return filtered_of(build_main(rows, kind="flat"))._can_be_coded

    assert can(vectors)
    assert not can(vectors[: filtered_search.CODED_FROM - 1])
    assert not can(vectors[:, :31])
    monkeypatch.setattr(filtered_search, "KEPT_BYTES", 2 * ROWS * RowCodes.row_bytes(DIM) - 1)
    assert not can(vectors)


def test_the_codes_of_an_index_that_is_gone_are_not_made_to_the_end(vectors, monkeypatch) -> None:
    main = build_main(vectors, **KINDS["ivfpq-fs"])
    filtered = filtered_of(main)
    is_gone, seen = threading.Event(), weakref.ref(filtered)
    made: list[RowCodes | None] = []
    make = RowCodes.of

    def noted(stored, metric, is_wanted) -> RowCodes | None:
        is_gone.wait()
        made.append(make(stored, metric, is_wanted))
        return made[0]

    monkeypatch.setattr(RowCodes, "of", noted)
    main.search_filtered(vectors[:1], K, NO_PARAMS, Selection.of(MASKS["half"]))
    main.search_filtered(vectors[:1], K, NO_PARAMS, Selection.of(MASKS["half"]))
    making = filtered._coding
    assert making is not None
    del main, filtered
    assert seen() is None
    is_gone.set()
    making.join()
    assert made == [None]
