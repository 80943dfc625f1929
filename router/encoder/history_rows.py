"""What a query's history looks up: the input rows of past items, by item id."""

from typing import NamedTuple, Protocol

import numpy as np

from shardline.shards.core.encoder_files import Weights
from shardline.shards.core.schema import FloatArray, IdArray


class PastItems(NamedTuple):
    """rows (m, width) float32; scores (m,) float32 where attention pools them, else None.

    A tuple, because one is made per query: a frozen dataclass takes a microsecond more.
    """

    rows: FloatArray
    scores: FloatArray | None


class HistoryRows(Protocol):
    """The items that a history may name. Threads may share it."""

    @property
    def width(self) -> int:
        """Numbers per row."""

    def newest(self, item_ids: IdArray, limit: int) -> PastItems:
        """The last ``limit`` of the ids (n,) that are known, in their order; others are skipped."""


class StoredRows:
    """The items of the catalogue that the encoder was exported with.

    The arrays are mapped files as a rule: a binary search reads log2(n) pages of the ids, and
    nothing here may read or copy a whole array.
    """

    def __init__(self, weights: Weights) -> None:
        self._ids: IdArray = weights["history.item_ids"]
        self._rows: FloatArray = weights["history.rows"]
        self._scores: FloatArray | None = weights.get("history.item_scores")
        self.width: int = self._rows.shape[1]

    def newest(self, item_ids: IdArray, limit: int) -> PastItems:
        places = np.minimum(self._ids.searchsorted(item_ids), len(self._ids) - 1)
        known = places[self._ids.take(places) == item_ids][-limit:]
        scores = None if self._scores is None else self._scores.take(known)
        return PastItems(self._rows.take(known, axis=0), scores)
