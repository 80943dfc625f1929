"""Events as a table of interactions: who took what, and when."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardline.bench.ab.event_table import NOBODY, REQUEST, EventTable
from shardline.shards.core.errors import NotFound
from shardline.shards.core.files import atomic_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """left_out: events of these kinds without an item, or without a key to be found."""

    rows: int
    users: int
    left_out: int


def write_interactions(table: EventTable, kinds: Sequence[str], out: Path) -> Written:
    """A Parquet file of user_id (the key), item_id and timestamp, oldest first, complete or absent.

    Raises:
        NotFound: no event of these kinds can be used.
    """
    is_wanted = np.isin(table.kinds(), list(kinds))
    is_key = np.array([not each.startswith(REQUEST) for each in table.keys.to_pylist()], np.bool_)
    is_owned = table.owners != NOBODY
    is_owned[is_owned] = is_key[table.owners[is_owned]]
    has_item = table.rows["item_id"].is_valid().to_numpy()
    usable = is_wanted & is_owned & has_item
    if not usable.any():
        raise NotFound(
            "no event to train on",
            expected="an item_id, and a key or the request_id of a stored search with a key",
            got=f"{int(is_wanted.sum()):,} events of the kind, none with both",
        )
    rows = table.rows.filter(pa.array(usable))
    users = table.keys.take(pa.array(table.owners[usable]))
    found = pa.table({"user_id": users, "item_id": rows["item_id"], "timestamp": rows["at"]})
    with atomic_path(out) as temporary:
        pq.write_table(found.sort_by("timestamp"), temporary)
    return Written(
        rows=found.num_rows,
        users=len(users.unique()),
        left_out=int(is_wanted.sum()) - found.num_rows,
    )
