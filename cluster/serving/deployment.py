"""Brings a generation up behind HTTP, and takes it down: controller, shards, router, in that order.

Ray must be running already (``cluster.serving.ray_session``). On a private Ray the serving process
stays in the foreground and leaves a note in the store, so that other commands find it.
"""

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve.exceptions import RayServeException

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.control.controller import (
    CONTROLLER_NAME,
    Controller,
    ControllerSettings,
    start_controller,
    wait_ready,
)
from shardline.cluster.control.shard_actors import SHARD_ACTOR_PREFIX
from shardline.cluster.preflight.check import enforce
from shardline.cluster.preflight.http_address import LOOPBACK, literal_address, local_url
from shardline.cluster.preflight.machine import before_start
from shardline.cluster.preflight.servable import find_damage, servable_generation
from shardline.cluster.serving.endpoint import (
    Address,
    Endpoint,
    leave_note,
    refuse_if_served,
    remove_note,
)
from shardline.cluster.serving.ray_session import NAMESPACE, free_port
from shardline.cluster.serving.serving_keys import ServingKeys, serving_keys
from shardline.cluster.store import Store
from shardline.router.http.auth import AuthSettings
from shardline.router.serve.environment import write_launcher
from shardline.router.serve.replica import RouterReplica
from shardline.shards.core.errors import (
    CorruptFile,
    NewerFormat,
    NotFound,
    ShardlineError,
    Unavailable,
    last_line,
)

logger = logging.getLogger(__name__)

APPLICATION = "shardline"
READY_POLL_S = 0.05
# How often Serve asks a replica whether it lives: a killed router is noticed so much later.
HEALTH_CHECK_PERIOD_S = 1.0
# Of an answer to that; three that fail, and Serve replaces a router that stopped or hangs.
HEALTH_CHECK_TIMEOUT_S = 4.0


@contextmanager
def serving(
    config: ShardlineConfig,
    *,
    keys: ServingKeys | None = None,
    generation: int | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Iterator[Endpoint]:
    """Serves a generation for the length of the block.

    generation None: the live one, and after a restart of the controller the one that is live then.
    keys None: those that the configuration or the environment names, or the store's.

    Raises:
        NotFound: there is no such generation, or no such key file.
        ConfigError: the keys are not to be used.
        CorruptFile: a file of the generation does not match its checksum.
        Unavailable: the store is being served already, the port is taken, a shard cannot be
            placed, or something did not become ready in time.
    """
    store = Store(config.store.resolve())
    refuse_if_served(store)
    endpoint = start_serving(config, keys=keys, generation=generation, on_stage=on_stage)
    try:
        leave_note(store, endpoint)
        yield endpoint
    finally:
        try:
            stop_serving()
        finally:
            remove_note(store, endpoint)


def start_serving(
    config: ShardlineConfig,
    *,
    keys: ServingKeys | None = None,
    generation: int | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Endpoint:
    """Starts controller, shards and router; returns once all of them answer.

    What was started is stopped again when something fails. Raises as ``serving``.
    """
    store = Store(config.store.resolve())
    number = servable_generation(store, generation)
    enforce(before_start(config))
    keys = keys or serving_keys(config)
    on_stage(keys.note)
    port = config.cluster.http_port or free_port()
    on_stage(f"loading generation {number} into its shards")
    controller = start_controller(
        ControllerSettings(
            store=str(store.root),
            generation=generation,
            secret=secrets.token_bytes(32),
            shard_host=config.cluster.shard_host,
            threads_per_shard=config.cluster.threads_per_shard,
            cpus_per_shard=config.cluster.cpus_per_shard,
            gpus_per_shard=config.cluster.gpus_per_shard,
            huge_pages=config.cluster.huge_pages,
        )
    )
    try:
        # another generation than that checked above if one has become live since
        number = _wait_loaded(controller, store, number, config.cluster.start_timeout_s, on_stage)
        on_stage("starting the HTTP front end")
        _start_router(config, port, keys.auth)
        url = local_url(config.cluster.http_host, port)
        for warning in _wait_connected(Address(url, keys.own), config.cluster.start_timeout_s):
            on_stage(f"warning: {warning['about']}: {warning['text']}")
    except BaseException:
        stop_serving()
        raise
    return Endpoint(
        url=url,
        generation=number,
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        key_file=keys.auth.key_file,
    )


def stop_serving() -> None:
    """Stops router, shards and controller of the Ray this process is attached to.

    Other Serve applications of that Ray are left alone.
    """
    if not ray.is_initialized():
        return
    try:
        serve.delete(APPLICATION)
    except (ray.exceptions.RayError, RayServeException, RuntimeError) as error:
        logger.warning("the HTTP front end did not stop in order: %s", error)
    with suppress(ValueError):  # there is no controller: it never started, or is gone already
        controller = ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)
        with suppress(ray.exceptions.RayError):  # it died: its shards are ended just below
            ray.get(controller.close.remote(), timeout=10)
        ray.kill(controller)
    for actor in ray.util.list_named_actors():
        if actor.startswith(SHARD_ACTOR_PREFIX):
            with suppress(ValueError):
                ray.kill(ray.get_actor(actor, namespace=NAMESPACE))


def shard_reports() -> list[dict[str, Any]]:
    """What every shard process says of itself; needs Ray attached.

    Raises:
        Unavailable: no controller runs there, or it does not answer.
    """
    try:
        controller = ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)
    except ValueError as error:
        raise Unavailable("no controller runs in this Ray cluster") from error
    try:
        reports: list[dict[str, Any]] = ray.get(controller.shard_reports.remote(), timeout=30)
    except ray.exceptions.RayError as error:
        raise Unavailable("the controller does not answer", got=last_line(error)) from error
    return reports


