"""What a model must beat: the most popular items, and a truncated SVD of the interactions.

A baseline turns the training interactions into one vector per user and one per item whose dot
product ranks; from there on it is evaluated exactly like a model.

    popularity   1-d: every user 1, every item its number of training interactions
    svd          PureSVD (Cremonesi, Koren, Turrin 2010) of D_u^-1/2 R D_i^-1/2, where heavy users
                 and popular items do not fill all factors; the answer is multiplied by D_i^1/2
                 again, which is worth .03 of recall@20 on Gowalla. It is the ideal low-pass filter
                 of GF-CF (Shen et al. 2021): the same ranking, user by user. The number of factors
                 is the one of ``SVD_RANKS`` with the best validation recall
"""

import dataclasses
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import svds

from shardline.shards.core.errors import DataError
from shardline.shards.core.progress import Progress
from shardline.shards.core.schema import FloatArray
from shardline.training.data.csr import Csr
from shardline.training.data.tables import Dataset
from shardline.training.evaluation.measure import measure, shared
from shardline.training.evaluation.ranking_metrics import DEFAULT_KS, MetricResult
from shardline.training.evaluation.user_queries import EvaluationTask, evaluation_task

SVD_RANKS = (16, 32, 64, 128, 256)  # one factorisation at the largest serves them all
SVD_RANK = 64  # without a validation split to choose by
SELECTION_K = 20  # of the recall that chooses; on smaller corpora all items
SELECTION_USERS = 2000  # as many as a training run validates with


class Vectors(NamedTuple):
    """(users, d) and (items, d) float32, a row for each row of the tables."""

    users: FloatArray
    items: FloatArray


class Baseline(StrEnum):
    POPULARITY = "popularity"
    SVD = "svd"


def popularity_vectors(train: Csr, num_items: int) -> Vectors:
    """Counts are exact in float32 up to 2^24 interactions of one item."""
    counts = np.bincount(train.items, minlength=num_items).astype(np.float32)
    return Vectors(np.ones((len(train.indptr) - 1, 1), dtype=np.float32), counts[:, None])


def svd_vectors(train: Csr, num_items: int, *, rank: int = SVD_RANK, seed: int = 0) -> Vectors:
    """``rank`` factors, fewer where the matrix has fewer, the strongest first.

    Fewer of them are thus a cut, not another factorisation. ``seed`` fixes the solver's start.

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
    left[train.lengths == 0] = 0.0  # the solver leaves rounding there, which would rank items
    order = np.argsort(-values, kind="stable")
    return Vectors(
        (left * values)[:, order].astype(np.float32),
        (right.T * np.sqrt(counts)[:, None])[:, order].astype(np.float32),
    )


def evaluate_baseline(
    kind: Baseline,
    dataset: Dataset,
    *,
    split: str = "test",
    ks: Sequence[int] = DEFAULT_KS,
    max_users: int | None = None,
    with_segments: bool = False,
    without_own: bool = False,
    graded: bool = False,
    progress: Progress | None = None,
) -> MetricResult:
    """Metrics on ``test``, with train + val learnt and masked, or on ``val``, with train.

    max_users: only so many are asked, the same ones as a model's evaluation draws. without_own,
    graded: as ``evaluation_task``. The result is ``about`` the number of factors.

    Raises:
        InvalidInput: nothing to measure, or a k beyond the corpus.
    """
    task = shared(
        evaluation_task(
            *(dataset, split),
            ks=ks,
            max_users=max_users,
            with_segments=with_segments,
            without_own=without_own,
            graded=graded,
        )
    )
    about = ""
    if kind is Baseline.POPULARITY:
        users, items = popularity_vectors(task.known, task.num_items)
    else:
        rank = svd_rank(dataset)
        users, items = svd_vectors(task.known, task.num_items, rank=rank)
        about = f"{users.shape[1]} factors"
    result = measure(users[task.users], items, task, progress=progress, stage=kind.value)
    return dataclasses.replace(result, about=about)


def svd_rank(dataset: Dataset, ranks: Sequence[int] = SVD_RANKS, *, k: int = SELECTION_K) -> int:
    """The rank, of ascending ``ranks``, whose SVD of train has the best validation recall@k.

    The smallest of equals; ``SVD_RANK`` where the dataset has no validation split.

    Raises:
        DataError: too small to factorise.
    """
    if not len(dataset.positives("val").items):
        return SVD_RANK
    deep = min(k, dataset.rows["items"])
    task = evaluation_task(dataset, "val", ks=(deep,), max_users=SELECTION_USERS)
    users, items = svd_vectors(task.known, task.num_items, rank=max(ranks))
    recalls = [_recall(Vectors(users[:, :rank], items[:, :rank]), task) for rank in ranks]
    return ranks[int(np.argmax(recalls))]


def _recall(vectors: Vectors, task: EvaluationTask) -> float:
    mine = shared(task)
    return measure(vectors.users[mine.users], vectors.items, mine).means[f"recall@{task.ks[0]}"]


def _inverse_root(counts: Any) -> Any:
    """1 / sqrt(count); 0 for what never occurs."""
    return np.where(counts > 0, 1.0 / np.sqrt(np.maximum(counts, 1)), 0.0)
