"""Rolling restarts of the live generation: begun, stopped, told of, and noted in the store."""

from collections.abc import Callable
from typing import Any

from shardline.cluster.control.cluster_report import restart_progress
from shardline.cluster.control.decisions import Decisions, known_error
from shardline.cluster.control.events import Event, RestartAsked, RestartStopped
from shardline.cluster.control.outlook import refuse_without_spare
from shardline.cluster.control.restart_note import RestartNote
from shardline.cluster.control.rolling_restart import is_restarting
from shardline.cluster.control.tasks import tried


class Restarts:
    """refuse: raises Unavailable while none may begin."""

    def __init__(self, decisions: Decisions, note: RestartNote, refuse: Callable[[], None]) -> None:
        self._decisions = decisions
        self._note = note
        self._refuse = refuse

    async def begin(self) -> dict[str, Any]:
        """Begins to replace every replica, one after the other; its ``restart_progress``, as that
        of one that is under way already.

        Raises:
            Unavailable: there is a replica that could not be replaced, for want of room; or a
                publish is under way.
            ShardlineError: the store takes no counter.
        """
        self._refuse()
        if not is_restarting(self._decisions.placement):
            refuse_without_spare(self._decisions.placement)
        progress = await self._take(RestartAsked())
        assert progress is not None
        return progress

    async def stop(self) -> dict[str, Any] | None:
        """Begins no further replacement; the ``restart_progress`` of then. Raises ShardlineError:
        the store takes no counter."""
        return await self._take(RestartStopped())

    @property
    def progress(self) -> dict[str, Any] | None:
        """Of the newest: ``cluster_report.restart_progress``."""
        return restart_progress(self._decisions.placement)

    async def keep_note(self) -> None:
        """Has the note say how far it is. Raises OSError: it cannot be written."""
        self._note.keep(self._decisions.placement)

    async def _take(self, event: Event) -> dict[str, Any] | None:
        try:
            await self._decisions.take(event)
        except OSError as error:
            raise known_error(error) from error
        # else with the next look at the hosts
        await tried(self.keep_note, "note how far the rolling restart is")
        return self.progress
