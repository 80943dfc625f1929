"""The living hosts, as Ray's head knows them; blocks while that is away."""

import time
from collections.abc import Collection, Iterable
from typing import Any

import ray

from shardline.cluster.control.hosts import Host

ZONE_LABEL = "ray.io/availability-zone"  # Ray sets it on clouds; elsewhere `ray start --labels`
FRESH_S = 2.0  # an answer that took longer tells of a head that was away: the next one counts


def living_hosts() -> tuple[Host, ...]:
    """The hosts that Ray counts as alive, by address. Needs Ray attached.

    Blocks for as long as the head does not answer, so never call it in an event loop.
    """
    return _living(ray.nodes())


def fresh_hosts(known: Collection[str] = ()) -> tuple[Host, ...]:
    """``living_hosts``; none if the answer is late, or says less than is known for certain.

    This process's host lives. A host of the node ids ``known`` that has died is listed as dead: a
    head that does not list it at all has only just started itself.
    """
    asked_at = time.monotonic()
    nodes = ray.nodes()
    is_late = time.monotonic() - asked_at > FRESH_S
    hosts = _living(nodes)
    own_lives = ray.get_runtime_context().get_node_id() in {host.node_id for host in hosts}
    is_whole = own_lives and {node["NodeID"] for node in nodes}.issuperset(known)
    return hosts if is_whole and not is_late else ()


def _living(nodes: Iterable[dict[str, Any]]) -> tuple[Host, ...]:
    alive = [_host(node) for node in nodes if node["Alive"]]
    return tuple(sorted(alive, key=lambda host: (host.address, host.node_id)))


def _host(node: dict[str, Any]) -> Host:
    resources = node["Resources"]
    return Host(
        node_id=node["NodeID"],
        address=node["NodeManagerAddress"],
        cpus=float(resources.get("CPU", 0)),
        gpus=float(resources.get("GPU", 0)),
        zone=(node.get("Labels") or {}).get(ZONE_LABEL, ""),
    )
