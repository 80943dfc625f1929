"""What the controller has decided until now: each event makes the next state, and orders.

Numbers are saved before anyone sees one, by the newest controller of the cluster only (``term``).
Whoever waits for a change is told of each, and of the store that takes no numbers.
"""

import asyncio
import contextlib
from collections.abc import Callable

from shardline.cluster.control.events import Instruction, Publish, SealDropped, Switched
from shardline.cluster.control.fleet_rules import FleetEvent, fleet_step
from shardline.cluster.control.fleet_state import Fleet
from shardline.cluster.control.placement_state import Placement
from shardline.cluster.exits import as_known
from shardline.cluster.store import Store, unguarded
from shardline.shards.core.errors import DataError, ShardlineError
from shardline.shards.core.messages import Absence, RoutingTable
from shardline.shards.live.went_live import WentLive, write_went_live


class Decisions:
    """The generations as they are placed now, and the newest table that routers may have.

    carry_out: told every instruction but ``Publish``, in order, once what led to it is saved.
    guard: raises Superseded once another controller has been started in the place of this one.
    """

    def __init__(
        self,
        store: Store,
        fleet: Fleet,
        carry_out: Callable[[Instruction], None],
        guard: Callable[[], None] = unguarded,
    ) -> None:
        self._store = store
        self._carry_out = carry_out
        self.guard = guard
        self._is_current_known = True  # that ``CURRENT`` names the live generation, for good
        self._changed = asyncio.Condition()
        self.fleet = fleet
        self.published: RoutingTable | None = None
        self.unsaved: Absence | None = None  # why the newest numbers are not on record

    @property
    def placement(self) -> Placement:
        """Of the live generation."""
        return self.fleet.live

    async def take(self, event: FleetEvent) -> None:
        """Decides what follows from the event.

        Another live generation is on record, as ``CURRENT``, before anybody is told of it.

        Raises:
            OSError: the store takes no numbers. Nothing was decided: whoever the event came from
                tries again.
            NotFound: the generation to be live is gone.
            Superseded: another controller decides now.
        """
        changed, instructions = fleet_step(self.fleet, event)
        if changed is self.fleet:
            return
        try:
            if changed.counter != self.fleet.counter:
                # before anyone sees a number of it
                self._store.raise_counter(changed.counter, self.guard)
                self.unsaved = None
            elif changed.beside is None and self.fleet.beside is not None:
                self.guard()  # processes end that another controller may need
        except OSError as error:
            await self._cannot_save(error)
            raise
        self._keep_current(changed.live.table, event)
        self.fleet = changed
        self.order(instructions)
        await self._tell()

    def _keep_current(self, table: RoutingTable, event: FleetEvent) -> None:
        """Where a disk fails after the file has its new name, either number may be found by the
        next controller. Then no write may be taken before it is certain again which."""
        generation, model = table.generation, table.model_version
        is_same = generation == self.placement.table.generation
        if is_same and (self._is_current_known or not isinstance(event, SealDropped)):
            return
        if isinstance(event, Switched):
            self._note_switch(event, model)
        self._is_current_known = False
        self._store.set_current(generation, self.guard)
        self._is_current_known = True

    def _note_switch(self, event: Switched, model: str) -> None:
        """What the coming generation has, before it is on record as the live one: a controller that
        is started again tells it, and shards of the same model take over the keys of writes."""
        before = self.placement.table
        is_like = event.has_all and before.model_version == model
        note = WentLive(
            has=event.has,
            keys_of=self._store.writes(before.generation).name if is_like else None,
        )
        write_went_live(self._store.writes(event.generation), note)

    def order(self, instructions: tuple[Instruction, ...]) -> None:
        """Has them carried out."""
        for instruction in instructions:
            if isinstance(instruction, Publish):
                self.published = instruction.table
            else:
                self._carry_out(instruction)

    async def save_again(self) -> None:
        """The event that could not be saved may never come again, and the store be well since."""
        if self.unsaved is None:
            return
        try:
            self._store.raise_counter(self.fleet.counter + 1, self.guard)  # never lower
        except OSError as error:
            await self._cannot_save(error)
        else:
            self.unsaved = None
            await self._tell()

    async def until(self, is_so: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Waits until it is so after some event; False: the time was up first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(is_so)
                return True
        return False

    def newer_than(self, version: int) -> RoutingTable | None:
        """The newest table, if it is newer than that."""
        is_newer = self.published is not None and self.published.version > version
        return self.published if is_newer else None

    async def _cannot_save(self, error: OSError) -> None:
        known = known_error(error)
        text = f"the controller cannot save its counter, so nothing newer is published: {known}"
        self.unsaved = Absence(known.code, text)
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def known_error(error: OSError) -> ShardlineError:
    """As one of ours."""
    return as_known(error) or DataError(str(error))
