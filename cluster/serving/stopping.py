"""Stops a cluster, or Ray itself on every host that it runs on."""

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shardline.cluster.control.actor_name import CONTROLLER_NAME, SHARD_ACTOR_PREFIX
from shardline.cluster.control.ray_hosts import living_hosts
from shardline.cluster.http_address import EVERYWHERE, host_and_port
from shardline.cluster.rollover.mirror_actor import MIRROR_PREFIX
from shardline.cluster.serving.front_end import serve_http, serve_runs, stop_front_end
from shardline.cluster.serving.joining import answers_at
from shardline.cluster.serving.ray_session import NAMESPACE
from shardline.shards.core.errors import Unavailable

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
HEAD_RESOURCE = "node:__internal_head__"
# A worker process is started for it on a host that may have none left.
ORDER_TIMEOUT_S = 30.0
# `ray stop` itself waits up to 16 s for processes that do not end, and kills them then.
STOPPED_WITHIN_S = 30.0
POLL_S = 0.2
SERVE_RETURNS_S = 10.0  # its controller, started again by Ray, takes about three
HAPROXY_START = "haproxy_start.py"  # the program that becomes HAProxy, or its watcher
HAPROXY_ENDS_BY_ITSELF_S = 2.0
HAPROXY_IS_ENDED_S = 5.0
# The process that runs it is a child of a process that it ends: so in a session of its own, as a
# grandchild, and a moment later, when the order has been acknowledged.
STOP = "import sys; sys.argv = ['ray', 'stop']; from ray.scripts.scripts import main; main()"
ORDER = f'(sleep 1; exec "$0" -c "{STOP}") &'


def stop_serving(*, keep_serve: bool = False) -> bool:
    """Stops routers, shards and controller of the Ray this process is attached to; whether there
    was anything of them.

    Serve ends too unless ``keep_serve``, or other applications run on it, which are left alone.
    """
    if not ray.is_initialized():
        return False
    stop_front_end(keep_serve=keep_serve)
    return stop_shards()


def stop_launched() -> tuple[bool, tuple[str, ...]]:
    """``stop_serving`` on a launched cluster; returns once no HAProxy listens any more, and where
    one still does when the time is up. Where Serve goes on for others, it goes on listening."""
    http = _http_of_serve()
    found = stop_serving()
    if http is None or serve_runs():
        return found, ()
    host, port = http
    nodes = {host_and_port(each.address, port): each.node_id for each in living_hosts()}
    left = set(nodes)
    if host in EVERYWHERE:  # else it cannot be asked from another host
        left = _listening(left, HAPROXY_ENDS_BY_ITSELF_S)
    if left:
        _not_taken({place: _task(end_haproxy, nodes[place], nodes[place]) for place in left})
        left = _listening(left, HAPROXY_IS_ENDED_S)
    return found, tuple(sorted(left))


def _http_of_serve() -> tuple[str, int] | None:
    """As ``serve_http``; a controller of Serve's that has died is waited for, and then logged: the
    rest is stopped without it."""
    deadline = time.monotonic() + SERVE_RETURNS_S
    while True:
        try:
            return serve_http()
        except Unavailable as error:
            if time.monotonic() > deadline:
                logger.warning("HAProxy may go on listening: %s", error)
                return None
        time.sleep(POLL_S)


def _listening(places: set[str], within_s: float) -> set[str]:
    """Those of the places, HOST:PORT, where somebody still listens when the time is up."""
    deadline = time.monotonic() + within_s
    while left := set(filter(answers_at, places)):
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    return left


def end_haproxy(node_id: str) -> None:
    """Ends every HAProxy of a Ray node with its watcher; runs on that host.

    A watcher takes an end by Serve for a crash where the manager is gone before it has looked, and
    keeps a substitute for a minute.
    """
    for process in psutil.process_iter(["cmdline"]):
        if is_haproxy_of(process.info["cmdline"] or [], node_id):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                process.kill()


def is_haproxy_of(words: Sequence[str], node_id: str) -> bool:
    """Whether a command line is of HAProxy or its watcher: Ray keeps their files in a folder that
    is named like the node."""
    is_one = any(Path(word).name in ("haproxy", HAPROXY_START) for word in words[:3])
    return is_one and any(f"/{node_id}/" in word for word in words)


