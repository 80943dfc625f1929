"""What boosts add to scores of items, by their attributes as answers have them. Pure."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from shardline.router.rearrange.greedy import Floats
from shardline.router.rearrange.rearrangement import Boost
from shardline.shards.core.schema import FloatArray

DAY_S = 86_400.0
LARGEST = float(np.finfo(np.float32).max)


def added(boost: Boost, values: Sequence[Any], now: float) -> Floats:
    """(m,) what a boost adds to the scores of items with these values of its column; 0 for an item
    without a value, or whose value is not finite. now: seconds since 1970."""
    with np.errstate(over="ignore"):
        if boost.half_life_days is None:
            of_values = _numbers(values)
        else:
            of_values = np.exp2(-_ages_days(values, now) / boost.half_life_days)
        # within what a score can hold: sums of these never are infinity minus infinity
        return np.clip(boost.weight * of_values, -LARGEST, LARGEST)


def boosted(scores: FloatArray, additions: Floats) -> FloatArray:
    """(m,) scores with what boosts add to them, (m,)."""
    return np.clip(scores + additions, -LARGEST, LARGEST).astype(np.float32)


def _numbers(values: Sequence[Any]) -> Floats:
    numbers = np.array([0.0 if value is None else float(value) for value in values])
    numbers[~np.isfinite(numbers)] = 0.0
    return numbers


def _ages_days(values: Sequence[Any], now: float) -> Floats:
    """0 for the future, infinity for no value."""
    ages = [math.inf if value is None else (now - _moment(value)) / DAY_S for value in values]
    return np.maximum(np.array(ages, dtype=np.float64), 0.0)


def _moment(text: str) -> float:
    """Seconds since 1970 of a date, which begins at midnight UTC, or of a timestamp, which is UTC
    where it says nothing else."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
