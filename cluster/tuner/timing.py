"""Times of several searches, measured in alternating rounds, and how two of them compare.

Other work on a machine slows one minute and not the next. So what is to be compared is asked
alternately, round by round, and compared by the ratio within each round.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import FloatArray

Times = NDArray[np.float64]  # milliseconds, (rounds, queries)
Search = Callable[[FloatArray], object]  # of one query, (1, dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds of one query on one thread; the percentiles are over queries."""

    p50_ms: float
    p99_ms: float

    def scaled(self, factor: float) -> "Latency":
        return Latency(p50_ms=self.p50_ms * factor, p99_ms=self.p99_ms * factor)


def in_rounds(searches: Sequence[Search], queries: FloatArray, rounds: int) -> list[Times]:
    """Of each search, the times of single queries (n, dim); each round begins with another one."""
    times = [np.empty((rounds, len(queries))) for _ in searches]
    for number in range(rounds):
        for place in range(len(searches)):
            which = (place + number) % len(searches)
            search, row = searches[which], times[which][number]
            for at in range(len(queries)):
                query = queries[at : at + 1]
                started = time.perf_counter_ns()
                search(query)
                row[at] = (time.perf_counter_ns() - started) / 1e6
    return times


def latency_of(times: Times) -> Latency:
    """A query's time is its median over the rounds, so that one interruption does not count."""
    of_query = np.median(times, axis=0)
    return Latency(p50_ms=float(np.median(of_query)), p99_ms=float(np.quantile(of_query, 0.99)))


def paired_ratio(times: Times, baseline: Times) -> float:
    """The median over rounds of one's p50 by the other's, measured in the same rounds."""
    return float(np.median(np.median(times, axis=1) / np.median(baseline, axis=1)))
