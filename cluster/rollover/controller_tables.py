"""The routing tables of a generation, as the controller's actor gives them to mirror and gate."""

import asyncio

import ray
from ray.exceptions import RayError, RayTaskError

from shardline.shards.core.errors import ShardlineError, Unavailable
from shardline.shards.core.messages import RoutingTable


async def table_of(
    controller: str, generation: int, version: int, timeout_s: float
) -> RoutingTable | None:
    """A table of a higher version; None: none came in time. controller: the name of its actor.

    Raises:
        ShardlineError: as the controller says; Unavailable too while there is none, or it dies.
        RayTaskError: a bug in the controller.
    """
    try:
        actor = await asyncio.to_thread(ray.get_actor, controller)  # blocks without Ray's head
        table: RoutingTable | None = await actor.table_of.remote(generation, version, timeout_s)
        return table
    except RayTaskError as error:
        if isinstance(error.cause, ShardlineError):
            raise error.cause from error
        raise
    except (RayError, ValueError) as error:
        raise Unavailable("the controller does not answer", got=str(error)) from error
