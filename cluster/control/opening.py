"""What a controller opens when it starts: a generation, its first table, the cluster's identity."""

import hashlib
import logging
import time
from pathlib import Path

import ray

from shardline.cluster.control.hosts import Host
from shardline.cluster.control.ray_hosts import fresh_hosts
from shardline.cluster.control.term import Term
from shardline.cluster.store import Store
from shardline.shards.core.encoder_files import (
    CONFIG,
    ITEM_ENCODER_FOLDER,
    QUERY_ENCODER_FOLDER,
)
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.messages import Absence, RoutingTable, ShardRoute
from shardline.shards.core.partition import Partitioning
from shardline.shards.storage.generation import GenerationManifest, read_generation

logger = logging.getLogger(__name__)

HOSTS_S = 0.5  # pause before Ray's head is asked again
REOPEN_S = 2.0  # pause of a restarted controller before it looks again at a damaged generation


def is_restart() -> bool:
    """Whether this process is an actor that Ray has started again."""
    return ray.is_initialized() and bool(ray.get_runtime_context().was_current_actor_reconstructed)


def first_hosts() -> tuple[Host, ...]:
    """The living hosts, once Ray's head tells them."""
    while not (hosts := fresh_hosts()):
        time.sleep(HOSTS_S)
    return hosts


def cluster_id_of(secret: bytes) -> str:
    """16 hex digits that tell a cluster from every other and say nothing of its secret."""
    return hashlib.sha256(b"shardline cluster id\0" + secret).hexdigest()[:16]


def claimed(store: Store, cluster_id: str, *, is_restart: bool) -> Term:
    """The term of the controller that starts now; before it reads what its predecessor decided.

    Raises:
        OSError: the store takes no file, and this is the first start. A restarted controller waits.
    """
    while True:
        try:
            return Term(store, cluster_id)
        except OSError as error:
            if not is_restart:
                raise
            logger.error("the controller waits for its store: %s", error)
        time.sleep(REOPEN_S)


def opened(
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


def empty_table(
    store: Store, folder: Path, manifest: GenerationManifest, cluster: str
) -> RoutingTable:
    """The table before any shard is known; ``cluster`` is the cluster's id."""
    encoders = (*manifest.query_encoder, *manifest.item_encoder)
    listed = {entry.name: entry.sha256 for entry in encoders}
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
        encoder_checksum=listed.get(f"{QUERY_ENCODER_FOLDER}/{CONFIG}"),
        item_encoder_checksum=listed.get(f"{ITEM_ENCODER_FOLDER}/{CONFIG}"),
        notes=tuple(
            Absence(damage.code, f"found when the controller started: {damage}")
            for damage in store.damaged_state()
        ),
        cluster_id=cluster,
    )
