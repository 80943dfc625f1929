"""Starts the controller of a cluster, and waits until all of its shards answer."""

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from shardline.cluster.control.actor_name import CONTROLLER_NAME
from shardline.cluster.control.controller import Controller, ControllerSettings
from shardline.cluster.control.shard_actors import reason_of
from shardline.shards.core.errors import Unavailable, error_of


def start_controller(settings: ControllerSettings) -> "ActorHandle[Controller]":
    """Creates the controller actor, which places the shards of its generation at once.

    Raises:
        Unavailable: a controller runs already.
    """
    try:
        handle = (
            ray.remote(Controller)
            .options(
                name=CONTROLLER_NAME,
                lifetime="detached",
                max_restarts=-1,
                max_task_retries=-1,
                num_cpus=0,
                max_concurrency=1000,  # every router replica parks one long poll here
            )
            .remote(settings)
        )
    except ValueError as error:
        raise Unavailable(
            "a controller is running already", hint="`shardline down` stops it"
        ) from error
    return handle


def wait_ready(controller: "ActorHandle[Controller]", timeout_s: float) -> int:
    """The generation that is served, once every replica answers.

    Raises:
        ShardlineError: a replica cannot be placed; the class says why.
        Unavailable: the time is up, or the controller does not answer.
    """
    try:
        generation: int = ray.get(controller.wait_ready.remote(timeout_s), timeout=timeout_s + 5)
    except RayError as error:
        reason = reason_of(error)
        is_told = isinstance(error, RayTaskError) or reason.code != Unavailable.code
        text = reason.text if is_told else f"the controller does not answer: {reason.text}"
        raise error_of(reason.code, text) from error
    return generation
