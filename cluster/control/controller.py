"""The controller: one named Ray actor that places shard actors, watches them, publishes the table.

A thin shell: every rule is in ``cluster.control.placement``, and ``cluster.control.shard_actors``
reaches the shards. It does not carry queries; while it is away, routers keep serving on the table
they have. Both it and the shard actors are detached, so that a restarted controller finds the
shards alive and learns their addresses from them.
"""

import asyncio
import contextlib
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from shardline.cluster.control.placement import (
    Announce,
    Event,
    Instruction,
    NumberSeen,
    Place,
    Publish,
    ReplicaFailed,
    ReplicaRegistered,
    open_generation,
    step,
)
from shardline.cluster.control.shard_actors import ShardActors, ShardSettings, reason_of
from shardline.cluster.exits import as_known
from shardline.cluster.store import Store
from shardline.shards.core.encoder_files import CONFIG
from shardline.shards.core.errors import DataError, ShardlineError, Unavailable, error_of
from shardline.shards.core.messages import Absence, ReplicaKey, RoutingTable, ShardRoute
from shardline.shards.core.partition import Partitioning
from shardline.shards.storage.generation import (
    QUERY_ENCODER_FOLDER,
    GenerationManifest,
    read_generation,
)

logger = logging.getLogger(__name__)

CONTROLLER_NAME = "shardline-controller"
WATCH_INTERVAL_S = 1.0
# How long the shards of a replaced generation live on, for the queries that began on them: far
# above the largest deadline that routers allow by default.
RETIRE_AFTER_S = 60.0
REOPEN_S = 2.0  # pause of a restarted controller before it looks again at a damaged generation


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings(ShardSettings):
    """What a controller is started with: the store, and how its shards are.

    generation: the only one that this cluster serves; None: the one that is live in the store
    whenever the controller starts.
    """

    store: str
    generation: int | None = None


