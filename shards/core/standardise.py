"""Numbers as inputs of a tower: scaled the same in training and in serving, by one function."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardline.shards.core.schema import FloatArray

LARGEST = 10.0  # deviations from the mean; beyond, one odd value would outweigh all others
DAY_S = 86_400.0
PERIODS_S = {"day": DAY_S, "week": 7 * DAY_S, "year": 365.2425 * DAY_S}  # of a time's cycles


def days_before(newest: float, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ages in days of times in seconds since 1970; what is newer than ``newest`` is as new."""
    return np.maximum(newest - seconds, 0.0) / DAY_S


def time_inputs(
    seconds: NDArray[np.float64], newest: float, cycles: Sequence[str], *, log: bool
) -> NDArray[np.float64]:
    """seconds (n, 1) since 1970, NaN where missing, as (n, 1 + 2 * cycles).

    The age in days before ``newest``, with ``log`` its log(1 + x); then sine and cosine of the
    place in each cycle, a key of PERIODS_S, counted in UTC.
    """
    age = days_before(newest, seconds)
    turns = [2 * np.pi * (seconds % PERIODS_S[cycle]) / PERIODS_S[cycle] for cycle in cycles]
    parts = [part for turn in turns for part in (np.sin(turn), np.cos(turn))]
    return np.concatenate([np.log1p(age) if log else age, *parts], axis=1)


def standardised(
    values: NDArray[np.float64], mean: ArrayLike, deviation: ArrayLike, *, missing: bool
) -> FloatArray:
    """values (n, d), NaN where missing, as (n, d) or, with ``missing``, (n, d + 1) float32.

    (x - mean) / deviation of each component, cut off at LARGEST; a missing value has the mean. The
    last number, with ``missing``, is 1 in rows where a value is missing and 0 in others.
    """
    with np.errstate(over="ignore"):  # what overflows is cut off like anything large
        scaled = (values - np.asarray(mean)) / np.asarray(deviation)
    absent = np.isnan(values)
    scaled = np.where(absent, 0.0, np.clip(scaled, -LARGEST, LARGEST))
    if missing:
        scaled = np.concatenate([scaled, absent.any(axis=1, keepdims=True)], axis=1)
    return scaled.astype(np.float32)
