"""Item-to-item: items' own vectors as queries, and the answers put back in the order asked for.

Pure functions of what was fetched and found. An item finds itself first, so it is taken out of its
own answer; an item that is not known gets an empty answer and a reason.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from shardline.router.contract import Coverage, Reason, ReasonCode
from shardline.router.query import FoundItems, Merged, Rearranged
from shardline.shards.core.messages import NO_FILTER
from shardline.shards.core.schema import (
    EMPTY_ID,
    EMPTY_SCORE,
    FloatArray,
    IdArray,
    Metric,
    Ranked,
    normalise,
)


@dataclass(slots=True, kw_only=True)
class ItemQueries:
    """``vectors`` and ``own``, the ids to drop from answers, one per known item.

    ``live`` are the known items' positions among the queries, ``reasons`` speak of the others;
    ``coverage`` is that of looking them up.
    """

    vectors: FloatArray
    own: IdArray
    live: IdArray
    num_queries: int
    coverage: Coverage
    reasons: tuple[Reason, ...]
    seq: tuple[int | None, ...]

    def spread(self, merged: Merged | None, k: int) -> Merged:
        """The answer to all queries, (num_queries, k), from what was found for ``vectors``, or
        None where there are none; the rows of unknown items are empty. ``matched`` counts no item
        that is left out of its own answer, ``left_out`` those that are."""
        ids = np.full((self.num_queries, k), EMPTY_ID)
        scores = np.full((self.num_queries, k), EMPTY_SCORE)
        coverage, matched, excluded, left_out = self.coverage, None, None, None
        if merged is not None:
            is_own = merged.left_out  # of pools
            if is_own is None:
                is_own = (merged.ranked.ids == self.own[:, None]).any(axis=1)
            left_out = self._of_all(is_own, 0)
            if merged.excluded is not None:
                excluded = self._of_all(merged.excluded, 0)
            if merged.matched is not None:
                matched = self._of_all(merged.matched - is_own, NO_FILTER)
            others = drop_own(merged.ranked, self.own)
            width = min(k, others.ids.shape[1])
            ids[self.live, :width] = others.ids[:, :width]
            scores[self.live, :width] = others.scores[:, :width]
            coverage = merged.coverage
            if self.reasons and self.coverage.degraded:
                coverage = coverage.joined(self.coverage)
        return Merged(
            ranked=Ranked(ids, scores),
            coverage=coverage,
            search_ms=0.0 if merged is None else merged.search_ms,
            seq=self.seq if merged is None else merged.seq,
            others_share=None if merged is None else merged.others_share,
            matched=matched,
            excluded=excluded,
            left_out=left_out,
            rearranged=self._rearranged(merged),
        )

    def _of_all(self, values: Any, others: int) -> IdArray:
        """(num_queries,): values (live,), and ``others`` for unknown items."""
        spread = np.full(self.num_queries, others, np.int64)
        spread[self.live] = values
        return spread

    def _rearranged(self, merged: Merged | None) -> Rearranged | None:
        """Of all queries; None where nothing was put into another order."""
        if merged is None or merged.rearranged is None:
            return None
        told = merged.rearranged
        return Rearranged(
            considered=self._of_all(told.considered, 0),
            refused=self._of_all(told.refused, 0),
            is_cut=self._of_all(told.is_cut, 0),
        )


def item_queries(item_ids: IdArray, found: FoundItems, metric: Metric) -> ItemQueries:
    """item_ids (n,) int64, checked, in any order and maybe repeated; ``found`` their vectors."""
    order = np.argsort(found.item_ids)
    held = found.item_ids[order]
    live = np.flatnonzero(np.isin(item_ids, held))
    missing = np.setdiff1d(np.arange(len(item_ids)), live)
    vectors = found.vectors[order[np.searchsorted(held, item_ids[live])]]
    if live.size and metric is Metric.COSINE:
        # an index without exact copies gives approximations, whose length is not quite one
        vectors = normalise(vectors, field="item_ids")
    code, where = ReasonCode.NOT_FOUND, ""
    if found.coverage.degraded:
        code = ReasonCode.NOT_FOUND_PARTIAL
        absent = "; ".join(map(str, found.coverage.degraded))
        where = f" in the shards that answered ({absent})"
    return ItemQueries(
        vectors=vectors,
        own=item_ids[live],
        live=live,
        num_queries=len(item_ids),
        coverage=found.coverage,
        seq=found.seq,
        reasons=tuple(
            Reason(query=int(row), code=code, text=f"item {item_ids[row]} not found{where}")
            for row in missing
        ),
    )


def drop_own(ranked: Ranked, own: IdArray) -> Ranked:
    """(n, k), with item own[i] taken out of row i and the rest moved up; new arrays."""
    is_own = ranked.ids == own[:, None]
    ids = np.where(is_own, EMPTY_ID, ranked.ids)
    scores = np.where(is_own, EMPTY_SCORE, ranked.scores)
    order = np.argsort(is_own, axis=1, kind="stable")
    return Ranked(np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1))
