"""Merging the answers of shards: the k best of all of them, in the one order every answer has.

Order: that of ``Ranked``. Pure numpy; nothing here knows of sockets, tables or deadlines. An item
lives in one shard: no id comes twice.
"""

from collections.abc import Sequence

import numpy as np

from shardline.shards.core.schema import EMPTY_ID, EMPTY_SCORE, FloatArray, IdArray, Ranked


def merge_top_k(parts: Sequence[Ranked], k: int) -> Ranked:
    """The k best, (n, k), of at least one part of (n, k_i) each; new arrays.

    Parts may be in any order; it is fastest when each is already sorted.
    """
    all_ids = np.concatenate([part.ids for part in parts], axis=1)
    all_scores = np.concatenate([part.scores for part in parts], axis=1)
    # A stable sort of sorted runs is a plain merge, several times faster than a sort by two keys;
    # it leaves equal scores in the order of the parts, so those are looked for afterwards.
    order = (-all_scores).argsort(axis=1, kind="stable")
    top = _take(all_ids, all_scores, order[:, : k + 1])
    if _needs_ids(top, k):
        # As unsigned, the id of an empty slot is the largest there is, so it sorts last.
        order = np.lexsort((all_ids.view(np.uint64), -all_scores), axis=1)
        top = _take(all_ids, all_scores, order[:, :k])
    return _to_width(top, k)


def _needs_ids(top: Ranked, k: int) -> bool:
    """Whether equal scores among the first k + 1 slots could be in the wrong order of ids."""
    ids, scores = top
    ties = scores[:, 1:] == scores[:, :-1]
    if not ties.any():
        return False
    keys = ids.view(np.uint64)
    cut_in_two = ties[:, k - 1 : k] & (ids[:, k : k + 1] != EMPTY_ID)
    return bool(cut_in_two.any() or (ties & (keys[:, 1:] < keys[:, :-1])).any())


def _take(
    ids: IdArray, scores: FloatArray, order: np.ndarray[tuple[int, ...], np.dtype[np.intp]]
) -> Ranked:
    flat = order
    if len(scores) > 1:
        flat = order + np.arange(len(scores))[:, None] * scores.shape[1]
    return Ranked(ids.ravel().take(flat), scores.ravel().take(flat))


def _to_width(top: Ranked, k: int) -> Ranked:
    ids, scores = top
    missing = k - scores.shape[1]
    if missing <= 0:
        return Ranked(np.ascontiguousarray(ids[:, :k]), np.ascontiguousarray(scores[:, :k]))
    pad = ((0, 0), (0, missing))
    return Ranked(
        np.pad(ids, pad, constant_values=EMPTY_ID),
        np.pad(scores, pad, constant_values=EMPTY_SCORE),
    )
