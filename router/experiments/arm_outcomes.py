"""What is recorded of searches that are in experiments: metrics by arm, and events for reports."""

import time
from collections.abc import Callable

from shardline.router.experiments.assignment import Assignment, point_of
from shardline.router.experiments.event_log import EventLog
from shardline.router.experiments.stored_event import RECALL, SEARCH, Event
from shardline.shards.core.metrics import ARM_REQUEST_MS, ARM_REQUESTS, Recorder

SAMPLING = ""  # no experiment has this name: which keys are stored depends on no arm


class ArmOutcomes:
    """All methods run in the router's event loop. event_share: of the keys, whose searches are
    stored; what has no key always is."""

    def __init__(
        self,
        recorder: Recorder,
        events: EventLog,
        event_share: float,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._recorder = recorder
        self._events = events
        self._event_share = event_share
        self._wall = wall

    def answered(
        self,
        assignment: Assignment,
        *,
        request_id: str,
        took_ms: float,
        shape: tuple[int, int, int],
    ) -> None:
        """One search; shape: its queries, k, and the results of all its queries together."""
        for experiment, arm in assignment.arms:
            self._recorder.count(ARM_REQUESTS, experiment, arm, "ok")
            self._recorder.observe(ARM_REQUEST_MS, took_ms, experiment, arm)
        queries, k, results = shape
        self._note(
            assignment,
            Event(
                event=SEARCH,
                at=self._wall(),
                key=assignment.key,
                request_id=request_id,
                arms=dict(assignment.arms),
                took_ms=took_ms,
                k=k,
                queries=queries,
                results=results,
            ),
        )

    def failed(self, assignment: Assignment, code: str) -> None:
        for experiment, arm in assignment.arms:
            self._recorder.count(ARM_REQUESTS, experiment, arm, code)

    def watched(self, assignment: Assignment, recall: float) -> None:
        """One query was asked again exactly: the recall of its answer, 0 to 1."""
        event = Event(
            event=RECALL,
            at=self._wall(),
            key=assignment.key,
            arms=dict(assignment.arms),
            value=recall,
        )
        self._note(assignment, event)

    def _note(self, assignment: Assignment, event: Event) -> None:
        key = assignment.key
        if key is None or point_of(SAMPLING, key) < self._event_share:
            self._events.note(event)
