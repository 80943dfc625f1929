"""Merging the answers of shards: the k best of all of them, in the one order every answer has.

Order: score descending, then item id ascending, empty slots (id -1, score -inf) last. Pure numpy;
nothing here knows of sockets, tables or deadlines. An item lives in one shard: no id comes twice.
"""

from collections.abc import Sequence

import numpy as np

from shardline.shards.core.schema import EMPTY_ID, EMPTY_SCORE, FloatArray, IdArray


def merge_top_k(
    scores: Sequence[FloatArray], ids: Sequence[IdArray], k: int
) -> tuple[FloatArray, IdArray]:
    """scores (n, k) float32 and ids (n, k) int64, best first, of parts (n, k_i); new arrays.

    At least one part. Parts may be in any order; it is fastest when each is already sorted.
    """
    all_scores = np.concatenate(scores, axis=1)
    all_ids = np.concatenate(ids, axis=1)
    # A stable sort of sorted runs is a plain merge, several times faster than a sort by two keys;
    # it leaves equal scores in the order of the parts, so those are looked for afterwards.
    order = (-all_scores).argsort(axis=1, kind="stable")
    top_scores, top_ids = _take(all_scores, all_ids, order[:, : k + 1])
    if _needs_ids(top_scores, top_ids, k):
        # As unsigned, the id of an empty slot is the largest there is, so it sorts last.
        order = np.lexsort((all_ids.view(np.uint64), -all_scores), axis=1)
        top_scores, top_ids = _take(all_scores, all_ids, order[:, :k])
    return _to_width(top_scores, top_ids, k)


def _needs_ids(scores: FloatArray, ids: IdArray, k: int) -> bool:
    """Whether equal scores among the first k + 1 slots could be in the wrong order of ids."""
    ties = scores[:, 1:] == scores[:, :-1]
    if not ties.any():
        return False
    keys = ids.view(np.uint64)
    cut_in_two = ties[:, k - 1 : k] & (ids[:, k : k + 1] != EMPTY_ID)
    return bool(cut_in_two.any() or (ties & (keys[:, 1:] < keys[:, :-1])).any())


def _take(
    scores: FloatArray, ids: IdArray, order: np.ndarray[tuple[int, ...], np.dtype[np.intp]]
) -> tuple[FloatArray, IdArray]:
    flat = order
    if len(scores) > 1:
        flat = order + np.arange(len(scores))[:, None] * scores.shape[1]
    return scores.ravel().take(flat), ids.ravel().take(flat)


def _to_width(scores: FloatArray, ids: IdArray, k: int) -> tuple[FloatArray, IdArray]:
    missing = k - scores.shape[1]
    if missing <= 0:
        return np.ascontiguousarray(scores[:, :k]), np.ascontiguousarray(ids[:, :k])
    pad = ((0, 0), (0, missing))
    return (
        np.pad(scores, pad, constant_values=EMPTY_SCORE),
        np.pad(ids, pad, constant_values=EMPTY_ID),
    )
