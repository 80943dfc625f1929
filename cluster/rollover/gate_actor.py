"""The Ray actor in which the gate measures, for as long as that takes: in the controller's process
its latencies would be those of the controller's own work. It ends with the controller.

A thin shell around ``gate_run`` and the tables of the two generations.
"""

import asyncio
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
from ray.exceptions import RayTaskError

from shardline.cluster.rollover.controller_tables import table_of
from shardline.cluster.rollover.gate import GateReport
from shardline.cluster.rollover.gate_in_files import gate_of_files
from shardline.cluster.rollover.gate_run import gate_of_generations
from shardline.cluster.rollover.publish_config import PublishConfig
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.schema import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GateOrder:
    """What is measured: the two generations, the name of the controller's actor, what proves a peer
    to shards. served, unreplayed: as of ``run_gate``. in_files: the folder of the candidate, where
    that is not loaded; None: it is."""

    candidate: int
    live: int
    controller: str
    secret: bytes
    config: PublishConfig
    served: FloatArray | None
    unreplayed: int
    in_files: str | None = None


class GateActor:
    """One measurement."""

    async def judged(self, order: GateOrder) -> GateReport:
        """Raises: as ``run_gate``."""
        if order.in_files is not None:
            return await gate_of_files(
                Path(order.in_files),
                order.live,
                partial(table_of, order.controller),
                order.config,
                secret=order.secret,
                served=order.served,
            )
        return await gate_of_generations(
            order.candidate,
            order.live,
            partial(table_of, order.controller),
            order.config,
            secret=order.secret,
            served=order.served,
            unreplayed=order.unreplayed,
        )


async def judged_in_a_process(order: GateOrder) -> GateReport:
    """By a process of its own.

    Raises:
        ShardlineError: as ``run_gate``. RayError: the process died, or cannot be started.
    """
    options = ray.remote(GateActor).options(num_cpus=0, max_restarts=0, max_concurrency=10)
    actor = await asyncio.to_thread(options.remote)
    try:
        report: GateReport = await actor.judged.remote(order)
        return report
    except RayTaskError as error:
        if isinstance(error.cause, ShardlineError):
            raise error.cause from error
        raise
    finally:
        await asyncio.to_thread(ray.kill, actor)
