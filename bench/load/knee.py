"""Where the latency curve bends: the highest rate the endpoint holds. Pure.

A rate is held when answers keep up with questions and the median has not left the neighbourhood
of the unloaded one. Of an M/M/1 queue the mean wait is 1 / (1 - load) times the service time, so
five times the unloaded median stands for a load of about .8: past it a little more traffic costs a
lot of latency.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

KEEPS_UP = 0.97  # answers/s of those offered
MOST_REFUSED = 0.01  # of the requests: 429 and failures
NOISE = 2.0  # standard deviations of a Poisson count
MEDIAN_GROWTH = 5.0
GROWTH = 2.0  # from one rate to the next while looking for the first that is not held
PRECISION = 1.1  # ratio of the lowest rate not held to the highest held, at which to stop
MOST_POINTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A rate and what came of it, in requests/s; sent: how many requests that were;
    p50_ms None: nothing was answered."""

    rate: float
    sent: int
    offered: float
    goodput: float
    lost_share: float
    p50_ms: float | None


def is_held(point: Point, unloaded: Point) -> bool:
    """``unloaded`` is the lowest rate measured; it is held if it keeps up."""
    return (
        missing_share(point) <= 1 - KEEPS_UP
        and point.lost_share <= MOST_REFUSED
        and point.p50_ms is not None
        and unloaded.p50_ms is not None
        and point.p50_ms <= MEDIAN_GROWTH * unloaded.p50_ms
    )


def missing_share(point: Point) -> float:
    """Answers that did not come in time, as a share of the requests; what chance explains is
    taken off: the requests in flight at the two ends of the measured time differ by that much."""
    chance = NOISE / math.sqrt(max(point.sent, 1))
    return max(1 - point.goodput / max(point.offered, 1e-9) - chance, 0.0)


def knee(points: Sequence[Point]) -> float | None:
    """The highest rate held below every rate that is not; None when not even the lowest is."""
    if not points:
        return None
    ordered = sorted(points, key=lambda point: point.rate)
    best = None
    for point in ordered:
        if not is_held(point, ordered[0]):
            break
        best = point.rate
    return best


def next_rate(points: Sequence[Point], start: float) -> float | None:
    """The rate to measure next: doubling until one is not held, then halving the gap (by ratio).

    None when the knee is known to PRECISION, or not even ``start`` is held, or MOST_POINTS are.
    """
    if not points:
        return start
    held = knee(points)
    if held is None or len(points) >= MOST_POINTS:
        return None
    above = [point.rate for point in points if point.rate > held]
    if not above:
        return held * GROWTH
    lowest = min(above)
    return None if lowest / held <= PRECISION else math.sqrt(lowest * held)
