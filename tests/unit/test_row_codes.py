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
from shardline.shards.index.row_codes import CodedRows, RowCodes
from shardline.shards.index.selection import Selection
from tests.engine import build_main
from tests.reference import assert_answer_order

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, DIM, CLUSTERS, K = 20_000, 32, 100, 20
KINDS = {
    "ivfpq-fs": {"kind": "ivfpq-fs", "nlist": 128, "nprobe": 2, "rerank_factor": 1},
    "ivfpq-fs-fp32": {"kind": "ivfpq-fs", "nlist": 128, "nprobe": 8, "rerank": "fp32"},
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


def tight(rng: np.random.Generator) -> np.ndarray:
    centres = rng.standard_normal((20, DIM))
    return centres[rng.integers(20, size=ROWS)] + 0.1 * rng.standard_normal((ROWS, DIM))


def with_copies(rng: np.random.Generator) -> np.ndarray:
    made = tight(rng)
    made[: ROWS // 3] = made[0]
    return made


def shifted(rng: np.random.Generator) -> np.ndarray:
    made = rng.standard_normal((ROWS, DIM))
    made[:, 0] += 50
    return made


@pytest.mark.parametrize(
    ("made", "metric"),
    [
        (tight, Metric.COSINE),
        (tight, Metric.L2),
        (with_copies, Metric.L2),
        (shifted, Metric.DOT),
    ],
)
def test_vectors_that_codes_do_not_tell_apart_are_searched_without(made, metric) -> None:
    vectors = made(np.random.default_rng(2)).astype(np.float32)
    main = build_main(vectors, metric=metric, **KINDS["ivfpq-fs"])
    chosen, queries = Selection.of(MASKS["half"]), vectors[:20]
    before = main.search_filtered(queries, K, NO_PARAMS, chosen)
    main.search_filtered(queries, K, NO_PARAMS, chosen)
    making = filtered_of(main)._coding
    assert making is not None
    making.join()
    after = main.search_filtered(queries, K, NO_PARAMS, chosen)
    assert filtered_of(main)._derived[chosen].coded is None
    assert not filtered_of(main)._can_be_coded
    rows = chosen.selected()
    least = recall_of(before, queries, vectors, rows, metric) - 0.02
    assert recall_of(after, queries, vectors, rows, metric) >= least


def test_what_all_vectors_have_in_common_does_no_harm(queries) -> None:
    vectors = np.random.default_rng(2).standard_normal((ROWS, DIM)).astype(np.float32)
    vectors[:, 0] += 5
    main = build_main(vectors, metric=Metric.L2, **KINDS["ivfpq-fs-fp32"])
    chosen = coded(main, queries, MASKS["half"])
    found = main.search_filtered(vectors[:20], K, NO_PARAMS, chosen)
    assert recall_of(found, vectors[:20], vectors, chosen.selected(), Metric.L2) >= 0.97


def test_a_caller_who_says_how_much_is_visited_gets_that(vectors, queries, monkeypatch) -> None:
    main = build_main(vectors, **KINDS["ivfpq-fs"])
    chosen = coded(main, queries, MASKS["half"])
    monkeypatch.setattr(CodedRows, "nearest", None)
    main.search_filtered(queries, K, SearchParams(nprobe=128), chosen)
    with pytest.raises(TypeError):
        main.search_filtered(queries, K, NO_PARAMS, chosen)


def test_a_failure_to_make_codes_costs_no_search(vectors, queries, monkeypatch, caplog) -> None:
    def broken(*args: object) -> None:
        raise MemoryError("a failure")

    monkeypatch.setattr(RowCodes, "of", broken)
    main, chosen = build_main(vectors, **KINDS["ivfpq-fs"]), Selection.of(MASKS["half"])
    for _ in range(2):
        main.search_filtered(queries[:1], K, NO_PARAMS, chosen)
    making = filtered_of(main)._coding
    assert making is not None
    making.join()
    assert "no codes for filters" in caplog.text
    assert not filtered_of(main)._can_be_coded
    assert (main.search_filtered(queries, K, NO_PARAMS, chosen).ids >= 0).all()


def test_filters_in_use_are_not_dropped_for_copies_of_others(vectors, queries, monkeypatch) -> None:
    main = build_main(vectors, **KINDS["ivfpq-fs"])
    filtered = filtered_of(main)
    filtered._can_be_coded, filtered._copied = False, 400
    entry = 300 * main._stored.row_bytes
    monkeypatch.setattr(filtered_search, "KEPT_BYTES", 10 * (entry + filtered_search.ENTRY_BYTES))
    walked = [Selection.of(np.arange(ROWS) % 2 == rest) for rest in range(2)]
    lost = 0
    for number in range(40):
        for each in walked:
            lost += number > 0 and each not in filtered._derived
            main.search_filtered(queries[:1], K, NO_PARAMS, each)
        small = Selection.of((np.arange(ROWS) // 300) == number)
        main.search_filtered(queries[:1], K, NO_PARAMS, small)
        assert filtered._bytes <= filtered_search.KEPT_BYTES + entry + 2 * ROWS
    assert lost == 0
    assert sum(each.has_vectors for each in filtered._derived.values()) > 4
    kept = list(filtered._derived.values())
    assert filtered._bytes == sum(each.bytes for each in kept)
    assert filtered._vector_bytes == sum(each.bytes for each in kept if each.has_vectors)


def test_codes_that_nobody_uses_make_room(vectors, queries, monkeypatch) -> None:
    main = build_main(vectors, **KINDS["ivfpq-fs"])
    filtered = filtered_of(main)
    chosen = coded(main, queries, MASKS["half"])
    size = filtered._derived[chosen].bytes
    monkeypatch.setattr(filtered_search, "FADING_USES", 40)
    monkeypatch.setattr(filtered_search, "KEPT_BYTES", filtered._bytes + size // 2)
    monkeypatch.setattr(filtered_search, "CODED_ROWS", 0)
    for number in range(100):
        other = Selection.of(np.arange(ROWS) % 3 == number % 3)
        main.search_filtered(queries[:1], K, NO_PARAMS, other)
    assert chosen not in filtered._derived


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
        return filtered_of(build_main(rows, **KINDS["ivfpq-fs"]))._can_be_coded

    assert can(vectors)
    assert not filtered_of(build_main(vectors, kind="flat"))._can_be_coded
    assert not filtered_of(build_main(vectors, kind="ivf", nlist=64))._can_be_coded
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
