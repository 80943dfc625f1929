"""When requests are meant to leave: offsets in seconds from the start, ascending. Pure.

A closed loop asks again when it has an answer, so a slow server slows its own questions and the
wait never shows ("coordinated omission"). Here the times are fixed before the first request.
"""

from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.errors import InvalidInput

FloatTimes = NDArray[np.float64]
Surge = tuple[float, float, float]  # from, to (shares of the measured time), factor on the rate


class Arrivals(StrEnum):
    """Poisson: independent users, with their bunches; constant: evenly spaced."""

    POISSON = "poisson"
    CONSTANT = "constant"


def offsets(
    arrivals: Arrivals,
    *,
    rate: float,
    warm_up_s: float,
    seconds: float,
    rng: np.random.Generator,
    surges: Sequence[Surge] = (),
) -> FloatTimes:
    """(n,) float64 below warm_up_s + seconds. ``surges`` multiply the rate for a part of the
    measured time; elsewhere ``rate`` requests per second are due.

    Raises:
        InvalidInput: a rate or duration that is not positive, or no request at all.
    """
    for name, value in (("rate", rate), ("seconds", seconds)):
        if not (np.isfinite(value) and value > 0):
            raise InvalidInput("out of range", field=name, expected="above 0", got=str(value))
    parts = []
    for start, stop, local_rate in _stretches(rate, warm_up_s, seconds, surges):
        length = stop - start
        if arrivals is Arrivals.CONSTANT:
            inside = np.arange(0, length, 1 / local_rate)
        else:
            # given their number, the points of a Poisson process are uniform
            inside = np.sort(rng.uniform(0, length, rng.poisson(local_rate * length)))
        parts.append(start + inside)
    times = np.concatenate(parts)
    if not (times >= warm_up_s).any():
        raise InvalidInput(
            "no request falls into the measured time",
            field="seconds",
            expected=f"more than {1 / rate:g}",
            got=str(seconds),
        )
    return times


def _stretches(
    rate: float, warm_up_s: float, seconds: float, surges: Sequence[Surge]
) -> list[tuple[float, float, float]]:
    """(start, stop, rate) of consecutive stretches that cover warm-up and measured time."""
    cuts = {0.0, 1.0} | {edge for surge in surges for edge in surge[:2]}
    edges = sorted(cuts)
    stretches = [(0.0, warm_up_s, rate)] if warm_up_s > 0 else []
    for start, stop in pairwise(edges):
        factor = next((f for a, b, f in surges if a <= start and stop <= b), 1.0)
        begin, end = warm_up_s + start * seconds, warm_up_s + stop * seconds
        stretches.append((begin, end, rate * factor))
    return stretches
