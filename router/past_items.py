"""Queries by features whose histories name items that were written since the model's export.

An item's part in a history is made of its features, and these are attributes of the generation: so
every router can make it, whichever took the write. It asks the shards for the attributes of ids
that the query encoder does not know, and keeps what it makes of them for a while.
"""

import asyncio
import logging

import numpy as np

from shardline.router.encoder.item_encoder import ItemEncoder
from shardline.router.encoder.new_item_cache import NOTHING, NewItem, NewItemLookup
from shardline.router.fanout.fanout import Fanout
from shardline.router.fanout.snapshot import ENCODE_IN_LOOP, TableSnapshot
from shardline.router.query import FoundAttributes, ResolvedQuery
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import FloatArray, IdArray

logger = logging.getLogger(__name__)

# Ids that one request has looked up, the first ones: half a millisecond of a shard per feature
MAX_LOOKED_UP = 512
LOOK_UP_SHARE = 0.5  # of the time left: a slow shard must leave some for the search itself


async def encoded(
    fanout: Fanout, snapshot: TableSnapshot, query: ResolvedQuery, deadline: float
) -> FloatArray:
    """(n, dim) float32 of a query by features; new items count in its histories.

    An item whose shard does not answer in time is left out, as one is that nobody knows. With
    ``min_seq`` items are looked up anew, in states that have those writes.

    Raises as ``TableSnapshot.encode``.
    """
    encoder = snapshot.encoder_of_new_items()
    if encoder is None:
        return await snapshot.encode(query.values)
    now = fanout.clock.time()
    lookup = NewItemLookup(snapshot.new_items, now, is_fresh=bool(query.options.min_seq))
    vectors = await snapshot.encode(query.values, lookup)
    if not lookup.missed:
        return vectors
    wanted = np.sort(np.array(list(lookup.missed)[:MAX_LOOKED_UP], dtype=np.int64))
    until = now + LOOK_UP_SHARE * (deadline - now)
    try:
        beside = await fanout.attributes(
            snapshot, wanted, encoder.names, deadline=until, seen=query.options.min_seq
        )
    except InvalidInput as error:  # more than an answer may hold
        logger.warning("new items are left out of histories: %s", error)
        return vectors
    if not await _take(encoder, snapshot, wanted, beside, lookup, now):
        return vectors
    return await snapshot.encode(query.values, lookup)


async def _take(
    encoder: ItemEncoder,
    snapshot: TableSnapshot,
    wanted: IdArray,
    beside: FoundAttributes,
    lookup: NewItemLookup,
    now: float,
) -> bool:
    """Puts what came into the cache and the look-up; whether any item has a row."""
    absent_shards = {each.shard for each in beside.missing}
    homes = snapshot.table.partition.shard_of(wanted).tolist()
    items = {
        item_id: NOTHING
        for item_id, home in zip(wanted.tolist(), homes, strict=True)
        if home not in absent_shards
    }
    if len(beside.item_ids) <= ENCODE_IN_LOOP:
        items |= made_of(encoder, beside)
    else:
        items |= await asyncio.to_thread(made_of, encoder, beside)
    for item_id, item in items.items():
        snapshot.new_items.put(item_id, item, now)
    lookup.found |= items
    return any(item.row is not None for item in items.values())


def made_of(encoder: ItemEncoder, beside: FoundAttributes) -> dict[int, NewItem]:
    """Of each item that shards hold its part in histories, NOTHING where it has none."""
    held = np.unique(beside.item_ids)
    feature = encoder.attributes.feature
    rows = [
        {name: feature(name, beside.values[name][item_id]) for name in encoder.names}
        for item_id in held.tolist()
    ]
    if not rows:
        return {}
    try:
        return _made(encoder, held, rows)
    except InvalidInput:  # of one: written by vector, with an attribute that the tower refuses
        made: dict[int, NewItem] = {}
        for place, item_id in enumerate(held.tolist()):
            try:
                made |= _made(encoder, held[place : place + 1], rows[place : place + 1])
            except InvalidInput:
                made[item_id] = NOTHING
        return made


def _made(
    encoder: ItemEncoder, item_ids: IdArray, rows: list[dict[str, object]]
) -> dict[int, NewItem]:
    has_row, inputs, scores = encoder.history_rows(item_ids, rows)
    return {
        # a copy, or one row would keep those of all the others
        item_id: NewItem(inputs[at].copy(), None if scores is None else float(scores[at]))
        if has_row[at]
        else NOTHING
        for at, item_id in enumerate(item_ids.tolist())
    }
