"""The users of each item, as embedding rows: what the item tower's ``audience`` pools.

The twin of a user's history, with users and items exchanged. A user that training does not know has
no vector and is left out. No list is longer than ``longest`` + 1, however popular the item: the one
more takes the place of a training row's own user, who is left out of the audience of its item.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import IdArray
from shardline.training.data.csr import Csr
from shardline.training.data.segments import filtered

NOBODY = 0  # the embedding row of the unknown, which is in no audience


@dataclass(frozen=True, slots=True)
class Audience:
    """lists: of each of n items the newest users, oldest first, as rows of the query tower's table
    of user ids, no user twice. longest: how many of them are pooled. user_column: which categorical
    column of the users' input rows has such a row for each user. keep_target: a training row's own
    user stays among them.
    """

    lists: Csr
    longest: int
    user_column: int
    keep_target: bool = False

    @classmethod
    def of(
        cls,
        users: Csr,
        table_rows: IdArray,
        *,
        longest: int,
        user_column: int,
        keep_target: bool = False,
    ) -> "Audience":
        """users: of each item the user rows, oldest first. table_rows (users,): their embedding
        rows, ``NOBODY`` where training does not know the user.
        """
        rows = Csr(users.indptr, table_rows[users.items])
        known = filtered(rows, rows.items != NOBODY)
        newest = known.take(np.arange(len(known.lengths)), longest + 1)
        return cls(newest, longest, user_column, keep_target)

    def take(self, items: IdArray) -> "Audience":
        """Of the given items in the given order, each list cut to its newest ``longest``."""
        return replace(self, lists=self.lists.take(items, self.longest))

    def without(self, items: IdArray, users: IdArray) -> "Audience":
        """As ``take``, without the user ``users[i]``, an embedding row, in the list of items[i]."""
        lists = self.lists.take(items)
        others = filtered(lists, lists.items != users[lists.owners])
        return replace(self, lists=others.take(np.arange(len(items)), self.longest))

    def hide(self, hidden: NDArray[np.bool_]) -> "Audience":
        """Nobody in the lists where hidden (n,) is set."""
        return replace(self, lists=filtered(self.lists, ~hidden[self.lists.owners]))

    def drawn(self, items: IdArray, draws: NDArray[np.float32]) -> IdArray:
        """(n,) int64: a user of each item's list by draws (n,) in [0, 1); NOBODY where it is empty.

        A drawn negative leaves this one out, as a positive leaves out its own: were its list whole,
        an empty one would give away the positives of items with one user.
        """
        starts, lengths = self.lists.indptr[:-1][items], self.lists.lengths[items]
        places = starts + np.minimum((draws * lengths).astype(np.int64), np.maximum(lengths - 1, 0))
        drawn = np.full(len(items), NOBODY, dtype=np.int64)
        some = lengths > 0
        drawn[some] = self.lists.items[places[some]]
        return drawn
