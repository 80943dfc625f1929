"""What the sequence numbers of an earlier answer ask of the shards that are live now.

Numbers count the writes of one generation. When another goes live, all that was acknowledged until
then is in it, under numbers of its own: the table names those that it had at that moment. Table
versions rise across generations, so they tell an answer of an earlier generation, a rollback
included, from one that another router gave after a switch of which this one has not heard.
"""

import asyncio
from dataclasses import replace

from shardline.router.fanout.fanout import Fanout, Pin
from shardline.router.query import ResolvedQuery, SeqOrigin
from shardline.shards.core.errors import Behind, InvalidInput
from shardline.shards.core.messages import RoutingTable

LOOK_S = 0.02  # between two looks at the table: routers hear of a switch within that time or so


def asked_seq(
    min_seq: tuple[int, ...], origin: SeqOrigin | None, table: RoutingTable
) -> tuple[int, ...] | None:
    """Of each shard of the table, how many writes it must have; None: the numbers are of a
    generation that goes live after the table. origin None: they are of the table's generation.

    Raises:
        InvalidInput: more numbers than the generation has shards.
    """
    if origin is None or origin.generation == table.generation:
        if len(min_seq) > len(table.shards):
            raise InvalidInput(
                "more numbers than the generation has shards",
                field="min_seq",
                expected=f"<= {len(table.shards)}, of generation {table.generation}",
                got=str(len(min_seq)),
                hint="numbers of another generation need min_seq_of: the generation and "
                "table_version of the answer that they are from",
            )
        return min_seq
    if origin.table_version > table.version:
        return None
    return table.went_live_with


async def pinned_with(
    fanout: Fanout, query: ResolvedQuery, deadline: float
) -> tuple[Pin, ResolvedQuery]:
    """What the query must use, to be entered at once, and the query with what it asks of that.

    Waits until the table is as new as the numbers; deadline: on the fan-out's clock.

    Raises:
        InvalidInput: as ``asked_seq``. Unavailable: as ``Fanout.pin``.
        Behind: no table has come that is as new as the numbers.
    """
    while True:
        pin = fanout.pin()
        asked = asked_seq(query.options.min_seq, query.min_seq_of, pin.table)
        if asked is not None:
            options = query.options
            if asked != options.min_seq:
                options = replace(options, min_seq=asked)
            return pin, replace(query, options=options)
        left = deadline - fanout.clock.time()
        if left <= 0:
            raise _behind(query.min_seq_of, pin.table)
        await asyncio.sleep(min(LOOK_S, left))


def _behind(origin: SeqOrigin | None, table: RoutingTable) -> Behind:
    assert origin is not None
    return Behind(
        "this router has not heard of the generation that min_seq is from",
        field="min_seq_of",
        expected=f"generation {table.generation}, or a table_version up to {table.version}",
        got=f"generation {origin.generation}, table_version {origin.table_version}",
        hint="ask again: a router hears of a switch within moments",
    )
