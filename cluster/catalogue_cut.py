"""What of the live generation's writes a catalogue contains that is read from now on."""

import logging

from shardline.cluster.store import Store
from shardline.shards.core.errors import NotFound, ShardlineError
from shardline.shards.live.live_rows import newest_write
from shardline.shards.storage.cut import Cut, cut_of
from shardline.shards.storage.generation import read_generation

logger = logging.getLogger(__name__)


def catalogue_cut(store: Store) -> Cut | None:
    """All writes that are in the logs now: who writes an item has it in the catalogue by then.

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
