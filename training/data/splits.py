"""Which interaction trains, validates or tests: leave-last-out, random ones, cold items.

Pure: columns in, positions in ``table_checks.SPLITS`` or row masks out; rows may come in any order.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import IdArray

SplitCodes = NDArray[np.int8]  # positions in SPLITS


def split_codes(
    users: IdArray,
    items: IdArray,
    timestamps: IdArray,
    *,
    test_per_user: int,
    val_ids: IdArray,
) -> SplitCodes:
    """(n,) int8 positions in SPLITS, leave-last-out.

    The last ``test_per_user`` interactions of a user by (timestamp, item id) are test; of the
    users ``val_ids`` the last one kept is val. A user with no more than ``test_per_user`` keeps all
    of them in train, one who keeps fewer than two gets no val. It needs all interactions of a user
    at once, but not all users at once.
    """
    codes = np.zeros(len(users), dtype=np.int8)
    if not len(users):
        return codes
    order = np.lexsort((items, timestamps, users))
    ids, starts, counts = np.unique(users[order], return_index=True, return_counts=True)
    has_test = counts > test_per_user
    kept = np.where(has_test, counts - test_per_user, counts)
    position = np.arange(len(users)) - np.repeat(starts, counts)
    ordered = np.where(position >= np.repeat(kept, counts), 2, 0).astype(np.int8)
    has_val = np.isin(ids, val_ids) & (kept >= 2)
    ordered[(starts + kept - 1)[has_val]] = 1
    codes[order] = ordered
    return codes


def hold_out(
    users: IdArray,
    items: IdArray,
    timestamps: IdArray,
    *,
    per_user: int,
    most_users: int,
    order: Literal["last", "random"],
    rng: np.random.Generator,
) -> NDArray[np.bool_]:
    """(n,) whether each interaction is held out: ``per_user`` of up to ``most_users`` users.

    The users are drawn from those who keep at least one; of theirs the last ones by (timestamp,
    item id), or random ones.
    """
    ids, counts = np.unique(users, return_counts=True)
    eligible = ids[counts > per_user]
    chosen = rng.choice(eligible, min(most_users, len(eligible)), replace=False)
    rows = np.flatnonzero(np.isin(users, chosen))
    key = timestamps[rows] if order == "last" else rng.permutation(len(rows))
    rows = rows[np.lexsort((items[rows], key, users[rows]))]
    # each chosen user's rows lie together now: held out are those close to the next user's
    ends = np.searchsorted(users[rows], users[rows], side="right")
    held = np.zeros(len(users), dtype=np.bool_)
    held[rows[ends - np.arange(len(rows)) <= per_user]] = True
    return held


def cold_rows(items: IdArray, share: float, rng: np.random.Generator) -> IdArray:
    """Rows of all interactions of a random ``share`` of the items that have any, ascending."""
    ids = np.unique(items)
    chosen = rng.choice(ids, round(share * len(ids)), replace=False)
    return np.flatnonzero(np.isin(items, chosen))
