"""Counted and streamed shares against each other and against loops."""

import numpy as np
import pytest
import torch

from shardline.training.loss.logq import CountedShares, StreamedShares, expected_counts


def test_counted_shares_are_those_of_train() -> None:
    shares = CountedShares(torch.tensor([6, 0, 2]))
    shares.see(torch.tensor([0, 0]))
    assert shares.of(torch.tensor([2, 0, 1])).tolist() == pytest.approx([2 / 8, 6 / 8, 0.5 / 8])
    assert dict(shares.state_dict()) == {}


def test_streamed_gaps_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    shares, rate = StreamedShares(5, 0.2), 0.2
    gaps: dict[int, float] = {}
    last = dict.fromkeys(range(5), 0)
    for step in range(1, 30):
        items = rng.integers(0, 4, 7)  # 4 is never seen
        shares.see(torch.from_numpy(items))
        for item, count in zip(*np.unique(items, return_counts=True), strict=True):
            gap = (step * 7 - last[item]) / count
            for _ in range(count):
                gaps[item] = gap if item not in gaps else (1 - rate) * gaps[item] + rate * gap
            last[item] = step * 7
    expected = [1 / gaps[item] for item in range(4)] + [0.5 / (29 * 7)]
    assert shares.of(torch.arange(5)).tolist() == pytest.approx(expected)


def test_streamed_shares_approach_the_counted_ones_and_follow_a_change() -> None:
    rng = np.random.default_rng(3)
    popularity = 1 / np.arange(1, 51)
    popularity /= popularity.sum()
    shares = StreamedShares(50, 0.01)
    counts = np.zeros(50, np.int64)
    for _ in range(800):
        items = rng.choice(50, 256, p=popularity)
        counts += np.bincount(items, minlength=50)
        shares.see(torch.from_numpy(items))
    counted = CountedShares(torch.from_numpy(counts)).of(torch.arange(50))
    ratio = shares.of(torch.arange(50)) / counted
    # an average with weight .01 scatters by sqrt(.01 / 2) = 7 % of a geometric gap
    assert ratio.log().abs().mean() < 0.1
    assert ratio.log().abs().max() < 0.35
    for _ in range(800):
        shares.see(torch.from_numpy(rng.choice(50, 256, p=popularity[::-1])))
    reversed_ratio = shares.of(torch.arange(50)).flip(0) / counted
    assert reversed_ratio.log().abs().max() < 0.35


def test_popular_items_may_come_many_times_a_batch() -> None:
    shares = StreamedShares(2, 0.05)
    for _ in range(100):
        shares.see(torch.tensor([0] * 90 + [1] * 10))
    assert shares.of(torch.tensor([0, 1])).tolist() == pytest.approx([0.9, 0.1])


def test_streamed_state_survives() -> None:
    first, second = StreamedShares(4, 0.1), StreamedShares(4, 0.1)
    first.see(torch.tensor([0, 1, 1, 3]))
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for shares in (first, second):
        shares.see(torch.tensor([2, 1, 0, 0]))
    assert torch.equal(first.of(torch.arange(4)), second.of(torch.arange(4)))


def test_expected_counts_of_a_mixed_pool() -> None:
    shares = torch.tensor([0.5, 0.25, 0.25])
    counts = expected_counts(shares, by_share=100, uniform=30, num_items=3)
    assert counts.tolist() == [60, 35, 35]
    rng = np.random.default_rng(0)
    drawn = np.concatenate([rng.choice(3, 100_000, p=shares), rng.integers(0, 3, 30_000)])
    assert np.bincount(drawn) / 1000 == pytest.approx(counts.numpy(), rel=0.02)
