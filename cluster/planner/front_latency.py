"""What a query takes outside of its shards: HTTP, router, fan-out, merge. Pure.

Two measurements are added as independent ones, each a lognormal through its two known percentiles:
requests without a search, and a fan-out without an index. Both were taken sequentially, with warm
caches, and with pauses between queries; a plan lies between the two, by its pauses.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from shardline.cluster.planner.fanout_tails import Spread, Times
from shardline.cluster.planner.measured_costs import (
    FAN_OUT_COLD,
    FAN_OUT_HOT,
    HTTP_COLD,
    HTTP_HOT,
)

NORMAL_P99 = 2.3263  # standard deviations
SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999)
DRAWS, SEED = 50_000, 0


@dataclass(frozen=True, slots=True)
class Front:
    """``spread`` is by ``p50_ms``."""

    p50_ms: float
    spread: Spread


@cache
def front_of(cold: float, added_ms: float = 0.0) -> Front:
    """cold: 0 where queries follow each other, 1 after long pauses. added_ms: for everything that
    every query has besides."""
    rng = np.random.default_rng(SEED)
    http = lognormal(*HTTP_HOT.between(HTTP_COLD, cold), rng)
    fan_out = lognormal(*FAN_OUT_HOT.between(FAN_OUT_COLD, cold), rng)
    total = http + fan_out + added_ms
    p50_ms = float(np.median(total))
    values = tuple(float(value) / p50_ms for value in np.quantile(total, SHARES))
    return Front(p50_ms, Spread(SHARES, values))


def lognormal(p50_ms: float, p99_ms: float, rng: np.random.Generator) -> Times:
    """(DRAWS,) milliseconds whose median and 99th percentile are these."""
    sigma = math.log(p99_ms / p50_ms) / NORMAL_P99
    drawn: Times = p50_ms * np.exp(sigma * rng.standard_normal(DRAWS))
    return drawn
