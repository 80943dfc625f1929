"""The shard actors of a cluster, as its controller reaches them: created, asked, ended.

Knows Ray, and decides nothing: what a creation or a check finds out becomes an event of
``cluster.control.placement``. The actors are detached, so a controller that was restarted finds
them alive.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field, replace
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

from shardline.cluster.control.actor_name import ActorName
from shardline.cluster.control.applied import Applied, Look
from shardline.cluster.control.events import (
    Event,
    LeaderSeen,
    LeaderSilent,
    LeadFailed,
    Leading,
    ReplicaFailed,
    ReplicaIdle,
    ReplicaUnreachable,
    Sealed,
    SealFailed,
)
from shardline.cluster.control.opening import cluster_id_of
from shardline.shards.core.errors import (
    DeadlineExceeded,
    ShardlineError,
    Unavailable,
    error_of,
    last_line,
)
from shardline.shards.core.messages import Absence, Pulse, ReplicaKey, ShardHealth
from shardline.shards.index.spec import Device
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.live.takeover import Takeover, TakeoverLook
from shardline.shards.process.shard_actor import ShardActor
from shardline.shards.storage.generation import GenerationManifest

logger = logging.getLogger(__name__)

# numpy's products of a delta with queries take less than a millisecond: a second thread of OpenBLAS
# that waits for a busy core makes twenty of it
SHARD_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}
DIGEST_DIGITS = 8  # of the cluster's id, in an actor's name
DESCRIBE_TIMEOUT_S = 5.0
LEAD_TIMEOUT_S = 30.0  # it may have a log to read first
SEAL_TIMEOUT_S = 3.0  # routers hold writes for as long as a seal lasts
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
    live: LiveConfig = field(default_factory=LiveConfig)
    cpu_when_gpu_fails: bool = False


class ShardActors:
    """Handles by replica. ``controller`` is the name that the actors register with."""

    def __init__(self, settings: ShardSettings, controller: str) -> None:
        self._settings = settings
        self._controller = controller
        self._opened: dict[int, tuple[Path, GenerationManifest]] = {}
        self._handles: dict[ReplicaKey, ActorHandle[Any]] = {}
        self._misses: Counter[ReplicaKey] = Counter()
        self.applied = Applied()
        self.health: dict[ReplicaKey, ShardHealth] = {}  # by the last look at each

    def open(self, folder: Path, manifest: GenerationManifest) -> None:
        """Actors of this generation may be created from now on."""
        self._opened[manifest.generation] = folder, manifest

    def on_gpu(self, generation: int) -> bool:
        return self._opened[generation][1].index.device is Device.CUDA

    @property
    def placed(self) -> tuple[ReplicaKey, ...]:
        """The replicas that have an actor, be it dead, which the next check finds out."""
        return tuple(self._handles)

    def found(self, generation: int) -> dict[ReplicaKey, str]:
        """The replicas of a generation that have an actor, and the node id of its host.

        Raises:
            RayError: the head does not answer.
        """
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
            return ReplicaFailed(key=key, reason=reason_of(error), now_s=time.monotonic())
        return None

    async def check(
        self,
        key: ReplicaKey,
        epoch: int,
        is_lost: Callable[[], bool],
        leads: int | None = None,
    ) -> Event | None:
        """One health check of a placed replica; the event that it amounts to, if to any.

        One that answers while ``is_lost`` says that nobody knows where is told to register. leads:
        the epoch with which it leads its shard, as far as is known.
        """
        handle = self._handles.get(key)
        if handle is None:
            return None
        try:
            asked_s = time.monotonic()
            pulse: Pulse = await _answer(handle.ping.remote())
            now_s = time.monotonic()
            self._misses[key] = 0
            self.applied.saw(key, Look(asked_s, now_s, pulse.seq))
            if pulse.health is not None:
                self.health[key] = pulse.health
            if is_lost():
                # alive, but we lost where: after our own restart, or after a passing failure
                await _answer(handle.announce.remote())
            if leads is None:
                return None
            seen = LeaderSeen(key=key, epoch=leads, leads=pulse.leads, now_s=now_s)
            return replace(seen, refused=pulse.refused)
        except (ActorDiedError, ActorUnschedulableError) as error:  # the second: its host is gone
            if self._handles.get(key) is handle:
                return ReplicaFailed(key=key, reason=reason_of(error), now_s=time.monotonic())
            return None
        except RayActorError as error:
            # A restarting actor registers a moment before Ray takes calls for it again.
            self._misses[key] += 1
            if self._misses[key] >= MISSES:
                reason, now_s = reason_of(error), time.monotonic()
                return ReplicaUnreachable(key=key, epoch=epoch, reason=reason, now_s=now_s)
        except (TimeoutError, GetTimeoutError):
            # Slow is not dead: the routers' own deadlines deal with slow shards.
            logger.warning("replica %s has not answered for %.0f s", key, DESCRIBE_TIMEOUT_S)
        if leads is None:
            return None
        return LeaderSilent(key=key, epoch=leads, now_s=time.monotonic())  # nobody else may write

    async def announce(self, key: ReplicaKey) -> None:
        """Has a replica register again; one that does not answer registers when it starts anew."""
        if key not in self._handles:
            return
        try:
            await _answer(self._handles[key].announce.remote())
        except (RayError, TimeoutError) as error:
            logger.warning("replica %s did not register again: %s", key, error)

    async def lead(self, key: ReplicaKey, epoch: int) -> Leading | LeadFailed:
        """Has a replica take the writes of its shard. One that does not answer in time may do so
        all the same, later: until another is asked, with a higher epoch."""
        try:
            if key not in self._handles:
                raise Unavailable("it has no process")
            asked = self._handles[key].lead.remote(epoch)
            seq: int = await _answer(asked, LEAD_TIMEOUT_S)
        except TimeoutError:
            text = f"replica {key.replica} did not take the lead within {LEAD_TIMEOUT_S:g} s"
            reason = Absence(DeadlineExceeded.code, text)
        except (RayError, ShardlineError) as error:
            reason = reason_of(error)
        else:
            logger.info("replica %s leads with epoch %d, from write %d on", key, epoch, seq)
            return Leading(key=key, epoch=epoch, seq=seq, now_s=time.monotonic())
        logger.warning("replica %s does not lead: %s: %s", key, reason.code, reason.text)
        return LeadFailed(key=key, epoch=epoch, reason=reason, now_s=time.monotonic())

    async def seal(self, key: ReplicaKey, epoch: int) -> Sealed | SealFailed:
        """Has a replica see to it that its shard acknowledges no write. One that does not answer in
        time may do so all the same, later: whoever leads with a higher epoch is not hindered."""
        try:
            if key not in self._handles:
                raise Unavailable("it has no process")
            asked = self._handles[key].seal.remote(epoch)
            seq: int = await _answer(asked, SEAL_TIMEOUT_S)
        except TimeoutError:
            text = f"replica {key} was not sealed within {SEAL_TIMEOUT_S:g} s"
            reason = Absence(DeadlineExceeded.code, text)
        except (RayError, ShardlineError) as error:
            reason = reason_of(error)
        else:
            return Sealed(key=key, epoch=epoch, seq=seq, now_s=time.monotonic())
        logger.warning("replica %s is not sealed: %s: %s", key, reason.code, reason.text)
        return SealFailed(key=key, epoch=epoch, reason=reason, now_s=time.monotonic())

    async def take_over(self, key: ReplicaKey, order: Takeover) -> None:
        """Has a primary begin to take over another index.

        Raises:
            ShardlineError: as ``ShardActor.take_over``. RayError, TimeoutError: it does not answer.
        """
        await _accepted(self._handle(key).take_over.remote(order))

    async def mark(self, key: ReplicaKey) -> None:
        """Has a primary log a write that changes nothing. Raises: as ``take_over``."""
        await _accepted(self._handle(key).mark.remote())

    def _handle(self, key: ReplicaKey) -> "ActorHandle[Any]":
        """Raises Unavailable: there is none."""
        if key not in self._handles:
            raise Unavailable("it has no process")
        return self._handles[key]

    async def taken_over(self, key: ReplicaKey) -> TakeoverLook | None:
        """How far a replica is with that; None: it does not answer."""
        if key not in self._handles:
            return None
        try:
            look: TakeoverLook = await _answer(self._handles[key].taken_over.remote())
        except (RayError, TimeoutError):
            return None
        return look

    def forget(self, key: ReplicaKey) -> None:
        """The failure of its actor is on record: nothing is asked of it any more."""
        self._handles.pop(key, None)
        self.applied.forget(key)
        self.health.pop(key, None)

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
        self.applied.forget(key)
        self.health.pop(key, None)
        if handle is not None:
            ray.kill(handle)

    def end(self) -> None:
        """Ends every shard actor of its generations, for good."""
        for handle in self._handles.values():
            ray.kill(handle)

    def end_others(self, kept: Collection[int]) -> None:
        """Ends this cluster's shard actors of other generations than these, for good."""
        for name in self._names():
            is_other = name.key.generation not in kept
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
            num_gpus=settings.gpus_per_shard if self.on_gpu(name.key.generation) else 0,
            runtime_env={"env_vars": SHARD_ENVIRONMENT},
            scheduling_strategy=NodeAffinitySchedulingStrategy(name.node_id, soft=False),
        )
        return actor.remote(
            folder=str(self._opened[name.key.generation][0]),
            key=name.key,
            controller=self._controller,
            secret=settings.secret,
            host=settings.shard_host,
            threads=settings.threads_per_shard,
            huge_pages=settings.huge_pages,
            live=settings.live,
            cpu_when_gpu_fails=settings.cpu_when_gpu_fails,
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


async def _accepted(reference: Awaitable[Any]) -> None:
    """Raises ShardlineError: what the method raised. RayError, TimeoutError: it does not answer."""
    try:
        await _answer(reference)
    except RayTaskError as error:
        reason = reason_of(error)
        raise error_of(reason.code, reason.text) from error


async def _answer(reference: Awaitable[Any], timeout_s: float | None = None) -> Any:
    return await asyncio.wait_for(_awaited(reference), timeout_s or DESCRIBE_TIMEOUT_S)


async def _awaited(reference: Awaitable[Any]) -> Any:
    return await reference
