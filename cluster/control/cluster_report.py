"""What the controller tells of the cluster, as plain data: hosts, replicas, routers, progress."""

from dataclasses import asdict, dataclass
from typing import Any

from shardline.cluster.control.hosts import Host
from shardline.cluster.control.news import Heard, News
from shardline.cluster.control.placement_state import Placement, ReplicaState, Stage
from shardline.cluster.http_address import url_of


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
    news: News,
    http: Http,
    now_s: float,
) -> dict[str, Any]:
    """The state of the cluster, ready for JSON.

    {"cluster_id", "generation", "version", "http_port", "replicas_wanted",
    "hosts": [{"host", "node_id", "alive", "replicas": ["shard/replica", ..], "router"}],
    "replicas": [{"shard", "replica", "host", "address", "epoch", "answers", "stage", "failures",
    "reason": {"code", "text"} or None}],
    "routers": [{"host", "node_id", "pid", "url", "heard_s"}], "notes": [{"code", "text"}],
    "restart": as ``restart_progress``}. A router is one that was heard of lately, on a living host.
    """
    table = placement.table
    living = [each for each in news.routers(now_s) if each.router.node_id in placement.hosts]
    silence = news.silence(now_s)
    notes = (*table.notes, *([] if silence is None else [silence]))
    return {
        "cluster_id": table.cluster_id,
        "generation": table.generation,
        "version": table.version,
        "http_port": http.port,
        "replicas_wanted": placement.rules.replicas,
        "hosts": [_host(host, placement, living) for host in news.hosts()],
        "replicas": [_replica(state, placement) for state in placement.replicas.values()],
        "routers": [
            {
                **asdict(heard.router),
                "url": http.url(heard.router.host),
                "heard_s": round(now_s - heard.at_s, 3),
            }
            for heard in living
        ],
        "notes": [asdict(note) for note in notes],
        "restart": restart_progress(placement),
    }


def restart_progress(placement: Placement) -> dict[str, Any] | None:
    """{"number", "total", "done", "is_over", "is_stopped", "trouble": {"code", "text"} or None} of
    the newest rolling restart; None: there was none of this generation."""
    restart = placement.restart
    if restart is None:
        return None
    is_whole = restart.is_over and not restart.is_stopped
    left = 0 if is_whole else sum(map(restart.is_old, placement.replicas))
    return {
        "number": restart.number,
        "total": restart.total,
        "done": max(0, restart.total - left),
        "is_over": restart.is_over,
        "is_stopped": restart.is_stopped,
        "trouble": None if restart.trouble is None else asdict(restart.trouble),
    }


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
