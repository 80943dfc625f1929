"""A note in the store of a rolling restart that is under way: a restarted controller goes on."""

import logging
from pathlib import Path

from shardline.cluster.control.placement_state import Placement
from shardline.cluster.control.restart_state import Restart
from shardline.shards.core import files
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.small_files import MAX_STATE_BYTES, read_json

logger = logging.getLogger(__name__)

NAME = "restart.json"


class RestartNote:
    """Of one cluster and generation; what another has left there is of no meaning."""

    def __init__(self, root: Path, cluster_id: str, generation: int) -> None:
        self._path = root / NAME
        self._owner = {"cluster_id": cluster_id, "generation": generation}
        self._saved: int | None = None

    def read(self) -> Restart | None:
        """The restart to go on with. One that cannot be read is logged and counts as ended: who
        waits for it is told that it was cut short."""
        try:
            found = read_json(self._path, MAX_STATE_BYTES)
            if any(found[name] != value for name, value in self._owner.items()):
                return None
            below = {int(shard): int(number) for shard, number in found["below"].items()}
            restart = Restart(number=int(found["number"]), below=below, total=int(found["total"]))
        except FileNotFoundError:
            return None
        except (ShardlineError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            logger.error("a rolling restart was cut short: %s: %s", self._path, error)
            return None
        self._saved = restart.number
        return restart

    def keep(self, placement: Placement) -> None:
        """Has the note say what the placement does; writes nothing if it does already.

        Raises:
            OSError: it cannot be written; the restart goes on, and this is tried again.
        """
        restart = placement.restart
        if restart is None or restart.is_over:
            if self._saved is not None:
                self._path.unlink(missing_ok=True)
                self._saved = None
        elif self._saved != restart.number:
            said = {"number": restart.number, "below": restart.below, "total": restart.total}
            files.write_json(self._path, self._owner | said)
            self._saved = restart.number
