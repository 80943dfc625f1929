"""Users who are items too: the rows of both tables as one, and who is who.

Tied towers (``training.config.tower_config``) encode a person asked for and the same person found
by one tower. Both tables then list the same things under the same numbers, and have the same
columns.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from shardline.shards.core.errors import DataError
from shardline.shards.core.schema import EMPTY_ID, ORIGINAL_ID, IdArray
from shardline.training.config.tower_config import mirrored_column
from shardline.training.data.csr import Csr
from shardline.training.data.tables import ITEMS, USERS, Dataset

UNTIED = "set towers.tied to false, or bring the same columns in both tables"


def rows_of_both(
    dataset: Dataset, columns: Sequence[str], splits: tuple[str, ...]
) -> tuple[pa.Table, IdArray]:
    """The items' rows, then the users', under the items' names; (rows,) int64 interactions of each.

    Raises:
        DataError: a column is missing in one of the tables or has another type there; an id
            stands for different things in them.
    """
    items, users = dataset.items(), dataset.users()
    _check_numbers(items, users)
    parts: dict[str, pa.ChunkedArray] = {}
    for name in columns:
        halves = [
            _column(table, column, file)
            for table, column, file in (
                (items, name, ITEMS),
                (users, mirrored_column(name), USERS),
            )
        ]
        if halves[0].type != halves[1].type:
            raise DataError(
                "tied towers need a column of one type in both tables",
                field=f"{USERS}: {mirrored_column(name)}",
                expected=f"{halves[0].type}, as in {ITEMS}",
                got=str(halves[1].type),
                hint=UNTIED,
            )
        parts[name] = pa.chunked_array([c for half in halves for c in half.chunks], halves[0].type)
    of_users, of_items = dataset.counts(*splits)
    return pa.table(parts), np.concatenate([of_items, of_users])


def own_items(dataset: Dataset) -> IdArray:
    """(users,) int64: the item row of each user, the one with the same id; -1 where there is none.

    Raises:
        DataError: somebody has an interaction with themselves, which trains and measures nothing.
    """
    users, items = dataset.user_ids, dataset.item_ids
    rows = np.minimum(np.searchsorted(items, users), len(items) - 1)
    own = np.where(items[rows] == users, rows, EMPTY_ID)
    everything = dataset.positives("train", "val", "test")
    selves = np.flatnonzero(everything.items == own[everything.owners])
    if len(selves):
        first = users[everything.owners[selves[0]]]
        raise DataError(
            "tied towers: pairs of one and the same",
            field="interactions",
            expected="user_id and item_id that differ",
            got=f"{len(selves)} rows, the first of id {first}",
            hint="leave them out of the interactions",
        )
    return own


def with_own(lists: Csr, own: IdArray) -> Csr:
    """Each user's list (n) and, at its end, their own item row ``own`` (n,), unless that is -1."""
    there = own >= 0
    ends = lists.indptr[1:][there]
    return Csr.of(lists.lengths + there, np.insert(lists.items, ends, own[there]))


def _column(table: pa.Table, name: str, file: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise DataError(
            "tied towers need the same columns in both tables",
            field=f"{file}: {name}",
            expected="a column of that name",
            got=", ".join(table.column_names),
            hint=UNTIED,
        )
    return table[name]


def _check_numbers(items: pa.Table, users: pa.Table) -> None:
    """An import numbers the ids of each table that are no integers >= 0 for itself."""
    names = [_originals(table, key) for table, key in ((items, "item_id"), (users, "user_id"))]
    for number in names[0].keys() & names[1].keys():
        if names[0][number] != names[1][number]:
            raise DataError(
                "tied towers need one number for one thing",
                field=f"{USERS}: user_id {number}",
                expected=f"{names[0][number]!r}, as in {ITEMS}",
                got=repr(names[1][number]),
                hint="import tables of users and items that list the same ids, or integers >= 0",
            )


def _originals(table: pa.Table, key: str) -> dict[int, object]:
    """What the source called each id."""
    name = ORIGINAL_ID if ORIGINAL_ID in table.column_names else key
    return dict(zip(table[key].to_pylist(), table[name].to_pylist(), strict=True))
