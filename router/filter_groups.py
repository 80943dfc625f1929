"""Searches with filters: queries of one filter are asked together.

Pure functions of what queries ask for and of what was found.
"""

from collections.abc import Sequence

import numpy as np

from shardline.router.query import Merged
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.messages import NO_FILTER
from shardline.shards.core.schema import IdArray, Ranked

FILTERS_AT_ONCE = 16  # of one request that are asked for at a time, each with a frame of its own


def groups_of(filters: Sequence[bytes]) -> dict[bytes, IdArray]:
    """Of each filter the queries that have it, by position, ascending; b"" for those without."""
    positions: dict[bytes, list[int]] = {}
    for position, packed in enumerate(filters):
        positions.setdefault(packed, []).append(position)
    return {packed: np.array(rows) for packed, rows in positions.items()}


def joined(parts: Sequence[tuple[IdArray, Merged]]) -> Merged:
    """The answer to all queries from answers to some each, at these positions.

    As old as the oldest part: of each shard the fewest writes that were in one of them.
    """
    first = parts[0][1]
    count = sum(len(rows) for rows, _ in parts)
    k = first.ranked.ids.shape[1]
    ranked = Ranked(np.empty((count, k), np.int64), np.empty((count, k), np.float32))
    matched = np.full(count, NO_FILTER)
    excluded = np.zeros(count, np.int64)
    coverage = first.coverage
    for rows, merged in parts:
        ranked.ids[rows], ranked.scores[rows] = merged.ranked
        if merged.matched is not None:
            matched[rows] = merged.matched
        if merged.excluded is not None:
            excluded[rows] = merged.excluded
        coverage = coverage.joined(merged.coverage)
    shares = [merged.others_share for _, merged in parts if merged.others_share is not None]
    return Merged(
        ranked=ranked,
        coverage=coverage,
        search_ms=max(merged.search_ms for _, merged in parts),
        seq=tuple(map(_oldest, zip(*(merged.seq for _, merged in parts), strict=True))),
        others_share=max(shares, default=None),
        matched=matched,
        excluded=excluded if any(merged.excluded is not None for _, merged in parts) else None,
    )


def at_query(error: InvalidInput, query: int) -> InvalidInput:
    """A shard's complaint about the filter of one query of several, with its position."""
    field = error.field
    if field is None or field.partition(".")[0] != "filter":
        return error
    return InvalidInput(
        error.message,
        field=f"filter[{query}]{field.removeprefix('filter')}",
        expected=error.expected,
        got=error.got,
        hint=error.hint,
    )


def _oldest(seqs: Sequence[int | None]) -> int | None:
    return None if None in seqs else min(seq for seq in seqs if seq is not None)
