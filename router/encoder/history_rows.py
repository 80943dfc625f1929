"""What a query's history looks up: the input rows of past items, by item id.

Those of the catalogue lie in the encoder's files. Items that were written since have their rows
from ``NewItems``, if the router has one.
"""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.encoder_files import Weights
from shardline.shards.core.schema import FloatArray, IdArray


def places_of(item_ids: IdArray, known: IdArray) -> tuple[IdArray, NDArray[np.bool_]]:
    """Where each of item_ids (n,) stands in known (m,), ascending, m > 0; and whether it does."""
    places = np.minimum(known.searchsorted(item_ids), len(known) - 1)
    return places, known.take(places) == item_ids


class PastItems(NamedTuple):
    """rows (m, width) float32; scores (m,) float32 where attention pools them, else None.

    A tuple, because one is made per query: a frozen dataclass takes a microsecond more.
    """

    rows: FloatArray
    scores: FloatArray | None


class NewItems(Protocol):
    """Items that may have been written since the export. Threads may share it."""

    def find(
        self, item_ids: IdArray
    ) -> tuple[NDArray[np.bool_], FloatArray | None, FloatArray | None]:
        """Of item_ids (m,), different ones or not: (m,) which are known; of those the rows
        (f, width) float32 and scores (f,), as of ``PastItems``; None for rows where f is 0."""


class HistoryRows(Protocol):
    """The items that a history may name. Threads may share it."""

    @property
    def width(self) -> int:
        """Numbers per row."""

    def newest(self, item_ids: IdArray, limit: int, new_items: NewItems | None = None) -> PastItems:
        """The last ``limit`` of the ids (n,) that are known, in their order; others are skipped.

        New items are looked for among the last ``limit`` ids only.
        """


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

    def newest(self, item_ids: IdArray, limit: int, new_items: NewItems | None = None) -> PastItems:
        places, is_known = places_of(item_ids, self._ids)
        known = places[is_known]
        if new_items is not None and len(known) < len(item_ids):
            return self._with_new(item_ids, limit, places, is_known, new_items)
        return self._stored(known[-limit:])

    def _stored(self, known: IdArray) -> PastItems:
        scores = None if self._scores is None else self._scores.take(known)
        return PastItems(self._rows.take(known, axis=0), scores)

    def _with_new(
        self,
        item_ids: IdArray,
        limit: int,
        places: IdArray,
        is_known: NDArray[np.bool_],
        new_items: NewItems,
    ) -> PastItems:
        start = max(0, len(item_ids) - limit)
        strangers = start + np.flatnonzero(~is_known[start:])
        is_found, rows, scores = new_items.find(item_ids[strangers])
        if rows is None:
            return self._stored(places[is_known][-limit:])
        stored_at, new_at = np.flatnonzero(is_known), strangers[is_found]
        order = np.argsort(np.concatenate([stored_at, new_at]))[-limit:]
        stored = self._stored(places[stored_at])
        merged = np.concatenate([stored.rows, rows]).take(order, axis=0)
        if stored.scores is None or scores is None:
            return PastItems(merged, None)
        return PastItems(merged, np.concatenate([stored.scores, scores]).take(order))
