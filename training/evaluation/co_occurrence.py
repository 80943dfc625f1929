"""The baseline of item-to-item models: what was most often clicked together with an item in train.

It knows pairs that were seen, and nothing of others.
"""

from collections.abc import Sequence

import numpy as np

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import EMPTY_ID, FloatArray, IdArray
from shardline.training.data.csr import Csr
from shardline.training.data.tables import Dataset
from shardline.training.evaluation.measure import (
    add_lists,
    all_reduced,
    empty_sums,
    result_of,
    shared,
)
from shardline.training.evaluation.ranking_metrics import DEFAULT_KS, MetricResult, metric_names
from shardline.training.evaluation.user_queries import KNOWN_BEFORE, evaluation_task


def evaluate_co_occurrence(
    dataset: Dataset,
    *,
    split: str = "test",
    ks: Sequence[int] = DEFAULT_KS,
    max_users: int | None = None,
    with_segments: bool = False,
    graded: bool = False,
) -> MetricResult:
    """Metrics by what each item was paired with before the split; weights are how often.

    Raises:
        InvalidInput: no pairs of items; nothing to measure, or a k beyond the corpus.
    """
    if not dataset.item_to_item:
        raise InvalidInput(
            "co-occurrence is of pairs of items",
            field="data",
            expected="a dataset of `shardline data sessions`",
            got=dataset.name,
        )
    task = shared(
        evaluation_task(
            *(dataset, split),
            ks=ks,
            max_users=max_users,
            with_segments=with_segments,
            graded=graded,
        )
    )
    assert task.own is not None, "users of such a dataset are items"
    weights, sums = dataset.weights(*KNOWN_BEFORE[split]), empty_sums(task)
    lists = co_occurrence_lists(task.known, weights, task.users, task.own, max(task.ks))
    if len(task.users):
        add_lists(sums, task, lists, task.relevant.take(task.users), task.users)
    return result_of(all_reduced(sums, metric_names(task.ks, graded=graded)))


def co_occurrence_lists(
    train: Csr, weights: FloatArray | None, users: IdArray, own: IdArray, depth: int
) -> IdArray:
    """(n, depth) int64 partners of the users (n,), the most frequent first, then by lower row.

    weights: how often each entry of ``train`` was seen, once where it is None or NaN. own (all
    users,): the item that a user is, which is left out. -1 fills up.
    """
    lists = np.full((len(users), depth), EMPTY_ID, dtype=np.int64)
    counts = np.ones(len(train.items)) if weights is None else np.nan_to_num(weights, nan=1.0)
    for place, user in enumerate(users):
        part = slice(train.indptr[user], train.indptr[user + 1])
        items, times = train.items[part], counts[part]
        order = np.lexsort((items, -times))
        best = items[order][items[order] != own[user]][:depth]
        lists[place, : len(best)] = best
    return lists
