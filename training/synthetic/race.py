"""Items drawn without replacement, in proportion to noisy weights w_i, as a race.

Item i arrives after a waiting time with rate w_i exp(c N_i), N_i standard normal, and the first n
arrivals are the sample (Efraimidis and Spirakis 2006). Seen without N_i, item i has the hazard

    h_i(t) = w_i r(t w_i),   r(x) = E[exp(c N - x e^(c N))] / E[exp(-x e^(c N))],

which only falls with t. So arrivals come from a Poisson process with the constant rates
h_i(t0) >= h_i(t), thinned by h_i(t) / h_i(t0) (Lewis and Shedler 1979): exact, yet one user costs
one exponential per item and a few dozen random numbers, instead of two random numbers per item.
Taken items leave the race, and a user still short of n starts a new round at the time reached.

Gumbel top-k (log w_i + c N_i + a Gumbel number per pair, the n largest) would draw from the same
distribution in a few lines, but takes about twice as long: two random numbers per pair.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import FloatArray, IdArray

ROUND_POINTS = 64  # arrivals drawn per user and round; 20 distinct items rarely need a second
CHUNK = 64  # items summed together, so that an arrival searches 64 weights and not all

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Hazard:
    """log of h_i(t) / w_i as a function of log(t w_i), by table; constant when noise is 0."""

    grid: Float64Array
    log_ratio: Float64Array

    def __call__(self, log_x: Float64Array) -> Float64Array:
        return np.interp(log_x, self.grid, self.log_ratio)

    @property
    def at_start(self) -> float:
        """At t = 0, where it is largest: c^2 / 2."""
        return float(self.log_ratio[0])


def noise_hazard(c: float) -> Hazard:
    """The log hazard ratio of weights multiplied by exp(c N(0, 1)).

    Trapezoidal quadrature over N in [-40, 40]; the grid spans from where the ratio equals its limit
    exp(c^2 / 2) to 1e-7 to where no item is still waiting.
    """
    if c == 0:
        return Hazard(np.zeros(1), np.zeros(1))
    grid = np.linspace(-c * (c + 8.0) - 16.0, 6.0 * c + 6.0, 2000)
    normal = np.linspace(-40.0, 40.0, 1601)
    late = -0.5 * normal**2 - np.exp(grid[:, None] + c * normal)
    peak = late.max(axis=1, keepdims=True)
    waiting = np.exp(late - peak)
    ratio = (waiting * np.exp(c * normal)).sum(axis=1) / waiting.sum(axis=1)
    return Hazard(grid, np.log(ratio))


def draw_items(
    log_weights: FloatArray, count: int, hazard: Hazard, rng: np.random.Generator
) -> IdArray:
    """(n, count) int64: for each row of log weights (n, m), ``count`` items without replacement.

    In order of arrival. log_weights is overwritten.
    """
    picked = np.full((len(log_weights), count), -1, dtype=np.int64)
    have = np.zeros(len(log_weights), dtype=np.int64)
    peaks = log_weights.max(axis=1)
    log_weights -= peaks[:, None]  # time runs in units of 1 / the largest weight
    with np.errstate(under="ignore"):
        weights = np.exp(log_weights)
    items, waits = _arrivals(weights, rng)
    times = np.cumsum(waits, axis=1) * np.exp(-hazard.at_start)
    start = np.full(len(times), -np.inf)
    active = np.arange(len(log_weights))
    while True:
        logs = log_weights[active[:, None], items].astype(np.float64)
        log_ratio = hazard(np.log(times) + logs) - hazard(start[:, None] + logs)
        accepted = rng.random(items.shape) < np.exp(log_ratio)
        _take_new(items, accepted, picked, have, active)
        short = have[active] < count
        active, start = active[short], np.log(times[short, -1])
        if not len(active):
            return picked
        items, times = _next_round(log_weights, picked, active, start, hazard, rng)


def _next_round(
    log_weights: FloatArray,
    picked: IdArray,
    active: IdArray,
    start: Float64Array,
    hazard: Hazard,
    rng: np.random.Generator,
) -> tuple[IdArray, Float64Array]:
    """Arrivals of the users still short of items, at the rates that hold from ``start`` on."""
    logs = log_weights[active].astype(np.float64)
    rows, slots = np.nonzero(picked[active] >= 0)
    logs[rows, picked[active][rows, slots]] = -np.inf
    rates = logs + hazard(start[:, None] + logs)
    peaks = rates.max(axis=1, keepdims=True)
    items, waits = _arrivals(np.exp(rates - peaks), rng)
    return items, np.exp(start)[:, None] + np.cumsum(waits, axis=1) * np.exp(-peaks)


def _arrivals(
    weights: NDArray[np.floating[Any]], rng: np.random.Generator
) -> tuple[IdArray, Float64Array]:
    """(n, p) int64 items drawn with replacement, and the waiting time before each."""
    rows, count = weights.shape
    points = (rows, ROUND_POINTS)
    size = min(CHUNK, count)
    starts = np.arange(0, count, size)
    bounds = np.cumsum(np.add.reduceat(weights, starts, axis=1), axis=1, dtype=np.float64)
    totals = bounds[:, -1:]
    # one search for all rows: row r owns the interval [r, r + 1)
    edges = (bounds / totals + np.arange(rows)[:, None]).ravel()
    found = np.searchsorted(edges, (rng.random(points) + np.arange(rows)[:, None]).ravel(), "right")
    chunk = np.minimum(
        found.reshape(points) - np.arange(rows)[:, None] * len(starts), len(starts) - 1
    )
    columns = chunk[:, :, None] * size + np.arange(size)
    inside = weights[np.arange(rows)[:, None, None], np.minimum(columns, count - 1)]
    inside = np.cumsum(np.where(columns < count, inside, 0), axis=2, dtype=np.float64)
    target = rng.random(points) * inside[:, :, -1]
    items = chunk * size + (inside <= target[:, :, None]).sum(axis=2)
    return np.minimum(items, count - 1), rng.standard_exponential(points) / totals


def _take_new(
    items: IdArray,
    accepted: NDArray[np.bool_],
    picked: IdArray,
    have: IdArray,
    active: IdArray,
) -> None:
    """Adds each user's accepted arrivals to ``picked``: first ones, in order, until it is full."""
    for user, arrived, kept in zip(active, items, accepted, strict=True):
        new = list(dict.fromkeys(arrived[kept].tolist()))[: picked.shape[1] - have[user]]
        picked[user, have[user] : have[user] + len(new)] = new
        have[user] += len(new)
