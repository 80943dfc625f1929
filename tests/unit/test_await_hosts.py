"""Hosts that join late: when a start that no person watches goes on, on which hosts, or not."""

from collections.abc import Sequence

import pytest

from shardline.cluster.control.hosts import Host
from shardline.cluster.serving.await_hosts import POLL_S, SETTLED_S, wait_for_hosts
from shardline.cluster.serving.survey import Wanted
from shardline.shards.core.errors import Unavailable

WANTED = Wanted(shards=4, replicas=2, cpus=2)  # two hosts of 8 CPUs
TIMEOUT_S = 100.0
HEAD = Host(node_id="head", address="10.0.0.1", cpus=0)


def worker(number: int) -> Host:
    return Host(node_id=f"node{number}", address=f"10.0.0.{number}", cpus=8)


class World:
    """Hosts by the time from which they live, on a clock that only ``sleep`` moves."""

    def __init__(self, joins: dict[float, Host]) -> None:
        self.now_s = 1000.0
        self._joins = {self.now_s + after_s: host for after_s, host in joins.items()}

    def look(self) -> Sequence[Host]:
        return [HEAD, *(host for at_s, host in self._joins.items() if at_s <= self.now_s)]

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def waited(self, count: int | None = None) -> tuple[float, str | None]:
        """Seconds until the wait was over, and its warning."""
        began = self.now_s
        warning = wait_for_hosts(
            self.look,
            WANTED,
            count=count,
            timeout_s=TIMEOUT_S,
            clock=lambda: self.now_s,
            sleep=self.sleep,
        )
        return self.now_s - began, warning


def test_as_many_hosts_as_wanted_are_waited_for_and_not_a_moment_longer() -> None:
    """With room on the first two the third would get no router."""
    world = World({5: worker(2), 30: worker(3), 60: worker(4)})
    assert world.waited(count=3) == (60, None)


def test_the_head_without_cpus_is_none_of_the_hosts_waited_for() -> None:
    assert World({0: worker(2), 40: worker(3)}).waited(count=2) == (40, None)


def test_hosts_that_all_live_already_are_not_waited_for() -> None:
    assert World({0: worker(2), -1: worker(3)}).waited(count=2) == (0, None)


def test_without_a_number_the_last_to_come_has_come_a_while_ago() -> None:
    world = World({5: worker(2), 30: worker(3), 36: worker(4)})
    assert world.waited() == (36 + SETTLED_S, None)


def test_without_a_number_hosts_without_room_are_not_enough() -> None:
    world = World({0: worker(2), 90: worker(3)})
    waited_s, warning = world.waited()
    assert (waited_s, warning) == (90 + SETTLED_S, None)


def test_if_some_stay_away_those_that_have_room_are_taken_with_a_warning() -> None:
    waited_s, warning = World({0: worker(2), 7: worker(3)}).waited(count=3)
    assert TIMEOUT_S <= waited_s <= TIMEOUT_S + POLL_S
    assert warning is not None
    assert warning.startswith("2 of 3 hosts have joined Ray within 100 s: starts on those")


@pytest.mark.parametrize("count", [None, 3])
def test_too_few_hosts_are_refused_with_the_arithmetic(count: int | None) -> None:
    with pytest.raises(
        Unavailable, match=r"have not joined Ray; expected within 100 s; got 2 replicas .* 1 of 2"
    ):
        World({3: worker(2)}).waited(count)


def test_as_many_hosts_as_wanted_without_room_are_left_to_the_check_of_the_hosts() -> None:
    """No further host is expected, so waiting for room would be in vain."""
    assert World({0: worker(2)}).waited(count=1) == (0, None)
