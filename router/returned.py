"""What a search wants beside its results: attributes of the items found, and their original ids."""

import time
from collections import Counter
from typing import Any

import msgpack
import numpy as np

from shardline.router.fanout.fanout import Fanout
from shardline.router.fanout.snapshot import TableSnapshot
from shardline.router.query import FoundAttributes, Merged, ResolvedQuery, Returned
from shardline.shards.core.errors import too_much_returned
from shardline.shards.core.messages import MAX_RETURNED_BYTES
from shardline.shards.core.metrics import STAGE_MS, Recorder
from shardline.shards.core.schema import EMPTY_ID, ORIGINAL_ID


async def bring_returned(
    fanout: Fanout,
    recorder: Recorder,
    snapshot: TableSnapshot,
    merged: Merged,
    query: ResolvedQuery,
    deadline: float,
) -> Returned:
    """What the query wants beside its results, from states no older than theirs."""
    ids = merged.ranked.ids
    began_at = time.perf_counter()
    original = (ORIGINAL_ID,) if query.original_ids else ()
    names = tuple(dict.fromkeys(query.returned + original))
    wanted = np.unique(ids[ids != EMPTY_ID])
    found = await fanout.attributes(snapshot, wanted, names, deadline=deadline, seen=merged.seq)
    rows = [[item for item in row if item != EMPTY_ID] for row in ids.tolist()]

    if found.size * len(rows) > MAX_RETURNED_BYTES:
        _refuse_large(rows, found)

    def of(name: str) -> list[list[Any]]:
        values = found.values[name]
        return [[values.get(item) for item in row] for row in rows]

    recorder.observe(STAGE_MS, (time.perf_counter() - began_at) * 1000, "attributes")
    return Returned(
        attributes={name: of(name) for name in query.returned},
        original_ids=of(ORIGINAL_ID) if query.original_ids else None,
        missing=found.missing,
    )


def _refuse_large(rows: list[list[int]], found: FoundAttributes) -> None:
    """InvalidInput where items that many queries share make more than an answer may hold."""
    times = Counter(item for row in rows for item in row)
    size = sum(
        times[item] * len(msgpack.packb(value))
        for values in found.values.values()
        for item, value in values.items()
    )
    if size > MAX_RETURNED_BYTES:
        raise too_much_returned(MAX_RETURNED_BYTES)
