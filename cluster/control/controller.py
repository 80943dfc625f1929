"""The controller: one named Ray actor that places shard actors, watches them, publishes the table.

A thin shell: every rule is in ``cluster.control.placement``, and ``cluster.control.shard_actors``
reaches the shards. It does not carry queries; while it is away, routers keep serving on the table
they have. Both it and the shard actors are detached, so that a restarted controller finds the
shards alive and learns their addresses from them.
"""

import asyncio
import contextlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from shardline.cluster.control.placement import (
    Event,
    Instruction,
    Place,
    Publish,
    ShardRegistered,
    open_generation,
    step,
)
from shardline.cluster.control.shard_actors import ShardActors, ShardSettings, reason_of
from shardline.cluster.store import Store
from shardline.shards.core import files
from shardline.shards.core.errors import ShardlineError, Unavailable
from shardline.shards.core.messages import RoutingTable, ShardRoute
from shardline.shards.storage.generation import (
    GenerationManifest,
    read_generation,
    verify_query_encoder,
)

logger = logging.getLogger(__name__)

CONTROLLER_NAME = "shardline-controller"
WATCH_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings(ShardSettings):
    """What a controller is started with: the generation to serve, and how its shards are."""

    store: str
    generation: int


class Controller:
    """The state machine's shell. Create it with ``start_controller``."""

    def __init__(self, settings: ControllerSettings) -> None:
        store = Store(Path(settings.store))
        self._counter_path = store.counter(settings.generation)
        folder = store.generation(settings.generation)
        self._manifest = read_generation(folder)
        table = _empty_table(folder, self._manifest)
        self._placement, places = open_generation(table, counter=self._next_counter())
        self._published: RoutingTable | None = None
        self._changed = asyncio.Condition()
        self._shards = ShardActors(settings, folder, self._manifest, CONTROLLER_NAME)
        self._tasks: set[asyncio.Task[None]] = set()
        self._spawn(self._open(places))

    async def register_shard(self, *, shard: int, generation: int, address: tuple[str, int]) -> int:
        """A shard process announces where it listens; the epoch it must say Hello with.

        Raises:
            Unavailable: the shard belongs to a generation that is not being served.
        """
        if generation != self._manifest.generation:
            raise Unavailable(
                "this generation is not being served",
                expected=str(self._manifest.generation),
                got=str(generation),
            )
        await self._apply(ShardRegistered(shard=shard, address=(address[0], address[1])))
        return self._placement.places[shard].route.epoch

    async def table_after(self, version: int, timeout_s: float) -> RoutingTable | None:
        """The routing table once it is newer than ``version``; None when the time is up first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._newer_than(version))
                return self._published
        return None

    async def wait_ready(self, timeout_s: float) -> bool:
        """Whether every shard answers before the time is up.

        Raises:
            Unavailable: a shard cannot be placed; carries its reason.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._placement.ready or self._failures())
                if self._failures():
                    raise Unavailable(self._failures()[0])
                return True
        return False

    async def shard_reports(self) -> list[dict[str, Any]]:
        """What each shard process says of itself, or why it does not, in shard order."""
        places = self._placement.places
        return list(await asyncio.gather(*(self._report(place.route.shard) for place in places)))

    async def close(self) -> None:
        """Stops watching and ends every shard actor, for good."""
        for task in list(self._tasks):
            task.cancel()
        self._shards.end()

    async def _open(self, places: tuple[Place, ...]) -> None:
        for place in places:
            self._carry_out(place)
        self._spawn(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            checks = [self._check(shard) for shard in self._shards.placed]
            for error in await asyncio.gather(*checks, return_exceptions=True):
                if isinstance(error, Exception):  # a full disk, say: look again in a second
                    logger.error("shard check failed", exc_info=error)

    async def _check(self, shard: int) -> None:
        """One health check; what it finds becomes an event."""
        epoch = self._placement.places[shard].route.epoch
        event = await self._shards.check(shard, epoch, lambda: self._is_lost(shard))
        if event is not None:
            await self._apply(event)

    def _is_lost(self, shard: int) -> bool:
        return self._placement.places[shard].route.address is None

    async def _report(self, shard: int) -> dict[str, Any]:
        place = self._placement.places[shard]
        report: dict[str, Any] = {"shard": shard, "failures": place.failures}
        if shard not in self._shards.placed:
            return report | {"error": place.reason or "not placed"}
        return report | await self._shards.describe(shard)

    async def _apply(self, event: Event) -> None:
        changed, instructions = step(self._placement, event)
        if changed is self._placement:
            return
        self._save_counter(changed.counter)  # before anyone sees a number of it
        self._placement = changed
        for instruction in instructions:
            self._carry_out(instruction)
        async with self._changed:
            self._changed.notify_all()

    def _carry_out(self, instruction: Instruction) -> None:
        if isinstance(instruction, Publish):
            self._published = instruction.table
        else:
            self._spawn(self._place(instruction))

    def _newer_than(self, version: int) -> bool:
        return self._published is not None and self._published.version > version

    async def _place(self, place: Place) -> None:
        """Creates the shard's actor, or finds it alive when this controller is a restarted one."""
        await asyncio.sleep(place.after_s)
        failed = self._shards.place(place.shard)
        if failed is not None:
            await self._apply(failed)

    def _failures(self) -> list[str]:
        return [
            f"shard {place.route.shard}: {place.reason}"
            for place in self._placement.places
            if place.failures > 0
        ]

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("controller task failed", exc_info=task.exception())

    def _next_counter(self) -> int:
        """Above every number an earlier controller of this generation has given out."""
        if not self._counter_path.is_file():
            return 1
        return int(json.loads(self._counter_path.read_bytes())["counter"]) + 1

    def _save_counter(self, counter: int) -> None:
        files.write_json(self._counter_path, {"counter": counter})


def start_controller(settings: ControllerSettings) -> "ActorHandle[Controller]":
    """Creates the controller actor, which places the shards of its generation at once.

    Raises:
        ShardlineError: the generation is absent, corrupt, or of a newer format.
        Unavailable: a controller runs already, or Ray could not create it.
    """
    folder = Store(Path(settings.store)).generation(settings.generation)
    manifest = read_generation(folder)
    if manifest.query_encoder:  # routers load it without its manifest
        verify_query_encoder(folder, manifest)
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


def wait_ready(controller: "ActorHandle[Controller]", timeout_s: float) -> None:
    """Returns once every shard answers.

    Raises:
        Unavailable: a shard cannot be placed, or the time is up; says why.
    """
    try:
        ready = ray.get(controller.wait_ready.remote(timeout_s), timeout=timeout_s + 5)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, ShardlineError) else Unavailable(str(cause)) from error
    except (RayActorError, GetTimeoutError) as error:
        raise Unavailable("the controller does not answer", got=reason_of(error)) from error
    if not ready:
        raise Unavailable(
            "shards did not become ready",
            expected=f"within {timeout_s:g} s",
            hint="give it longer with --set cluster.start_timeout_s=..., or Ray more CPUs",
        )


def _empty_table(folder: Path, manifest: GenerationManifest) -> RoutingTable:
    return RoutingTable(
        version=0,
        generation=manifest.generation,
        generation_dir=str(folder),
        model_version=manifest.model_version,
        dim=manifest.dim,
        metric=manifest.metric,
        index=manifest.index.kind,
        shards=tuple(
            ShardRoute(shard=entry.shard, rows=entry.rows, epoch=0, address=None)
            for entry in manifest.shards
        ),
    )
