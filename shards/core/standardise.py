"""Numbers as inputs of a tower: scaled the same in training and in serving, by one function."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardline.shards.core.schema import FloatArray

LARGEST = 10.0  # deviations from the mean; beyond, one odd value would outweigh all others
DAY_S = 86_400.0


def days_before(newest: float, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ages in days of times in seconds since 1970; what is newer than ``newest`` is as new."""
    return np.maximum(newest - seconds, 0.0) / DAY_S


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
