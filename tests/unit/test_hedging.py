"""When a frame counts as slow, and how many may be sent a second time."""

import random

import numpy as np
import pytest

from shardline.router.fanout.hedging import (
    HEADROOM,
    MAX_TOKENS,
    PERCENTILE,
    REFRESH,
    WINDOW,
    Budget,
    Pace,
    Paces,
    kind_of,
)
from shardline.shards.core.messages import FetchRequest, SearchOptions, SearchRequest

FLOOR_S = 0.005


def fed(times, pace=None):
    pace = pace or Pace(Budget(0.05), FLOOR_S)
    for seconds in times:
        pace.took(seconds)
    return pace


def test_nothing_is_hedged_before_enough_is_known():
    assert fed([1.0] * (REFRESH - 1)).delay_s == float("inf")
    assert fed([1.0] * REFRESH).delay_s == HEADROOM


@pytest.mark.parametrize("seed", range(3))
def test_the_delay_follows_the_percentile_of_the_last_frames(seed):
    rng = np.random.default_rng(seed)
    times = rng.lognormal(-3.0, 0.7, 5 * WINDOW).tolist()
    expected = HEADROOM * sorted(times[-WINDOW:])[int(PERCENTILE * WINDOW)]
    assert fed(times).delay_s == pytest.approx(expected)
    # what was long ago does not count
    assert fed(times + [2.0] * WINDOW).delay_s == 2.0 * HEADROOM


def test_a_few_slow_ones_do_not_move_it_and_there_is_a_floor():
    rng = random.Random(0)
    times = [0.2 if rng.random() < 0.03 else 0.001 for _ in range(WINDOW)]
    assert fed(times).delay_s == FLOOR_S
    assert fed([0.01 if each < 0.1 else each for each in times]).delay_s == 0.01 * HEADROOM


def test_the_budget_is_a_share_of_what_was_sent_and_bounded():
    rng = random.Random(1)
    budget, sent, again = Budget(0.05), 0, 0
    for _ in range(3000):
        if rng.random() < 0.3:
            rows = 4 * rng.choice([1, 1, 16])
            budget.sends(rows)
            sent += rows
        rows = rng.choice([1, 2, 64])
        if budget.allows(rows):
            again += rows
        assert again <= 0.05 * sent
    assert again >= 0.05 * sent - MAX_TOKENS
    for _ in range(3000):
        budget.sends(4)
    assert not budget.allows(int(MAX_TOKENS) + 1)
    assert sum(budget.allows(1) for _ in range(1000)) == MAX_TOKENS


def test_a_share_of_nothing_hedges_nothing():
    paces = Paces(0.0, FLOOR_S)
    fed([1.0] * WINDOW, paces.of(SearchRequest, 1)).budget.sends(10_000)
    assert paces.of(SearchRequest, 1).delay_s == paces.guess_s(SearchRequest, 1) == float("inf")
    assert not paces.of(SearchRequest, 1).budget.allows(1)


def test_frames_are_alike_by_kind_and_by_size_up_to_a_factor_of_two():
    paces = Paces(0.05, FLOOR_S)
    assert paces.of(SearchRequest, 2) is paces.of(SearchRequest, 3)
    apart = [(SearchRequest, 1), (SearchRequest, 2), (SearchRequest, 4), (FetchRequest, 1)]
    assert len({id(paces.of(*each)) for each in apart}) == len(apart)


def test_tokens_are_shared_by_the_sizes_of_a_kind_not_by_kinds():
    paces = Paces(0.05, FLOOR_S)
    paces.of(SearchRequest, 1).budget.sends(100)
    assert not paces.of(FetchRequest, 1).budget.allows(1)
    assert paces.of(SearchRequest, 4).budget.allows(4)
    assert not paces.of(SearchRequest, 4).budget.allows(4)


def test_a_size_of_which_little_is_known_goes_by_the_nearest_that_is_known():
    paces = Paces(0.05, FLOOR_S)
    assert paces.guess_s(SearchRequest, 1) == float("inf")
    fed([0.1] * REFRESH, paces.of(SearchRequest, 4))
    delay_s = HEADROOM * 0.1
    assert paces.of(SearchRequest, 4).delay_s == delay_s
    assert paces.guess_s(SearchRequest, 1) == delay_s, "smaller: not longer than a larger one"
    assert paces.guess_s(SearchRequest, 8) == 2 * delay_s
    assert paces.guess_s(SearchRequest, 64) == 16 * delay_s
    assert paces.guess_s(FetchRequest, 4) == float("inf")
    fed([0.2] * REFRESH, paces.of(SearchRequest, 64))
    assert paces.guess_s(SearchRequest, 40) == HEADROOM * 0.2
    assert paces.guess_s(SearchRequest, 8) == 2 * delay_s


def test_searches_with_a_filter_tell_nothing_of_others():
    queries = np.zeros((4, 2), np.float32)
    plain = SearchRequest(queries=queries, k=1, timeout_ms=1.0)
    options = SearchOptions(filter=b"f")
    filtered = SearchRequest(queries=queries, k=1, timeout_ms=1.0, options=options)
    paces = Paces(0.05, FLOOR_S)
    fed([9.0] * REFRESH, paces.of(kind_of(filtered), 4))
    assert paces.of(kind_of(filtered), 4).delay_s == 9.0 * HEADROOM
    assert paces.guess_s(kind_of(plain), 4) == float("inf")


def test_background_searches_are_not_hedged_and_tell_nothing_of_others():
    queries = np.zeros((4, 2), np.float32)
    plain = SearchRequest(queries=queries, k=1, timeout_ms=1.0)
    options = SearchOptions(background=True)
    background = SearchRequest(queries=queries, k=1, timeout_ms=1.0, options=options)
    paces = Paces(0.05, FLOOR_S)
    fed([9.0] * 5 * REFRESH, paces.of(kind_of(background), 4))
    assert paces.of(kind_of(background), 4).delay_s == float("inf")
    assert paces.guess_s(kind_of(background), 4) == float("inf")
    assert paces.guess_s(kind_of(plain), 4) == float("inf")
    fed([0.1] * REFRESH, paces.of(kind_of(plain), 4))
    assert paces.of(kind_of(plain), 4).delay_s == 0.1 * HEADROOM
    assert paces.guess_s(kind_of(background), 4) == float("inf")
