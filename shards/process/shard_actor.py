"""The Ray actor that holds one shard: loads it, serves it on a socket, registers its address.

A thin shell around ``Shard`` and ``ShardServer``. Ray supervises and restarts it; queries never go
through Ray. A restart runs the constructor again, which registers the new address by itself.
"""

import logging
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray

from shardline.shards.core.errors import CardFailed, CorruptFile, ShardlineError
from shardline.shards.core.messages import Pulse, ReplicaKey, ShardHealth
from shardline.shards.core.unused_imports import forgo_pandas
from shardline.shards.index import gpu
from shardline.shards.index.spec import Device
from shardline.shards.live.changeover import Changeover
from shardline.shards.live.health import HealthLook
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.loading import load_caught_up
from shardline.shards.live.takeover import Takeover, TakeoverLook
from shardline.shards.live.writes import ShardWrites
from shardline.shards.process.card_log import (
    CardLog,
    card_log_path,
    device_for,
    noting_refusals,
)
from shardline.shards.process.memory import prepare_memory, use_huge_pages
from shardline.shards.process.ray_metrics import RayExporter
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer
from shardline.shards.storage.generation import read_generation

logger = logging.getLogger(__name__)

HEALTH_S = 5.0  # between two looks at the index, each some milliseconds of the GIL
NODE_HOST = "node"  # in the configuration: the address by which Ray knows the machine


