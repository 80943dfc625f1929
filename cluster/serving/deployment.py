"""Brings a generation up behind HTTP: controller, shards, routers, in that order.

Ray must be running already (``cluster.serving.ray_session``). On a private Ray the serving process
stays in the foreground and leaves a note in the store, so that other commands find it; a launched
cluster is found through its controller (``cluster.serving.launched``).
"""

import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
from ray.actor import ActorHandle

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.control.controller import Controller, ControllerSettings
from shardline.cluster.control.opening import cluster_id_of
from shardline.cluster.control.ray_hosts import living_hosts
from shardline.cluster.control.start import start_controller, wait_ready
from shardline.cluster.http_address import is_loopback, local_url
from shardline.cluster.preflight.check import enforce
from shardline.cluster.preflight.machine import before_start
from shardline.cluster.preflight.servable import find_damage, servable_generation
from shardline.cluster.serving.await_routers import status_of, wait_for_hosts, wait_for_routers
from shardline.cluster.serving.endpoint import (
    Endpoint,
    leave_note,
    refuse_if_served,
    remove_note,
)
from shardline.cluster.serving.front_end import (
    already_served,
    check_serve,
    check_started,
    routers_wanted,
    serve_runs,
    start_front_end,
)
from shardline.cluster.serving.launched import (
    Report,
    ask_controller,
    asked,
    by_host,
    controller,
    is_served,
)
from shardline.cluster.serving.ray_session import free_port
from shardline.cluster.serving.serving_keys import ServingKeys, serving_keys
from shardline.cluster.serving.start_lock import starting
from shardline.cluster.serving.stopping import stop_launched, stop_serving
from shardline.cluster.serving.survey import survey
from shardline.cluster.store import Store
from shardline.shards.core.errors import CorruptFile, NewerFormat, NotFound, Unavailable

