"""States of a shard under writes, against a dict and brute force: every index kind and metric."""

import threading
import time
import tracemalloc
from dataclasses import replace

import faiss
import numpy as np
import pytest

from shardline.bench.vectors import manifold
from shardline.shards.core.errors import Behind
from shardline.shards.core.messages import NO_PARAMS, SearchOptions, SearchParams, SearchRequest
from shardline.shards.core.schema import EMPTY_ID, Metric, Ranked
from shardline.shards.index.selection import Selection
from shardline.shards.live import delta, delta_search
from shardline.shards.live.records import Record
from shardline.shards.live.state import Applied, ShardState, apply
from shardline.shards.server.shard import Shard
from tests.engine import build_main
from tests.live_model import Model, delete, upsert
from tests.reference import assert_answer_order, assert_same_answers, brute_force

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
QUERIES = manifold(4, DIM, 4, seed=1, stream=2)
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
    for part, k in zip(parts_of(rng, records), (1, 10, 100, ROWS + 60, 30, 2, 100), strict=True):
        state, applied = apply(state, part)
        assert applied == [model.apply(record) for record in part]
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


@pytest.mark.parametrize("metric", [Metric.DOT, Metric.L2])
@pytest.mark.parametrize("kind", EXACT)
def test_ties_across_main_and_delta_are_in_order_of_item_id(kind, metric) -> None:
    """Vectors of small integers, whose scores are exact in any order of summation."""
    rng = np.random.default_rng(5)
    values = rng.integers(-1, 2, (ROWS, DIM)).astype(np.float32)
    values[~values.any(axis=1)] = 1
    state = ShardState.of(build_main(values, metric=metric, **KINDS[kind]), IDS)
    model = Model(IDS, values)
    queries = rng.integers(-2, 3, (6, DIM)).astype(np.float32)
    # ids before, between and after those of main
    between = np.setdiff1d(np.arange(IDS[10], IDS[10] + 10**5), IDS)[:150]
    pool = np.concatenate([[0, 1, 2], between, IDS[::5], NEW_IDS])
    for seq in range(1, 6):
        ids = rng.choice(np.unique(pool), 40, replace=False)
        record = upsert(seq, ids, values[rng.integers(0, ROWS, 40)])
        state, applied = apply(state, [record])
        assert applied == [model.apply(record)]
        for k in (1, 7, 40, len(model.items) - 1):
            expected = model.answer(queries, k, metric)
            together = state.search(queries, k, FULL)
            np.testing.assert_array_equal(together.ids, expected.ids)
            np.testing.assert_array_equal(together.scores, expected.scores)
            for at in range(len(queries)):
                alone = state.search(queries[at : at + 1], k, FULL)
                np.testing.assert_array_equal(alone.ids[0], expected.ids[at])


def test_everything_deleted_and_written_again(states) -> None:
    for kind in ("flat", "hnsw", "pq", "ivfpq-fs"):
        state = states[kind, Metric.COSINE]
        gone, applied = apply(state, [delete(1, [*IDS, 5])])
        assert applied == [Applied(ROWS + 1, ROWS)]
        assert gone.rows == 0
        empty = gone.search(QUERIES, 10, FULL)
        assert (empty.ids == -1).all()
        assert np.isneginf(empty.scores).all()
        assert gone.fetch(IDS)[0].size == 0
        again, applied = apply(gone, [upsert(2, IDS[:30], VECTORS[:30])])
        assert applied == [Applied(30, 0)]
        expected = brute_force(QUERIES, VECTORS[:30], IDS[:30], 40, Metric.COSINE)
        assert_same_answers(again.search(QUERIES, 40, FULL), expected)
        assert_same_answers(
            again.search(QUERIES[:1], 40, FULL), Ranked(expected.ids[:1], expected.scores[:1])
        )
        twice, applied = apply(again, [delete(3, IDS[:30]), delete(4, IDS[:30])])
        assert applied == [Applied(30, 30), Applied(30, 0)]
        assert (twice.search(QUERIES, 10, FULL).ids == -1).all()
        assert (state.search(QUERIES, 10, FULL).ids >= 0).all()


