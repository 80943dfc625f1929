"""Kinds of the attributes that caps and boosts name: asked of the shards once per routing table.

Writes add no columns, so what one shard says of a column holds for all, and while the table does.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from shardline.router.fanout.fanout import Fanout
from shardline.router.fanout.snapshot import TableSnapshot
from shardline.router.rearrange.rearrangement import Rearrangement
from shardline.shards.core.attribute_kinds import AttributeKind
from shardline.shards.core.errors import InvalidInput, Unavailable

KINDS_SHARE = 0.3  # of the time: a shard that hangs must leave some for the search itself
NO_ITEMS = np.empty(0, np.int64)


async def kinds_of(
    fanout: Fanout, snapshot: TableSnapshot, asked: Rearrangement, deadline: float
) -> Mapping[str, AttributeKind]:
    """Of each of ``asked.columns``, and maybe of others.

    Raises:
        InvalidInput: no such column; field says where it is named.
        Unavailable: no shard says so in time.
    """
    known, now = snapshot.attribute_kinds, fanout.clock.time()
    until = now + KINDS_SHARE * (deadline - now)
    for each in asked.by_column:
        if each.column not in known:
            try:
                await _learn(fanout, snapshot, [each.column], until)
            except InvalidInput as error:
                raise InvalidInput(error.message, field=f"{each.field}.column") from error
    return known


async def _learn(
    fanout: Fanout, snapshot: TableSnapshot, names: Sequence[str], deadline: float
) -> None:
    found = await fanout.attributes(snapshot, NO_ITEMS, tuple(names), deadline=deadline)
    if not found.kinds:
        raise Unavailable("no shard answered", expected="the kinds of attributes")
    snapshot.attribute_kinds.update(found.kinds)
