"""Partial results of many queries merged, in the one order every answer has.

As ``router.merge``, whose rules it keeps and whose code it uses for ties, but for thousands of
queries at once: faiss merges the sorted lists, and only rows with equal scores are looked at again.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shardline.router.item_queries import drop_own
from shardline.router.merge import merge_top_k
from shardline.shards.core.schema import EMPTY_SCORE, FloatArray, IdArray, Ranked
from shardline.shards.index.knn_merge import merge_sorted


def merge_parts(parts: Sequence[Ranked]) -> Ranked:
    """The k best, (n, k), of parts (n, k) each, in the order of ``Ranked``."""
    if len(parts) == 1:
        return parts[0]
    ids = np.stack([part.ids for part in parts])
    return merge_stacked(ids, np.stack([part.scores for part in parts]))


def merge_stacked(ids: IdArray, scores: FloatArray) -> Ranked:
    """``merge_parts`` of parts that lie in one array: ids and scores (parts, n, k)."""
    if len(ids) == 1:
        return Ranked(ids[0], scores[0])
    merged = merge_sorted(ids, scores)
    tied = np.flatnonzero(_has_ties(scores, merged.scores))
    if tied.size:
        parts = [Ranked(*part) for part in zip(ids[:, tied], scores[:, tied], strict=True)]
        merged.ids[tied], merged.scores[tied] = merge_top_k(parts, ids.shape[2])
    return merged


def without_own(ranked: Ranked, own: IdArray | None, k: int) -> Ranked:
    """The first k of each row, item own[i] left out of row i."""
    if own is not None:
        ranked = drop_own(ranked, own)
    return Ranked(
        np.ascontiguousarray(ranked.ids[:, :k]), np.ascontiguousarray(ranked.scores[:, :k])
    )


def _has_ties(scores: FloatArray, merged: FloatArray) -> NDArray[np.bool_]:
    """(n,) whether two results have one score, or the last result's goes on beyond the answer.

    scores (parts, n, k), merged (n, k).
    """
    real = merged > EMPTY_SCORE
    ties = ((merged[:, 1:] == merged[:, :-1]) & real[:, 1:]).any(axis=1)
    last = merged[:, -1]
    held = (scores == last[None, :, None]).sum(axis=(0, 2))
    is_cut = (held > (merged == last[:, None]).sum(axis=1)) & (last > EMPTY_SCORE)
    found: NDArray[np.bool_] = ties | is_cut
    return found
