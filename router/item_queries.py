"""Item-to-item: items' own vectors as queries, and the answers put back in the order asked for.

Pure functions of what was fetched and found. An item finds itself first, so it is taken out of its
own answer; an item that is not known gets an empty answer and a reason.
"""

from dataclasses import dataclass

import numpy as np

from shardline.router.fanout.coalesce import Found
from shardline.router.fanout.fanout import FetchAnswer
from shardline.router.query import Coverage
from shardline.shards.core.schema import (
    EMPTY_ID,
    EMPTY_SCORE,
    FloatArray,
    IdArray,
    Metric,
    normalise,
)


@dataclass(slots=True, kw_only=True)
class ItemQueries:
    """``vectors`` and ``own``, the ids to drop from answers, one a known item.

    ``live`` are the known items' positions among the queries, ``reasons`` speak of the others;
    ``coverage`` is that of looking them up.
    """

    vectors: FloatArray
    own: IdArray
    live: IdArray
    num_queries: int
    coverage: Coverage
    reasons: dict[int, str]

    def spread(self, found: Found | None, k: int) -> tuple[IdArray, FloatArray]:
        """(ids, scores), (num_queries, k) each, of what was found for ``vectors``, maybe nothing;
        the rows of unknown items are empty."""
        ids = np.full((self.num_queries, k), EMPTY_ID)
        scores = np.full((self.num_queries, k), EMPTY_SCORE)
        if found is not None:
            own_ids, own_scores = drop_own(found.ids, found.scores, self.own)
            width = min(k, own_ids.shape[1])
            ids[self.live, :width] = own_ids[:, :width]
            scores[self.live, :width] = own_scores[:, :width]
        return ids, scores


def item_queries(item_ids: IdArray, found: FetchAnswer, metric: Metric) -> ItemQueries:
    """item_ids (n,) int64, checked, in any order and maybe repeated; ``found`` their vectors."""
    order = np.argsort(found.item_ids)
    held = found.item_ids[order]
    live = np.flatnonzero(np.isin(item_ids, held))
    missing = np.setdiff1d(np.arange(len(item_ids)), live)
    degraded = found.coverage.degraded
    where = f" in the shards that answered ({'; '.join(degraded)})" if degraded else ""
    vectors = found.vectors[order[np.searchsorted(held, item_ids[live])]]
    if live.size and metric is Metric.COSINE:
        # an index without exact copies gives approximations, whose length is not quite one
        vectors = normalise(vectors, field="item_ids")
    return ItemQueries(
        vectors=vectors,
        own=item_ids[live],
        live=live,
        num_queries=len(item_ids),
        coverage=found.coverage,
        reasons={int(row): f"item {item_ids[row]} not found{where}" for row in missing},
    )


def drop_own(ids: IdArray, scores: FloatArray, own: IdArray) -> tuple[IdArray, FloatArray]:
    """Both (n, k), with item own[i] taken out of row i and the rest moved up; new arrays."""
    is_own = ids == own[:, None]
    ids = np.where(is_own, EMPTY_ID, ids)
    scores = np.where(is_own, EMPTY_SCORE, scores)
    order = np.argsort(is_own, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
