"""Sorted results of several indexes merged into the best of all, by faiss, on all its threads."""

import faiss
import numpy as np

from shardline.shards.core.schema import EMPTY_ID, EMPTY_SCORE, FloatArray, IdArray, Ranked


def merge_sorted(ids: IdArray, scores: FloatArray) -> Ranked:
    """(n, k) of ids and scores (parts, n, k), each row sorted by score, higher first.

    Equal scores come in any order, and any of those that tie for the last slot.
    """
    merged_scores, merged_ids = faiss.merge_knn_results(scores, ids, keep_max=True)
    empty = merged_ids < 0
    if empty.any():
        merged_ids[empty], merged_scores[empty] = EMPTY_ID, EMPTY_SCORE
    return Ranked(np.asarray(merged_ids), np.asarray(merged_scores))
