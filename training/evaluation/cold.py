"""What a model must beat among items that nobody has taken yet, where popularity and SVD are blind.

chance      the expected metrics of a random order: exact, nothing is drawn
attributes  popularity guessed from an item's features: ridge regression of log(1 + train
            interactions) on its columns, fitted on the other items; the same for every user
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shardline.shards.core.schema import FloatArray, IdArray
from shardline.training.data.segments import filtered
from shardline.training.data.tables import Dataset, vector_matrix
from shardline.training.evaluation.baselines import Vectors
from shardline.training.evaluation.measure import measure, shared
from shardline.training.evaluation.ranking_metrics import DEFAULT_KS, MetricResult
from shardline.training.evaluation.user_queries import EvaluationTask, evaluation_task

RIDGE = 1.0  # on standardised columns
MOST_VALUES = 256  # of a string or list column that become columns of 0 and 1

Design = NDArray[np.float64]


def cold_baselines(
    dataset: Dataset,
    *,
    split: str = "test",
    ks: tuple[int, ...] = DEFAULT_KS,
    max_users: int | None = None,
) -> dict[str, MetricResult]:
    """Metrics by name, of ranking the cold items among themselves.

    Raises:
        InvalidInput: no user of the split has a cold item, or a k beyond the cold items.
    """
    task = evaluation_task(dataset, split, ks=ks, max_users=max_users, candidates="cold")
    mine = shared(task)
    users, items = attribute_vectors(dataset, task)
    return {
        "chance": chance(task),
        "attributes": measure(users[mine.users], items, mine, stage="attributes"),
    }


def chance(task: EvaluationTask) -> MetricResult:
    """Means over the task's users of what a uniformly random order of the candidates gives."""
    rows = np.arange(task.num_items) if task.candidates is None else task.candidates
    known = task.known.take(task.users)
    pool = len(rows) - filtered(known, np.isin(known.items, rows)).lengths
    right = task.relevant.take(task.users).lengths
    depth = max(task.ks)
    gains = 1.0 / np.log2(np.arange(2, depth + 2))
    ideal = np.concatenate([[0.0], np.cumsum(gains)])
    # (users, depth): the chance that the first 1, 2, ... drawn are all irrelevant
    left = np.maximum(pool[:, None] - np.arange(depth), 0)
    missed = np.cumprod(np.maximum(left - right[:, None], 0) / np.maximum(left, 1), axis=1)
    first = -np.diff(missed, axis=1, prepend=1.0)
    means: dict[str, float] = {}
    for k in task.ks:
        shown = np.minimum(k, pool)
        means[f"recall@{k}"] = float((shown / pool).mean())
        means[f"hit_rate@{k}"] = float((1 - missed[:, k - 1]).mean())
        means[f"ndcg@{k}"] = float(
            (right / pool * ideal[shown] / ideal[np.minimum(right, k)]).mean()
        )
    means["mrr"] = float((first / np.arange(1, depth + 1)).sum(axis=1).mean())
    return MetricResult(means=means, users=len(task.users), relevant=int(right.sum()), skipped=0)


def attribute_vectors(dataset: Dataset, task: EvaluationTask) -> Vectors:
    """1-d: every user 1, every item the popularity that its features suggest."""
    _, counts = dataset.counts("train")
    warm = np.flatnonzero(counts)
    design = _design(dataset.items().drop_columns(["item_id"]), warm)
    target = np.log1p(counts[warm])
    sample = design[warm]
    gram = sample.T @ sample + RIDGE * np.eye(design.shape[1])
    weights = np.linalg.solve(gram, sample.T @ (target - target.mean()))
    scores: FloatArray = (design @ weights).astype(np.float32)
    return Vectors(np.ones((dataset.rows["users"], 1), np.float32), scores[:, None])


def _design(table: pa.Table, warm: IdArray) -> Design:
    """(m, p) float64: every usable column, shifted and scaled as the warm items have it."""
    parts = [_numbers(table[name]) for name in table.column_names]
    matrix = np.concatenate([np.empty((len(table), 0)), *parts], axis=1)
    mean, deviation = matrix[warm].mean(axis=0), matrix[warm].std(axis=0)
    useful = deviation > 0
    scaled: Design = (matrix[:, useful] - mean[useful]) / deviation[useful]
    return scaled


def _numbers(column: pa.ChunkedArray) -> Design:
    """(m, p): numbers as they are, values of strings and lists as 0 and 1, else p = 0."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        return vector_matrix(column).astype(np.float64)
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return np.asarray(column.cast(pa.float64()).to_numpy())[:, None]
    flat = column.combine_chunks()
    owners = np.arange(len(flat))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        owners = pc.list_parent_indices(flat).to_numpy()
        flat = pc.list_flatten(flat)
    codes = flat.dictionary_encode()
    width = len(codes.dictionary) if len(codes.dictionary) <= MOST_VALUES else 0
    out = np.zeros((len(column), width))
    if width:
        out[owners, codes.indices.to_numpy()] = 1.0
    return out