def stop_shards() -> bool:
    """Stops the controller and its shards; whether there were any. Needs Ray attached."""
    found = _end_actors(MIRROR_PREFIX)  # first: they ask the controller
    with suppress(ValueError):  # there is no controller: it never started, or is gone already
        controller = ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)
        found = True
        with suppress(ray.exceptions.RayError):  # it died: its shards are ended just below
            ray.get(controller.close.remote(), timeout=CLOSE_TIMEOUT_S)
        ray.kill(controller)
    return _end_actors(SHARD_ACTOR_PREFIX) or found


def _end_actors(prefix: str) -> bool:
    """Ends the actors whose names begin so; whether there were any."""
    names = [name for name in ray.util.list_named_actors() if name.startswith(prefix)]
    for name in names:
        with suppress(ValueError):
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    return bool(names)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayHosts:
    """Addresses of a Ray cluster's hosts. missing: those that Ray has lost, and still may run."""

    head: str
    workers: tuple[str, ...]
    missing: tuple[str, ...]


def hosts_of(nodes: Sequence[dict[str, Any]]) -> tuple[RayHosts, dict[str, str]]:
    """From what Ray says of its nodes; and the node id of each living host."""
    ids = {node["NodeManagerAddress"]: node["NodeID"] for node in nodes if node["Alive"]}
    heads = [
        node["NodeManagerAddress"]
        for node in nodes
        if node["Alive"] and HEAD_RESOURCE in node["Resources"]
    ]
    head = heads[0] if heads else ""
    known = {node["NodeManagerAddress"] for node in nodes}
    hosts = RayHosts(
        head=head,
        workers=tuple(sorted(set(ids) - {head})),
        missing=tuple(sorted(known - set(ids))),
    )
    return hosts, ids


def end_ray(head: str, note: Callable[[str], None]) -> tuple[str, ...]:
    """Ends Ray on every host, the head after the other hosts; the addresses of hosts where it may
    still run.

    head: HOST:PORT of the head. This process is attached to it, and no more afterwards. Orders are
    given through this host's Ray: so it ends last, if it is not the head.
    """
    hosts, ids = hosts_of(ray.nodes())
    here = ray.get_runtime_context().get_node_id()
    own = {address for address in hosts.workers if ids[address] == here}
    others = set(hosts.workers) - own
    left = set(hosts.missing)
    left |= _not_taken({address: _order(ids[address]) for address in sorted(others)})
    ended = others - left
    left |= _still_alive(ended)
    for address in sorted(ended - left):
        note(f"ended Ray on {address}")
    if hosts.head:
        left |= _not_taken({hosts.head: _order(ids[hosts.head])})
    ray.shutdown()
    deadline = time.monotonic() + STOPPED_WITHIN_S
    while answers_at(head):
        if time.monotonic() > deadline:
            left.add(hosts.head or head)
            break
        time.sleep(POLL_S)
    else:
        note(f"ended Ray on {hosts.head or head}, the head")
    for address in own:
        if _stop_own():
            note(f"ended Ray on {address}, this host")
        else:
            left.add(address)
    return tuple(sorted(left))


def _stop_own() -> bool:
    """Ends this host's Ray, which has no head any more to take an order from; whether it has."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", STOP],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=STOPPED_WITHIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _order(node_id: str) -> Any:
    """Has a host end its Ray a second later; the reference to the acknowledgement."""
    return _task(_stop_here, node_id, ORDER)


def _task(function: Callable[..., None], node_id: str, *arguments: str) -> Any:
    """Runs a function on one host; the reference to its end."""
    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=pinned)
    return task.remote(*arguments)


def _stop_here(order: str) -> None:
    """Runs on the host, in a worker process of Ray's."""
    subprocess.run(
        ["/bin/sh", "-c", order, sys.executable],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
    )


def _not_taken(orders: dict[str, Any]) -> set[str]:
    """The hosts that did not acknowledge."""
    missing = set()
    deadline = time.monotonic() + ORDER_TIMEOUT_S
    for address, reference in orders.items():
        try:
            ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.RayError as error:
            logger.warning("%s did not end what it was told to: %s", address, error)
            missing.add(address)
    return missing


def _still_alive(addresses: set[str]) -> set[str]:
    """Those of the hosts that Ray still counts as alive when the time is up."""
    deadline = time.monotonic() + STOPPED_WITHIN_S
    while True:
        alive = {host.address for host in living_hosts()}
        if not addresses & alive or time.monotonic() > deadline:
            return addresses & alive
        time.sleep(POLL_S)
