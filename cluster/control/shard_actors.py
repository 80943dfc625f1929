"""The shard actors of one generation, as their controller reaches them: created, asked, ended.

Knows Ray, and decides nothing: what a creation or a check finds out becomes an event of
``cluster.control.placement``. The actors are detached, so a controller that was restarted finds
them alive.
"""

import asyncio
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
    ActorUnschedulableError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shardline.cluster.control.events import (
    Event,
    ReplicaFailed,
    ReplicaIdle,
    ReplicaUnreachable,
)
from shardline.cluster.control.opening import cluster_id_of
from shardline.shards.core.errors import ShardlineError, Unavailable, last_line
from shardline.shards.core.messages import Absence, ReplicaKey
from shardline.shards.index.spec import Device
from shardline.shards.process.shard_actor import ShardActor
from shardline.shards.storage.generation import GenerationManifest

logger = logging.getLogger(__name__)

SHARD_ACTOR_PREFIX = "shardline-shard-"
DIGEST_DIGITS = 8  # of the cluster's id, in an actor's name
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


@dataclass(frozen=True, slots=True)
class ActorName:
    """What the name of a shard actor says: replica, host, and cluster by a digest of its secret.

    An actor stays on its host for life, so that a restarted controller knows from the list of
    names alone what is where.
    """

    key: ReplicaKey
    digest: str
    node_id: str

    def __str__(self) -> str:
        return f"{SHARD_ACTOR_PREFIX}{self.key}-{self.digest}-{self.node_id}"

    @classmethod
    def parse(cls, name: str) -> "ActorName | None":
        """None for a name that is not a shard actor's."""
        parts = name.removeprefix(SHARD_ACTOR_PREFIX).split("-")
        if not name.startswith(SHARD_ACTOR_PREFIX) or len(parts) != 5:
            return None
        if not all(part.isdecimal() for part in parts[:3]):
            return None
        return cls(ReplicaKey(*map(int, parts[:3])), *parts[3:])


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
    def on_gpu(self) -> bool:
        return self._manifest.index.device is Device.CUDA

    @property
    def placed(self) -> tuple[ReplicaKey, ...]:
        """The replicas that have an actor, be it dead, which the next check finds out."""
        return tuple(self._handles)

    def found(self) -> dict[ReplicaKey, str]:
        """The replicas of the generation that have an actor, and the node id of its host.

        Raises:
            RayError: the head does not answer.
        """
        generation = self._manifest.generation
        return {
            name.key: name.node_id for name in self._names() if name.key.generation == generation
        }

    def place(self, key: ReplicaKey, node_id: str) -> ReplicaFailed | None:
        """Creates the replica's actor on that host, or finds it alive; why Ray could not, else
        None."""
        name = ActorName(key, self._digest, node_id)
        try:
            self._handles[key] = _existing(str(name)) or self._create(name)
        except (RayError, ValueError) as error:
            return ReplicaFailed(key=key, reason=reason_of(error))
        return None

    async def check(self, key: ReplicaKey, epoch: int, is_lost: Callable[[], bool]) -> Event | None:
        """One health check of a placed replica; the event that it amounts to, if to any.

        One that answers while ``is_lost`` says that nobody knows where is told to register.
        """
        handle = self._handles.get(key)
        if handle is None:
            return None
        try:
            await _answer(handle.ping.remote())
            self._misses[key] = 0
            if is_lost():
                # alive, but we lost where: after our own restart, or after a passing failure
                await _answer(handle.announce.remote())
        except (ActorDiedError, ActorUnschedulableError) as error:  # the second: its host is gone
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
        except (RayError, TimeoutError) as error:  # a GetTimeoutError is one of both
            return reason_of(error)
        return described

    async def is_idle(self, key: ReplicaKey) -> ReplicaIdle | None:
        """The event that no router is connected to a replica, if none is."""
        described = await self.describe(key) if key in self._handles else None
        is_idle = isinstance(described, dict) and described["connections"] == 0
        return ReplicaIdle(key=key) if is_idle else None

    def end_replica(self, key: ReplicaKey, node_id: str) -> None:
        """Ends one actor for good; nothing if there is none."""
        handle = self._handles.pop(key, None) or _existing(
            str(ActorName(key, self._digest, node_id))
        )
        if handle is not None:
            ray.kill(handle)

    def end(self) -> None:
        """Ends every shard actor of the generation, for good."""
        for handle in self._handles.values():
            ray.kill(handle)

    def end_others(self) -> None:
        """Ends this cluster's shard actors of other generations, for good."""
        for name in self._names():
            is_other = name.key.generation != self._manifest.generation
            handle = _existing(str(name)) if is_other else None
            if handle is not None:
                logger.info("ending %s, of a generation that is not served any more", name)
                ray.kill(handle)

    def _names(self) -> list[ActorName]:
        """Of this cluster's shard actors, those of every generation."""
        parsed = map(ActorName.parse, ray.util.list_named_actors())
        return [name for name in parsed if name is not None and name.digest == self._digest]

    @property
    def _digest(self) -> str:
        """Tells the actors of this cluster from leftovers of an earlier one, by its secret."""
        return cluster_id_of(self._settings.secret)[:DIGEST_DIGITS]

    def _create(self, name: ActorName) -> "ActorHandle[Any]":
        settings = self._settings
        actor = ray.remote(ShardActor).options(
            name=str(name),
            lifetime="detached",
            max_restarts=-1,
            num_cpus=settings.cpus_per_shard,
            num_gpus=settings.gpus_per_shard if self.on_gpu else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(name.node_id, soft=False),
        )
        return actor.remote(
            folder=str(self._folder),
            key=name.key,
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
