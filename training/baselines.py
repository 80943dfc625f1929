"""What a model must beat: the most popular items, and a truncated SVD of the interactions.

A baseline turns the training interactions into one vector per user and one per item whose dot
product ranks; from there on it is evaluated exactly like a model.

    popularity   1-d: every user 1, every item its number of training interactions
    svd          PureSVD (Cremonesi, Koren, Turrin 2010) of D_u^-1/2 R D_i^-1/2, where heavy users
                 and popular items do not fill all factors; the answer is multiplied by D_i^1/2
                 again, which is worth .03 of recall@20 on Gowalla
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import svds

from shards.errors import DataError
from shards.schema import FloatArray
from training.metrics import DEFAULT_KS, Csr, MetricResult, Progress, checked_ks, evaluate_vectors
from training.queries import evaluation_task
from training.tables import Dataset

SVD_RANK = 64

Vectors = tuple[FloatArray, FloatArray]  # (users, d) and (items, d) float32


class Baseline(StrEnum):
    POPULARITY = "popularity"
    SVD = "svd"


def popularity_vectors(train: Csr, num_items: int) -> Vectors:
    """Counts are exact in float32 up to 2^24 interactions of one item."""
    counts = np.bincount(train.items, minlength=num_items).astype(np.float32)
    return np.ones((len(train.indptr) - 1, 1), dtype=np.float32), counts[:, None]


def svd_vectors(train: Csr, num_items: int, *, rank: int = SVD_RANK, seed: int = 0) -> Vectors:
    """``rank`` factors, fewer where the matrix has fewer; ``seed`` fixes the solver's start.

    Raises:
        DataError: fewer than two users or items, so there is nothing to factorise.
    """
    shape = (len(train.indptr) - 1, num_items)
    if min(shape) < 2:
        raise DataError("too small for an SVD", expected="2 users and 2 items", got=str(shape))
    data = np.ones(len(train.items), dtype=np.float64)
    matrix = sparse.csr_array((data, train.items, train.indptr), shape=shape)
    users = _inverse_root(train.lengths)
    counts = np.bincount(train.items, minlength=num_items)
    items = _inverse_root(counts)
    normalised = sparse.diags_array(users) @ matrix @ sparse.diags_array(items)
    start = np.random.default_rng(seed).standard_normal(min(shape))
    left, values, right = svds(normalised, k=min(rank, min(shape) - 1), v0=start)
    return (left * values).astype(np.float32), (right.T * np.sqrt(counts)[:, None]).astype(
        np.float32
    )


def evaluate_baseline(
    kind: Baseline,
    dataset: Dataset,
    *,
    split: str = "test",
    ks: Sequence[int] = DEFAULT_KS,
    max_users: int | None = None,
    progress: Progress | None = None,
) -> MetricResult:
    """Metrics on ``test``, with train + val learnt and masked, or on ``val``, with train.

    max_users: only so many are asked, the same ones as a model's evaluation draws.

    Raises:
        InvalidInput: nothing to measure, or a k beyond the corpus.
    """
    num_items = dataset.rows["items"]
    ks = checked_ks(ks, num_items)
    known, relevant, users = evaluation_task(dataset, split, max_users)
    queries, vectors = _BASELINES[kind](known, num_items)
    return evaluate_vectors(
        queries[users],
        vectors,
        relevant=relevant.take(users),
        exclude=known.take(users),
        ks=ks,
        progress=progress,
        stage=kind.value,
    )


_BASELINES: dict[Baseline, Callable[[Csr, int], Vectors]] = {
    Baseline.POPULARITY: popularity_vectors,
    Baseline.SVD: svd_vectors,
}


def _inverse_root(counts: Any) -> Any:
    """1 / sqrt(count); 0 for what never occurs."""
    return np.where(counts > 0, 1.0 / np.sqrt(np.maximum(counts, 1)), 0.0)
