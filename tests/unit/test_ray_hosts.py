"""What Ray's head says of hosts, and when that is no answer."""

from typing import Any

import pytest
import ray

from shardline.cluster.control import ray_hosts
from shardline.cluster.control.hosts import Host
from shardline.cluster.control.ray_hosts import fresh_hosts, living_hosts


def node(name: str, address: str, *, alive: bool = True, **changes: Any) -> dict[str, Any]:
    resources = {"CPU": 4.0, "GPU": 1.0, "node:10.0.0.1": 1.0}
    described = {"NodeID": name, "Alive": alive, "NodeManagerAddress": address}
    return described | {"Resources": resources, "Labels": None} | changes


NODES = [
    node("b", "10.0.0.2", Labels={"ray.io/availability-zone": "z1"}),
    node("c", "10.0.0.3", alive=False, Resources={}),
    node("own", "10.0.0.1", Resources={}),
]
HOSTS = (
    Host(node_id="own", address="10.0.0.1", cpus=0),
    Host(node_id="b", address="10.0.0.2", cpus=4, gpus=1, zone="z1"),
)


class Context:
    def get_node_id(self) -> str:
        return "own"


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The head's answer, to be changed."""
    nodes = list(NODES)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    return nodes


def test_the_living_hosts_by_address_with_what_they_have(says: list[dict[str, Any]]) -> None:
    assert living_hosts() == HOSTS
    assert fresh_hosts() == HOSTS
    assert fresh_hosts({"own", "b", "c"}) == HOSTS, "that c is dead is said"


def test_an_answer_that_cannot_be_is_none(says: list[dict[str, Any]]) -> None:
    assert fresh_hosts({"own", "z"}) == (), "a head that does not know z has lost its memory"
    says.pop()
    assert fresh_hosts() == (), "this host lives"
    says.clear()
    assert fresh_hosts() == ()


def test_a_late_answer_is_none(says: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    for late, expected in ((0.5, HOSTS), (0.1 + ray_hosts.FRESH_S, ())):
        times = iter([10.0, 10.0 + late])
        monkeypatch.setattr(ray_hosts.time, "monotonic", lambda times=times: next(times))
        assert fresh_hosts() == expected
