"""The users of each item in order of time: the interactions of a dataset read by item."""

import numpy as np

from shardline.training.data.csr import Csr
from shardline.training.data.table_checks import rows_of
from shardline.training.data.tables import Dataset


def users_of_items(dataset: Dataset, splits: tuple[str, ...]) -> Csr:
    """User rows of every item row over the splits, by (timestamp, user row), no user twice.

    A user who took an item several times stands where the first of them was, as an item does in
    ``Dataset.positives``.

    Raises:
        DataError: an interaction refers to a user or an item that is not listed.
    """
    table = dataset.interactions()
    names = table["split"].combine_chunks()
    wanted = np.isin(names.dictionary.to_pylist(), splits)
    kept = np.flatnonzero(wanted[names.indices.to_numpy()])
    users, items, times = (
        table[name].to_numpy()[kept] for name in ("user_id", "item_id", "timestamp")
    )
    users = rows_of(dataset.user_ids, users, field="interactions.user_id")
    items = rows_of(dataset.item_ids, items, field="interactions.item_id")
    order = np.lexsort((users, times, items))
    users, items = users[order], items[order]
    _, first = np.unique(items * np.int64(len(dataset.user_ids)) + users, return_index=True)
    first.sort()  # back to the order of time
    lengths = np.bincount(items[first], minlength=len(dataset.item_ids))
    return Csr.of(lengths, users[first])
