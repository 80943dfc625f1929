"""The share of the last seconds, beside a list of all that was spent."""

import random

import pytest

from shardline.shards.server.recent_share import SLOTS, WINDOW_S, RecentShare


@pytest.mark.parametrize("seed", range(5))
def test_the_share_is_that_of_the_last_slots(seed: int) -> None:
    rng, share, now = random.Random(seed), RecentShare(), 1000 * random.Random(seed).random()
    spent: list[tuple[int, float]] = []
    for _ in range(500):
        now += rng.choice([0, 0.001, 0.05, 0.3, 5.0])
        slot = int(now * SLOTS / WINDOW_S)
        if rng.random() < 0.7:
            seconds = rng.expovariate(50)
            share.add(seconds, now)
            spent.append((slot, seconds))
        recent = sum(seconds for at, seconds in spent if slot - SLOTS < at <= slot)
        assert share.at(now) == pytest.approx(min(1.0, recent / WINDOW_S))


def test_anything_is_more_than_nothing_until_it_is_forgotten() -> None:
    share = RecentShare()
    assert share.at(7.0) == 0
    share.add(1e-6, 7.0)
    assert share.at(7.0 + WINDOW_S * (SLOTS - 2) / SLOTS) > 0
    assert share.at(7.0 + WINDOW_S * (SLOTS + 1) / SLOTS) == 0
    share.add(100.0, 20.0)
    assert share.at(20.0) == 1
