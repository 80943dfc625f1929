"""Longer vectors for popular items: among equally similar items the popular one comes first.

Vectors of length one fit the pairs that were seen closely, and understate for all others how much
more often popular items are chosen. length = max(interactions, 1) ** exponent makes up for that. It
is applied after training, to whatever is ranked or exported, and the exponent is chosen on
validation. The scores then are inner products, not cosines.
"""

import numpy as np

from shardline.shards.core.schema import FloatArray, IdArray, Metric
from shardline.training.data.tables import Dataset


def item_lengths(counts: IdArray, exponent: float) -> FloatArray:
    """(items,) float32 from the interactions of each; ones where the exponent is 0."""
    return np.asarray(np.maximum(counts, 1.0) ** exponent, dtype=np.float32)


def lengths_of(dataset: Dataset, splits: tuple[str, ...], exponent: float) -> FloatArray:
    """(items,) float32, in the order of the items table, counted in those splits."""
    if not exponent:
        return np.ones(dataset.rows["items"], dtype=np.float32)
    fitted = dataset.positives(*splits).items
    return item_lengths(np.bincount(fitted, minlength=dataset.rows["items"]), exponent)


def metric_of(exponent: float, trained: str = "cosine") -> Metric:
    """What scores exported vectors: cosine while all of them have length one.

    trained: ``training.metric``.
    """
    return Metric.DOT if exponent or trained == "dot" else Metric.COSINE
