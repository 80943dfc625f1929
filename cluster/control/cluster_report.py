"""What the controller tells of the cluster, as plain data: hosts, replicas, routers, progress."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shardline.cluster.control.hosts import Host
from shardline.cluster.control.placement_state import Placement, ReplicaState, Stage
from shardline.cluster.http_address import url_of
from shardline.shards.core.messages import RouterSeen

EXPIRE_S = 15.0  # three of the polls with which a router announces itself


@dataclass(frozen=True, slots=True)
class Heard:
    """A router, and when it announced itself last, in seconds of the controller's clock."""

    router: RouterSeen
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Http:
    """Where the HTTP front ends listen: address and port are the same on every host."""

    host: str
    port: int

    def url(self, host: str) -> str:
        """Of a host's own front end, by which others reach it if it listens for them."""
        return url_of(self.host, self.port, host)


def cluster_report(
    placement: Placement,
    *,
    known_hosts: Iterable[Host],
    routers: Iterable[Heard],
    http: Http,
    now_s: float,
) -> dict[str, Any]:
    """The state of the cluster, ready for JSON.

    {"cluster_id", "generation", "version", "http_port", "replicas_wanted",
    "hosts": [{"host", "node_id", "alive", "replicas": ["shard/replica", ..], "router"}],
    "replicas": [{"shard", "replica", "host", "address", "epoch", "answers", "stage", "failures",
    "reason": {"code", "text"} or None}],
    "routers": [{"host", "node_id", "pid", "url", "heard_s"}], "notes": [{"code", "text"}],
    "restart": as ``restart_progress``}. known_hosts: those that live, and those that did.
    """
    table = placement.table
    living = list(routers_alive(routers, placement, now_s))
    return {
        "cluster_id": table.cluster_id,
        "generation": table.generation,
        "version": table.version,
        "http_port": http.port,
        "replicas_wanted": placement.rules.replicas,
        "hosts": [_host(host, placement, living) for host in known_hosts],
        "replicas": [_replica(state, placement) for state in placement.replicas.values()],
        "routers": [
            {
                **asdict(heard.router),
                "url": http.url(heard.router.host),
                "heard_s": round(now_s - heard.at_s, 3),
            }
            for heard in living
        ],
        "notes": [asdict(note) for note in table.notes],
        "restart": restart_progress(placement),
    }


def restart_progress(placement: Placement) -> dict[str, Any] | None:
    """{"number", "total", "done", "is_over", "is_stopped", "trouble": {"code", "text"} or None} of
    the newest rolling restart; None: there was none of this generation."""
    restart = placement.restart
    if restart is None:
        return None
    left = sum(map(restart.is_old, placement.replicas))
    return {
        "number": restart.number,
        "total": restart.total,
        "done": max(0, restart.total - left),
        "is_over": restart.is_over,
        "is_stopped": restart.is_stopped,
        "trouble": None if restart.trouble is None else asdict(restart.trouble),
    }


def routers_alive(routers: Iterable[Heard], placement: Placement, now_s: float) -> Iterable[Heard]:
    """Those that were heard of lately and whose hosts live."""
    for heard in routers:
        is_known = heard.router.node_id in placement.hosts
        if is_known and now_s - heard.at_s < EXPIRE_S:
            yield heard


def with_known(known: Mapping[str, Host], living: Iterable[Host]) -> dict[str, Host]:
    """Hosts by node id: the living ones, and those gone whose address no living one has."""
    alive = {host.node_id: host for host in living}
    addresses = {host.address for host in alive.values()}
    gone = {
        node_id: host
        for node_id, host in known.items()
        if node_id not in alive and host.address not in addresses
    }
    by_address = sorted({**gone, **alive}.values(), key=lambda host: (host.address, host.node_id))
    return {host.node_id: host for host in by_address}


def _host(host: Host, placement: Placement, routers: list[Heard]) -> dict[str, Any]:
    held = [state.key for state in placement.replicas.values() if state.node_id == host.node_id]
    return {
        "host": host.address,
        "node_id": host.node_id,
        "alive": host.node_id in placement.hosts,
        "replicas": [f"{key.shard}/{key.replica}" for key in held],
        "router": any(heard.router.node_id == host.node_id for heard in routers),
    }


def _replica(state: ReplicaState, placement: Placement) -> dict[str, Any]:
    route = state.route
    return {
        "shard": route.key.shard,
        "replica": route.key.replica,
        "host": route.host,
        "node_id": state.node_id,
        "address": route.address,
        "epoch": route.epoch,
        "answers": state.answers and state.stage is not Stage.DRAINING,
        "stage": str(state.stage),
        "failures": state.failures,
        "reason": None if route.absence is None else asdict(route.absence),
    }
