"""The main index against brute force: scores, order, exclusion, parameters, read-back."""

from pathlib import Path

import numpy as np
import pytest

from shardline.bench.vectors import manifold
from shardline.shards.core.errors import CorruptFile, InvalidInput
from shardline.shards.core.messages import NO_PARAMS, SearchParams
from shardline.shards.core.schema import Metric, Ranked
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.selection import Selection
from shardline.shards.index.template import write_index
from tests.engine import build_main
from tests.index_kinds import DIM, FULL, KINDS, ROWS
from tests.reference import assert_answer_order, assert_same_answers, brute_force, recall_by_ids

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = ["flat", "ivf"]
# these scan every row, or every list with FULL, so k live rows are always found
COMPLETE = [name for name in KINDS if "hnsw" not in name]


@pytest.fixture(scope="module")
def built(vectors: np.ndarray) -> dict[tuple[str, Metric], MainIndex]:
    return {
        (name, metric): build_main(vectors, metric=metric, **fields)
        for name, fields in KINDS.items()
        for metric in Metric
    }


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("k", [1, 10, 100, ROWS + 5])
def test_exact_kinds_equal_brute_force(built, vectors, queries, kind, metric, k) -> None:
    got = built[kind, metric].search(queries, k, FULL)
    expected = brute_force(queries, vectors, np.arange(ROWS), k, metric)
    assert (got.ids.dtype, got.scores.dtype) == (np.int64, np.float32)
    assert_same_answers(got, expected)
    assert_answer_order(got)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_most_and_scores_higher_is_better(
    built, vectors, queries, kind, metric
) -> None:
    rows, scores = built[kind, metric].search(queries, 20, FULL)
    assert_answer_order(Ranked(rows, scores))
    exact, _ = brute_force(queries, vectors, np.arange(ROWS), 20, metric)
    assert recall_by_ids(rows, exact) > 0.5
    true = brute_force(queries, vectors, np.arange(ROWS), ROWS, metric)
    for at in range(len(queries)):
        true_score = dict(zip(true.ids[at].tolist(), true.scores[at].tolist(), strict=True))
        near = [true_score[row] for row in rows[at].tolist()]
        # approximate scores approach the true ones, sign included
        np.testing.assert_allclose(scores[at], near, atol=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_one_query_gets_the_same_answer_alone_and_in_a_batch(built, queries, kind) -> None:
    main = built[kind, Metric.COSINE]
    rows, scores = main.search(queries, 15, FULL)
    for at in range(len(queries)):
        alone = main.search(queries[at : at + 1], 15, FULL)
        part = Ranked(rows[at : at + 1], scores[at : at + 1])
        assert_same_answers(part, alone, rtol=1e-4, atol=1e-4)


def without(excluded: np.ndarray) -> Selection | None:
    return Selection.without(excluded, rows=ROWS)


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_excluded_rows_never_come_back(built, queries, kind, metric, share) -> None:
    rng = np.random.default_rng(5)
    best = np.unique(built[kind, metric].search(queries, 5, FULL).ids)
    chosen = rng.choice(ROWS, int(ROWS * share), replace=False)
    excluded = np.union1d(chosen, best)[: ROWS - 12]
    rows, scores = built[kind, metric].search(queries, 10, FULL, without(excluded))
    assert not np.isin(rows, excluded).any()
    assert_answer_order(Ranked(rows, scores))
    if kind in COMPLETE:
        assert (rows >= 0).all()


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("kind", EXACT)
def test_exclusion_equals_brute_force_over_the_rest(built, vectors, queries, kind, metric) -> None:
    excluded = np.flatnonzero(np.random.default_rng(6).random(ROWS) < 0.4)
    got = built[kind, metric].search(queries, 50, FULL, without(excluded))
    expected = brute_force(queries, vectors, np.arange(ROWS), 50, metric, excluded.tolist())
    assert_same_answers(got, expected)


@pytest.mark.parametrize("kind", COMPLETE)
def test_fewer_live_rows_than_k_leave_empty_slots(built, queries, kind) -> None:
    excluded = np.arange(3, ROWS)
    rows, scores = built[kind, Metric.COSINE].search(queries, 10, FULL, without(excluded))
    for row in rows:
        assert sorted(row[:3].tolist()) == [0, 1, 2]
    assert (rows[:, 3:] == -1).all()
    assert np.isneginf(scores[:, 3:]).all()


@pytest.mark.parametrize("kind", ["flat", "pq", "ivfpq-fs"])
def test_everything_excluded_and_nothing_excluded(built, queries, kind) -> None:
    main = built[kind, Metric.COSINE]
    free = main.search(queries, 10, FULL)
    rows, scores = main.search(queries, 10, FULL, without(np.arange(ROWS)))
    assert (rows == -1).all()
    assert np.isneginf(scores).all()
    again = main.search(queries, 10, FULL, without(np.empty(0, np.int64)))
    np.testing.assert_array_equal(again.ids, free.ids)
    np.testing.assert_array_equal(again.scores, free.scores)


@pytest.mark.parametrize("kind", ["ivf", "pq", "ivfpq-fs"])
def test_selections_used_alternately_do_not_undo_each_other(built, queries, kind) -> None:
    main = built[kind, Metric.COSINE]
    halves = [np.arange(0, ROWS, 2), np.arange(1, ROWS, 2)]
    selections = [without(half) for half in halves]
    main._selecting.prepared.clear()
    expected = [main.search(queries, 10, FULL, without(half)) for half in halves]
    for _ in range(3):
        for selection, half, first in zip(selections, halves, expected, strict=True):
            got = main.search(queries, 10, FULL, selection)
            assert not np.isin(got.ids, half).any()
            np.testing.assert_array_equal(got.ids, first.ids)
    assert len(main._selecting.prepared) <= 1


def test_a_default_widened_for_a_large_k_stays_within_the_limit(built, monkeypatch) -> None:
    main = build_main(manifold(ROWS, DIM, 4, seed=1), kind="ivf", nlist=8, nprobe=4)
    monkeypatch.setattr("shardline.shards.index.main_index.MAX_NPROBE", 6)
    made = main._base_parameters(200, 200, SearchParams(), None)
    assert made.nprobe == 6


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("kind", [{"kind": "ivf"}, {"kind": "ivfpq-fs", "m": 8}])
def test_a_search_that_is_told_its_lists_finds_the_same(kind, metric) -> None:
    rows = manifold(4000, DIM, 4, seed=1)
    main = build_main(rows, metric=metric, nlist=64, **kind)
    queries, params = rows[::40], SearchParams(nprobe=2)
    grouped = main.by_list(queries, 10, params)
    assert grouped is not None
    told = 0
    for start in range(0, len(queries), 8):
        some = grouped.order[start : start + 8]
        lists = grouped.of(some)
        told += lists is not None
        got = main.search(queries[some], 10, params, lists=lists)
        expected = main.search(queries[some], 10, params)
        np.testing.assert_array_equal(got.ids, expected.ids)
        np.testing.assert_allclose(got.scores, expected.scores, rtol=1e-5)
    assert told > 3
    assert grouped.of(grouped.order) is None  # nearly all lists
    many = main.by_list(queries, 10, SearchParams(nprobe=16))
    assert many is not None and many.of(many.order[:1]) is None


@pytest.mark.parametrize("metric", [Metric.L2, Metric.DOT])
@pytest.mark.parametrize("kind", [{"kind": "ivf"}, {"kind": "ivfpq-fs", "m": 8}])
def test_a_query_that_overflows_costs_the_others_nothing(kind, metric) -> None:
    rows = manifold(4000, DIM, 4, seed=1)
    main = build_main(rows, metric=metric, nlist=64, **kind)
    queries, params = np.concatenate((rows[:5], np.full((1, DIM), 1e19, np.float32))), NO_PARAMS
    grouped = main.by_list(queries, 10, params)
    assert grouped is not None
    got = main.search(queries, 10, params, lists=grouped.of(np.arange(6)))
    expected = main.search(queries, 10, params)
    np.testing.assert_array_equal(got.ids[:5], expected.ids[:5])


def test_whether_indexes_have_the_same_lists(vectors) -> None:
    ivf = build_main(vectors, kind="ivf", nlist=8)
    assert ivf.has_lists_of(ivf)
    assert ivf.has_lists_of(build_main(vectors, kind="ivf", nlist=8))
    others = [{"kind": "ivf", "nlist": 7}, {"kind": "flat"}]
    assert not any(ivf.has_lists_of(build_main(vectors, **fields)) for fields in others)
    assert not ivf.has_lists_of(build_main(-vectors, kind="ivf", nlist=8))


def test_ties_are_ordered_by_row(built, vectors) -> None:
    rows, _ = built["flat", Metric.DOT].search(vectors[:1], 11, FULL)
    assert rows[0].tolist() == [0, *range(100, 110)]


def test_nprobe_widens_the_search(built, queries, vectors) -> None:
    exact = brute_force(queries, vectors, np.arange(ROWS), 50, Metric.COSINE).ids
    main = built["ivf", Metric.COSINE]
    recalls = [
        recall_by_ids(main.search(queries, 50, SearchParams(nprobe=nprobe)).ids, exact)
        for nprobe in (1, 2, 8)
    ]
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[2] == 1.0


def test_rerank_factor_widens_the_search(built, queries, vectors) -> None:
    exact = brute_force(queries, vectors, np.arange(ROWS), 20, Metric.COSINE).ids
    main = built["pq-fs", Metric.COSINE]
    recalls = [
        recall_by_ids(main.search(queries, 20, SearchParams(rerank_factor=factor)).ids, exact)
        for factor in (1, 30)
    ]
    assert recalls[0] < recalls[1] == 1.0


def test_ef_search_is_never_below_k(built, queries) -> None:
    rows, _ = built["hnsw", Metric.COSINE].search(queries, 300, SearchParams(ef_search=1))
    assert (rows >= 0).sum(axis=1).min() == 300


def test_a_request_overrides_and_otherwise_the_default_holds(vectors, queries) -> None:
    main = build_main(vectors, kind="ivf", nlist=8, nprobe=1)
    by_default = main.search(queries, 50, SearchParams())
    explicit = main.search(queries, 50, SearchParams(nprobe=1))
    np.testing.assert_array_equal(by_default.ids, explicit.ids)
    assert (main.search(queries, 50, SearchParams(nprobe=8)).ids != by_default.ids).any()


@pytest.mark.parametrize(
    "params",
    [
        SearchParams(nprobe=2049),
        SearchParams(nprobe=0),
        SearchParams(ef_search=16_385),
        SearchParams(rerank_factor=65),
    ],
)
@pytest.mark.parametrize("kind", ["flat", "ivfpq-fs"])
def test_illegal_parameters_are_refused(built, queries, kind, params) -> None:
    with pytest.raises(InvalidInput, match="out of range") as caught:
        built[kind, Metric.COSINE].search(queries, 5, params)
    assert caught.value.field in {"params.nprobe", "params.ef_search", "params.rerank_factor"}


def test_wrong_dimension_is_refused(built) -> None:
    with pytest.raises(InvalidInput, match="wrong dimension; expected 16; got 8"):
        built["flat", Metric.COSINE].search(np.zeros((1, 8), np.float32), 5, FULL)


def test_many_kinds_of_requests_do_not_pile_up(built, queries) -> None:
    main = built["ivf", Metric.COSINE]
    for k in range(1, 200):
        assert main.search(queries[:1], k, FULL).ids.shape == (1, k)
    assert len(main._prepared) <= 64


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("flat", 0),
        ("ivf", 0),
        ("hnsw", 0),
        ("ivfpq-fs-fp32", 0),
        ("pq-rerank", 0),
        ("ivfpq-fs", 5e-4),
        ("pca-flat", 5e-4),
        ("sq8", 0.01),
        ("ivf-sq8", 0.01),
        ("pq", 0.4),
        ("ivfpq", 0.4),
        ("pca-ivf", 0.4),
    ],
)
def test_reconstruct(built, vectors, kind, tolerance) -> None:
    rows = np.array([599, 3, 3, 0])
    got = built[kind, Metric.COSINE].reconstruct(rows)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, vectors[rows], atol=tolerance, rtol=0)
    assert built[kind, Metric.COSINE].reconstruct(rows[:0]).shape == (0, DIM)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("flat", 64),
        ("ivf", 64 + 8),
        ("pq", 6),
        ("ivfpq", 6 + 8),
        ("ivfpq-fs", 4 + 8 + 32),
        ("sq8", 16),
        ("pca-flat", 32 + 32),
        ("pq-fs", 4 + 64),
    ],
)
def test_bytes_per_vector(built, kind, size) -> None:
    assert built[kind, Metric.COSINE].bytes_per_vector == size


