"""What is known of the newest publish and of what is beside the live generation, as it changes.

Kept in the store's note, so that a restarted controller goes on from it.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from shardline.cluster.control.fleet_state import Fleet, Role
from shardline.cluster.control.publish_note import PublishNote
from shardline.cluster.control.publish_state import Noted, PublishOptions, PublishProgress

logger = logging.getLogger(__name__)


class PublishBook:
    """noted: what the controller before this has noted; None: nothing. fleet: that of now."""

    def __init__(
        self,
        note: PublishNote,
        noted: Noted | None,
        fleet: Callable[[], Fleet],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._note = note
        self._fleet = fleet
        self._wall = wall
        self._is_saved = not note.is_outdated
        self.noted = noted or Noted(live=self.live)

    @property
    def live(self) -> int:
        return self._fleet().live.table.generation

    @property
    def is_under_way(self) -> bool:
        return self.noted.publish is not None and not self.noted.publish.is_over

    @property
    def age_s(self) -> float:
        """Seconds since what is beside the live generation got its role."""
        return self._wall() - self.noted.since_s

    def begun(self, options: PublishOptions) -> PublishProgress:
        """A publish that begins now."""
        last = self.noted.publish
        progress = PublishProgress(
            number=1 if last is None else last.number + 1,
            options=options,
            source=self.live,
            since_s=self._wall(),
        )
        self.put(progress)
        return progress

    def put(self, progress: PublishProgress) -> None:
        """How far it is from now on; noted, as soon as the store takes it."""
        self.noted = replace(self.noted, publish=progress)
        self._try_to_save()

    async def told(self, **changes: Any) -> None:
        """Changes of the progress; a new stage is noted, and has its time."""
        progress = self.noted.publish
        assert progress is not None
        changed = replace(progress, **changes)
        if changed.stage is not progress.stage:
            self.put(replace(changed, since_s=self._wall()))
        else:
            self.noted = replace(self.noted, publish=changed)

    async def opening(self, options: PublishOptions) -> None:
        """A candidate, noted before any of its processes is started: else nobody would know whose
        they are. Raises OSError: the store takes no note."""
        changed = replace(
            self.noted,
            live=self.live,
            beside=options.generation,
            role=Role.CANDIDATE,
            is_mirrored=options.with_writes,
            since_s=self._wall(),
        )
        self._note.keep(changed)
        self.noted = changed

    def switched(self) -> None:
        """The generation of the newest publish is live, and the one before is kept."""
        assert self.noted.publish is not None
        self.noted = replace(self.noted, before=self.noted.publish.source)
        self.put_beside()

    def no_way_back(self) -> None:
        """What was live before has not what the live generation is about to have."""
        self.noted = replace(self.noted, before=None)
        self._try_to_save()

    def put_beside(self) -> None:
        """What is beside the live generation now, if anything, is kept there from now on."""
        beside = self._fleet().beside
        self.noted = replace(
            self.noted,
            live=self.live,
            beside=None if beside is None else beside.generation,
            role=Role.KEPT,
            is_mirrored=beside is not None and beside.is_mirrored,
            since_s=self._wall(),
        )
        self._try_to_save()

    def save_again(self) -> None:
        """What could not be noted before. Raises OSError: it cannot be now either."""
        if not self._is_saved:
            self._save()

    def close(self) -> None:
        """The cluster ends: nothing is beside the live generation. Raises OSError: not noted."""
        if self.noted.beside is not None:
            self.noted = replace(self.noted, beside=None)
            self._save()

    def _try_to_save(self) -> None:
        self._is_saved = False
        try:
            self._save()
        except OSError as error:  # ``save_again``
            logger.warning("not noted yet: %s", error)

    def _save(self) -> None:
        self._note.keep(self.noted)
        self._is_saved = True
