"""The vector and the attributes of one item, both of one version of it.

They come in two replies, and the item may be written between them. Each says the state of the shard
that it is from, so a mixture is noticed, and what is older is asked for again.
"""

import numpy as np

from shardline.router.contract import ItemAnswer
from shardline.router.fanout.fanout import Fanout
from shardline.router.fanout.snapshot import TableSnapshot
from shardline.router.query import FoundAttributes, FoundItems
from shardline.shards.core.errors import NotFound, Unavailable

READS = 4  # of the attributes: one is enough unless this very item is written meanwhile


async def read_item(
    fanout: Fanout, snapshot: TableSnapshot, item_id: int, deadline: float
) -> ItemAnswer:
    """vector (dim,) float32 and all attributes; seq: of a state of its shard that has both.

    Raises:
        NotFound: no shard holds it, and every shard answered.
        Unavailable: it was not found, but a shard that might hold it did not answer; or it was, and
            its shard did not bring its attributes; or it was written all the time.
    """
    found = await _vector(fanout, snapshot, item_id, (), deadline)
    for _ in range(READS):
        beside = await _attributes(fanout, snapshot, found, deadline)
        shard = int(found.shards[0])
        seq = beside.seq[shard]
        assert seq is not None  # its attributes are there
        if seq == found.seq[shard]:
            return _answer(snapshot, found, beside, seq)
        again = await _vector(fanout, snapshot, item_id, (0,) * shard + (seq,), deadline)
        # Of a shard that is written often no two replies are of one state. An item whose vector is
        # the same before and after its attributes had it with them too.
        if seq == again.seq[shard] or np.array_equal(found.vectors, again.vectors):
            return _answer(snapshot, again, beside, seq)
        found = again
    raise Unavailable(
        "it is written faster than it can be read",
        field="item_id",
        got=f"{READS} versions",
        hint="ask again",
    )


async def _vector(
    fanout: Fanout,
    snapshot: TableSnapshot,
    item_id: int,
    min_seq: tuple[int, ...],
    deadline: float,
) -> FoundItems:
    ids = np.array([item_id], dtype=np.int64)
    found = await fanout.fetch(snapshot, ids, deadline=deadline, min_seq=min_seq)
    if found.item_ids.size:
        return found
    if found.coverage.degraded:
        raise Unavailable(
            "not found in the shards that answered",
            field="item_id",
            hint="; ".join(map(str, found.coverage.degraded)),
        )
    raise NotFound("no such item", field="item_id", got=str(item_id))


async def _attributes(
    fanout: Fanout, snapshot: TableSnapshot, found: FoundItems, deadline: float
) -> FoundAttributes:
    beside = await fanout.attributes(
        snapshot, found.item_ids, (), deadline=deadline, seen=found.seq
    )
    if beside.missing:
        raise Unavailable(
            "its attributes did not come",
            field="item_id",
            hint="; ".join(map(str, beside.missing)),
        )
    if not beside.item_ids.size:  # deleted since its vector was read
        raise NotFound("no such item", field="item_id", got=str(found.item_ids[0]))
    return beside


def _answer(
    snapshot: TableSnapshot, found: FoundItems, beside: FoundAttributes, seq: int
) -> ItemAnswer:
    item_id = int(found.item_ids[0])
    return ItemAnswer(
        item_id=item_id,
        vector=found.vectors[0],
        attributes={
            name: values[item_id] for name, values in beside.values.items() if item_id in values
        },
        shard=int(found.shards[0]),
        seq=seq,
        generation=snapshot.table.generation,
        model_version=snapshot.table.model_version,
    )