class ShardActor:
    """One shard of one generation, ready to answer once the constructor has returned."""

    def __init__(
        self,
        *,
        folder: str,
        key: ReplicaKey,
        controller: str,
        secret: bytes,
        host: str,
        threads: int,
        huge_pages: bool,
        live: LiveConfig,
        cpu_when_gpu_fails: bool = False,
    ) -> None:
        """``controller``: name of the actor to register with; ``threads``: faiss threads per batch;
        ``cpu_when_gpu_fails``: as of the configuration.

        Raises:
            ShardlineError: the generation cannot be loaded, or the controller refuses it.
        """
        started = time.perf_counter()
        forgo_pandas()
        generation = Path(folder)
        manifest = read_generation(generation)
        device, self._device_note = manifest.index.device, None
        noting: AbstractContextManager[None] = nullcontext()
        if device is Device.CUDA:
            log = CardLog(card_log_path(generation, key))
            device, self._device_note = device_for(
                device, log.failures, cpu_allowed=cpu_when_gpu_fails
            )
            gpu.watch(log)
            noting = noting_refusals(log)
        if device is Device.CPU:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray shows every GPU to an actor without one
        if self._device_note is not None:
            logger.error("replica %s: %s", key, self._device_note)
        # before anybody is answered: a shard that was written and starts again must know all of it
        with noting:
            loaded = load_caught_up(generation, manifest, key.shard, device=device)
        if loaded.state.attributes.names:  # or the first search with a filter would wait for it
            loaded.state.main.prepare_for_filters()
        self._shard = Shard(shard=key.shard, generation=key.generation, state=loaded.state)
        self._shard.on_card_failure = _end
        self._writes = ShardWrites(
            self._shard, live_folder(generation, key.shard), keys=loaded.keys, config=live
        )
        self._health_look = HealthLook(generation, key.shard)
        self._health: ShardHealth | None = None
        self._health_at_s = 0.0  # when it is looked at again
        self._load_ms = (time.perf_counter() - started) * 1e3
        if host == NODE_HOST:
            host = ray.util.get_node_ip_address()
        self._changeover = Changeover(
            generation,
            key.shard,
            main_seq=loaded.main_seq,
            own=loaded.own,
            config=live,
            # or searches would take a sixth longer from the first compaction on
            prepare=use_huge_pages if huge_pages else lambda: None,
            device=device,
        )
        self._server = ShardServer(
            self._shard,
            secret=secret,
            host=host,
            replica=key.replica,
            threads=threads,
            writes=self._writes,
            changeover=self._changeover,
            on_damage=_end,
        )
        self._address = self._server.bind()
        prepare_memory(huge_pages=huge_pages)
        self._controller = controller
        self._server.start(epoch=self._register())
        self._exporter = RayExporter(self._server.recorder, self._server.refresh_metrics)
        logger.info(
            "replica %s: %d rows at %s:%d, loaded in %.0f ms",
            self._server.key,
            self._shard.rows,
            *self._address,
            self._load_ms,
        )

    def announce(self) -> None:
        """Registers again: a restarted controller does not know this shard's address."""
        self._server.epoch = self._register()

    def lead(self, epoch: int) -> int:
        """Makes it the primary of its shard; the number of writes that it has applied then.

        Raises:
            NotPrimary: a later epoch has been given to another replica.
            CorruptFile: the log is damaged. NotFound: it was trimmed behind this replica's state.
            OSError: it cannot be read or written.
        """
        return self._server.lead(epoch)

    def seal(self, epoch: int) -> int:
        """Ends the acknowledging of writes to its shard until a replica leads with a later epoch;
        the number of writes that have been applied then, which all replicas follow up to.

        Raises: as ``lead``.
        """
        return self._server.seal(epoch)

    def take_over(self, takeover: Takeover) -> int:
        """Starts to take over another generation's index; the write that it will have.

        Raises:
            NotPrimary: another replica takes the writes of this shard.
            Unavailable: a compaction is under way: ask again. OSError: of the disk.
        """
        return self._server.take_over(takeover)

    def taken_over(self) -> TakeoverLook:
        """How far that is, or how it ended."""
        change = self._changeover
        return TakeoverLook(
            token=None if change.own is None else change.own.token,
            is_busy=change.is_busy,
            failure=change.takeover_failure,
            trouble=change.trouble,
        )

    def mark(self) -> int:
        """Logs a write that changes nothing: what routers have cached is not used any more. Its
        number.

        Raises:
            NotPrimary, ReadOnly: it cannot be logged here.
        """
        return self._server.mark()

    def ping(self) -> Pulse:
        """A sign of life, and whether it takes writes."""
        return Pulse(
            pid=os.getpid(),
            seq=self._writes.seq,
            leads=self._writes.leading_epoch,
            refused=self._writes.refused,
            health=self._look_at_health(),
        )

    def _look_at_health(self) -> ShardHealth | None:
        now_s = time.monotonic()
        if now_s >= self._health_at_s:
            self._health_at_s = now_s + HEALTH_S
            try:
                self._health = self._health_look.look(self._shard.state)
            except (
                ShardlineError,
                OSError,
                ValueError,
            ) as error:  # a sign of life must not depend on the store
                logger.warning("the health of the index is not known: %s", error)
        if self._health is None:
            return None
        own = self._changeover.own
        return replace(
            self._health,
            trouble=self._changeover.trouble,
            index_of=None if own is None else own.generation,
            device_note=self._device_note,
        )

    def describe(self) -> dict[str, Any]:
        """The rows, the index and the counters of this shard, for `status`."""
        stats = self._server.stats
        return {
            **self._shard.describe(),
            **self._writes.describe(),
            **self._changeover.describe(),
            "replica": self._server.key.replica,
            "device_note": self._device_note,
            "address": self._address,
            "pid": os.getpid(),
            "epoch": self._server.epoch,
            "load_ms": round(self._load_ms, 1),
            "memory_bytes": psutil.Process().memory_info().rss,
            "queue_depth": self._server.queue_depth,
            "connections": len(self._server.sessions),
            "requests": stats.requests,
            "batches": stats.batches,
            "overloaded": stats.overloaded,
            "expired": stats.expired,
            "failed": stats.failed,
        }

    def _register(self) -> int:
        registration = ray.get_actor(self._controller).register_replica.remote(
            key=self._server.key,
            address=self._address,
            epoch=max(self._server.epoch, self._writes.newest_epoch()),
            leads=self._writes.leading_epoch,
        )
        epoch: int = ray.get(registration)
        return epoch

    def stop(self) -> None:
        """Closes port and connections; the process stays until Ray ends it."""
        self._exporter.stop()
        self._server.stop()


def _end(error: CorruptFile | CardFailed) -> None:
    """A replica that cannot follow its log would answer without writes for good, and one whose card
    has failed not at all. Ray starts it again: it reads all files anew, or the reason why it cannot
    is known to whoever asks. Routers ask another replica at once, as their connection breaks."""
    logger.critical("this replica ends, to be loaded anew: %s", error)
    os._exit(1)
