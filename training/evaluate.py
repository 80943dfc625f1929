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
from training.batches import item_lists, newest_of
from training.checkpoint import load_best
from training.encoding import encode_items, encode_queries
from training.metrics import (
    DEFAULT_KS,
    Csr,
    MetricResult,
    MetricSums,
    Progress,
    evaluate_vectors,
    score_lists,
)
from training.queries import query_features
from training.tables import ITEMS, USERS, Dataset

KNOWN_BEFORE = {"val": ("train",), "test": ("train", "val")}  # split -> splits that may be used
QUERIES_PER_REQUEST = 64

Search = Callable[[list[dict[str, Any]], int], IdArray]


def evaluate_exact(
    run_folder: Path,
    dataset: Dataset,
    *,
    split: str = "test",
    ks: Sequence[int] = DEFAULT_KS,
    progress: Progress | None = None,
) -> MetricResult:
    """Brute force over the whole corpus with the run's best model; users without items in the
    split are left out. Progress stage: ``evaluate``.

    Raises:
        NotFound: no trained run. InvalidInput: nothing to measure, or a k beyond the corpus.
    """
    run, model = load_best(run_folder)
    known, relevant, users = _task(dataset, split)
    items = run.space.item.encode(dataset.items(), ITEMS)
    inputs = run.space.query.encode(dataset.users(), USERS)
    queries = encode_queries(model, inputs.take(users), known, items)
    return evaluate_vectors(
        queries,
        encode_items(model, items),
        relevant=relevant,
        exclude=known,
        ks=[k for k in ks if k <= len(items)],
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

    Each batch asks for max(ks) and as many more as its users know items, up to MAX_K. kinds: name
    and kind of the encoder's features.

    Raises:
        InvalidInput: max(ks) is beyond MAX_K, or no user has an item in the split.
    """
    known, relevant, users = _task(dataset, split)
    users = users[:max_users]
    item_ids = dataset.items()["item_id"].to_numpy()
    ks = [k for k in ks if k <= len(item_ids)]
    sums = MetricSums()
    features = query_features(dataset, kinds, users, KNOWN_BEFORE[split])
    for start in range(0, len(users), QUERIES_PER_REQUEST):
        rows = np.arange(start, min(start + QUERIES_PER_REQUEST, len(users)))
        past, wanted = newest_of(known, rows), newest_of(relevant, rows)
        k = min(max(ks) + int(past.lengths.max()), MAX_K, len(item_ids))
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


def _task(dataset: Dataset, split: str) -> tuple[Csr, Csr, IdArray]:
    """(known, relevant, users): item rows per evaluated user, and the rows of these users."""
    if split not in KNOWN_BEFORE:
        raise InvalidInput(
            "unknown split", field="split", expected=" | ".join(KNOWN_BEFORE), got=repr(split)
        )
    relevant = item_lists(dataset, (split,))
    users = np.flatnonzero(relevant.lengths)
    if not len(users):
        raise InvalidInput("nothing to measure", field="split", got=f"no interactions in {split}")
    known = item_lists(dataset, KNOWN_BEFORE[split])
    return newest_of(known, users), newest_of(relevant, users), users
