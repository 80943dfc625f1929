"""How well a trained run retrieves: exactly, over the whole corpus, or through a running cluster.

Test users are asked with everything known before the test items: history from train and val, and
those items left out of the ranking. Through a cluster the answer is asked that much longer, and
the known items are dropped from it afterwards.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import InvalidInput
from shards.schema import EMPTY_ID, MAX_K, IdArray
from training.checkpoint import check_dataset, load_best
from training.encoding import encode_items, encode_queries
from training.metrics import (
    DEFAULT_KS,
    Csr,
    MetricResult,
    MetricSums,
    Progress,
    checked_ks,
    evaluate_vectors,
    score_lists,
)
from training.queries import KNOWN_BEFORE, evaluation_task, query_features
from training.tables import ITEMS, USERS, Dataset

QUERIES_PER_REQUEST = 64

Search = Callable[[list[dict[str, Any]], int], IdArray]


def evaluate_exact(
    run_folder: Path,
    dataset: Dataset,
    *,
    split: str = "test",
    ks: Sequence[int] = DEFAULT_KS,
    max_users: int | None = None,
    progress: Progress | None = None,
) -> MetricResult:
    """Brute force over the whole corpus with the run's best model; users without items in the
    split are left out, of the others ``max_users`` are drawn. Progress stage: ``evaluate``.

    Raises:
        NotFound: no trained run. DataError: the run was trained on another dataset.
        InvalidInput: nothing to measure, or a k beyond the corpus.
    """
    run, model = load_best(run_folder)
    check_dataset(run_folder, dataset.identity)
    ks = checked_ks(ks, dataset.rows["items"])
    known, relevant, users = evaluation_task(dataset, split, max_users)
    known = known.take(users)
    items = run.space.item.encode(dataset.items(), ITEMS)
    inputs = run.space.query.encode(dataset.users(), USERS)
    queries = encode_queries(model, inputs.take(users), known, items)
    return evaluate_vectors(
        queries,
        encode_items(model, items),
        relevant=relevant.take(users),
        exclude=known,
        ks=ks,
        progress=progress,
    )


def evaluate_through(
    search: Search,
    dataset: Dataset,
    *,
    kinds: dict[str, str],
    split: str = "test",
    ks: Sequence[int] = DEFAULT_KS,
    max_users: int | None = None,
    progress: Progress | None = None,
) -> MetricResult:
    """The same metrics of whatever ``search(features, k)`` answers: (n, k) int64 item ids.

    Each batch asks for max(ks) and as many more as its users know items. max_users: only so many,
    the same ones as the other evaluations draw. kinds: name and kind of the encoder's features.

    Raises:
        InvalidInput: a k beyond the corpus, or beyond what MAX_K leaves after dropping the known
            items; or no user has an item in the split.
    """
    item_ids = dataset.items()["item_id"].to_numpy()
    ks = checked_ks(ks, len(item_ids))
    known, relevant, users = evaluation_task(dataset, split, max_users)
    known, relevant = known.take(users), relevant.take(users)
    _check_reach(max(ks), int(known.lengths.max()), len(item_ids))
    sums = MetricSums()
    features = query_features(dataset, kinds, users, KNOWN_BEFORE[split])
    for start in range(0, len(users), QUERIES_PER_REQUEST):
        rows = np.arange(start, min(start + QUERIES_PER_REQUEST, len(users)))
        past, wanted = known.take(rows), relevant.take(rows)
        k = min(max(ks) + int(past.lengths.max()), len(item_ids))
        found = search([features[row] for row in rows], k)
        kept = drop_known(found, Csr(past.indptr, item_ids[past.items]), max(ks))
        sums.add(score_lists(kept, Csr(wanted.indptr, item_ids[wanted.items]), ks))
        if progress is not None:
            progress("evaluate", int(rows[-1]) + 1, len(users))
    return sums.result()


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
            hint="ask for a smaller k, or measure the run exactly",
        )
