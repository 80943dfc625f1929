"""Intervals: known values, another library's, and how often they hold what is true."""

import math

import numpy as np
import pytest
from scipy import stats

from shardline.bench.ab.intervals import (
    NOTHING,
    apart,
    binomial_cdf,
    difference,
    mean,
    mismatch,
    quantile,
    resampled_mean,
    resampled_median,
    share,
    t_quantile,
    t_within,
)

TIMES = 1000  # of drawn samples


@pytest.mark.parametrize(
    ("freedom", "t"),  # of printed tables, two-sided .05
    [(1, 12.706), (2, 4.303), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_of_student_are_those_of_tables(freedom: int, t: float) -> None:
    assert t_quantile(freedom) == pytest.approx(t, abs=5e-4)


@pytest.mark.parametrize("freedom", [1, 1.5, 2, 3.7, 9, 57.3, 1e3, 1e6])
def test_student_is_another_librarys(freedom: float) -> None:
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-6)
    for t in (1e-3, 0.5, 1.0, 3.0, 30.0):
        wanted = stats.t.cdf(t, freedom) - stats.t.cdf(-t, freedom)
        assert t_within(t, freedom) == pytest.approx(wanted, abs=1e-8)
    assert t_quantile(1e9) == pytest.approx(1.959964, abs=1e-6)


def test_a_mean() -> None:
    found = mean(np.array([2.0, 4.0, 6.0, 8.0]))
    # standard deviation sqrt(20 / 3), by t(3) = 3.18245
    assert (found.value, found.low, found.high) == pytest.approx((5, 0.8914, 9.1086), abs=1e-3)
    assert mean(np.array([])) == NOTHING or math.isnan(mean(np.array([])).value)
    assert mean(np.array([3.0])).value == 3 and math.isnan(mean(np.array([3.0])).low)


def test_a_share() -> None:
    found = share(8, 10)  # Wilson's interval as printed for 8 of 10
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert share(0, 20).low == 0 < share(0, 20).high < 0.2
    assert share(20, 20).high == 1 > share(20, 20).low > 0.8
    assert math.isnan(share(0, 0).value)


def test_binomial_probabilities() -> None:
    for n, q in ((1, 0.5), (10, 0.5), (200, 0.99), (1000, 0.01)):
        wanted = stats.binom.cdf(np.arange(n + 1), n, q)
        np.testing.assert_allclose(binomial_cdf(n, q), wanted, atol=1e-9)


def test_a_median_lies_between_order_statistics() -> None:
    ten = np.arange(1.0, 11.0)
    found = quantile(np.random.default_rng(0).permutation(ten), 0.5)
    assert (found.value, found.low, found.high) == (5.5, 2.0, 9.0)  # 97.9 %: the next is 89 %
    assert (quantile(ten[:6], 0.5).low, quantile(ten[:6], 0.5).high) == (1.0, 6.0)
    five = quantile(ten[:5], 0.5)
    assert five.value == 3 and math.isnan(five.low) and math.isnan(five.high)
    high = quantile(np.arange(100.0), 0.99)
    assert math.isnan(high.high), "no sample says how far the 99th percentile may lie"
    assert 90 < high.low < high.value


def test_a_difference_is_another_librarys() -> None:
    rng = np.random.default_rng(4)
    first, second = rng.normal(0, 1, 12), rng.normal(1, 3, 30)
    found = difference(first, second)
    wanted = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-6)
    assert found.value == pytest.approx(second.mean() - first.mean())
    same = difference(np.ones(5), np.full(4, 3.0))
    assert (same.value, same.low, same.high) == (2, 2, 2) and same.tells
    assert (
        difference(np.ones(1), np.ones(9)) == NOTHING
        or not difference(np.ones(1), np.ones(9)).tells
    )


def test_numbers_of_keys_that_do_not_fit() -> None:
    assert mismatch([5000, 5000], [0.5, 0.5]) == pytest.approx(1, abs=0.06)
    for counts, shares in (([5100, 4900], [0.5, 0.5]), ([300, 310, 390], [0.3, 0.3, 0.4])):
        wanted = stats.chisquare(counts, np.array(shares) * sum(counts)).pvalue
        assert mismatch(counts, shares) == pytest.approx(wanted, abs=0.01)
    assert mismatch([6000, 4000], [0.5, 0.5]) < 1e-9
    assert mismatch([7], [1.0]) == mismatch([0, 0], [0.5, 0.5]) == 1


def held(made, truth: float) -> float:
    """In which share of drawn samples the interval holds what is true."""
    found = [made(np.random.default_rng(seed)) for seed in range(TIMES)]
    return sum(each.low <= truth <= each.high for each in found) / TIMES


def test_intervals_hold_what_is_true_as_often_as_they_say() -> None:
    assert 0.93 < held(lambda rng: mean(rng.normal(3, 2, 8)), 3) < 0.97
    assert 0.93 < held(lambda rng: share(int(rng.binomial(60, 0.1)), 60), 0.1) < 0.99
    made = lambda rng: difference(rng.normal(0, 1, 20), rng.normal(2, 4, 10))  # noqa: E731
    assert 0.93 < held(made, 2) < 0.97
    made = lambda rng: apart(  # noqa: E731
        quantile(rng.exponential(1, 101), 0.5), quantile(rng.exponential(3, 60), 0.5)
    )
    assert 0.94 < held(made, 2 * math.log(2)) < 0.99
    skewed = math.log(2)  # the median of an exponential variable
    assert 0.94 < held(lambda rng: quantile(rng.exponential(1, 101), 0.5), skewed) < 0.99


def test_resampled_intervals() -> None:
    rng = np.random.default_rng(1)
    values = rng.exponential(1, 400)
    median, middle = resampled_median(values, rng), resampled_mean(values, rng)
    assert median.value == np.median(values) and middle.value == pytest.approx(values.mean())
    by_order = quantile(values, 0.5)
    assert (median.low, median.high) == pytest.approx((by_order.low, by_order.high), abs=0.03)
    by_student = mean(values)
    assert (middle.low, middle.high) == pytest.approx((by_student.low, by_student.high), abs=0.02)
    again = np.random.default_rng(1)
    again.exponential(1, 400)
    assert resampled_median(values, again) == median, "the generator is the only randomness"
    assert math.isnan(resampled_median(values[:0], rng).value)


def test_an_interval_with_zero_outside_tells() -> None:
    assert difference(np.arange(50.0), np.arange(50.0) + 100).tells
    assert not difference(np.arange(50.0), np.arange(50.0) + 1).tells
    assert not NOTHING.tells
