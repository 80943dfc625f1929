"""Waiting for a cluster's own routers: which answers count, how long, and what is said then."""

from collections.abc import Callable
from typing import Any

import pytest

from shardline.cluster.serving.await_routers import (
    FOREIGN_S,
    OTHERS_S,
    AnotherCluster,
    Ready,
    wait_for_hosts,
    wait_for_routers,
)
from shardline.shards.core.errors import Unavailable

ONE, TWO = "http://10.0.0.1:8000", "http://10.0.0.2:8000"


def status(*connected: bool, cluster_id: str = "own") -> dict[str, Any]:
    shards = [{"shard": number, "connected": each} for number, each in enumerate(connected)]
    return {"cluster_id": cluster_id, "shards": shards, "warnings": []}


class Hosts:
    """Routers by URL: what they answer, from which second on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.answers: dict[str, list[tuple[float, dict[str, Any]]]] = {}
        self.asked: list[str] = []

    def ask(self, url: str) -> dict[str, Any]:
        self.asked.append(url)
        due = [answer for at_s, answer in self.answers[url] if at_s <= self.now - 100]
        if not due:
            raise Unavailable("cannot be connected to")
        return due[-1]

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(
        self, wanted: int, timeout_s: float = 30, started: Callable[[], None] = lambda: None
    ) -> Ready:
        return wait_for_routers(
            lambda: list(self.answers),
            self.ask,
            cluster_id="own",
            wanted=wanted,
            timeout_s=timeout_s,
            check_started=started,
            clock=lambda: self.now,
            sleep=self.sleep,
        )


@pytest.fixture
def hosts() -> Hosts:
    return Hosts()


def test_all_routers_that_are_wanted_are_waited_for(hosts: Hosts) -> None:
    hosts.answers = {ONE: [(0, status(True))], TWO: [(3, status(True, False)), (5, status(True))]}
    ready = hosts.wait(2)
    assert list(ready.statuses) == [ONE, TWO]
    assert 5 <= hosts.now - 100 < 6
    assert hosts.asked.count(ONE) == 1, "one that is ready is not asked again"
    assert ready.warnings == []


def test_a_router_without_a_shard_is_not_ready(hosts: Hosts) -> None:
    hosts.answers = {ONE: [(0, status(True, False, False))]}
    with pytest.raises(Unavailable, match=r"no router became ready.*30 s.*shards \[1, 2\] are not"):
        hosts.wait(1)


def test_another_clusters_answer_does_not_count(hosts: Hosts) -> None:
    """HAProxy of a cluster that has ended otherwise still answers at the port."""
    orphan = status(True, cluster_id="other")
    hosts.answers = {ONE: [(0, orphan), (FOREIGN_S / 2, status(True))]}
    assert list(hosts.wait(1).statuses) == [ONE]


def test_another_cluster_that_stays_is_named_before_the_time_is_up(hosts: Hosts) -> None:
    hosts.answers = {ONE: [(0, status(True, cluster_id="other"))]}
    with pytest.raises(
        AnotherCluster, match=r"another cluster answers at .*8000.*got cluster other"
    ):
        hosts.wait(1, timeout_s=300)
    assert hosts.now - 100 < FOREIGN_S + 1


def test_an_answer_without_an_identity_is_none_of_ours(hosts: Hosts) -> None:
    old = status(True)
    del old["cluster_id"]
    hosts.answers = {ONE: [(0, old)]}
    with pytest.raises(AnotherCluster, match=r"earlier version"):
        hosts.wait(1)


def test_a_host_without_a_router_delays_the_others_for_a_bounded_time(hosts: Hosts) -> None:
    hosts.answers = {ONE: [(0, status(True))], TWO: []}
    ready = hosts.wait(2, timeout_s=1)
    assert OTHERS_S <= hosts.now - 100 < OTHERS_S + 1
    assert ready.warnings == [f"{TWO} does not answer: cannot be connected to"]


def test_another_cluster_on_one_host_is_a_warning_where_others_are_ready(hosts: Hosts) -> None:
    hosts.answers = {ONE: [(0, status(True))], TWO: [(0, status(True, cluster_id="other"))]}
    assert "another cluster answers" in hosts.wait(2).warnings[0]


def test_warnings_of_the_router_are_passed_on(hosts: Hosts) -> None:
    warns = status(True) | {"warnings": [{"about": "state", "code": "x", "text": "damaged"}]}
    hosts.answers = {ONE: [(0, warns)]}
    assert hosts.wait(1).warnings == ["state: damaged"]


def test_a_start_that_serve_has_given_up_ends_the_wait(hosts: Hosts) -> None:
    hosts.answers = {ONE: []}

    def given_up() -> None:
        raise Unavailable("the HTTP front end did not start")

    with pytest.raises(Unavailable, match=r"did not start"):
        hosts.wait(1, started=given_up)
    assert hosts.now - 100 < 3


def test_routers_that_nobody_has_heard_of_are_said_to_be(hosts: Hosts) -> None:
    with pytest.raises(Unavailable, match=r"no router has been heard of.*start_timeout_s=60"):
        hosts.wait(1)


def test_hosts_are_counted_until_all_have_a_router_or_the_time_is_up(hosts: Hosts) -> None:
    def wait(count: Callable[[], int]) -> int:
        return wait_for_hosts(count, 3, clock=lambda: hosts.now, sleep=hosts.sleep)

    assert wait(lambda: 3 if hosts.now > 105 else 1) == 3
    assert 105 < hosts.now < 106
    assert wait(lambda: 2) == 2
    assert 105 + OTHERS_S < hosts.now < 107 + OTHERS_S
