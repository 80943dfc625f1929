"""Items that each query excludes, in a shard: answers are those of a shard that does not have them.

Vectors are of multiples of 1/2, so that scores are exact, and ties are many.
"""

from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
import pytest

from shardline.bench.vectors import clustered
from shardline.shards.core.exclusions import Excluded, joined_excluded
from shardline.shards.core.filter_language import check_filter
from shardline.shards.core.messages import (
    NO_FILTER,
    NO_PARAMS,
    SearchOptions,
    SearchParams,
    SearchReply,
    SearchRequest,
)
from shardline.shards.core.schema import MAX_K, Metric, Ranked
from shardline.shards.index.selection import Selection
from shardline.shards.index.spec import MEASURED_K
from shardline.shards.live.delta import TILE_ROWS
from shardline.shards.live.excluding import MARGIN, Excluding
from shardline.shards.live.state import ShardState, apply
from shardline.shards.server.shard import Shard
from tests.engine import build_main
from tests.fake_shard import brute_force, make_rows
from tests.live_model import delete, upsert
from tests.reference import assert_answer_order, assert_same_answers

DIM, ROWS, K = 8, 500, 20
IDS = np.arange(0, 3 * ROWS, 3)
VECTORS = make_rows(ROWS, DIM, seed=1)[1]
OTHERS = make_rows(400, DIM, seed=2)[1]
QUERIES = make_rows(6, DIM, seed=3)[1]
FEW = {"item_id": {"$lt": 300}}
HALF = {"item_id": {"$gte": 700}}
KINDS: dict[str, dict[str, Any]] = {
    "flat": {"kind": "flat"},
    "ivf": {"kind": "ivf", "nlist": 8, "nprobe": 8},
    "hnsw": {"kind": "hnsw", "ef_search": 400},
    "ivfpq-fs": {"kind": "ivfpq-fs", "nlist": 8, "nprobe": 8, "m": 4, "rerank_factor": 16},
}
EXACT = ("flat", "ivf")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def new_state(kind: str) -> ShardState:
    return ShardState.of(build_main(VECTORS, metric=Metric.DOT, **KINDS[kind]), IDS)


def written(state: ShardState, items: dict[int, np.ndarray], writes: int, seed: int) -> ShardState:
    """After some writes, which ``items`` follow."""
    rng = np.random.default_rng(seed)
    for seq in range(state.seq + 1, state.seq + 1 + writes):
        ids = rng.choice(np.arange(3 * ROWS + 60), 30, replace=False)
        if rng.random() < 0.3:
            record = delete(seq, ids)
            for item in ids.tolist():
                items.pop(item, None)
        else:
            vectors = OTHERS[rng.choice(len(OTHERS), len(ids), replace=False)]
            record = upsert(seq, ids, vectors)
            items.update(zip(ids.tolist(), vectors, strict=True))
        state, _ = apply(state, [record])
    return state


def of(lists: Sequence[Sequence[int]]) -> Excluded:
    ids = [np.unique(np.array(each, np.int64)) for each in lists]
    return Excluded(np.array([len(each) for each in ids], np.int32), np.concatenate(ids))


def expected(
    items: dict[int, np.ndarray], query: np.ndarray, excluded: Sequence[int], k: int
) -> Ranked:
    ids = np.array(sorted(items.keys() - set(excluded)), np.int64)
    vectors = np.array([items[item] for item in ids.tolist()], np.float32).reshape(-1, DIM)
    return brute_force(query[None], ids, vectors, k)


def random_lists(
    rng: np.random.Generator, state: ShardState, items: dict[int, np.ndarray]
) -> list[list[int]]:
    """Of each query: nothing, some items, the best ones, those of the delta, all, unknown ones."""
    lists = []
    for query in QUERIES:
        best = expected(items, query, (), 3 * K).ids[0]
        choices = [
            [],
            rng.choice(list(items), 15, replace=False),
            best[: rng.integers(1, 3 * K)],
            best[:2],
            state.delta.ids,
            list(items),
            list(items)[5:],
            [10**9, 2**63 - 1, 1],
        ]
        lists.append(list(choices[rng.integers(len(choices))]))
    return lists


