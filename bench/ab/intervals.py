"""Estimates with intervals: means, shares, quantiles, differences. Pure.

Every interval is two-sided, of confidence ``LEVEL``, and assumes that samples are independent of
each other. Where a function has random draws, it takes the generator.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
NORMAL_FROM = 1e6  # degrees of freedom: Student's t is the normal one to six digits
RESAMPLES = 2000
ITERATIONS = 300  # of a continued fraction that converges in some dozens, and of a bisection
RESAMPLED_AT_ONCE = 1 << 22  # numbers

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """low and high: the ends of its interval; NaN where too few samples give none."""

    value: float
    low: float
    high: float

    @property
    def tells(self) -> bool:
        """Whether zero lies outside: for a difference, that there is one."""
        return self.low > 0 or self.high < 0


NOTHING = Estimate(math.nan, math.nan, math.nan)


def mean(values: Numbers) -> Estimate:
    """Student's interval for the mean of values (n,)."""
    if len(values) < 2:
        return Estimate(float(values[0]), math.nan, math.nan) if len(values) else NOTHING
    middle = float(values.mean())
    half = t_quantile(len(values) - 1) * math.sqrt(float(values.var(ddof=1)) / len(values))
    return Estimate(middle, middle - half, middle + half)


def share(hits: int, trials: int) -> Estimate:
    """Wilson's interval for a share, which holds near 0 and 1 too (Wilson 1927)."""
    if not trials:
        return NOTHING
    p, z = hits / trials, NormalDist().inv_cdf((1 + LEVEL) / 2)
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def quantile(values: Numbers, q: float) -> Estimate:
    """The q-quantile of values (n,), 0 < q < 1, and the order statistics around it between which
    that of the distribution lies; NaN for an end beyond the smallest or the largest value."""
    if not len(values):
        return NOTHING
    ordered, n = np.sort(values), len(values)
    # P(the quantile lies below the i-th smallest) = P(Binomial(n, q) < i)
    below = binomial_cdf(n, q)
    low = int(np.searchsorted(below, (1 - LEVEL) / 2, side="right"))
    high = int(np.searchsorted(below, (1 + LEVEL) / 2, side="left")) + 1
    return Estimate(
        float(np.quantile(ordered, q)),
        float(ordered[low - 1]) if low > 0 else math.nan,
        float(ordered[high - 1]) if high <= n else math.nan,
    )


def difference(first: Numbers, second: Numbers) -> Estimate:
    """Of the means, second less first, by Welch's interval, which takes no equal variances (Welch
    1947)."""
    if min(len(first), len(second)) < 2:
        return NOTHING
    parts = [float(each.var(ddof=1)) / len(each) for each in (first, second)]
    found = float(second.mean() - first.mean())
    if not sum(parts):
        return Estimate(found, found, found)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(each) - 1) for part, each in zip(parts, (first, second), strict=True)
    )
    half = t_quantile(freedom) * math.sqrt(sum(parts))
    return Estimate(found, found - half, found + half)


def apart(first: Estimate, second: Estimate) -> Estimate:
    """Second less first, of independent estimates with intervals of any form: each end takes the
    distances to those ends that it depends on (MOVER; Zou and Donner 2008)."""
    found = second.value - first.value
    down = math.hypot(second.value - second.low, first.high - first.value)
    up = math.hypot(second.high - second.value, first.value - first.low)
    return Estimate(found, found - down, found + up)


def resampled_median(values: Numbers, rng: np.random.Generator) -> Estimate:
    """The median of values (n,), and the percentiles of medians of as many values drawn from them
    (the bootstrap; Efron 1979)."""
    if not len(values):
        return NOTHING
    return _resampled(values, lambda drawn: np.median(drawn, axis=1), rng)


def resampled_mean(values: Numbers, rng: np.random.Generator) -> Estimate:
    """As ``resampled_median``, of the mean: for values that are far from normal."""
    if not len(values):
        return NOTHING
    return _resampled(values, lambda drawn: drawn.mean(axis=1), rng)


def mismatch(counts: Sequence[int], shares: Sequence[float]) -> float:
    """The probability that keys dealt out by these shares give counts at least as far from them:
    the upper tail of Pearson's chi-square, by Wilson and Hilferty's cube-root approximation (1931),
    which is right to a few hundredths."""
    total, freedom = sum(counts), len(counts) - 1
    if not total or not freedom:
        return 1.0
    wanted = [total * each for each in shares]
    square = sum((got - want) ** 2 / want for got, want in zip(counts, wanted, strict=True))
    spread = 2 / (9 * freedom)
    z = ((square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 1 - NormalDist().cdf(z)


def binomial_cdf(n: int, q: float) -> Numbers:
    """(n + 1,) the probability of at most 0, 1, ..., n hits in n trials of probability q."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])  # of factorials
    hits = np.arange(n + 1)
    mass = logs[n] - logs[hits] - logs[n - hits] + hits * math.log(q) + (n - hits) * math.log1p(-q)
    below: Numbers = np.minimum(np.cumsum(np.exp(mass)), 1.0)
    return below


def t_quantile(freedom: float, level: float = LEVEL) -> float:
    """t so that a variable of Student's distribution is from -t to t with that probability."""
    if freedom > NORMAL_FROM:
        return NormalDist().inv_cdf((1 + level) / 2)
    low, high = 0.0, 1.0
    while t_within(high, freedom) < level:
        high *= 2
    for _ in range(ITERATIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_within(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def t_within(t: float, freedom: float) -> float:
    """P(-t < T < t) for Student's distribution: I_x(1 / 2, freedom / 2), x = t^2 / (t^2 + f)."""
    return _beta_share(t * t / (t * t + freedom), 0.5, freedom / 2)


def _beta_share(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b) by its continued fraction, evaluated from
    the front (modified Lentz; Abramowitz and Stegun 26.5.8)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast below this
        return 1 - _beta_share(1 - x, b, a)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    upper, lower = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = lower
    for m in range(1, ITERATIONS):
        before = fraction
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            lower = 1 / (1 + step * lower)
            upper = 1 + step / upper
            fraction *= upper * lower
        if abs(fraction - before) < 1e-16 * abs(fraction):
            break
    return front * fraction / a


def _resampled(
    values: Numbers, statistic: Callable[[Numbers], Numbers], rng: np.random.Generator
) -> Estimate:
    at_once = max(1, RESAMPLED_AT_ONCE // len(values))
    found = [
        statistic(values[rng.integers(len(values), size=(min(at_once, left), len(values)))])
        for left in range(RESAMPLES, 0, -at_once)
    ]
    low, high = np.quantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(statistic(values[None])[0]), float(low), float(high))
