"""The shard actors of one generation, as their controller reaches them: created, asked, ended.

Knows Ray, and decides nothing: what a creation or a check finds out becomes an event of
``cluster.control.placement``. The actors are detached, so a controller that was restarted finds
them alive.
"""

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)

from shardline.cluster.control.placement import Event, ReplicaFailed, ReplicaUnreachable
from shardline.shards.core.errors import ShardlineError, Unavailable, last_line
from shardline.shards.core.messages import Absence, ReplicaKey
from shardline.shards.index.spec import Device
from shardline.shards.process.shard_actor import ShardActor
from shardline.shards.storage.generation import GenerationManifest

logger = logging.getLogger(__name__)

SHARD_ACTOR_PREFIX = "shardline-shard-"
DESCRIBE_TIMEOUT_S = 5.0
MISSES = 2  # failed checks, one after the other, before a replica is taken out of the table


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSettings:
    """What every shard actor is started with; secret proves a router to a shard and back."""

    secret: bytes
    shard_host: str
    threads_per_shard: int
    cpus_per_shard: float
    gpus_per_shard: float
    huge_pages: bool


class ShardActors:
    """Handles by replica. ``controller`` is the name that the actors register with."""

    def __init__(
        self, settings: ShardSettings, folder: Path, manifest: GenerationManifest, controller: str
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._manifest = manifest
        self._controller = controller
        self._handles: dict[ReplicaKey, ActorHandle[Any]] = {}
        self._misses: Counter[ReplicaKey] = Counter()

    @property
    def placed(self) -> tuple[ReplicaKey, ...]:
        """The replicas that have an actor, be it dead, which the next check finds out."""
        return tuple(self._handles)

    def place(self, key: ReplicaKey) -> ReplicaFailed | None:
        """Creates the replica's actor, or finds it alive; why Ray could not, else None."""
        name = self._name(key)
        try:
            self._handles[key] = _existing(name) or self._create(name, key)
        except (RayError, ValueError) as error:
            return ReplicaFailed(key=key, reason=reason_of(error))
        return None

    async def check(self, key: ReplicaKey, epoch: int, is_lost: Callable[[], bool]) -> Event | None:
        """One health check of a placed replica; the event that it amounts to, if to any.

        One that answers while ``is_lost`` says that nobody knows where is told to register.
        """
        handle = self._handles[key]
        try:
            await _answer(handle.ping.remote())
            self._misses[key] = 0
            if is_lost():
                # alive, but we lost where: after our own restart, or after a passing failure
                await _answer(handle.announce.remote())
        except ActorDiedError as error:
            if self._handles.get(key) is handle:
                return ReplicaFailed(key=key, reason=reason_of(error))
        except RayActorError as error:
            # A restarting actor registers a moment before Ray takes calls for it again.
            self._misses[key] += 1
            if self._misses[key] >= MISSES:
                return ReplicaUnreachable(key=key, epoch=epoch, reason=reason_of(error))
        except (TimeoutError, GetTimeoutError):
            # Slow is not dead: the routers' own deadlines deal with slow shards.
            logger.warning("replica %s has not answered for %.0f s", key, DESCRIBE_TIMEOUT_S)
        return None

    async def announce(self, key: ReplicaKey) -> None:
        """Has a replica register again; one that does not answer registers when it starts anew."""
        if key not in self._handles:
            return
        try:
            await _answer(self._handles[key].announce.remote())
        except (RayError, TimeoutError) as error:
            logger.warning("replica %s did not register again: %s", key, error)

    def forget(self, key: ReplicaKey) -> None:
        """The failure of its actor is on record: nothing is asked of it any more."""
        self._handles.pop(key, None)

    async def describe(self, key: ReplicaKey) -> dict[str, Any] | Absence:
        """What a placed replica says of itself, or why it does not."""
        try:
            described: dict[str, Any] = await _answer(self._handles[key].describe.remote())
        except (RayActorError, TimeoutError, GetTimeoutError) as error:
            return reason_of(error)
        return described

    def end(self) -> None:
        """Ends every shard actor of the generation, for good."""
        for handle in self._handles.values():
            ray.kill(handle)

    def end_others(self) -> None:
        """Ends this cluster's shard actors of other generations, for good."""
        for name in ray.util.list_named_actors():
            handle = _existing(name) if self._is_other(name) else None
            if handle is not None:
                logger.info("ending %s, of a generation that is not served any more", name)
                ray.kill(handle)

    def _is_other(self, name: str) -> bool:
        ours = f"{SHARD_ACTOR_PREFIX}{self._manifest.generation}-"
        is_of_cluster = name.startswith(SHARD_ACTOR_PREFIX) and name.endswith(self._digest)
        return is_of_cluster and not name.startswith(ours)

    @property
    def _digest(self) -> str:
        """Tells the actors of this cluster from leftovers of an earlier one, by its secret."""
        return hashlib.sha256(self._settings.secret).hexdigest()[:8]

    def _name(self, key: ReplicaKey) -> str:
        return f"{SHARD_ACTOR_PREFIX}{key}-{self._digest}"

    def _create(self, name: str, key: ReplicaKey) -> "ActorHandle[Any]":
        settings = self._settings
        on_gpu = self._manifest.index.device is Device.CUDA
        actor = ray.remote(ShardActor).options(
            name=name,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=settings.cpus_per_shard,
            num_gpus=settings.gpus_per_shard if on_gpu else 0,
        )
        return actor.remote(
            folder=str(self._folder),
            key=key,
            controller=self._controller,
            secret=settings.secret,
            host=settings.shard_host,
            threads=settings.threads_per_shard,
            huge_pages=settings.huge_pages,
        )


def reason_of(error: BaseException) -> Absence:
    """The code and text of our error that a Ray error carries; else ``Unavailable``'s, last line.

    Ray hands over what a method raised as the ``cause`` of a RayTaskError, and what a constructor
    raised as such a RayTaskError inside an ActorDiedError.
    """
    cause: object = error
    while isinstance(cause, RayTaskError | ActorDiedError):
        died = isinstance(cause, ActorDiedError)
        cause = next(iter(cause.args), None) if died else cause.cause
    if isinstance(cause, ShardlineError):
        return Absence(cause.code, str(cause))
    return Absence(Unavailable.code, last_line(error))


def _existing(name: str) -> "ActorHandle[Any] | None":
    try:
        return ray.get_actor(name)
    except ValueError:
        return None


async def _answer(reference: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(_awaited(reference), DESCRIBE_TIMEOUT_S)


async def _awaited(reference: Awaitable[Any]) -> Any:
    return await reference
