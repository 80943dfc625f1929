"""A launched cluster, found from any of its hosts: Ray knows the controller by name, and the
controller knows the HTTP addresses of all routers.

What the controller reports stays the plain data that it is on the wire: ``cluster_id``,
``generation``, ``version``, ``http_port``; ``hosts`` [{host, node_id, alive, replicas, router}],
``replicas`` [{shard, replica, host, address, epoch, answers, reason}], ``routers`` [{host, url,
heard_s}], and ``notes`` [{code, text}].
"""

import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import ray

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.control.actor_name import CONTROLLER_NAME
from shardline.cluster.http_address import EVERYWHERE, LOOPBACK, url_of
from shardline.cluster.serving.ray_session import NAMESPACE, attached_ray
from shardline.cluster.serving.serving_keys import key_file_of, key_for
from shardline.router.http.api_keys import Scope, read_keys
from shardline.shards.core.errors import ShardlineError, Unavailable, last_line

REPORT_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 1.0

Report = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """report: the controller's. node_id: Ray's name for the host that asked."""

    report: Report
    node_id: str

    @property
    def urls(self) -> list[str]:
        """Where to ask, this host's own router first, then those heard of last."""
        return ordered_urls(self.report, self.node_id)

    @property
    def shown(self) -> dict[str, str]:
        """Of each of ``urls``, the one by which other hosts reach that router."""
        return _shown_urls(self.report, self.node_id)


def find_launched(address: str, *, verbose: bool = False) -> Launched:
    """Joins the Ray cluster at ``address`` for a moment and asks the controller.

    Raises:
        ConfigError, Unavailable: as ``attached_ray``; no controller runs there, or it does not
            answer.
    """
    with attached_ray(address, verbose=verbose):
        return ask_controller()


def ask_controller() -> Launched:
    """Needs Ray attached.

    Raises:
        Unavailable: no controller runs there, or it does not answer.
    """
    report: Report = asked(controller().report.remote(), timeout_s=REPORT_TIMEOUT_S)
    return Launched(report=report, node_id=ray.get_runtime_context().get_node_id())


def is_served() -> bool:
    """Whether this Ray has a controller of ours."""
    try:
        controller()
    except Unavailable:
        return False
    return True


def controller() -> Any:
    """The handle of this Ray's controller. Raises Unavailable: there is none."""
    try:
        return ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)
    except ValueError as error:
        raise Unavailable(
            "no cluster of Shardline's is served on this Ray",
            hint="start one with `shardline serve`",
        ) from error


def asked(reference: Any, *, timeout_s: float) -> Any:
    """What the controller answers.

    Raises:
        Unavailable: nothing in time, or it has died.
        ShardlineError: what it raised itself.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise Unavailable(
            "the controller does not answer",
            expected=f"within {timeout_s:g} s",
            hint="routers go on meanwhile: name one with --url",
        ) from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ShardlineError):
            raise error.cause from error
        raise Unavailable("the controller failed at it", got=last_line(error)) from error
    except ray.exceptions.RayError as error:
        raise Unavailable("the controller does not answer", got=last_line(error)) from error


def ordered_urls(report: Report, node_id: str) -> list[str]:
    """The routers' URLs, those of the host ``node_id`` first, then those heard of last.

    HAProxy of one's own host is asked at the loopback address, where it listens in any case.
    """
    return list(_shown_urls(report, node_id))


def by_host(urls: Iterable[str]) -> tuple[str, ...]:
    """Each once; that of 10.0.0.9 before that of 10.0.0.10."""

    def key(url: str) -> list[str]:
        return [part.zfill(3) for part in (urlsplit(url).hostname or "").split(".")]

    return tuple(sorted(set(urls), key=key))


def first_answering(urls: Sequence[str]) -> str:
    """The first URL where somebody listens.

    Raises:
        Unavailable: nowhere does anybody, or there is no URL.
    """
    if not urls:
        raise Unavailable(
            "no router of the cluster has been heard of",
            hint="`shardline status` shows the hosts; routers come back within seconds",
        )
    for url in urls:
        parts = urlsplit(url)
        with suppress(OSError):
            socket.create_connection((parts.hostname, parts.port), CONNECT_TIMEOUT_S).close()
            return url
    raise Unavailable("none of the cluster's routers can be connected to", got=", ".join(urls))


def launched_key(config: ShardlineConfig, scope: Scope = Scope.SEARCH) -> str | None:
    """The key for requests of this scope to a launched cluster, from the file that it was served
    with: the store is there on every host. None: it asks for none, or took its keys from an
    environment.

    Raises:
        ConfigError: the file may be read by others, or has a line that is no key.
    """
    path = key_file_of(config)
    if config.cluster.insecure or not path.exists():
        return None
    return key_for(read_keys(path), scope)


def _shown_urls(report: Report, node_id: str) -> dict[str, str]:
    """From where a router is asked to where others ask it, in the order of ``ordered_urls``."""
    own = {host["host"] for host in report["hosts"] if host["node_id"] == node_id}
    routers = sorted(report["routers"], key=lambda router: router["heard_s"])
    first = {
        url_of(EVERYWHERE[0], report["http_port"], LOOPBACK): router["url"]
        for router in routers
        if router["host"] in own
    }
    return first | {router["url"]: router["url"] for router in routers if router["host"] not in own}
