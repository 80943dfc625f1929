"""The shard actors of one generation, as their controller reaches them: created, asked, ended.

Knows Ray, and decides nothing: what a creation or a check finds out becomes an event of
``cluster.control.placement``. The actors are detached, so a controller that was restarted finds
them alive.
"""

import asyncio
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError

from shardline.cluster.control.placement import Event, ShardFailed, ShardUnreachable
from shardline.shards.core.errors import ShardlineError
from shardline.shards.index.spec import Device
from shardline.shards.process.shard_actor import ShardActor
from shardline.shards.storage.generation import GenerationManifest

logger = logging.getLogger(__name__)

SHARD_ACTOR_PREFIX = "shardline-shard-"
DESCRIBE_TIMEOUT_S = 5.0
OUR_ERROR = re.compile(r"^shards\.errors\.\w+: ")
MISSES = 2  # failed checks in a row before a shard is taken out of the table


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSettings:
    """What every shard actor is started with; secret proves a router to a shard and back."""

    secret: bytes
    shard_host: str
    threads_per_shard: int
    cpus_per_shard: float
    gpus_per_shard: float


class ShardActors:
    """Handles by shard number. ``controller`` is the name that the actors register with."""

    def __init__(
        self, settings: ShardSettings, folder: Path, manifest: GenerationManifest, controller: str
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._manifest = manifest
        self._controller = controller
        self._handles: dict[int, ActorHandle[Any]] = {}
        self._misses: Counter[int] = Counter()

    @property
    def placed(self) -> tuple[int, ...]:
        """The shards that have an actor, be it dead, which the next check finds out."""
        return tuple(self._handles)

    def place(self, shard: int) -> ShardFailed | None:
        """Creates the shard's actor, or finds it alive; why Ray could not, else None."""
        name = self._name(shard)
        try:
            self._handles[shard] = _existing(name) or self._create(name, shard)
        except (RayError, ValueError) as error:
            return ShardFailed(shard=shard, reason=reason_of(error))
        return None

    async def check(self, shard: int, epoch: int, is_lost: Callable[[], bool]) -> Event | None:
        """One health check of a placed shard; the event that it amounts to, if to any.

        A shard that answers while ``is_lost`` says that nobody knows where is told to register.
        """
        handle = self._handles[shard]
        try:
            await _answer(handle.ping.remote())
            self._misses[shard] = 0
            if is_lost():
                # alive, but we lost where: after our own restart, or after a passing failure
                await _answer(handle.announce.remote())
        except ActorDiedError as error:
            if self._handles.get(shard) is handle:
                del self._handles[shard]
                return ShardFailed(shard=shard, reason=reason_of(error))
        except RayActorError as error:
            # A restarting actor registers a moment before Ray takes calls for it again.
            self._misses[shard] += 1
            if self._misses[shard] >= MISSES:
                return ShardUnreachable(shard=shard, epoch=epoch, reason=reason_of(error))
        except (TimeoutError, GetTimeoutError):
            # Slow is not dead: the routers' own deadlines deal with slow shards.
            logger.warning("shard %d has not answered for %.0f s", shard, DESCRIBE_TIMEOUT_S)
        return None

    async def describe(self, shard: int) -> dict[str, Any]:
        """What a placed shard says of itself, or under ``error`` why it does not."""
        try:
            described: dict[str, Any] = await _answer(self._handles[shard].describe.remote())
        except (RayActorError, TimeoutError, GetTimeoutError) as error:
            return {"error": reason_of(error)}
        return described

    def end(self) -> None:
        """Ends every shard actor, for good."""
        for handle in self._handles.values():
            ray.kill(handle)

    def _name(self, shard: int) -> str:
        """Unique to this cluster: the secret's digest tells it from leftovers of an earlier one."""
        digest = hashlib.sha256(self._settings.secret).hexdigest()[:8]
        return f"{SHARD_ACTOR_PREFIX}{self._manifest.generation}-{shard}-{digest}"

    def _create(self, name: str, shard: int) -> "ActorHandle[Any]":
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
            shard=shard,
            controller=self._controller,
            secret=settings.secret,
            host=settings.shard_host,
            threads=settings.threads_per_shard,
        )


def reason_of(error: BaseException) -> str:
    """The last line of a Ray error: the one that says what happened, without our class's name."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, ShardlineError):
        return str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return OUR_ERROR.sub("", lines[-1]) if lines else type(error).__name__


def _existing(name: str) -> "ActorHandle[Any] | None":
    try:
        return ray.get_actor(name)
    except ValueError:
        return None


async def _answer(reference: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(_awaited(reference), DESCRIBE_TIMEOUT_S)


async def _awaited(reference: Awaitable[Any]) -> Any:
    return await reference
