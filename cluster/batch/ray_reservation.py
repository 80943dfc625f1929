"""Room for all stages of a job on Ray at once, and an end to a job that has lost a part of it.

When a host dies, Ray looks for other room for what was reserved on it, and restarts the stages
there; while there is none, it waits for ever, and so would the job. So the reservation is watched:
if it has not been whole for LOST_AFTER_S, it is given back, which ends the stages and the pipeline.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from shardline.cluster.batch.ray_room import StageNeed
from shardline.shards.core.errors import Unavailable

logger = logging.getLogger(__name__)

RESERVED_WITHIN_S = 60
LOST_AFTER_S = 60.0  # Ray moves a stage within seconds where there is room for it
LOOK_EVERY_S = 2.0
WHOLE = "CREATED"  # the state of a group that has all it asked for


@dataclass(slots=True)
class Loss:
    """Decides when a reservation counts as lost, from looks at it. Pure."""

    since_s: float | None = None

    def is_lost(self, is_whole: bool, now_s: float) -> bool:
        if is_whole:
            self.since_s = None
        elif self.since_s is None:
            self.since_s = now_s
        return self.since_s is not None and now_s - self.since_s >= LOST_AFTER_S


@dataclass(slots=True)
class Reservation:
    """What the stages of a job have reserved, a bundle for each in their order.

    lost: why it was given back before its end.
    """

    group: PlacementGroup
    lost: Unavailable | None = None

    def watch(self, wait: Callable[[float], bool], clock: Callable[[], float]) -> None:
        """Until the reservation is lost, or ``wait`` says that the job has ended."""
        loss = Loss()
        while not wait(LOOK_EVERY_S):
            try:
                state = placement_group_table(self.group)["state"]
            except ray.exceptions.RayError as error:
                logger.info("the reservation cannot be looked at: %s", error)
                continue
            if loss.is_lost(state == WHOLE, clock()):
                self.lost = Unavailable(
                    "a host of the Ray cluster was lost, and no other has room for its stages",
                    expected=f"room for them within {LOST_AFTER_S:g} s",
                    hint="start the job again, which goes on where it was with what is free, or "
                    "add a host first",
                )
                remove_placement_group(self.group)
                return


@contextmanager
def reserved(needs: Sequence[StageNeed]) -> Iterator[Reservation]:
    """Room for all stages at once, or none.

    Raises:
        Unavailable: it was taken since it was counted.
    """
    bundles = [
        {"CPU": need.cpus} | ({"memory": float(need.memory)} if need.memory else {})
        for need in needs
    ]
    group = placement_group(bundles, strategy="PACK")
    ended = threading.Event()
    reservation = Reservation(group)
    watcher = threading.Thread(target=reservation.watch, args=(ended.wait, time.monotonic))
    try:
        if not group.wait(RESERVED_WITHIN_S):
            raise Unavailable(
                "the Ray cluster did not give the job its CPUs and memory",
                expected=f"{sum(need.cpus for need in needs):g} CPUs within {RESERVED_WITHIN_S} s",
                got="others have taken them meanwhile, or they lie on too many hosts",
                hint="start it again, or give it fewer with --cpus",
            )
        watcher.start()
        yield reservation
    finally:
        ended.set()
        if watcher.ident is not None:
            watcher.join()
        remove_placement_group(group)