REPORTS_TIMEOUT_S = 30.0
MOST_NAMED = 8  # replicas in one message
LOAD_TRIES = 3  # hosts on which a shard that does not load is tried in the time of a start


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What is served, and where: the URLs of all routers, at least one.

    key_file None: no key is required, or they came from the environment.
    """

    generation: int
    urls: tuple[str, ...]
    key_file: str | None


@contextmanager
def serving(
    config: ShardlineConfig,
    *,
    keys: ServingKeys | None = None,
    generation: int | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Iterator[Endpoint]:
    """Serves a generation from this process's private Ray for the length of the block.

    generation None: the live one, and after a restart of the controller the one that is live then.
    keys None: those that the configuration or the environment names, or the store's.

    Raises:
        NotFound: there is no such generation, or no such key file.
        ConfigError: the keys are not to be used.
        CorruptFile: a file of the generation does not match its checksum.
        Unavailable: the store is being served already, or a gc is at work in it; the port is taken,
            a shard cannot be placed, or something did not become ready in time.
    """
    store = Store(config.store.resolve())
    with ExitStack() as until_noted:
        until_noted.enter_context(starting(store))
        refuse_if_served(store)
        started = start_serving(config, keys=keys, generation=generation, on_stage=on_stage)
        endpoint = Endpoint(
            url=started.urls[0],
            generation=started.generation,
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            key_file=started.key_file,
            host=platform.node(),
        )
        try:
            leave_note(store, endpoint)
            until_noted.close()
            yield endpoint
        finally:
            try:
                stop_serving(keep_serve=True)
            finally:
                remove_note(store, endpoint)


def start_serving(
    config: ShardlineConfig,
    *,
    keys: ServingKeys | None = None,
    generation: int | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Started:
    """Starts controller, shards and routers; returns once all of them answer.

    What was started is stopped again when something fails, and nothing else: not a cluster that
    was there before, nor Serve if that ran already. Raises as ``serving``.
    """
    store = Store(config.store.resolve())
    number = servable_generation(store, generation)
    enforce(before_start(config))
    port = config.cluster.http_port or free_port()
    had_serve = serve_runs()
    if is_served():
        raise already_served()
    if had_serve:
        check_serve(config.cluster, port)
    if config.cluster.address != "local":
        on_stage("looking at the hosts")
        for warning in enforce(survey(config, number, is_served=False, has_serve=had_serve)):
            on_stage(f"warning: {warning}")
    keys = keys or serving_keys(config)
    on_stage(keys.note)
    on_stage(f"loading generation {number} into its shards")
    settings = controller_settings(config, store, generation, port)
    handle = start_controller(settings)
    try:
        # another generation than that checked above if one has become live since
        number = wait_loaded(handle, store, number, config.cluster.start_timeout_s, on_stage)
        on_stage("starting the HTTP front end")
        hosts = len(living_hosts())
        start_front_end(config, port, keys.auth, hosts=hosts)
        urls, warnings = _wait_connected(
            config, port, keys.own, hosts=hosts, cluster_id=cluster_id_of(settings.secret)
        )
        for warning in warnings:
            on_stage(f"warning: {warning}")
    except BaseException:
        if had_serve or config.cluster.address == "local":
            stop_serving(keep_serve=had_serve)
        else:
            stop_launched()
        raise
    return Started(generation=number, urls=urls, key_file=keys.auth.key_file)


def shard_reports() -> list[dict[str, Any]]:
    """What every shard process says of itself; needs Ray attached.

    Raises:
        Unavailable: no controller runs there, or it does not answer.
    """
    reports: list[dict[str, Any]] = asked(
        controller().shard_reports.remote(), timeout_s=REPORTS_TIMEOUT_S
    )
    return reports


def controller_settings(
    config: ShardlineConfig, store: Store, generation: int | None, port: int
) -> ControllerSettings:
    """What the controller of a new cluster is started with; it gets a secret of its own."""
    cluster = config.cluster
    return ControllerSettings(
        store=str(store.root),
        generation=generation,
        secret=secrets.token_bytes(32),
        shard_host=cluster.shard_host,
        threads_per_shard=cluster.threads_per_shard,
        cpus_per_shard=cluster.cpus_per_shard,
        gpus_per_shard=cluster.gpus_per_shard,
        cpu_when_gpu_fails=cluster.cpu_when_gpu_fails,
        huge_pages=cluster.huge_pages,
        live=config.live,
        quality=config.quality,
        publish=config.publish,
        replicas=cluster.replicas,
        writes=cluster.writes,
        load_limit_s=cluster.start_timeout_s / LOAD_TRIES,
        http_host=cluster.http_host,
        http_port=port,
    )


def wait_loaded(
    controller: "ActorHandle[Controller]",
    store: Store,
    number: int,
    timeout_s: float,
    on_stage: Callable[[str], None],
) -> int:
    """The generation that is served, once every shard answers; raises as ``serving``."""
    began = time.monotonic()
    try:
        return wait_ready(controller, timeout_s)
    except Unavailable as error:
        is_late = time.monotonic() - began >= timeout_s
        silent = _silent_replicas() if is_late else ""
        if not silent:
            raise
        raise Unavailable(
            error.message, expected=error.expected, got=silent, hint=error.hint
        ) from error
    except (CorruptFile, NewerFormat, NotFound) as error:
        # a timeout or too few CPUs is no reason to read every byte; these are
        on_stage(
            f"a shard refused its files: checking generation {number}, then what can be served"
        )
        damage = find_damage(store, number)
        if damage is None:
            raise
        raise damage from error


def silent_replicas(report: Report) -> str:
    """Names the first replicas that do not answer, with their hosts and reasons; "" if all do."""
    named = [
        f"shard {each['shard']} on {each['host']}: "
        + ("nothing yet" if each["reason"] is None else each["reason"]["text"])
        for each in report["replicas"]
        if not each["answers"]
    ]
    more = [f"{len(named) - MOST_NAMED} more"] if len(named) > MOST_NAMED else []
    return "; ".join(named[:MOST_NAMED] + more)


def _silent_replicas() -> str:
    try:
        return silent_replicas(ask_controller().report)
    except Unavailable as error:
        return str(error)


def _wait_connected(
    config: ShardlineConfig, port: int, key: str | None, *, hosts: int, cluster_id: str
) -> tuple[tuple[str, ...], list[str]]:
    """The URLs of the routers, once they answer, each connected to every shard, and what they warn
    of; raises as ``serving``.

    Where HAProxy listens on loopback, that of this host is asked, and the routers of the others are
    counted by what the controller has heard.
    """
    cluster = config.cluster
    wanted, _ = routers_wanted(cluster, hosts)
    own = local_url(cluster.http_host, port)
    is_local = cluster.address == "local"
    asks_all = not is_local and not is_loopback(cluster.http_host)
    shown = {own: own}

    def urls() -> list[str]:
        if is_local:  # HAProxy is asked, whatever the number of routers behind it
            return [own]
        try:
            found = ask_controller().shown
        except Unavailable:  # it restarts
            return []
        shown.update(found)
        return list(found)

    ready = wait_for_routers(
        urls,
        lambda url: status_of(url, key),
        cluster_id=cluster_id,
        wanted=min(wanted, hosts) if asks_all else 1,
        timeout_s=cluster.start_timeout_s,
        check_started=check_started,
    )
    warnings = ready.warnings
    if not is_local and not asks_all:
        missing = min(wanted, hosts) - wait_for_hosts(_hosts_with_router, min(wanted, hosts))
        warnings += [f"routers of {missing} hosts have not been heard of"] if missing > 0 else []
    return by_host(shown[url] for url in ready.statuses), warnings


def _hosts_with_router() -> int:
    try:
        return len({router["host"] for router in ask_controller().report["routers"]})
    except Unavailable:  # it restarts
        return 0
