"""The recall budget: which part of what is not found the model loses, and which the index.

The same users are asked at several stages, from an exact ranking of the unquantised vectors to
what is served. At each the recall of the relevant items is measured, and the agreement:

    agreement@k   recall of the exact ranking, known items dropped, by score: the share of a
                  stage's first k whose exact score reaches the k-th of the exact ranking

What the first stage misses, the model misses; every later difference is the index's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from shardline.shards.core.progress import Progress
from shardline.shards.core.recall import count_hits, exact_scores, without_repeats
from shardline.shards.core.schema import EMPTY_ID, FloatArray, IdArray, Metric
from shardline.shards.storage.embedding_set import EmbeddingSet
from shardline.training.evaluation.evaluate import Ask, ask_batch, request_batches
from shardline.training.evaluation.measure import add_lists, empty_sums, result_of
from shardline.training.evaluation.ranking import rank_exact
from shardline.training.evaluation.ranking_metrics import MetricResult
from shardline.training.evaluation.user_queries import EvaluationTask

# (places in task.users (n,), item ids (n, k)) -> their exact scores (n, k), -inf where none
Score = Callable[[IdArray, IdArray], FloatArray]


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
    score: Score,
    progress: Progress | None = None,
) -> list[StageResult]:
    """Asks every user at every stage; the first is what the others are compared with.

    item_ids (m,) of all rows of the dataset. ``score`` is that of the first stage's ranking, for
    whatever items a stage answers. Progress stage: ``budget``.

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
        # an item that the dataset does not list has no score: it is neither compared nor a hit
        ids = [np.where(ranked >= 0, item_ids[ranked], EMPTY_ID) for ranked in lists]
        scores = [score(batch, each) for each in ids]
        for place, k in enumerate(task.ks):
            compared[place] += np.isfinite(scores[0][:, :k]).sum()
            agreed[:, place] += [count_hits(each[:, :k], scores[0][:, :k]) for each in scores]
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


class ExactRanking:
    """The exact ranking of a corpus's own float32 vectors; queries (u, dim), one for each user.

    The vectors are held in memory. For cosine and inner product.
    """

    def __init__(self, queries: FloatArray, corpus: EmbeddingSet) -> None:
        assert corpus.metric is not Metric.L2, "query encoders are trained for cosine"
        batches = [(batch.item_ids, batch.vectors) for batch in corpus.batches()]
        ids = np.concatenate([part for part, _ in batches])
        order = np.argsort(ids)  # equal scores are ordered by id
        self._queries, self._ids = queries, ids[order]
        self._vectors = np.concatenate([part for _, part in batches])[order]

    def ask(self, places: IdArray, k: int) -> IdArray:
        """(n, k) int64 item ids for the queries at ``places``, best first, -1 in empty slots."""
        rows, _ = rank_exact(self._queries[places], self._vectors, k=k)
        return np.where(rows == EMPTY_ID, EMPTY_ID, self._ids[rows])

    def score(self, places: IdArray, ids: IdArray) -> FloatArray:
        """(n, k) float32 scores of items ``ids`` (n, k) for the queries at ``places``; -inf where
        the corpus has no such item, and from the second time a row holds one."""
        ids = without_repeats(ids)
        rows = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        rows = np.where(self._ids[rows] == ids, rows, EMPTY_ID)
        return exact_scores(self._queries[places], self._vectors, rows, Metric.DOT)
