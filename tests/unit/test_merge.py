"""The merge against slow obvious code, ties and empty slots included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardline.router.merge import merge_top_k
from shardline.shards.core.schema import EMPTY_ID, EMPTY_SCORE, Ranked
from tests import reference


def random_parts(rng, n, widths, levels):
    """Parts with few distinct scores (many ties), unique ids, some slots empty, rows sorted."""
    pool = rng.permutation(10_000)
    parts, start = [], 0
    for width in widths:
        ids = pool[start : start + n * width].reshape(n, width).astype(np.int64)
        start += n * width
        scores = rng.integers(0, levels, (n, width)).astype(np.float32) - levels / 2
        empty = rng.random((n, width)) < 0.2
        ids[empty], scores[empty] = EMPTY_ID, EMPTY_SCORE
        order = np.argsort(-scores, axis=1, kind="stable")
        parts.append(Ranked(*(np.take_along_axis(each, order, axis=1) for each in (ids, scores))))
    return parts


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 5),
    widths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    k=st.integers(1, 40),
    levels=st.sampled_from([1, 2, 5, 1000]),
)
def test_merge_equals_the_slow_one(seed, n, widths, k, levels):
    parts = random_parts(np.random.default_rng(seed), n, widths, levels)
    expected, got = reference.merge(parts, k), merge_top_k(parts, k)
    np.testing.assert_array_equal(got.scores, expected.scores)
    np.testing.assert_array_equal(got.ids, expected.ids)
    assert (got.ids.dtype, got.scores.dtype) == (np.int64, np.float32)


def test_the_order_of_shards_does_not_matter():
    parts = random_parts(np.random.default_rng(3), 4, [6, 6, 6], 3)
    forward, backward = merge_top_k(parts, 10), merge_top_k(parts[::-1], 10)
    np.testing.assert_array_equal(forward.ids, backward.ids)


def test_a_tie_cut_in_two_by_k_keeps_the_lower_ids():
    one = Ranked(np.array([[9, 7, 8]]), np.array([[2.0, 1.0, 1.0]], np.float32))
    other = Ranked(np.array([[3, 4]]), np.array([[1.0, 1.0]], np.float32))
    got_ids, got_scores = merge_top_k([one, other], 3)
    assert got_ids.tolist() == [[9, 3, 4]]
    assert got_scores.tolist() == [[2.0, 1.0, 1.0]]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_nothing_found_anywhere_is_all_empty_slots(k):
    nothing = Ranked(np.full((2, 2), EMPTY_ID), np.full((2, 2), EMPTY_SCORE, np.float32))
    got_ids, got_scores = merge_top_k([nothing, nothing], k)
    assert (got_ids == np.full((2, k), EMPTY_ID)).all()
    assert np.isneginf(got_scores).all()
    assert got_scores.shape == (2, k)
