"""The kills: each brings a process to a named point, or to any moment, and ends or stops it there.

Afterwards another replica leads, the one that ended is started again, and writes go on.
"""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count

from shardline.bench.crash.points import (
    ADOPT_POINTS,
    COMPACT_POINTS,
    FOLLOW_POINTS,
    LEAD_POINTS,
    TORN_POINTS,
    WRITE_POINTS,
    Action,
    Order,
)
from shardline.bench.crash.shard_cluster import Cluster, Ended, ReplicaProcess

REACHED_WITHIN_S = 10.0  # a point; then the process is killed wherever it is
COMPACTED_WITHIN_S = 20.0
STOPPED_S = 0.4  # at most, while its successor takes writes
RANDOM = "any moment"
RIVALS = "two successors"
WHILE_STOPPED = "while stopped"
PLACES = ("lead", "write", "adopt", "follow", "compact")


class Kills:
    """Counts by point and action; ``missed``: points that were not reached in time."""

    def __init__(self, cluster: Cluster, seed: int, points: Sequence[str]) -> None:
        self.kills: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        self.disk_errors: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self._cluster = cluster
        self._random = random.Random(seed)
        self._plan = self._steps(points)

    @property
    def total(self) -> int:
        return self.kills.total()

    def step(self) -> None:
        """The next of the plan: one kill or two, one stop, or one disk that fails."""
        self._cluster.all_replicas()
        self._cluster.leader()
        next(self._plan)()

    def _steps(self, points: Sequence[str]) -> Iterator[Callable[[], None]]:
        """All points in random order, again and again; between them kills at any moment."""
        for round_ in count():
            chosen = list(points)
            self._random.shuffle(chosen)
            for point in chosen:
                yield lambda point=point: self._at_point(point)  # type: ignore[misc]
                if self._random.random() < 0.3:
                    yield self._at_any_moment
                if self._random.random() < 0.05:
                    yield self._rivals
                if self._random.random() < 0.1:
                    yield self._on_bad_disk
            if not points or round_ == 0:
                yield self._at_any_moment

    def _at_point(self, point: str) -> None:
        if point in FOLLOW_POINTS:
            self._follower(point)
        elif point in COMPACT_POINTS:
            self._compaction(point)
        elif point in LEAD_POINTS or point in TORN_POINTS:
            self._successor(point)
        else:
            self._primary(point)

    def _primary(self, point: str) -> None:
        leader = self._cluster.leader()
        times = self._random.randint(1, 10) if point in WRITE_POINTS else 1
        action = self._random.choice((Action.KILL, Action.KILL, Action.STOP))
        if point == "write.write.segment.before" and self._random.random() < 0.7:
            action = Action.TEAR
        if not self._armed(leader, Order(point=point, action=action, count=times)):
            return
        timeout_s = COMPACTED_WITHIN_S if point in ADOPT_POINTS else REACHED_WITHIN_S
        if action is Action.STOP:
            self._stopped(leader, point, leader.stops_within(timeout_s))
        else:
            self._ended(leader, point, leader.ends_within(timeout_s), action)
            self._elect_another(leader)

    def _successor(self, point: str) -> None:
        """The primary ends, and the replica that takes over ends or stops at the point."""
        leader, successor = self._cluster.leader(), self._follower_process()
        torn = point in TORN_POINTS
        ending = Order(point="write.write.segment.before", action=Action.TEAR)
        if torn:
            if not self._armed(leader, ending):
                return
            self._ended(leader, ending.point, leader.ends_within(REACHED_WITHIN_S), Action.TEAR)
        elif self._random.random() < 0.5 or point.startswith("lead.swap"):
            self._now(leader)
        action = self._random.choice((Action.KILL, Action.KILL, Action.STOP))
        if not self._armed(successor, Order(point=point, action=action)):
            return
        epoch = self._cluster.next_epoch()
        try:
            outcome = successor.ask("lead", epoch)
        except Ended:
            if action is Action.STOP and successor.stops_within(1.0):
                self._stopped(successor, point, True)
            else:
                self._ended(successor, point, successor.ends_within(1.0), action)
                self._elect_another(successor)
            return
        self.missed[point] += 1
        successor.ask("arm", None)
        self._cluster.led(successor, epoch, outcome)

    def _follower(self, point: str) -> None:
        follower = self._follower_process()
        if not self._armed(follower, Order(point=point, count=self._random.randint(1, 5))):
            return
        self._ended(follower, point, follower.ends_within(REACHED_WITHIN_S), Action.KILL)

    def _compaction(self, point: str) -> None:
        """The process that compacts is killed; the replicas live on."""
        leader = self._cluster.leader()
        times = self._random.randint(1, 4) if point.startswith("compact.sync") else 1
        try:
            before = leader.ask("state")["killed"]
            leader.ask("compaction", Order(point=point, count=times))
            until = time.monotonic() + COMPACTED_WITHIN_S
            while leader.ask("state")["killed"] == before:
                if time.monotonic() > until:
                    self.missed[point] += 1
                    leader.ask("compaction", None)
                    return
                time.sleep(0.02)
        except Ended:
            self.missed[point] += 1
            return
        self.kills[point] += 1

    def _at_any_moment(self) -> None:
        time.sleep(self._random.random() * 0.2)
        leader = self._cluster.leader()
        if self._random.random() < 0.3:
            self._now(self._follower_process())
        elif self._random.random() < 0.25:
            leader.signal(signal.SIGSTOP)
            self._stopped(leader, RANDOM, leader.stops_within(REACHED_WITHIN_S))
        else:
            self._now(leader)
            self._elect_another(leader)

    def _rivals(self) -> None:
        """Two replicas are told to lead at the same time, as by two controllers."""
        first, second = self._random.sample(self._cluster.all_replicas(), 2)
        epochs = self._cluster.next_epoch(), self._cluster.next_epoch()
        try:
            asked = first.order("lead", epochs[0]), second.order("lead", epochs[1])
            outcomes = first.answer(asked[0]), second.answer(asked[1])
        except Ended:
            return
        self.stops[RIVALS] += 1
        self._cluster.led(first, epochs[0], outcomes[0])
        self._cluster.led(second, epochs[1], outcomes[1])

    def _on_bad_disk(self) -> None:
        """One call of the log fails; the same process goes on by itself."""
        leader = self._cluster.leader()
        place = self._random.choice(("write.write.segment.before", "write.sync.segment.before"))
        action = self._random.choice((Action.FULL, Action.IO_ERROR))
        order = Order(point=place, action=action, count=self._random.randint(1, 5))
        if not self._armed(leader, order):
            return
        self.disk_errors[f"{place} {action}"] += 1
        try:
            seq = leader.ask("state")["seq"]
            until = time.monotonic() + REACHED_WITHIN_S
            while time.monotonic() < until and leader.ask("state")["seq"] < seq + 20:
                time.sleep(0.05)
        except Ended:
            return

    def _armed(self, process: ReplicaProcess, order: Order) -> bool:
        try:
            process.ask("arm", order)
        except Ended:
            self.missed[order.point] += 1
            return False
        return True

    def _now(self, process: ReplicaProcess) -> None:
        process.signal(signal.SIGKILL)
        process.ends_within(REACHED_WITHIN_S)
        self.kills[RANDOM] += 1

    def _ended(self, process: ReplicaProcess, point: str, reached: bool, action: Action) -> None:
        if not reached:
            self.missed[point] += 1
            self._now(process)
            return
        self.kills[f"{point} (torn)" if action is Action.TEAR else point] += 1

    def _stopped(self, process: ReplicaProcess, point: str, reached: bool) -> None:
        """A successor takes writes meanwhile; then the process wakes up, or is killed."""
        if not reached:
            self.missed[point] += 1
            self._now(process)
            self._elect_another(process)
            return
        self.stops[point] += 1
        self._elect_another(process)
        time.sleep(self._random.random() * STOPPED_S)
        if self._random.random() < 0.3:
            process.signal(signal.SIGKILL)
            process.ends_within(REACHED_WITHIN_S)
            self.kills[WHILE_STOPPED] += 1
        else:
            process.signal(signal.SIGCONT)

    def _elect_another(self, process: ReplicaProcess) -> None:
        self._cluster.elect(self._cluster.others(process.number))

    def _follower_process(self) -> ReplicaProcess:
        return self._cluster.replica(self._cluster.others()[0])
