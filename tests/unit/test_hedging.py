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
    Pace,
    Paces,
)
from shardline.shards.core.messages import FetchRequest, SearchRequest

FLOOR_S = 0.005


def fed(times, share=0.05):
    pace = Pace(share, FLOOR_S)
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
    pace, sent, hedged = Pace(0.05, FLOOR_S), 0, 0
    for _ in range(3000):
        if rng.random() < 0.3:
            pace.sends(4)
            sent += 4
        hedged += pace.may_hedge()
        assert hedged <= 0.05 * sent
    assert hedged >= 0.05 * sent - 2
    for _ in range(1000):
        pace.sends(4)
    assert sum(pace.may_hedge() for _ in range(100)) == MAX_TOKENS


def test_a_share_of_nothing_hedges_nothing():
    pace = fed([1.0] * WINDOW, share=0.0)
    pace.sends(10_000)
    assert pace.delay_s == float("inf")
    assert not pace.may_hedge()


def test_frames_are_alike_by_kind_and_by_size_up_to_a_factor_of_two():
    paces = Paces(0.05, FLOOR_S)
    assert paces.of(SearchRequest, 2) is paces.of(SearchRequest, 3)
    apart = [(SearchRequest, 1), (SearchRequest, 2), (SearchRequest, 4), (FetchRequest, 1)]
    assert len({id(paces.of(*each)) for each in apart}) == len(apart)
