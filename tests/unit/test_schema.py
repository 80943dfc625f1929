"""What is checked where it enters: ids, vectors, k; and the order of answers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import (
    EMPTY_ID,
    MAX_K,
    Metric,
    check_ids,
    check_k,
    check_vectors,
    in_order,
    normalise,
    query_vectors,
    unit_vectors,
)
from tests.reference import assert_answer_order


def test_checking_leaves_lengths_alone_and_queries_are_normalised() -> None:
    given_rows = np.array([[3.0, 4.0], [0.0, 2.0]], dtype=np.float32)
    kept = given_rows.copy()
    assert check_vectors(given_rows, dim=2, metric=Metric.COSINE) is given_rows
    asked = query_vectors(given_rows, dim=2, metric=Metric.COSINE)
    np.testing.assert_allclose(asked, [[0.6, 0.8], [0.0, 1.0]], rtol=1e-7)
    np.testing.assert_array_equal(given_rows, kept)


@pytest.mark.parametrize("metric", [Metric.DOT, Metric.L2])
@pytest.mark.parametrize("check", [check_vectors, query_vectors])
def test_other_metrics_leave_vectors_alone(check, metric: Metric) -> None:
    rows = np.array([[3.0, 4.0], [0.0, 0.0]], dtype=np.float32)
    assert check(rows, dim=2, metric=metric) is rows
    assert unit_vectors(rows, metric) is rows


def test_unit_vectors_are_stored_bit_for_bit() -> None:
    rows = normalise(np.random.default_rng(0).standard_normal((500, 384), dtype=np.float32))
    assert unit_vectors(rows, Metric.COSINE) is rows
    longer = rows.copy()
    longer[7] *= np.float32(1.0001)
    stored = unit_vectors(longer, Metric.COSINE)
    np.testing.assert_allclose(np.linalg.norm(stored.astype(np.float64), axis=1), 1, rtol=1e-6)
    assert unit_vectors(stored, Metric.COSINE) is stored


@pytest.mark.parametrize(
    "values",
    [[[1, 2], [3, 4]], np.array([[1, 2], [3, 4]], dtype=np.uint8), [[1.0, 2.0], [3.0, 4.0]]],
)
def test_numbers_of_other_types_are_converted(values: object) -> None:
    checked = check_vectors(values, dim=2, metric=Metric.DOT)
    assert checked.dtype == np.float32
    assert checked.flags.c_contiguous
    np.testing.assert_array_equal(checked, [[1, 2], [3, 4]])


def test_transposed_input_becomes_contiguous() -> None:
    columns = np.arange(6, dtype=np.float32).reshape(2, 3).T
    checked = check_vectors(columns, dim=2, metric=Metric.DOT)
    assert checked.flags.c_contiguous
    np.testing.assert_array_equal(checked, columns)


def test_huge_and_tiny_float32_values_normalise() -> None:
    rows = np.array([[3e38, 3e38], [1e-11, 0.0]], dtype=np.float32)
    checked = check_vectors(rows, dim=2, metric=Metric.COSINE)
    checked = unit_vectors(checked, Metric.COSINE)
    np.testing.assert_allclose(np.linalg.norm(checked.astype(np.float64), axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("metric", list(Metric))
def test_values_whose_squares_overflow_float32_are_finite(metric: Metric) -> None:
    rows = np.full((3, 2), 3e38, np.float32)
    assert np.isfinite(check_vectors(rows, dim=2, metric=metric)).all()
    rows[1, 1] = -np.inf
    with pytest.raises(InvalidInput, match="not finite") as caught:
        check_vectors(rows, dim=2, metric=metric)
    assert caught.value.field == "vectors[1]"


@pytest.mark.parametrize(
    ("values", "message", "field"),
    [
        ([[1.0, 2.0, 3.0]], "wrong dimension", "vectors"),
        ([[1.0, 2.0], [np.nan, 1.0]], "not finite", "vectors[1]"),
        ([[1.0, np.inf]], "not finite", "vectors[0]"),
        ([[1.0, 1e300]], "not finite", "vectors[0]"),
        ([[1.0, 0.0], [0.0, 0.0]], "zero vector", "vectors[1]"),
        ([1.0, 2.0], "not a matrix", "vectors"),
        ([["1", "2"]], "not a matrix", "vectors"),
        ([[True, False]], "not a matrix", "vectors"),
        ([[1.0], [1.0, 2.0]], "not a matrix", "vectors"),
        ([[1 + 2j, 1]], "not a matrix", "vectors"),
        (np.empty((0, 2), np.float32), "empty batch", "vectors"),
        (None, "not a matrix", "vectors"),
    ],
)
@pytest.mark.parametrize("check", [check_vectors, query_vectors])
def test_bad_vectors_are_refused(check, values: object, message: str, field: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        check(values, dim=2, metric=Metric.COSINE)
    assert caught.value.field == field


def test_normalise_gives_unit_rows() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 8), dtype=np.float32)
    expected = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(normalise(rows), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "values", [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3], np.uint64), np.array([1, 2, 3], np.int8)]
)
def test_integer_ids_become_int64(values: object) -> None:
    ids = check_ids(values)
    assert ids.dtype == np.int64
    assert ids.tolist() == [1, 2, 3]


def test_no_ids_are_ids() -> None:
    assert check_ids([]).shape == (0,)
    assert check_ids([]).dtype == np.int64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, -2], "negative id"),
        ([1.0, 2.0], "not an array of integers"),
        ([True], "not an array of integers"),
        (["1"], "not an array of integers"),
        ([[1, 2]], "not an array of integers"),
        (np.array([2**63], np.uint64), "id too large"),
        ([2**63], "id too large"),
        ([2**70], "id too large"),
        ([1, None], "not an array of integers"),
        (np.array([1, 2.5], object), "not an array of integers"),
        ([[1], [1, 2]], "not an array of integers"),
        (7, "not an array of integers"),
    ],
)
def test_bad_ids_are_refused(values: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        check_ids(values)


def test_duplicate_ids_are_refused_only_when_asked() -> None:
    assert check_ids([5, 3, 5]).tolist() == [5, 3, 5]
    with pytest.raises(InvalidInput, match="1 repeated, the first is 5"):
        check_ids([5, 3, 5, 5], unique=True)


@pytest.mark.parametrize("k", [1, 100, MAX_K, np.int64(7)])
def test_legal_k(k: int) -> None:
    assert check_k(k) == int(k)
    assert type(check_k(k)) is int


@pytest.mark.parametrize("k", [0, -1, MAX_K + 1, 1.0, "10", True, None])
def test_illegal_k(k: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_k(k)
    assert caught.value.field == "k"
    assert caught.value.expected == f"1 to {MAX_K}"


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 30)), min_size=1, max_size=30))
def test_results_sort_by_score_then_id_with_holes_last(pairs: list[tuple[int, int]]) -> None:
    unique = {item: value for value, item in pairs if item >= 0}
    holes = sum(item < 0 for _, item in pairs)
    ids = np.array([[*unique, *[EMPTY_ID] * holes]], dtype=np.int64)
    scores = np.array([[*unique.values(), *[-np.inf] * holes]], dtype=np.float32)
    ranked = in_order(ids, scores)
    assert_answer_order(ranked)
    assert {i: s for i, s in zip(*(each[0] for each in ranked), strict=True) if i >= 0} == unique
