"""Opens a generation of the store for the controller: its table, rules and found actors."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shardline.cluster.control.events import BesideOpened
from shardline.cluster.control.fleet_rules import FleetOutcome, fleet_step
from shardline.cluster.control.fleet_state import Fleet, Role
from shardline.cluster.control.hosts import Host
from shardline.cluster.control.opening import empty_table
from shardline.cluster.control.placement import open_generation
from shardline.cluster.control.placement_state import Rules
from shardline.cluster.control.publish_state import Noted
from shardline.cluster.control.replacing import Outcome
from shardline.cluster.control.restart_state import Restart
from shardline.cluster.control.shard_actors import ShardActors
from shardline.cluster.store import Store
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.messages import RoutingTable
from shardline.shards.live.went_live import read_went_live
from shardline.shards.storage.generation import (
    GenerationManifest,
    read_generation,
    verify_query_encoder,
)

logger = logging.getLogger(__name__)


class Opener:
    """rules: those of a generation on CPUs, gpus aside. gpus: what a replica reserves of one that
    is searched on GPUs."""

    def __init__(
        self, store: Store, shards: ShardActors, cluster_id: str, rules: Rules, gpus: float
    ) -> None:
        self._store = store
        self._shards = shards
        self._cluster_id = cluster_id
        self._rules = rules
        self._gpus = gpus

    def table(self, folder: Path, manifest: GenerationManifest) -> RoutingTable:
        """Its first table; actors of the generation may be created from now on."""
        self._shards.open(folder, manifest)
        return empty_table(self._store, folder, manifest, self._cluster_id)

    def rules(self, generation: int) -> Rules:
        """Of one that has a table."""
        rules, on_gpu = self._rules, self._shards.on_gpu(generation)
        return Rules(
            replicas=rules.replicas,
            cpus=rules.cpus,
            gpus=self._gpus if on_gpu else 0,
            load_limit_s=rules.load_limit_s,
            writes=rules.writes,
        )

    def live(
        self,
        folder: Path,
        manifest: GenerationManifest,
        hosts: Sequence[Host],
        restart: Restart | None,
    ) -> Outcome:
        """As ``open_generation``, from the last number that the store has given out. Raises
        RayError: the head does not answer."""
        table = self.table(folder, manifest)
        has = read_went_live(self._store.writes(manifest.generation)).has
        if len(has) == len(table.shards):
            table = replace(table, went_live_with=has)
        return open_generation(
            table,
            counter=self._store.counter() + 1,
            rules=self.rules(manifest.generation),
            hosts=hosts,
            found=self._shards.found(manifest.generation),
            now_s=time.monotonic(),
            restart=restart,
        )

    def beside(self, generation: int, role: Role, *, is_mirrored: bool) -> BesideOpened:
        """The event that it is to be loaded. Blocks: it reads files, and asks Ray.

        Raises:
            ShardlineError, OSError: it cannot be read, or its query encoder is damaged. RayError:
                the head does not answer.
        """
        folder = self._store.generation(generation)
        manifest = read_generation(folder)
        if manifest.query_encoder and role is Role.CANDIDATE:
            verify_query_encoder(folder, manifest)
        return BesideOpened(
            table=self.table(folder, manifest),
            role=role,
            rules=self.rules(generation),
            now_s=time.monotonic(),
            found=tuple(self._shards.found(generation).items()),
            is_mirrored=is_mirrored and self._rules.writes,
        )


def with_beside(fleet: Fleet, noted: Noted | None, opener: Opener) -> FleetOutcome:
    """With the generation that a controller before this had beside the live one, as far as it can
    still be read."""
    if noted is None or noted.beside is None:
        return fleet, ()
    try:
        event = opener.beside(noted.beside, noted.role, is_mirrored=noted.is_mirrored)
    except (ShardlineError, OSError) as error:
        logger.error("generation %d is not beside the live one any more: %s", noted.beside, error)
        return fleet, ()
    return fleet_step(fleet, event)
