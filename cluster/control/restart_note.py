"""A note in the store of the newest rolling restart: a restarted controller goes on with it, or
tells how it ended."""

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
    """Of one cluster; what another, or another generation, has left there is of no meaning."""

    def __init__(self, root: Path, cluster_id: str) -> None:
        self._path = root / NAME
        self._cluster_id = cluster_id
        self._saved: tuple[int, bool] | None = None

    def read(self, generation: int) -> Restart | None:
        """The newest restart of that generation.

        One that cannot be read is logged and counts as ended: who waits for it is told that it was
        cut short.
        """
        try:
            found = read_json(self._path, MAX_STATE_BYTES)
            owner = self._owner(generation)
            if any(found[name] != value for name, value in owner.items()):
                return None
            below = {int(shard): int(number) for shard, number in found["below"].items()}
            restart = Restart(
                number=int(found["number"]),
                below=below,
                total=int(found["total"]),
                is_over=found["is_over"] is True,
                is_stopped=found["is_stopped"] is True,
            )
        except FileNotFoundError:
            return None
        except (ShardlineError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            logger.error("a rolling restart was cut short: %s: %s", self._path, error)
            return None
        self._saved = restart.number, restart.is_over
        return restart

    def keep(self, placement: Placement) -> None:
        """Has the note say what the placement does; writes nothing if it does already.

        Raises:
            OSError: it cannot be written; the restart goes on, and this is tried again.
        """
        restart = placement.restart
        if restart is None or self._saved == (restart.number, restart.is_over):
            return
        said = {
            "number": restart.number,
            "below": restart.below,
            "total": restart.total,
            "is_over": restart.is_over,
            "is_stopped": restart.is_stopped,
        }
        files.write_json(self._path, self._owner(placement.table.generation) | said)
        self._saved = restart.number, restart.is_over

    def _owner(self, generation: int) -> dict[str, object]:
        return {"cluster_id": self._cluster_id, "generation": generation}