def _wait_loaded(
    controller: "ActorHandle[Controller]",
    store: Store,
    number: int,
    timeout_s: float,
    on_stage: Callable[[str], None],
) -> int:
    """The generation that is served, once every shard answers; raises as ``serving``."""
    try:
        return wait_ready(controller, timeout_s)
    except (CorruptFile, NewerFormat, NotFound) as error:
        # a timeout or too few CPUs is no reason to read every byte; these are
        on_stage(
            f"a shard refused its files: checking generation {number}, then what can be served"
        )
        damage = find_damage(store, number)
        if damage is None:
            raise
        raise damage from error


def _start_router(config: ShardlineConfig, port: int, auth: AuthSettings) -> None:
    cluster = config.cluster
    location, host = "EveryNode", cluster.http_host
    if cluster.address == "local":
        location, host = "HeadOnly", LOOPBACK
        address = literal_address(cluster.http_host)
        write_launcher(config.router, insecure=cluster.insecure, address=address)
    application = (
        serve.deployment(RouterReplica)
        .options(
            name="router",
            health_check_period_s=HEALTH_CHECK_PERIOD_S,
            health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
            num_replicas=cluster.routers_per_host,
            # the service refuses overload itself, early and with Retry-After
            max_ongoing_requests=config.router.max_in_flight * 2,
            ray_actor_options={"num_cpus": 0},
            # no access log: even a line that is not written costs 0.05 ms of the replica's loop
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        .bind(
            config=config.router,
            controller=CONTROLLER_NAME,
            namespace=NAMESPACE,
            auth=auth,
            huge_pages=cluster.huge_pages,
        )
    )
    try:
        serve.start(proxy_location=location, http_options={"host": host, "port": port})
        serve.run(application, name=APPLICATION, route_prefix="/")
    except (RuntimeError, TimeoutError, RayServeException, ray.exceptions.RayError) as error:
        raise Unavailable("the HTTP front end did not start", got=last_line(error)) from error


def _wait_connected(address: Address, timeout_s: float) -> list[dict[str, str]]:
    """Once the router answers and every shard is connected to it: the warnings of its status."""
    deadline = time.monotonic() + timeout_s
    with address.client() as client:
        while True:
            try:
                status = client.status()
                missing = [s["shard"] for s in status["shards"] if not s["connected"]]
                reason = f"shards {missing} are not connected"
            except ShardlineError as error:
                missing, reason = [-1], str(error)
            if not missing:
                warnings: list[dict[str, str]] = status["warnings"]
                return warnings
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"{address.url} did not become ready",
                    expected=f"within {timeout_s:g} s",
                    got=reason,
                    hint=f"allow more with --set cluster.start_timeout_s={2 * timeout_s:g}",
                )
            time.sleep(READY_POLL_S)