def test_bytes_per_vector_of_hnsw_counts_the_links(built) -> None:
    assert 64 + 4 * 64 <= built["hnsw", Metric.COSINE].bytes_per_vector < 64 + 4 * 80


def test_describe(built) -> None:
    assert built["ivfpq-fs", Metric.L2].describe() == {
        "class": "IndexIVFPQFastScan",
        "rows": ROWS,
        "dim": DIM,
        "metric": "l2",
        "device": "cpu",
        "bytes_per_vector": 44.0,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_index_answers_as_the_one_that_was_written(
    built, queries, kind, tmp_path: Path
) -> None:
    main = built[kind, Metric.COSINE]
    write_index(main._layers.whole, tmp_path / "index.faiss")
    loaded = MainIndex.load(tmp_path / "index.faiss", metric=Metric.COSINE, defaults=main._defaults)
    expected = main.search(queries, 20, SearchParams())
    got = loaded.search(queries, 20, SearchParams())
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])
    rows = np.arange(5)
    np.testing.assert_array_equal(loaded.reconstruct(rows), main.reconstruct(rows))


def test_a_file_that_is_no_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "index.faiss").write_bytes(b"IxF2 and then nothing")
    with pytest.raises(CorruptFile, match=r"index\.faiss: not a faiss index"):
        MainIndex.load(tmp_path / "index.faiss", metric=Metric.DOT, defaults=SearchParams())
