"""What of the live generation's writes a catalogue is taken to contain that is read from now on.

An assumption: a table that was written yesterday lacks the writes of today. Cuts of rows that come
from the generation itself, as of ``build --from-live`` and of snapshots, are exact.
"""

import logging

from shardline.cluster.store import Store
from shardline.shards.core.errors import NotFound, ShardlineError
from shardline.shards.live.live_rows import newest_write
from shardline.shards.storage.cut import Cut, cut_of
from shardline.shards.storage.generation import read_generation

logger = logging.getLogger(__name__)

NO_CUT_HELP = (
    "Do not take the catalogue to have what was written to the live generation until now: a "
    "publish replays everything. For tables that are older than some of the writes."
)


def catalogue_cut(store: Store) -> Cut | None:
    """All writes that are in the logs now, as if whoever writes an item had it in the catalogue by
    then. Say so to the user: ``assumption_of``.

    None where nothing is live, or its logs cannot be read, which is logged: then ``publish``
    replays all writes, which is slower and as right.
    """
    try:
        number = store.current()
        folder = store.generation(number)
        manifest = read_generation(folder)
        seqs = tuple(newest_write(folder, shard) for shard in range(len(manifest.shards)))
        return cut_of(number, seqs, manifest.cut)
    except NotFound:
        return None
    except (ShardlineError, OSError) as error:
        logger.error("%s; `shardline publish` will replay all writes", error)
        return None


def assumption_of(cut: Cut | None) -> str | None:
    """What a user must know of a catalogue with such a cut, in a line; None: nothing."""
    writes = 0 if cut is None else sum(cut.seqs)
    if cut is None or not writes:
        return None
    return (
        f"assumed: the catalogue has all that was written to generation {cut.generation} before it "
        f"was read ({writes:,} writes), and a publish does not replay it; if the catalogue is "
        "older, use --no-cut: a publish replays everything"
    )