class Controller:
    """The state machine's shell. Create it with ``start_controller``."""

    def __init__(self, settings: ControllerSettings) -> None:
        self._store = store = Store(Path(settings.store))
        self._secret = settings.secret
        # Ray runs this again when it restarts the controller: another generation may be live then
        folder, manifest = _opened(store, settings.generation, is_restart=_is_restart())
        notes = tuple(
            Absence(damage.code, f"found when the controller started: {damage}")
            for damage in store.damaged_state()
        )
        table = _empty_table(folder, manifest, notes)
        self._placement, places = open_generation(table, counter=store.counter() + 1)
        self._published: RoutingTable | None = None
        self._unsaved: Absence | None = None  # why the newest numbers are not on record
        self._changed = asyncio.Condition()
        self._shards = ShardActors(settings, folder, manifest, CONTROLLER_NAME)
        self._tasks: set[asyncio.Task[None]] = set()
        self._spawn(self._open(places))

    async def connection_secret(self) -> bytes:
        """What proves a peer to a shard: for routers, batch jobs and tools of this cluster.

        Ray's token decides who may call actors, and so who may have it.
        """
        return self._secret

    async def register_replica(
        self, *, key: ReplicaKey, address: tuple[str, int], epoch: int = 0
    ) -> int:
        """A shard process announces where it listens; the epoch it must say Hello with.

        epoch: the one it says Hello with until then.

        Raises:
            Unavailable: the replica belongs to a generation that is not being served.
        """
        if key not in self._placement.replicas:
            raise Unavailable(
                "this replica is not being served",
                expected=f"one of generation {self._placement.table.generation}",
                got=str(key),
            )
        await self._apply(ReplicaRegistered(key=key, address=(address[0], address[1]), epoch=epoch))
        return self._placement.replicas[key].route.epoch

    async def table_after(self, version: int, timeout_s: float) -> RoutingTable | None:
        """The routing table once it is newer than ``version``; None when the time is up first.

        A version above all of ours was given out before the record of it was lost.
        """
        await self._apply(NumberSeen(number=version))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._newer_than(version))
                return self._published
        return None

    async def trouble_after(self, known: Absence | None, timeout_s: float) -> Absence | None:
        """Why no newer table can be published, once that is another reason than ``known``, or when
        the time is up; None: nothing hinders it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._unsaved != known)
        return self._unsaved

    async def wait_ready(self, timeout_s: float) -> int | None:
        """The generation that is served, once every replica answers; None when the time is up.

        Raises:
            ShardlineError: a replica cannot be placed, or the store takes no counter; of that
                reason's code.
        """

        def is_over() -> bool:
            return self._placement.ready or bool(self._failures()) or self._unsaved is not None

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(is_over)
                if self._unsaved is not None:
                    raise error_of(self._unsaved.code, self._unsaved.text)
                for key, reason in self._failures():
                    raise error_of(reason.code, f"shard {key.shard}: {reason.text}")
                return self._placement.table.generation
        return None

    async def shard_reports(self) -> list[dict[str, Any]]:
        """What each shard process says of itself, or why it does not, in the order of their keys.

        ``reason``, instead of the rest: {"code", "text"}.
        """
        return list(await asyncio.gather(*map(self._report, self._placement.replicas)))

    async def close(self) -> None:
        """Stops watching and ends every shard actor, for good."""
        for task in list(self._tasks):
            task.cancel()
        self._shards.end()

    async def _open(self, places: tuple[Place, ...]) -> None:
        for place in places:
            self._carry_out(place)
        self._spawn(self._watch())
        async with self._changed:
            await self._changed.wait_for(lambda: self._placement.ready)
        await asyncio.sleep(RETIRE_AFTER_S)
        self._shards.end_others()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            checks = [self._check(key) for key in self._shards.placed]
            for error in await asyncio.gather(*checks, return_exceptions=True):
                if isinstance(error, Exception):  # a full disk, say: look again in a second
                    logger.error("replica check failed", exc_info=error)

    async def _check(self, key: ReplicaKey) -> None:
        """One health check; what it finds becomes an event."""
        epoch = self._placement.replicas[key].route.epoch
        event = await self._shards.check(key, epoch, lambda: self._is_lost(key))
        if event is not None:
            await self._apply(event)
            if isinstance(event, ReplicaFailed):  # not before: a full disk must not lose it
                self._shards.forget(key)

    def _is_lost(self, key: ReplicaKey) -> bool:
        return self._placement.replicas[key].route.address is None

    async def _report(self, key: ReplicaKey) -> dict[str, Any]:
        state = self._placement.replicas[key]
        found: dict[str, Any] | Absence
        if key in self._shards.placed:
            found = await self._shards.describe(key)
        else:
            found = state.route.absence or Absence(Unavailable.code, "not placed")
        rest = {"reason": asdict(found)} if isinstance(found, Absence) else found
        return asdict(key) | {"failures": state.failures} | rest

    async def _apply(self, event: Event) -> None:
        changed, instructions = step(self._placement, event)
        if changed is self._placement:
            return
        try:
            self._store.raise_counter(changed.counter)  # before anyone sees a number of it
        except OSError as error:
            await self._cannot_save(error)
            raise
        self._unsaved = None
        self._placement = changed
        for instruction in instructions:
            self._carry_out(instruction)
        async with self._changed:
            self._changed.notify_all()

    async def _cannot_save(self, error: OSError) -> None:
        """Tells whoever waits; the event is tried again by whoever it came from."""
        known = as_known(error) or DataError(str(error))
        text = f"the controller cannot save its counter, so nothing newer is published: {known}"
        self._unsaved = Absence(known.code, text)
        async with self._changed:
            self._changed.notify_all()

    def _carry_out(self, instruction: Instruction) -> None:
        if isinstance(instruction, Publish):
            self._published = instruction.table
        elif isinstance(instruction, Announce):
            self._spawn(self._shards.announce(instruction.key))
        else:
            self._spawn(self._place(instruction))

    def _newer_than(self, version: int) -> bool:
        return self._published is not None and self._published.version > version

    async def _place(self, place: Place) -> None:
        """Creates the replica's actor, or finds it alive if this controller is a restarted one."""
        await asyncio.sleep(place.after_s)
        failed = self._shards.place(place.key)
        if failed is None:
            return
        try:
            await self._apply(failed)
        except OSError:
            logger.exception("the failure of replica %s is not on record yet", place.key)
            self._spawn(self._place(Place(key=place.key, after_s=WATCH_INTERVAL_S)))

    def _failures(self) -> list[tuple[ReplicaKey, Absence]]:
        replicas = self._placement.replicas.items()
        return [
            (key, state.route.absence)
            for key, state in replicas
            if state.failures and state.route.absence
        ]

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("controller task failed", exc_info=task.exception())


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
        generation: int | None = ray.get(
            controller.wait_ready.remote(timeout_s), timeout=timeout_s + 5
        )
    except RayError as error:
        reason = reason_of(error)
        is_told = isinstance(error, RayTaskError) or reason.code != Unavailable.code
        text = reason.text if is_told else f"the controller does not answer: {reason.text}"
        raise error_of(reason.code, text) from error
    if generation is None:
        raise Unavailable(
            "shards did not become ready",
            expected=f"within {timeout_s:g} s",
            hint="give it longer with --set cluster.start_timeout_s=..., or Ray more CPUs",
        )
    return generation


def _is_restart() -> bool:
    return ray.is_initialized() and bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _opened(
    store: Store, generation: int | None, *, is_restart: bool
) -> tuple[Path, GenerationManifest]:
    """Folder and manifest of the generation to serve; None: the one that is live.

    Raises:
        ShardlineError, OSError: it cannot be read, and this is the first start. A restarted
            controller waits instead, because Ray starts none whose constructor has failed.
    """
    told = ""
    while True:
        try:
            folder = store.generation(store.current() if generation is None else generation)
            return folder, read_generation(folder)
        except (ShardlineError, OSError) as error:
            if not is_restart:
                raise
            if str(error) != told:
                logger.error("the controller waits for what it is to serve: %s", error)
            told = str(error)
        time.sleep(REOPEN_S)


def _empty_table(
    folder: Path, manifest: GenerationManifest, notes: tuple[Absence, ...]
) -> RoutingTable:
    """The table before any shard is known."""
    name = f"{QUERY_ENCODER_FOLDER}/{CONFIG}"
    listed = {entry.name: entry.sha256 for entry in manifest.query_encoder}
    return RoutingTable(
        version=0,
        generation=manifest.generation,
        generation_dir=str(folder),
        model_version=manifest.model_version,
        dim=manifest.dim,
        metric=manifest.metric,
        index=manifest.index.kind,
        partitioning=Partitioning(manifest.partitioning),
        boundaries=manifest.boundaries,
        shards=tuple(
            ShardRoute(shard=entry.shard, rows=entry.rows, replicas=()) for entry in manifest.shards
        ),
        encoder_checksum=listed.get(name),
        notes=notes,
    )
