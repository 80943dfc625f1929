"""The merge against slow obvious code, ties and empty slots included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardline.router.merge import merge_top_k
from shardline.shards.core.schema import EMPTY_ID, EMPTY_SCORE
from tests import reference


def random_parts(rng, n, widths, levels):
    """Parts with few distinct scores (many ties), unique ids, some slots empty, rows sorted."""
    pool = rng.permutation(10_000)
    scores, ids, start = [], [], 0
    for width in widths:
        part_ids = pool[start : start + n * width].reshape(n, width).astype(np.int64)
        start += n * width
        part_scores = rng.integers(0, levels, (n, width)).astype(np.float32) - levels / 2
        empty = rng.random((n, width)) < 0.2
        part_ids[empty], part_scores[empty] = EMPTY_ID, EMPTY_SCORE
        order = np.argsort(-part_scores, axis=1, kind="stable")
        scores.append(np.take_along_axis(part_scores, order, axis=1))
        ids.append(np.take_along_axis(part_ids, order, axis=1))
    return scores, ids


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 5),
    widths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    k=st.integers(1, 40),
    levels=st.sampled_from([1, 2, 5, 1000]),
)
def test_merge_equals_the_slow_one(seed, n, widths, k, levels):
    scores, ids = random_parts(np.random.default_rng(seed), n, widths, levels)
    expected_scores, expected_ids = reference.merge(scores, ids, k)
    got_scores, got_ids = merge_top_k(scores, ids, k)
    np.testing.assert_array_equal(got_scores, expected_scores)
    np.testing.assert_array_equal(got_ids, expected_ids)
    assert got_scores.dtype == np.float32
    assert got_ids.dtype == np.int64


def test_the_order_of_shards_does_not_matter():
    scores, ids = random_parts(np.random.default_rng(3), 4, [6, 6, 6], 3)
    forward = merge_top_k(scores, ids, 10)
    backward = merge_top_k(scores[::-1], ids[::-1], 10)
    np.testing.assert_array_equal(forward[1], backward[1])


def test_a_tie_cut_in_two_by_k_keeps_the_lower_ids():
    scores = [np.array([[2.0, 1.0, 1.0]], np.float32), np.array([[1.0, 1.0]], np.float32)]
    ids = [np.array([[9, 7, 8]]), np.array([[3, 4]])]
    got_scores, got_ids = merge_top_k(scores, ids, 3)
    assert got_ids.tolist() == [[9, 3, 4]]
    assert got_scores.tolist() == [[2.0, 1.0, 1.0]]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_nothing_found_anywhere_is_all_empty_slots(k):
    scores = [np.full((2, 2), EMPTY_SCORE, np.float32)] * 2
    ids = [np.full((2, 2), EMPTY_ID)] * 2
    got_scores, got_ids = merge_top_k(scores, ids, k)
    assert (got_ids == np.full((2, k), EMPTY_ID)).all()
    assert np.isneginf(got_scores).all()
    assert got_scores.shape == (2, k)