def check(
    found: Ranked,
    counts: np.ndarray,
    items: dict[int, np.ndarray],
    lists: Sequence[Sequence[int]],
    kind: str,
) -> None:
    assert_answer_order(found)
    for row, (query, excluded) in enumerate(zip(QUERIES, lists, strict=True)):
        wanted = expected(items, query, excluded, K)
        are_short = wanted.ids[0, -1] < 0
        assert counts[row] == (len(items.keys() & set(map(int, excluded))) if are_short else 0)
        got = found.rows(slice(row, row + 1))
        if kind in EXACT:
            np.testing.assert_array_equal(got.ids, wanted.ids)
            np.testing.assert_array_equal(got.scores, wanted.scores)
        else:
            assert not np.isin(got.ids, np.array(excluded, np.int64)).any()
            assert (got.ids >= 0).sum() == (wanted.ids >= 0).sum()
            if kind == "hnsw":
                assert_same_answers(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [None, FEW, HALF])
def test_answers_are_those_without_the_excluded_items(kind: str, given: Any) -> None:
    rng = np.random.default_rng(5)
    items = dict(zip(IDS.tolist(), VECTORS, strict=True))
    state = new_state(kind)
    for turn in range(8):
        lists = random_lists(rng, state, items)
        matching, live = None, dict(items)
        if given is not None:
            matching = state.matching(check_filter(given))
            low, high = (0, 300) if given is FEW else (700, 10**9)
            live = {item: vector for item, vector in items.items() if low <= item < high}
        together, counts = state.search_excluding(QUERIES, K, NO_PARAMS, of(lists), matching)
        check(together, counts, live, lists, kind)
        exactly, counts = state.search_excluding(QUERIES, K, None, of(lists), matching)
        check(exactly, counts, live, lists, "flat" if kind in EXACT else kind)
        for row, each in enumerate(lists):
            some = slice(row, row + 1)
            alone, count = state.search_excluding(QUERIES[some], K, NO_PARAMS, of([each]), matching)
            assert count == counts[row]
            if kind in EXACT:
                np.testing.assert_array_equal(alone.ids, together.ids[some])
                np.testing.assert_array_equal(alone.scores, together.scores[some])
            assert not np.isin(alone.ids, np.array(each, np.int64)).any()
        # what is derived for a filter is not changed by those who exclude some of its rows
        plain = state.search(QUERIES, K, NO_PARAMS, matching)
        check(plain, np.zeros(len(QUERIES)), live, [[]] * len(QUERIES), kind)
        state = written(state, items, 1 + turn, seed=turn)
    assert state.delta.rows > TILE_ROWS


def test_a_query_in_a_batch_is_searched_alone_only_if_it_comes_out_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone: list[list[int]] = []

    def counted(self: Excluding, query: Any, k: int, ids: Any) -> Any:
        alone.append(ids.tolist())
        return real(self, query, k, ids)

    real = Excluding._alone
    monkeypatch.setattr(Excluding, "_alone", counted)
    state = new_state("flat")
    best = brute_force(QUERIES, IDS, VECTORS, ROWS).ids
    lists = [[], best[1, :MARGIN], best[2, : MARGIN + 1], best[3, -200:], [1], best[5, :300]]
    found, counts = state.search_excluding(QUERIES, K, NO_PARAMS, of(lists))
    assert alone == [sorted(lists[5])], (
        "of 2 and 5, which the first batch leaves short, the second finds 2"
    )
    items = dict(zip(IDS.tolist(), VECTORS, strict=True))
    check(found, counts, items, lists, "flat")

    alone.clear()  # nothing more is there to be found
    everything = [IDS.tolist()] * len(QUERIES)
    found, counts = state.search_excluding(QUERIES, ROWS, NO_PARAMS, of(everything))
    assert (found.ids == -1).all()
    assert counts.tolist() == [ROWS] * len(QUERIES)
    assert alone == []
    for size, is_alone in ((MARGIN, False), (MARGIN + 1, True)):
        state.search_excluding(QUERIES[:1], K, NO_PARAMS, of([best[0, :size]]))
        assert bool(alone) is is_alone


