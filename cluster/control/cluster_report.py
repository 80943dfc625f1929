"""What the controller tells of the cluster, as plain data: hosts, replicas, routers, progress."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shardline.cluster.control.applied import Applied
from shardline.cluster.control.hosts import Host
from shardline.cluster.control.leading import epoch_of, primary_key
from shardline.cluster.control.news import Heard, News
from shardline.cluster.control.placement_state import Placement, ReplicaState, Stage
from shardline.cluster.http_address import url_of
from shardline.shards.core.messages import ReplicaKey, ShardHealth


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
    applied: Applied,
    health: Mapping[ReplicaKey, ShardHealth],
    http: Http,
    now_s: float,
) -> dict[str, Any]:
    """The state of the cluster, ready for JSON.

    {"cluster_id", "generation", "version", "http_port", "replicas_wanted", "writes",
    "hosts": [{"host", "node_id", "alive", "replicas": ["shard/replica", ..], "router"}],
    "shards": [{"shard", "primary", "primary_epoch"}],
    "replicas": [{"shard", "replica", "host", "address", "epoch", "answers", "stage", "failures",
    "seq", "lag", "rows", "index_of", "device_note", "reason": {"code", "text"} or None}],
    "routers": [{"host", "node_id", "pid", "url", "heard_s"}], "notes": [{"code", "text"}],
    "restart": as ``restart_progress``}. A router is one that was heard of lately, on a living host.
    writes: whether shards take any. primary: the number of the replica that takes them, and its
    epoch. seq: writes that a replica has applied; lag: how many fewer than its primary
    (``Applied.lag``); rows: live ones, written and deleted items counted, by its last look at
    itself; index_of: the generation whose index it has taken over; device_note: why it is searched
    on the CPU though its generation is made for a GPU. Each is None where there is
    none, or it is not known.
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
        "writes": placement.rules.writes,
        "hosts": [_host(host, placement, living) for host in news.hosts()],
        "shards": [_shard(shard.shard, placement) for shard in table.shards],
        "replicas": [
            _replica(state) | _applied(state, placement, applied) | _live(state, health)
            for state in placement.replicas.values()
        ],
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


def _shard(shard: int, placement: Placement) -> dict[str, Any]:
    primary = primary_key(placement, shard)
    return {
        "shard": shard,
        "primary": None if primary is None else primary.replica,
        "primary_epoch": None if primary is None else epoch_of(placement, primary),
    }


def _applied(state: ReplicaState, placement: Placement, applied: Applied) -> dict[str, Any]:
    if not state.answers:
        return {"seq": None, "lag": None}
    primary = primary_key(placement, state.key.shard)
    lag = None if primary is None else applied.lag(state.key, primary)
    return {"seq": applied.seq(state.key), "lag": lag}


def _live(state: ReplicaState, health: Mapping[ReplicaKey, ShardHealth]) -> dict[str, Any]:
    found = health.get(state.key) if state.answers else None
    if found is None:
        return {"rows": None, "index_of": None, "device_note": None}
    return {
        "rows": found.rows,
        "index_of": found.index_of,
        "device_note": found.device_note,
    }


def _replica(state: ReplicaState) -> dict[str, Any]:
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
