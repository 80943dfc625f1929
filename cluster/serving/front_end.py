"""The HTTP front end in Ray Serve: routers as one application, HAProxy in front of them.

On a private Ray there is one host, and Serve ends with it. On a launched cluster there is one
router per host, and Serve may run other applications, which are left alone.
"""

import logging
import math
from typing import Any

import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from shardline.cluster.config import ClusterConfig, ShardlineConfig
from shardline.cluster.control.actor_name import CONTROLLER_NAME
from shardline.cluster.http_address import LOOPBACK, host_and_port, literal_address
from shardline.cluster.preflight.text_models import with_absolute_folder
from shardline.cluster.serving.ray_session import NAMESPACE
from shardline.cluster.store import Store
from shardline.router.http.auth import AuthSettings
from shardline.router.serve.environment import write_launcher
from shardline.router.serve.replica import RouterReplica
from shardline.shards.core.errors import Unavailable, last_line

logger = logging.getLogger(__name__)

APPLICATION = "shardline"
# How often Serve asks a replica whether it lives: a killed router is noticed so much later.
HEALTH_CHECK_PERIOD_S = 1.0
# Of an answer to that; three that fail, and Serve replaces a router that stopped or hangs.
HEALTH_CHECK_TIMEOUT_S = 4.0
FAILURES = (RuntimeError, TimeoutError, RayServeException, ray.exceptions.RayError)


def routers_wanted(cluster: ClusterConfig, hosts: int) -> tuple[int, int]:
    """Router replicas in all, and how many of them one host may have at most."""
    wanted = cluster.router_replicas or hosts
    return wanted, math.ceil(wanted / hosts)


def router_application(
    config: ShardlineConfig, auth: AuthSettings, *, hosts: int
) -> serve.Application:
    """The routers of a cluster on so many living hosts; they ask the controller for the rest."""
    cluster = config.cluster
    wanted, per_host = routers_wanted(cluster, hosts)
    options: dict[str, Any] = {
        "name": "router",
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "num_replicas": wanted,
        # the service refuses overload itself, early and with Retry-After
        "max_ongoing_requests": config.router.max_in_flight * 2,
        "ray_actor_options": {"num_cpus": 0},
        # no access log: even a line that is not written costs 0.05 ms of the replica's loop
        "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
    }
    if cluster.address != "local":  # a host that returns gets its router back
        options["max_replicas_per_node"] = per_host
    deployment: Any = serve.deployment(RouterReplica).options(**options)
    application: serve.Application = deployment.bind(
        config=with_absolute_folder(config.router),
        controller=CONTROLLER_NAME,
        namespace=NAMESPACE,
        auth=auth,
        huge_pages=cluster.huge_pages,
        events_folder=str(Store(config.store.resolve()).events) if cluster.writes else None,
    )
    return application


def start_front_end(config: ShardlineConfig, port: int, auth: AuthSettings, *, hosts: int) -> None:
    """Starts Serve where it does not run yet, and has it start the routers; does not wait for them.

    Raises:
        Unavailable: it did not start.
    """
    cluster = config.cluster
    location, host = "EveryNode", _serve_host(cluster)
    if cluster.address == "local":
        location = "HeadOnly"
        address = literal_address(cluster.http_host)
        write_launcher(config.router, insecure=cluster.insecure, address=address)
    target = serve.RunTarget(
        target=router_application(config, auth, hosts=hosts), name=APPLICATION, route_prefix="/"
    )
    try:
        serve.start(proxy_location=location, http_options={"host": host, "port": port})
        serve.run_many([target], wait_for_applications_running=False)
    except FAILURES as error:
        raise Unavailable("the HTTP front end did not start", got=last_line(error)) from error


def check_started() -> None:
    """Whether the routers can still be expected.

    Raises:
        Unavailable: Serve has given up starting them; with the reason of the last one.
    """
    try:
        found = serve.status().applications.get(APPLICATION)
    except FAILURES as error:  # asked again in a moment
        logger.warning("Serve does not say how the routers are: %s", error)
        return
    if found is not None and found.status is ApplicationStatus.DEPLOY_FAILED:
        told = [found.message, *(each.message for each in found.deployments.values())]
        raise Unavailable(
            "the HTTP front end did not start",
            got=last_line(RuntimeError("\n".join(filter(None, told)))),
        )


def applications() -> set[str] | None:
    """The names of what Serve runs; None: Serve does not run.

    Raises:
        Unavailable: it does not answer.
    """
    if not serve_runs():
        return None
    try:
        return set(serve.status().applications)
    except FAILURES as error:
        raise _no_answer(error) from error


def serve_runs() -> bool:
    """Whether Serve has a controller in this Ray."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return any(each["name"] == SERVE_CONTROLLER_NAME for each in named)


def serve_http() -> tuple[str, int] | None:
    """Address and port at which Serve's HTTP listens, on every host that has any; None: Serve does
    not run.

    Raises:
        Unavailable: it does not answer.
    """
    try:
        client = _get_global_client(raise_if_no_controller_running=False)
    except FAILURES as error:
        raise _no_answer(error) from error
    if client is None:
        return None
    return str(client.http_config.host), int(client.http_config.port)


def check_serve(cluster: ClusterConfig, port: int) -> None:
    """Whether routers can be started beside what Serve runs already.

    Raises:
        Unavailable: they run, Serve does not answer, or it has its HTTP at another address or port,
            which it keeps until it ends.
    """
    running = applications()
    if running is None:
        return
    if APPLICATION in running:
        raise already_served()
    found, wanted = serve_http(), (_serve_host(cluster), port)
    if found is None or found == wanted:
        return
    host, taken = found
    others = ", ".join(sorted(running)) or "none"
    raise Unavailable(
        f"Ray Serve listens elsewhere already; its applications: {others}",
        expected=f"{host_and_port(*wanted)}, as in cluster.http_host and cluster.http_port",
        got=host_and_port(host, taken),
        hint=f"`shardline --set cluster.http_host={host} serve --port {taken}` shares it, or end "
        "Serve with `serve shutdown`",
    )


def already_served() -> Unavailable:
    return Unavailable(
        "a cluster of Shardline's is served on this Ray already",
        hint="`shardline status` shows it, `shardline down` stops it",
    )


def stop_front_end(*, keep_serve: bool) -> None:
    """Ends the routers, and Serve with HAProxy unless that is to be kept or runs others, too."""
    try:
        running = applications()
        if running is None:
            return
        if keep_serve or running - {APPLICATION}:
            if APPLICATION in running:
                serve.delete(APPLICATION)
        else:
            serve.shutdown()
    except (*FAILURES, Unavailable) as error:
        logger.warning("the HTTP front end did not stop in order: %s", error)


def _serve_host(cluster: ClusterConfig) -> str:
    """The address that Serve is told; a private Ray's HAProxy listens at its own."""
    return LOOPBACK if cluster.address == "local" else cluster.http_host


def _no_answer(error: Exception) -> Unavailable:
    return Unavailable("Ray Serve does not answer", got=last_line(error))