@pytest.mark.parametrize("at_once", [True, False])
def test_the_newest_of_several_versions_counts(states, at_once) -> None:
    item, new = int(IDS[3]), int(NEW_IDS[0])
    records = [
        upsert(1, [item, new], OTHERS[:2]),
        upsert(2, [new, item], OTHERS[2:4]),
        delete(3, [item]),
        upsert(4, [item], OTHERS[5:6]),
        upsert(5, [new], OTHERS[6:7]),
    ]
    state, model = states["flat", Metric.DOT], Model(IDS, VECTORS)
    for part in [records] if at_once else [[record] for record in records]:
        state, applied = apply(state, part)
        assert applied == [model.apply(record) for record in part]
    found, vectors = state.fetch(np.array([new, item]))
    assert found.tolist() == [new, item]
    np.testing.assert_array_equal(vectors, OTHERS[[6, 5]])
    assert_as_model(state, model, ROWS + 10, Metric.DOT)
    assert (state.rows, state.hidden, state.delta.num_live, state.delta.rows) == (
        *(ROWS + 1, 1, 2),
        6,
    )


def test_fetch_of_new_replaced_deleted_and_absent_items(states) -> None:
    replaced, deleted, kept = IDS[[5, 6, 7]].tolist()
    new = int(NEW_IDS[0])
    state, _ = apply(
        states["flat", Metric.COSINE],
        [upsert(1, [new, replaced], OTHERS[:2]), delete(2, [deleted, 10**9])],
    )
    asked = np.array([kept, deleted, new, 10**9, replaced, kept])
    found, vectors = state.fetch(asked)
    assert found.tolist() == [kept, new, replaced, kept]
    np.testing.assert_array_equal(vectors, [VECTORS[7], OTHERS[0], OTHERS[1], VECTORS[7]])
    assert state.fetch(np.array([deleted]))[1].shape == (0, DIM)


@pytest.mark.parametrize("tile_rows", [7, delta.TILE_ROWS])
def test_old_states_stay_as_they_were_and_may_go_two_ways(states, monkeypatch, tile_rows) -> None:
    """A tree of states, each grown from a random earlier one, compared at the end."""
    monkeypatch.setattr(delta, "TILE_ROWS", tile_rows)
    main, ids = states["ivf", Metric.L2].main, states["ivf", Metric.L2].ids_by_row[:-1]
    rng = np.random.default_rng(8)
    grown = [(ShardState.of(main, ids), Model(IDS, VECTORS))]  # a delta with tiles of that size
    for _ in range(40):
        state, model = grown[rng.integers(max(0, len(grown) - 6), len(grown))]
        after = Model([], [])
        after.items = dict(model.items)
        records = random_records(rng, int(rng.integers(1, 5)), state.seq + 1)
        changed, applied = apply(state, records)
        assert applied == [after.apply(record) for record in records]
        grown.append((changed, after))
    for state, model in grown:
        assert_as_model(state, model, 20, Metric.L2)
        ids = np.array(sorted(model.items))
        found, vectors = state.fetch(np.concatenate([IDS, NEW_IDS]))
        assert sorted(found.tolist()) == ids.tolist()
        np.testing.assert_array_equal(vectors, [model.items[int(item)] for item in found])


