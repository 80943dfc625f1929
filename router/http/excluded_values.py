"""The items that a body excludes: of each query a list of ids, checked as arrays."""

from contextlib import suppress
from typing import Any

import numpy as np

from shardline.router.excluded import MAX_EXCLUDED, ascending
from shardline.router.http.body_values import to_ids
from shardline.router.http.problems import wrong_type
from shardline.router.limits import too_many
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import IdArray, check_ids

FIELD = "exclude"
# Ids that are checked in the event loop, within 2 ms or so: each takes 0.1 us
EXCLUDED_IN_LOOP = 16_384


def takes_long(given: Any) -> bool:
    """Whether what a body has for ``exclude`` is to be checked outside the event loop."""
    if not isinstance(given, list):
        return False
    return sum(len(ids) for ids in given if isinstance(ids, list | np.ndarray)) > EXCLUDED_IN_LOOP


def to_excluded(value: Any, max_batch: int) -> tuple[IdArray, ...]:
    """Of each query the ids, as ``ResolvedQuery.excluded`` has them, some of them maybe empty.

    Raises:
        InvalidInput: no list of lists of at most MAX_EXCLUDED integers >= 0, or of more than
            ``max_batch`` lists.
    """
    if not isinstance(value, list):
        raise wrong_type(FIELD, "a list with a list of item ids per query", value)
    if len(value) > max_batch:
        raise too_many(FIELD, len(value), max_batch)
    return tuple(_ids(ids, f"{FIELD}[{row}]") for row, ids in enumerate(value))


def _ids(value: Any, field: str) -> IdArray:
    if not isinstance(value, list | np.ndarray):
        advice = "even for one query it is a list with one list"
        raise wrong_type(field, "a list of item ids", value, advice)
    if len(value) > MAX_EXCLUDED:
        raise InvalidInput(
            "too many items excluded",
            field=field,
            expected=f"<= {MAX_EXCLUDED} ids per query",
            got=f"{len(value)} ids",
        )
    ids = to_ids(value, field, MAX_EXCLUDED)
    with suppress(OverflowError):  # which the check below tells
        ids = np.array(ids, np.int64) if isinstance(ids, list) else ids  # sooner than by the check
    return ascending(check_ids(ids, field=field))
