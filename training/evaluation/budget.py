"""The recall budget: which part of what is not found the model loses, and which the index.

The same users are asked at several stages, from an exact ranking of the unquantised vectors to
what is served. At each the recall of the relevant items is measured, and the agreement:

    agreement@k   of the first k of the exact ranking, known items dropped, the share that a
                  stage also has among its first k

What the first stage misses, the model misses; every later difference is the index's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardline.shards.core.progress import Progress
from shardline.shards.core.schema import EMPTY_ID, FloatArray, IdArray, Metric
from shardline.shards.storage.embedding_set import EmbeddingSet
from shardline.training.data.csr import Csr
from shardline.training.evaluation.evaluate import Ask, ask_batch, request_batches
from shardline.training.evaluation.measure import add_lists, empty_sums, result_of
from shardline.training.evaluation.ranking import rank_exact
from shardline.training.evaluation.ranking_metrics import MetricResult, hit_matrix
from shardline.training.evaluation.user_queries import EvaluationTask


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetStage:
    """A stage that is asked: ``ask(places in task.users, k)`` answers item ids (n, k)."""

    name: str
    about: str
    ask: Ask


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """Means at a stage, and its agreement with the first one: ``agreement[k]``, 0 to 1."""

    name: str
    about: str
    metrics: MetricResult
    agreement: dict[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One line of the waterfall: what is found up to here, and what this stage changed."""

    name: str
    about: str
    recall: float
    change: float
    agreement: float


def recall_budget(
    stages: Sequence[BudgetStage],
    task: EvaluationTask,
    item_ids: IdArray,
    *,
    progress: Progress | None = None,
) -> list[StageResult]:
    """Asks every user at every stage; the first is what the others are compared with.

    item_ids (m,) of all rows of the dataset. Progress stage: ``budget``.

    Raises:
        InvalidInput: nothing to measure, or a k that leaves no room for known items.
    """
    sums = [empty_sums(task) for _ in stages]
    agreed = np.zeros((len(stages), len(task.ks)))
    compared = np.zeros(len(task.ks))
    for batch in request_batches(task):
        users = task.users[batch]
        wanted = task.relevant.take(users)
        lists = [ask_batch(stage.ask, batch, task, item_ids) for stage in stages]
        for part, ranked in zip(sums, lists, strict=True):
            add_lists(part, task, ranked, wanted, users)
        for place, k in enumerate(task.ks):
            compared[place] += (lists[0][:, :k] != EMPTY_ID).sum()
            agreed[:, place] += [overlap(lists[0][:, :k], ranked[:, :k]) for ranked in lists]
        if progress is not None:
            progress("budget", int(batch[-1]) + 1, len(task.users))
    shares = agreed / np.maximum(compared, 1)
    return [
        StageResult(
            name=stage.name,
            about=stage.about,
            metrics=result_of(part),
            agreement=dict(zip(task.ks, share.tolist(), strict=True)),
        )
        for stage, part, share in zip(stages, sums, shares, strict=True)
    ]


def waterfall(results: Sequence[StageResult], k: int) -> list[Step]:
    """Recall@k from stage to stage; the first change is from 1, finding every relevant item."""
    steps, before = [], 1.0
    for result in results:
        recall = result.metrics.means[f"recall@{k}"]
        steps.append(
            Step(
                name=result.name,
                about=result.about,
                recall=recall,
                change=recall - before,
                agreement=result.agreement[k],
            )
        )
        before = recall
    return steps


def overlap(reference: IdArray, ranked: IdArray) -> int:
    """How many live entries of reference (n, k) are in the same row of ranked (n, k)."""
    live = reference >= 0
    return int(hit_matrix(ranked, Csr.of(live.sum(axis=1), reference[live])).sum())


def exact_ask(queries: FloatArray, corpus: EmbeddingSet) -> Ask:
    """The exact ranking of a corpus's own float32 vectors; queries (u, dim), one for each user.

    The vectors are held in memory. For cosine and inner product.
    """
    assert corpus.metric is not Metric.L2, "query encoders are trained for cosine"
    batches = [(batch.item_ids, batch.vectors) for batch in corpus.batches()]
    ids = np.concatenate([part for part, _ in batches])
    order = np.argsort(ids)  # equal scores are ordered by id
    ids, vectors = ids[order], np.concatenate([part for _, part in batches])[order]

    def ask(places: IdArray, k: int) -> IdArray:
        rows, _ = rank_exact(queries[places], vectors, k=k)
        return np.where(rows == EMPTY_ID, EMPTY_ID, ids[rows])

    return ask
