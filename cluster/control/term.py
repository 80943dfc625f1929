"""Which controller of a cluster may decide: the one that was started last.

One that was paused, or cut off from Ray's head, may wake up when another has been started in its
place. What it would still write must not count. So each start leaves a name of its own in the
store, and every number given out, every live generation and every note of a publish is written
under the lock of the store, and by the controller whose name is there.

    <store>/controllers.json    {"format": 1, "newest": {cluster id: name of its newest controller}}
"""

import logging
import secrets
from pathlib import Path

from shardline.cluster.store import Store
from shardline.shards.core import files
from shardline.shards.core.errors import ShardlineError, Unavailable
from shardline.shards.core.small_files import MAX_STATE_BYTES, read_json

logger = logging.getLogger(__name__)

NAME = "controllers.json"
FORMAT = 1
CLUSTERS = 32  # that are remembered, for several may serve one store


class Superseded(Unavailable):
    """This controller decides nothing any more: another one has been started in its place."""

    code = "superseded"


class Term:
    """Of one controller; of those of another cluster it knows nothing."""

    def __init__(self, store: Store, cluster_id: str) -> None:
        """Ends the term of every controller of the cluster that was started before.

        Raises:
            OSError: the store takes no file.
        """
        self._path = store.root / NAME
        self._cluster_id = cluster_id
        self._name = secrets.token_hex(8)
        with store.lock():
            newest = _newest_in(self._path)
            newest.pop(cluster_id, None)
            kept = [*newest.items(), (cluster_id, self._name)][-CLUSTERS:]
            files.write_json(self._path, {"format": FORMAT, "newest": dict(kept)})

    def check(self) -> None:
        """Call it under the store's lock, where something is written after it.

        Raises:
            Superseded: another controller of this cluster was started later.
            OSError: as of any file.
        """
        newest = _newest_in(self._path).get(self._cluster_id, self._name)
        if newest != self._name:
            raise Superseded(
                "this controller decides nothing any more",
                got="another one of this cluster has been started in its place",
            )


def _newest_in(path: Path) -> dict[str, str]:
    """By cluster, that of the longest ago first. A file that cannot be read is logged, and counts
    as empty: the next controller writes it anew."""
    try:
        found = read_json(path, MAX_STATE_BYTES)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r} instead of {FORMAT}")
        return {str(cluster): str(name) for cluster, name in found["newest"].items()}
    except FileNotFoundError:
        return {}
    except (ShardlineError, KeyError, TypeError, ValueError, AttributeError) as error:
        logger.error("%s does not say which controller is the newest: %s", path, error)
        return {}
