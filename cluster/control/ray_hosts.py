"""The living hosts, as Ray's head knows them; blocks while that is away."""

import time
from typing import Any

import ray

from shardline.cluster.control.hosts import Host

FRESH_S = 2.0  # an answer that took longer tells of a head that was away: the next one counts


def living_hosts() -> tuple[Host, ...]:
    """The hosts that Ray counts as alive, by address. Needs Ray attached.

    Blocks for as long as the head does not answer, so never call it in an event loop.
    """
    alive = [_host(node) for node in ray.nodes() if node["Alive"]]
    return tuple(sorted(alive, key=lambda host: (host.address, host.node_id)))


def fresh_hosts() -> tuple[Host, ...]:
    """``living_hosts``, or none if the answer was late or cannot be: this process's host lives."""
    asked_at = time.monotonic()
    hosts = living_hosts()
    own = ray.get_runtime_context().get_node_id()
    is_late = time.monotonic() - asked_at > FRESH_S
    return () if is_late or own not in {host.node_id for host in hosts} else hosts


def _host(node: dict[str, Any]) -> Host:
    resources = node["Resources"]
    return Host(
        node_id=node["NodeID"],
        address=node["NodeManagerAddress"],
        cpus=float(resources.get("CPU", 0)),
        gpus=float(resources.get("GPU", 0)),
    )