@pytest.mark.parametrize("kind", ["ivf", "ivfpq-fs"])
def test_a_search_finds_k_items_where_the_lists_that_it_visits_have_too_few(kind: str) -> None:
    fields = KINDS[kind] | {"nlist": 16, "nprobe": 1}
    state = ShardState.of(build_main(VECTORS, metric=Metric.DOT, **fields), IDS)
    found = state.search(QUERIES, 200, NO_PARAMS)
    assert (found.ids >= 0).all()
    own = SearchParams(nprobe=1)
    assert (state.search(QUERIES, 200, own).ids == -1).any(), "as its caller wants it"
    best = brute_force(QUERIES, IDS, VECTORS, 300).ids
    left, _ = state.search_excluding(QUERIES, 200, NO_PARAMS, of(list(best)))
    assert (left.ids >= 0).all()
    for row, each in enumerate(best):
        assert sorted([*left.ids[row], *each]) == IDS.tolist()
    few, _ = state.search_excluding(QUERIES, 200, own, of(list(best)))
    assert (few.ids == -1).any()


def test_of_one_of_several_shards_its_share_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many far items a query excludes, no more is visited than without."""
    vectors = clustered(8000, 16, 80, seed=1)
    main = build_main(vectors, kind="ivf", nlist=100, nprobe=1)
    state = ShardState.of(main, np.arange(8000), share=0.25)
    visited: list[tuple[int, int]] = []
    search = type(main).search

    def noted(self: Any, queries: Any, k: int, params: Any, selection: Any = None,
              beyond: int = 0, more: int = 0) -> Ranked:  # fmt: skip
        visited.append((k, beyond))
        return search(self, queries, k, params, selection, beyond, more=more)

    monkeypatch.setattr(type(main), "search", noted)
    k, enough = MEASURED_K, MEASURED_K // 2
    sizes = (state.search(vectors[:100], k, NO_PARAMS).ids >= 0).sum(axis=1)
    (places,) = ((sizes >= enough + 5) & (sizes < k)).nonzero()
    query = vectors[places[:1]]
    plain = state.search(query, k, NO_PARAMS)
    scores = vectors @ query[0]
    far, near = np.argsort(scores)[:1000], np.argsort(-scores)[:5]
    visited.clear()
    found, counts = state.search_excluding(query, k, NO_PARAMS, of([[*far, *near]]))
    assert visited == [(k, 0)]
    left = plain.ids[0][~np.isin(plain.ids[0], near)]
    assert found.ids[0].tolist() == [*left, *[-1] * 5]
    assert counts.tolist() == [1005]
    # far items of the delta are no better for being many
    items = np.arange(8000, 8000 + k)
    written, _ = apply(state, [upsert(1, items, np.repeat(-query, k, axis=0))])
    own = plain.ids[0][plain.ids[0] >= 0]
    found, _ = written.search_excluding(query, k, NO_PARAMS, of([own[5:]]))
    assert np.isin(found.ids[0], np.arange(8000)).sum() >= enough
    assert np.isin(own[:5], found.ids[0]).all()
    own_params = SearchParams(nprobe=1)
    found, _ = state.search_excluding(query, k, own_params, of([own[5:]]))
    assert sorted(found.ids[0][found.ids[0] >= 0]) == sorted(own[:5]), "as its caller wants it"
    # one that excludes most of what it finds gets as many of other lists
    found, counts = state.search_excluding(query, k, NO_PARAMS, of([own[5:]]))
    assert (found.ids >= 0).sum() >= enough
    assert not np.isin(found.ids, own[5:]).any()


def test_all_but_a_few_rows_may_be_excluded_or_deleted() -> None:
    state = new_state("ivf")
    state, _ = apply(state, [delete(1, IDS[:-30])])
    found, counts = state.search_excluding(QUERIES[:1], K, NO_PARAMS, of([IDS[:-5]]))
    assert counts.tolist() == [25]
    assert sorted(found.ids[0][:5]) == IDS[-5:].tolist()
    assert (found.ids[0][5:] == -1).all()


def test_replies_of_a_batch_are_those_of_each_request_alone() -> None:
    rng = np.random.default_rng(3)
    items = dict(zip(IDS.tolist(), VECTORS, strict=True))
    state = written(new_state("flat"), items, 12, seed=9)
    shard = Shard(shard=0, generation=1, state=state)
    for given in (b"", check_filter(HALF)):
        requests = []
        for _ in range(12):
            lists = random_lists(rng, state, items)
            excluded = of(lists) if any(map(len, lists)) and rng.random() < 0.8 else None
            options = SearchOptions(filter=given)
            requests.append(
                SearchRequest(
                    queries=QUERIES, k=K, timeout_ms=1e4, options=options, excluded=excluded
                )
            )
        for request, together in zip(requests, shard.search_batch(requests), strict=True):
            alone = shard.search(request)
            assert isinstance(together, SearchReply)
            np.testing.assert_array_equal(together.ranked.ids, alone.ranked.ids)
            np.testing.assert_array_equal(together.ranked.scores, alone.ranked.scores)
            counts = [0] * len(QUERIES) if alone.excluded is None else alone.excluded.tolist()
            assert together.excluded is not None
            assert together.excluded.tolist() == counts
            assert together.matched == alone.matched
            assert (together.matched == NO_FILTER) == (given == b"")


def test_an_item_query_of_the_largest_k_is_one_more_for_the_item_itself() -> None:
    shard = Shard(shard=0, generation=1, state=new_state("flat"))
    reply = shard.search(SearchRequest(queries=QUERIES, k=MAX_K + 1, timeout_ms=1e4))
    assert (reply.ranked.ids >= 0).sum(axis=1).tolist() == [ROWS] * len(QUERIES)


def test_exclusions_of_some_queries_are_those_of_the_whole() -> None:
    lists = [[], [4, 5], [], [9], [1, 2, 3], []]
    whole = of(lists)
    for start in range(6):
        for end in range(start, 7):
            part = whole.rows(slice(start, end))
            some = lists[start:end]
            if not any(some):
                assert part is None
                continue
            assert part is not None
            assert part.counts.tolist() == [len(each) for each in some]
            assert part.ids.tolist() == [item for each in some for item in each]
    halves = [(2, whole.rows(slice(0, 2))), (1, whole.rows(slice(2, 3))), (3, of(lists[3:]))]
    again = joined_excluded(halves)
    assert again is not None
    np.testing.assert_array_equal(again.counts, whole.counts)
    np.testing.assert_array_equal(again.ids, whole.ids)
    assert joined_excluded([(2, None), (1, None)]) is None


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 64, 1001])
def test_a_selection_less_some_rows_has_all_others(rows: int) -> None:
    rng = np.random.default_rng(rows)
    whole = Selection.whole(rows)
    assert (whole.num_selected, whole.selected().tolist()) == (rows, list(range(rows)))
    base = Selection.of(rng.random(rows) < 0.7)
    for origin in (whole, base):
        more = origin.selected()[::2]
        less = origin.less(more)
        assert less.selected().tolist() == sorted(set(origin.selected()) - set(more))
        assert less.num_selected == origin.num_selected - len(more)
        assert less.origin is origin
        assert less.base is origin


def test_exclusions_add_to_the_lists_that_many_results_need() -> None:
    """Beyond MEASURED_K results a default visits more lists; with exclusions not fewer."""
    main = build_main(clustered(4000, 16, 40, seed=1), kind="ivf", nlist=64, nprobe=2)
    k = 10 * MEASURED_K
    assert main._reaching(NO_PARAMS, k, 40).nprobe > 2 * 10
    assert main._reaching(NO_PARAMS, 10, 40).nprobe > 2


def test_many_results_are_found_as_well_with_exclusions_as_without() -> None:
    """Far items are excluded: nothing that would be found is missing, beyond MEASURED_K too."""
    vectors = clustered(20_000, 16, 200, seed=1)
    state = ShardState.of(build_main(vectors, kind="ivf", nlist=64, nprobe=4), np.arange(20_000))
    query, k = vectors[:1], 5 * MEASURED_K
    plain = state.search(query, k, NO_PARAMS)
    far = np.sort(np.argsort(vectors @ query[0])[: 2 * MARGIN])
    excluded = Excluded(np.array([len(far)], np.int32), far)
    found, _ = state.search_excluding(query, k, NO_PARAMS, excluded)
    assert found.scores[0, -1] >= plain.scores[0, -1]
