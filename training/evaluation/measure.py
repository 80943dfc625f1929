"""From a vector per user and per item to metrics: whole, by segment, over all ranks.

A model and a baseline differ only in their vectors; everything after that is here, once. Under
torch.distributed each rank ranks its share of the users and the sums are all-reduced, so every
rank returns the result that one process would.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from shardline.shards.core.progress import Progress
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.training import gather
from shardline.training.data.csr import Csr
from shardline.training.data.segments import filtered
from shardline.training.evaluation.ranking import ranked_blocks
from shardline.training.evaluation.ranking_metrics import (
    MetricResult,
    MetricSums,
    metric_names,
    score_lists,
)
from shardline.training.evaluation.user_queries import EvaluationTask

WHOLE = ""  # key of the sums over all users and items; the others are names of segments

Sums = dict[str, MetricSums]


def shared(task: EvaluationTask) -> EvaluationTask:
    """This rank's users of a task: every ``world``-th one; all of them in a single process."""
    users = task.users[gather.rank() :: gather.world_size()]
    return dataclasses.replace(task, users=users)


def measure(
    queries: FloatArray,
    items: FloatArray,
    task: EvaluationTask,
    *,
    progress: Progress | None = None,
    stage: str = "evaluate",
) -> MetricResult:
    """Metrics of ranking the task's candidates by dot product, of all ranks together.

    queries (u, d) float32, one for each of ``task.users``, which are this rank's; items (m, d)
    float32, one for each row of the items table. Known items are left out of the lists.

    Raises:
        InvalidInput: vectors that are not finite or do not fit, or no user to measure.
    """
    exclude, wanted = task.not_shown(task.users), task.relevant.take(task.users)
    if task.candidates is not None:
        items = items[task.candidates]
        exclude = _renumbered(exclude, task.candidates, task.num_items)
    sums = empty_sums(task)
    blocks = ranked_blocks(queries, items, exclude, max(task.ks)) if len(task.users) else ()
    for start, (ranked, _) in blocks:
        done = start + len(ranked)
        if task.candidates is not None:
            ranked = np.where(ranked < 0, ranked, task.candidates[ranked])
        add_lists(sums, task, ranked, wanted.slice(start, done), task.users[start:done])
        if progress is not None:
            progress(stage, done, len(task.users))
    names = metric_names(task.ks, graded=task.grades is not None)
    return result_of(all_reduced(sums, names))


def empty_sums(task: EvaluationTask) -> Sums:
    """Sums to fill by ``add_lists``: of the whole, and of each segment of the task."""
    return {WHOLE: MetricSums()} | {segment.name: MetricSums() for segment in task.segments}


def add_lists(
    sums: Sums, task: EvaluationTask, ranked: IdArray, wanted: Csr, users: IdArray
) -> None:
    """Adds the lists of some users: ranked (n, K) item rows best first, -1 empty; users (n,).

    A segment of items asks where its own items stand in the whole list.
    """
    grades = task.grades_of(users)
    sums[WHOLE].add(score_lists(ranked, wanted, task.ks, grades))
    for segment in task.segments:
        inside = segment.holds(users, wanted)
        part = None if grades is None else grades[inside]
        sums[segment.name].add(score_lists(ranked, filtered(wanted, inside), task.ks, part))


def result_of(sums: Sums) -> MetricResult:
    """The means; a segment without users has none. Raises InvalidInput where nobody has any."""
    segments = {
        name: part.result() if part.users else None for name, part in sums.items() if name != WHOLE
    }
    return dataclasses.replace(sums[WHOLE].result(), segments=segments)


def all_reduced(sums: Sums, names: Sequence[str]) -> Sums:
    """The sums of all ranks, on every rank; in a single process ``sums`` as they are.

    names: of all metrics, because a rank without users has not met them. Float64: the order in
    which users are added, and how many ranks share them, move a mean by rounding alone.
    """
    if gather.world_size() == 1:
        return sums
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    rows = [_flat(part, names) for part in sums.values()]
    table = torch.tensor(rows, dtype=torch.float64, device=device)
    dist.all_reduce(table)
    return {
        key: MetricSums(
            users=int(row[0]),
            relevant=int(row[1]),
            skipped=int(row[2]),
            sums=dict(zip(names, row[3:], strict=True)),
        )
        for key, row in zip(sums, table.tolist(), strict=True)
    }


def _flat(part: MetricSums, names: Iterable[str]) -> list[float]:
    return [part.users, part.relevant, part.skipped, *(part.sums.get(name, 0.0) for name in names)]


def _renumbered(lists: Csr, candidates: IdArray, num_items: int) -> Csr:
    """The entries that are candidates, as places among the ascending ``candidates``."""
    place = np.full(num_items, -1, dtype=np.int64)
    place[candidates] = np.arange(len(candidates))
    kept = filtered(lists, place[lists.items] >= 0)
    return Csr(kept.indptr, place[kept.items])
