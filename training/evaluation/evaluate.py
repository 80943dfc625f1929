"""How well a trained run retrieves: exactly, over the whole corpus, or through a running cluster.

Test users are asked with everything known before the test items: history from train and val, and
those items left out of the ranking. Through a cluster the answer is asked that much longer, and
the known items are dropped from it afterwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.progress import Progress
from shardline.shards.core.schema import EMPTY_ID, MAX_K, IdArray
from shardline.training.data.csr import Csr
from shardline.training.data.tables import USERS, Dataset
from shardline.training.evaluation.measure import add_lists, empty_sums, measure, result_of, shared
from shardline.training.evaluation.ranking_metrics import DEFAULT_KS, MetricResult
from shardline.training.evaluation.user_queries import (
    KNOWN_BEFORE,
    Candidates,
    EvaluationTask,
    evaluation_task,
    query_features,
)
from shardline.training.features.item_inputs import item_inputs
from shardline.training.model.checkpoint import check_dataset, is_dataset_of, load_best
from shardline.training.model.encoding import encode_items, encode_queries
from shardline.training.model.popularity import lengths_of

QUERIES_PER_REQUEST = 64
OUTSIDE_ROW = -2  # of an item that a cluster serves and the dataset does not list

Search = Callable[[list[dict[str, Any]], int], IdArray]
Ask = Callable[[IdArray, int], IdArray]


def evaluate_exact(
    run_folder: Path,
    dataset: Dataset,
    *,
    split: str = "test",
    ks: Sequence[int] = DEFAULT_KS,
    max_users: int | None = None,
    with_segments: bool = False,
    candidates: Candidates = "all",
    unfinished: bool = False,
    other_data: bool = False,
    without_own: bool = False,
    graded: bool = False,
    progress: Progress | None = None,
) -> MetricResult:
    """Brute force over the whole corpus with the run's best model; users without items in the
    split are left out, of the others ``max_users`` are drawn. Progress stage: ``evaluate``.

    unfinished: also a run whose training has not ended; other_data: also one that was trained on
    another dataset. The result is then ``about`` that. without_own, graded: as
    ``evaluation_task``, and without_own always where the towers are tied.

    Raises:
        NotFound: no trained run. DataError: the run was trained on another dataset, or has not
            ended; the dataset lacks a feature column.
        InvalidInput: nothing to measure, or a k beyond the corpus.
    """
    run, model = load_best(run_folder, unfinished=unfinished)
    is_other = other_data and not is_dataset_of(run_folder, dataset.identity)
    if not is_other:
        check_dataset(run_folder, dataset.identity)
    task = shared(
        evaluation_task(
            dataset,
            split,
            ks=ks,
            max_users=max_users,
            with_segments=with_segments,
            candidates=candidates,
            without_own=without_own or run.config.towers.tied,
            graded=graded,
        )
    )
    if split in run.config.fitted_splits and not is_other:
        raise InvalidInput(
            "the run was fitted on this split",
            field="split",
            expected="a split it has not seen",
            got=f"{split} (fit_splits: {run.config.fit_splits})",
            hint="--split test, or --run with one that was trained without --all",
        )
    items = item_inputs(run.space, dataset, run.config.fitted_splits)
    inputs = run.space.query.encode(dataset.users(), USERS)
    known = task.known.take(task.users)
    queries = encode_queries(model, inputs.take(task.users), known, items)
    lengths = lengths_of(dataset, run.config.fitted_splits, run.config.popularity_exponent)
    vectors = encode_items(model, items) * lengths[:, None]
    result = measure(queries, vectors, task, progress=progress)
    notes = ["unfinished"] * run.cut_off + ["trained on other data"] * is_other
    return replace(result, about=", ".join(notes))


def evaluate_through(
    search: Search,
    dataset: Dataset,
    *,
    kinds: dict[str, str],
    split: str = "test",
    ks: Sequence[int] = DEFAULT_KS,
    max_users: int | None = None,
    with_segments: bool = False,
    without_own: bool = False,
    graded: bool = False,
    progress: Progress | None = None,
) -> MetricResult:
    """The same metrics of whatever ``search(features, k)`` answers: (n, k) int64 item ids.

    Each batch asks for max(ks) and as many more as its users know items. max_users: only so many,
    the same ones as the other evaluations draw. kinds: name and kind of the encoder's features.
    without_own, graded: as ``evaluation_task``.

    Raises:
        InvalidInput: a k beyond the corpus, or beyond what MAX_K leaves after dropping the known
            items; or no user has an item in the split.
    """
    task = evaluation_task(
        *(dataset, split),
        ks=ks,
        max_users=max_users,
        with_segments=with_segments,
        without_own=without_own,
        graded=graded,
    )
    features = query_features(dataset, kinds, task.users, KNOWN_BEFORE[split])
    item_ids, sums = dataset.item_ids, empty_sums(task)
    for batch in request_batches(task):
        ranked = ask_batch(
            lambda rows, k: search([features[row] for row in rows], k), batch, task, item_ids
        )
        users = task.users[batch]
        add_lists(sums, task, ranked, task.relevant.take(users), users)
        if progress is not None:
            progress("evaluate", int(batch[-1]) + 1, len(task.users))
    return result_of(sums)


def request_batches(task: EvaluationTask) -> list[IdArray]:
    """Places in ``task.users``, some at a time, that are asked in one request.

    Raises:
        InvalidInput: max(ks) and the longest list of known items are more than MAX_K.
    """
    longest = int(task.not_shown(task.users).lengths.max())
    _check_reach(max(task.ks), longest, task.num_items)
    places = np.arange(len(task.users))
    return [
        places[start : start + QUERIES_PER_REQUEST]
        for start in range(0, len(places), QUERIES_PER_REQUEST)
    ]


def ask_batch(ask: Ask, batch: IdArray, task: EvaluationTask, item_ids: IdArray) -> IdArray:
    """(n, max(ks)) int64 item rows, best first, known ones dropped, -1 empty.

    ask(places in task.users, k) answers item ids (n, k); item_ids (m,) are those of all rows. An
    item that is answered but not listed there keeps its place, and is never a hit.
    """
    past = task.not_shown(task.users[batch])
    found = ask(batch, min(max(task.ks) + int(past.lengths.max()), task.num_items))
    rows = np.minimum(np.searchsorted(item_ids, found), len(item_ids) - 1)
    rows = np.where(item_ids[rows] == found, rows, OUTSIDE_ROW)
    return drop_known(np.where(found == EMPTY_ID, EMPTY_ID, rows), past, max(task.ks))


def drop_known(found: IdArray, known: Csr, k: int) -> IdArray:
    """(n, k) int64: each row of found (n, m) without its known ids, order kept, -1 at the end."""
    out = np.full((len(found), k), EMPTY_ID, dtype=np.int64)
    for row, ids in enumerate(found):
        start, end = known.indptr[row], known.indptr[row + 1]
        kept = ids[~np.isin(ids, known.items[start:end]) & (ids != EMPTY_ID)][:k]
        out[row, : len(kept)] = kept
    return out


def _check_reach(k: int, longest: int, rows: int) -> None:
    """Raises InvalidInput where k items and the ``longest`` known list are more than MAX_K."""
    if min(k + longest, rows) > MAX_K:
        raise InvalidInput(
            f"a user knows {longest} items, which are asked for too and then dropped",
            field="k",
            expected=f"<= {max(0, MAX_K - longest)}, because a query returns {MAX_K} at most",
            got=str(k),
            hint="ask for a smaller --k, or leave out --url and --through-cluster",
        )
