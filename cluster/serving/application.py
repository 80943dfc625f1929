"""Shardline as an application of Ray Serve's own tools: ``serve deploy deploy/serve.yaml``,
``serve run``, KubeRay's RayService. ``build`` is what their ``import_path`` names.

Serve starts and watches the routers alone. So ``build`` first brings up what they ask: it finds the
controller and the shards of this Ray, or waits for its hosts to join, starts them, and waits until
every shard answers: neither Serve nor KubeRay tries again a deployment that failed. What runs
already stays as it is, whatever the configuration says by now: ``shardline down`` ends it.

Ray names actors per job, and Serve's jobs have a namespace of their own. Controller and shards are
therefore started by a process of their own that joins Ray as ``shardline serve`` does: this module,
run as a program.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from shardline.cluster.config import ShardlineConfig, load_config
from shardline.cluster.control.ray_hosts import living_hosts
from shardline.cluster.control.start import start_controller, wait_ready
from shardline.cluster.exits import as_known
from shardline.cluster.preflight.check import enforce
from shardline.cluster.preflight.machine import before_start
from shardline.cluster.preflight.servable import servable_generation
from shardline.cluster.serving.await_hosts import wait_for_hosts
from shardline.cluster.serving.deployment import controller_settings, wait_loaded
from shardline.cluster.serving.front_end import router_application
from shardline.cluster.serving.launched import controller
from shardline.cluster.serving.ray_session import attached_ray
from shardline.cluster.serving.serving_keys import serving_keys
from shardline.cluster.serving.stopping import stop_shards
from shardline.cluster.serving.survey import survey, wanted_of
from shardline.cluster.store import Store
from shardline.shards.core.errors import ConfigError, Unavailable
from shardline.shards.storage.generation import read_generation

logger = logging.getLogger(__name__)

START_MARGIN_S = 60.0  # beyond hosts and shards: joining Ray, checksums, asking the hosts


class ServeArguments(BaseModel):
    """``args`` of the application in Serve's file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: Path | None = Field(
        default=None, description="Configuration file, at the same path on every host."
    )
    overrides: list[str] = Field(
        default=[], description="key.path=value each, as --set of the command line."
    )
    generation: int | None = Field(
        default=None, ge=1, description="Serve this one instead of the live one."
    )
    hosts: int | None = Field(
        default=None,
        ge=1,
        description="Hosts with CPUs to wait for before the first start; null: until the shards "
        "have room, and no further host has come for ten seconds.",
    )

    def load(self) -> ShardlineConfig:
        """Raises ConfigError, NotFound: as ``load_config``; or the cluster is not this Ray."""
        path = None if self.config is None else self.config.expanduser()
        config = load_config(path, self.overrides)
        if config.cluster.address == "local":
            raise ConfigError(
                "Ray Serve starts the routers on the Ray that it runs on, not on a private one",
                field="cluster.address",
                expected="auto",
                got="local",
            )
        return config


def build(arguments: ServeArguments) -> serve.Application:
    """The routers, once controller and shards run; for Serve's ``import_path``.

    Raises:
        ConfigError, NotFound: the configuration, or the keys, cannot be used.
        Unavailable: shards could not be started; says why.
    """
    config = arguments.load()
    if not ray.is_initialized():  # `serve build` runs on no cluster
        return router_application(config, serving_keys(config).auth, hosts=1)
    # once for hosts to join, once for shards to load
    hosts = _bring_up_apart(arguments, 2 * config.cluster.start_timeout_s + START_MARGIN_S)
    return router_application(config, serving_keys(config).auth, hosts=hosts)


def bring_up(config: ShardlineConfig, generation: int | None, *, hosts: int | None = None) -> int:
    """Controller and shards, found or started; the number of living hosts. Needs Ray attached.

    hosts: those to wait for before anything is started, as in ServeArguments. What was started is
    stopped again when something fails, and nothing else.

    Raises:
        ShardlineError: as ``cluster.serving.deployment.start_serving``.
    """
    timeout_s = config.cluster.start_timeout_s
    try:
        found = controller()
    except Unavailable:  # there is none
        store = Store(config.store.resolve())
        number = servable_generation(store, generation)
        enforce(before_start(config))
        wanted = wanted_of(config, read_generation(store.generation(number)))
        late = wait_for_hosts(living_hosts, wanted, count=hosts, timeout_s=timeout_s)
        checks = survey(config, number, is_served=False, has_serve=True)
        for warning in [late, *enforce(checks)]:
            if warning is not None:
                logger.warning("%s", warning)
        port = config.cluster.http_port
        handle = start_controller(controller_settings(config, store, generation, port))
        try:
            wait_loaded(handle, store, number, timeout_s, logger.info)
        except BaseException:
            stop_shards()
            raise
    else:
        wait_ready(found, timeout_s)
    return len(living_hosts())


def main(words: list[str]) -> None:
    """Arguments as JSON, the head's HOST:PORT; prints {"hosts": N}, or {"error": why not}."""
    arguments = ServeArguments.model_validate_json(words[0])
    answer: dict[str, int | str]
    try:
        with attached_ray(words[1]):
            config = arguments.load()
            answer = {"hosts": bring_up(config, arguments.generation, hosts=arguments.hosts)}
    except Exception as error:
        known = as_known(error)
        if known is None:
            raise
        answer = {"error": str(known)}
    sys.stdout.write(f"{json.dumps(answer)}\n")


def _bring_up_apart(arguments: ServeArguments, timeout_s: float) -> int:
    head = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", __spec__.name, arguments.model_dump_json(), head]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # notes and Ray's own lines go to this process's log
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            "controller and shards did not start",
            expected=f"within {timeout_s:g} s",
            hint="allow more with cluster.start_timeout_s",
        ) from error
    return _hosts_of(done.stdout, done.returncode)


def _hosts_of(printed: str, code: int) -> int:
    """From what ``main`` has printed; its answer is the last line."""
    lines = printed.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if code == 0 else {}
    except (IndexError, ValueError):
        answer = {}
    if "hosts" in answer:
        return int(answer["hosts"])
    reason = answer.get("error", f"exit code {code}, see the log of this process")
    raise Unavailable("controller and shards did not start", got=reason)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(sys.argv[1:])
