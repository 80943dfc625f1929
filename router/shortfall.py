"""Why an answer has fewer than k items: what took them, as reasons with counts.

Pure, of what was asked for and of what shards say they searched. An answer that has as many items
as the whole index, because k is larger, has no reason.
"""

from collections.abc import Container, Iterator

import numpy as np

from shardline.router.contract import Reason, ReasonCode
from shardline.router.query import Merged
from shardline.router.rearrange.shortened import cap_reason
from shardline.shards.core.messages import NO_FILTER
from shardline.shards.core.schema import EMPTY_ID


def shortfall_reasons(
    merged: Merged, k: int, has_reason: Container[int] = ()
) -> tuple[Reason, ...]:
    """Of each query with fewer than k items, except those that have a reason already: queries by
    position, of each the reasons in the order in which items are taken."""
    ids = merged.ranked.ids
    if k <= ids.shape[1]:
        # one number is looked at in a tenth of the time of an array
        least = ids.item(k - 1) if len(ids) == 1 else ids[:, k - 1].min(initial=0)
        if least != EMPTY_ID:
            return ()
    found = (ids != EMPTY_ID).sum(axis=1).tolist()
    return tuple(
        reason
        for query, count in enumerate(found)
        if count < k and query not in has_reason
        for reason in _of(merged, query, count, k)
    )


def _of(merged: Merged, query: int, found: int, k: int) -> Iterator[Reason]:
    """Of a query that has ``found`` items instead of k."""
    coverage = merged.coverage
    where = " in the shards that answered" if coverage.degraded else ""
    candidates = coverage.rows_answered - int(_at(merged.left_out, query, 0))
    matched = int(_at(merged.matched, query, NO_FILTER))
    if matched != NO_FILTER:
        candidates = matched
        if matched < k:
            text = f"{_items(matched, 'matches', 'match')} the filter{where}"
            yield Reason(query=query, code=ReasonCode.FILTER, text=text, matched=matched)
    excluded = int(_at(merged.excluded, query, 0))
    available = candidates - excluded
    if excluded and available < k:
        text = f"{_items(excluded, 'is', 'are')} excluded{where}"
        yield Reason(query=query, code=ReasonCode.EXCLUSION, text=text, count=excluded)
    if coverage.degraded:
        rows = coverage.rows_asked - coverage.rows_answered
        text = f"{rows} of {coverage.rows_asked} items were not searched"
        yield Reason(query=query, code=ReasonCode.COVERAGE, text=text, count=rows)
    missed = min(k, available) - found
    if merged.rearranged is not None:
        missed -= int(merged.rearranged.dropped[query])
    if merged.rearranged is not None and (refusal := cap_reason(merged.rearranged, query)):
        yield refusal
        missed = 0 if merged.rearranged.is_cut[query] else missed - (refusal.count or 0)
    if missed > 0:
        text = f"{_items(missed, 'is', 'are')} beyond what the search parameters visit"
        yield Reason(query=query, code=ReasonCode.PROBE_LIMIT, text=text, count=missed)


def _at(values: "np.ndarray[tuple[int], np.dtype[np.int64]] | None", query: int, none: int) -> int:
    return none if values is None else int(values[query])


def _items(count: int, one: str, many: str) -> str:
    if count == 1:
        return f"1 item {one}"
    return f"{count or 'no'} item{'s' if count else ''} {many if count else one}"
