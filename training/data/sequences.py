"""Each user's interactions in order of time, held once: lists of positives and counts come from it.

Users and items go by their row in the dataset's tables.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from shardline.shards.core.schema import FloatArray, IdArray
from shardline.training.data.csr import Csr
from shardline.training.data.splits import SplitCodes
from shardline.training.data.table_checks import WEIGHT, rows_of, split_code


@dataclass(frozen=True, slots=True)
class Sequences:
    """lists: item rows per user row, by (timestamp, item row), with repeats; codes: their splits;
    weights (len(lists.items),) float32, NaN where one is not known; None where there are none.

    Nine bytes per interaction, 13 with weights, and eight per user.
    """

    lists: Csr
    codes: SplitCodes
    weights: FloatArray | None = None

    @classmethod
    def of(cls, interactions: pa.Table, user_ids: IdArray, item_ids: IdArray) -> "Sequences":
        """From the interactions in any order; both id arrays ascending.

        Raises:
            DataError: an interaction refers to a user or an item that is not listed.
        """
        users, items, times = (
            interactions[name].to_numpy() for name in ("user_id", "item_id", "timestamp")
        )
        users = rows_of(user_ids, users, field="interactions.user_id")
        items = rows_of(item_ids, items, field="interactions.item_id")
        splits = interactions.unify_dictionaries()["split"].combine_chunks()
        known = np.array([split_code(name) for name in splits.dictionary.to_pylist()], np.int8)
        codes = known[splits.indices.to_numpy()]
        order = np.lexsort((items, times, users))
        lengths = np.bincount(users, minlength=len(user_ids))
        weights = None
        if WEIGHT in interactions.column_names:
            given = interactions[WEIGHT].to_numpy()  # a null becomes NaN
            weights = given.astype(np.float32)[order]
        return cls(Csr.of(lengths, items[order]), codes[order], weights)

    def positives(self, splits: tuple[str, ...], num_items: int) -> Csr:
        """Item rows of every user row over the splits, oldest first, no item twice."""
        first = self._first(splits, num_items)
        owners = self.lists.owners[first]
        lengths = np.bincount(owners, minlength=len(self.lists.lengths))
        return Csr.of(lengths, self.lists.items[first])

    def weights_of(self, splits: tuple[str, ...], num_items: int) -> FloatArray | None:
        """(n,) float32: the weight of each entry of ``positives(splits, num_items)``."""
        return None if self.weights is None else self.weights[self._first(splits, num_items)]

    def counts(self, splits: tuple[str, ...], num_items: int) -> tuple[IdArray, IdArray]:
        """(users,) and (items,) int64: interactions of each over the splits, repeats included."""
        kept = self._of(splits)
        return (
            np.bincount(self.lists.owners[kept], minlength=len(self.lists.lengths)),
            np.bincount(self.lists.items[kept], minlength=num_items),
        )

    def _first(self, splits: tuple[str, ...], num_items: int) -> IdArray:
        """Places of the first interaction of each pair of user and item, in the order of time."""
        kept = self._of(splits)
        pairs = self.lists.owners[kept] * np.int64(num_items) + self.lists.items[kept]
        _, first = np.unique(pairs, return_index=True)
        first.sort()
        return kept[first]

    def _of(self, splits: tuple[str, ...]) -> IdArray:
        """Places in ``lists.items`` of the interactions of the splits."""
        return np.flatnonzero(np.isin(self.codes, [split_code(name) for name in splits]))