def test_no_records_change_nothing(states) -> None:
    state = states["flat", Metric.DOT]
    assert apply(state, []) == (state, [])
    same, applied = apply(state, [delete(1, []), delete(2, [10**9])])
    assert applied == [Applied(0, 0), Applied(1, 0)]
    assert (same.seq, same.rows, same.selection) == (2, ROWS, None)
    with pytest.raises(AssertionError):
        apply(state, [delete(2, [5])])  # the first is missing


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize(
    ("block_queries", "block_scores", "tile_rows"),
    [(3, 40, 7), (100, 1, 64), (2, 7, 1), (8, 999, 33)],
)
def test_any_size_of_blocks_gives_the_same(
    monkeypatch, metric, block_queries, block_scores, tile_rows
) -> None:
    """With more rows in the delta than in main, so that answers have slots to fill."""
    monkeypatch.setattr(delta_search, "BLOCK_QUERIES", block_queries)
    monkeypatch.setattr(delta_search, "BLOCK_SCORES", block_scores)
    monkeypatch.setattr(delta, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(delta_search, "DIFFERENCES", 3 * DIM)
    few = ShardState.of(build_main(VECTORS[:12], metric=metric, kind="flat"), IDS[:12])
    model = Model(IDS[:12], VECTORS[:12])
    records = [
        upsert(1, np.arange(200), OTHERS[:200]),
        delete(2, np.arange(0, 200, 3)),
        upsert(3, IDS[:5], OTHERS[200:205]),
    ]
    state, _ = apply(few, records)
    for record in records:
        model.apply(record)
    queries = manifold(7, DIM, 4, seed=1, stream=3)
    for k in (5, 50, 300):
        got = state.search(queries, k, FULL)
        assert_same_answers(got, model.answer(queries, k, metric))
        assert_answer_order(got)


@pytest.mark.parametrize("tile_rows", [4, 16])
@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("k", [1, 6, 40, 100])
def test_of_many_equal_scores_the_lowest_ids_come_back(monkeypatch, metric, tile_rows, k) -> None:
    """Vectors of few different values, in main, in the delta, and dead ones: most scores tie."""
    monkeypatch.setattr(delta, "TILE_ROWS", tile_rows)
    rng = np.random.default_rng(k)
    some = rng.integers(1, 3, (90, DIM)).astype(np.float32)
    some[:, 2:] = 1
    if metric is Metric.COSINE:
        some /= np.linalg.norm(some, axis=1, keepdims=True)
    ids = np.sort(rng.choice(1000, 20, replace=False)).astype(np.int64)
    model = Model(ids, some[:20])
    state = ShardState.of(build_main(some[:20], metric=metric, kind="flat"), ids)
    records = [
        upsert(1, rng.permutation(1000)[:70].astype(np.int64), some[20:]),
        delete(2, ids[::3]),
    ]
    records.append(upsert(3, records[0].change.item_ids[:9], some[:9]))
    state, _ = apply(state, records)
    for record in records:
        model.apply(record)
    queries = np.repeat(some[:3], 4, axis=0)
    expected = model.answer(queries, k, metric)
    together = state.search(queries, k, FULL)
    alone = [state.search(query[None], k, FULL) for query in queries]
    for got in (together, Ranked(*map(np.concatenate, zip(*alone, strict=True)))):
        assert_same_answers(got, expected)
        assert_answer_order(got)
        if metric is not Metric.COSINE:  # sums of small whole numbers are exact
            np.testing.assert_array_equal(got.ids, expected.ids)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("queries", [1, 2, 3, 7, 8, 9, 20])
def test_of_rows_with_one_vector_as_many_come_back_as_fit(metric, queries) -> None:
    """In the products of several queries and of one the same pair may differ in the last bit."""
    rng = np.random.default_rng(queries)
    one = rng.standard_normal(128)
    copies = np.repeat((one / np.linalg.norm(one)).astype(np.float32)[None], 600, axis=0)
    main = build_main(-copies[:2], metric=metric, kind="flat")
    ids = np.arange(100, 700)
    state, _ = apply(ShardState.of(main, np.arange(2)), [upsert(1, ids, copies)])
    asked = rng.standard_normal((queries, 128)).astype(np.float32) + 3 * copies[:1]
    for k in (5, 50):
        found = state.search(asked, k, FULL)
        np.testing.assert_array_equal(found.ids, np.tile(ids[:k], (queries, 1)))


def test_vectors_whose_squares_overflow_are_found_and_ranked(states) -> None:
    """Under l2 their distance is infinite to all but each other; nothing else is disturbed."""
    huge = np.full((2, DIM), 3e19, np.float32)
    huge[1] *= -1
    state, _ = apply(states["flat", Metric.L2], [upsert(1, NEW_IDS[:2], huge)])
    before = states["flat", Metric.L2].search(QUERIES, ROWS, FULL)
    after = state.search(QUERIES, ROWS, FULL)
    np.testing.assert_array_equal(after.ids, before.ids)
    for queries in (huge[:1], np.concatenate([huge, huge])):
        assert state.search(queries, 1, FULL).ids[0, 0] == NEW_IDS[0]
        assert state.search(queries, 1, FULL).scores[0, 0] == 0


def test_distances_are_exact_far_from_the_origin(states) -> None:
    """Squares of 10^8 hold no digit of such distances: they are made of differences."""
    far = (VECTORS[:50] * 1e-2 + 1e4).astype(np.float32)
    state, _ = apply(states["flat", Metric.L2], [upsert(1, NEW_IDS, far)])
    expected = brute_force(far[:6], far, NEW_IDS, 10, Metric.L2)
    for at in range(6):
        alone = state.search(far[at : at + 1], 10, FULL)
        assert_same_answers(alone, Ranked(expected.ids[at : at + 1], expected.scores[at : at + 1]))
        assert (alone.ids[0, 0], alone.scores[0, 0]) == (NEW_IDS[at], 0)
    # faiss's own distances of batches are off by their squares' rounding, those of main are far
    assert_same_answers(state.search(far[:6], 10, FULL), expected)


def test_searches_go_on_while_writes_are_applied(states) -> None:
    """Each search of the thread uses one state, and finds what a dict at its number holds."""
    rng = np.random.default_rng(9)
    records = random_records(rng, 200)
    expected, model = {}, Model(IDS, VECTORS)
    for record in [None, *records]:
        if record is not None:
            model.apply(record)
        expected[0 if record is None else record.seq] = frozenset(model.items)
    current = [states["flat", Metric.DOT]]
    seen, wrong = set(), []
    done = threading.Event()

    def search() -> None:
        while not done.is_set():
            state = current[0]
            found = state.search(QUERIES[:1], ROWS + 60, FULL).ids[0]
            seen.add(state.seq)
            if frozenset(found[found >= 0].tolist()) != expected[state.seq]:
                wrong.append(state.seq)

    thread = threading.Thread(target=search)
    thread.start()
    for record in records:
        current[0], _ = apply(current[0], [record])
        if record.seq % 20 == 0:
            deadline = time.monotonic() + 30
            while record.seq not in seen and time.monotonic() < deadline:
                time.sleep(0.001)
    done.set()
    thread.join(60)
    assert not thread.is_alive()
    assert wrong == []
    assert {20, 100, 200} <= seen


def test_memory_of_a_written_row(states) -> None:
    """Vector, id and the places to find it by; the room behind the last row is at most as much."""
    dim, rows = 128, 4096
    state = ShardState.of(build_main(manifold(50, dim, 4, seed=1), kind="flat"), IDS[:50])
    vectors = manifold(rows, dim, 4, seed=2)
    ids = np.arange(10**7, 10**7 + rows)
    records = [
        upsert(1 + at // 64, ids[at : at + 64], vectors[at : at + 64]) for at in range(0, rows, 64)
    ]
    tracemalloc.start()
    try:
        state, _ = apply(state, records)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert state.delta.rows == rows
    assert taken / rows < dim * 4 + 80


def test_a_shard_answers_by_its_state_and_says_what_it_holds(states) -> None:
    state, _ = apply(
        states["flat", Metric.DOT], [upsert(1, NEW_IDS[:2], OTHERS[:2]), delete(2, IDS[:1])]
    )
    shard = Shard(shard=1, generation=7, state=state)
    request = SearchRequest(queries=OTHERS[:1], k=1, timeout_ms=1e3)
    reply = shard.search(request)
    assert (reply.seq, reply.rows, reply.ranked.ids[0, 0]) == (2, ROWS + 1, NEW_IDS[0])
    for min_seq in ((9, 2), (9, 2, 9), (0, 0), ()):
        options = SearchOptions(min_seq=min_seq)
        assert shard.search(replace(request, options=options)).seq == 2
    with pytest.raises(Behind, match="2 applied"):
        shard.search(replace(request, options=SearchOptions(min_seq=(0, 3))))
    described = shard.describe()
    assert (described["seq"], described["rows"]) == (2, ROWS + 1)
    assert (described["delta_rows"], described["hidden_rows"]) == (2, 1)


@pytest.mark.parametrize("kind", ["ivf", "ivfpq-fs"])
def test_lists_with_fewer_than_k_rows_are_followed_by_others_not_by_all_rows(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan of all rows takes as long as a hundred searches."""
    vectors = manifold(4000, 32, 8, seed=3)
    main = build_main(vectors, kind=kind, nlist=100, nprobe=1)
    state = ShardState.of(main, np.arange(4000))
    monkeypatch.setattr(main, "search_exactly", None)
    for hidden in (None, np.arange(0, 4000, 2)):
        if hidden is not None:
            state = replace(state, selection=Selection.without(hidden, rows=4000))
        found = state.search(vectors[:50], 100, NO_PARAMS)
        assert (found.ids != EMPTY_ID).all(), "lists have 40 rows"
        assert all(len(set(ids)) == 100 for ids in found.ids.tolist())
        exact = vectors[:50] @ vectors.T
        if hidden is not None:
            exact[:, hidden] = -np.inf
        least = np.sort(exact, axis=1)[:, -400]
        assert (found.scores[:, 50] >= least).mean() > 0.9, "the nearest lists, not any"
    given = state.search(vectors[:1], 100, SearchParams(nprobe=1))
    assert (given.ids == EMPTY_ID).any(), "who says how much is visited gets that"


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_written_rows_do_not_stand_in_for_rows_of_main_that_were_not_looked_for(kind: str) -> None:
    """Which rows of main are found does not depend on how many rows the delta has."""
    vectors = manifold(4000, 32, 8, seed=3)
    settings = {"nlist": 100, "nprobe": 1} if kind == "ivf" else {"ef_search": 16}
    state = ShardState.of(build_main(vectors, kind=kind, **settings), np.arange(4000))
    poor = -vectors[:1]  # the last of every answer
    records = [upsert(1 + n, [10_000 + n], poor) for n in range(150)]
    before = state.search(vectors[:1], 100, NO_PARAMS)
    after = apply(state, records)[0].search(vectors[:1], 100, NO_PARAMS)
    assert before.ids.max() < 4000
    assert_same_answers(after, before)


@pytest.mark.parametrize("queries", [1, 20])
def test_a_shard_of_several_finds_what_makes_k_with_the_others(queries: int) -> None:
    """Lists of 40 rows, k = 100: all of it alone, twice its share of it beside others."""
    vectors = manifold(4000, 32, 8, seed=3)
    main = build_main(vectors, kind="ivf", nlist=100, nprobe=1)
    whole = ShardState.of(main, np.arange(4000))
    fewest = {1.0: 100, 0.5: 100, 0.25: 50, 0.125: 25}
    for share, wanted in fewest.items():
        found = replace(whole, share=share).search(vectors[:queries], 100, NO_PARAMS)
        counts = (found.ids != EMPTY_ID).sum(axis=1)
        assert counts.min() >= wanted
        if queries > 1:
            assert share >= 0.5 or counts.min() < 100, "no search for what others have"
