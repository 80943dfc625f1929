"""What a mirror reads of the two generations before its first round: from files alone."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from shardline.cluster.rollover.fitting import retyped
from shardline.cluster.rollover.mirror import Mirror, Route, Target
from shardline.cluster.rollover.mirror_plan import NONE_UNREPLAYED, ItemEncoder
from shardline.cluster.rollover.mirror_source import SourceShard
from shardline.cluster.rollover.mirror_start import Made, check_not_ahead, start_of
from shardline.cluster.rollover.mirror_term import MirrorTerm
from shardline.cluster.rollover.replayed_note import Replayed, new_run, read_note
from shardline.cluster.rollover.way_back import has_all, known_back
from shardline.cluster.store import Store
from shardline.router.encoder.item_encoder import ItemEncoder as Tower
from shardline.router.fanout.snapshot import load_item_encoder
from shardline.shards.core.errors import NotFound, VersionMismatch, WritesLost
from shardline.shards.core.messages import RoutingTable
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.live_rows import newest_write
from shardline.shards.storage.generation import (
    GenerationManifest,
    read_attributes,
    read_generation,
)

logger = logging.getLogger(__name__)

LOOKS, LOOK_S = 10, 0.5  # at the log of the source, until it has what was read of it before


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorOrder:
    """What a mirror is started with: the store, the two generations, the name of the controller's
    actor, and what proves a peer to shards."""

    store: str
    source: int
    target: int
    controller: str
    secret: bytes


class TargetEncoder:
    """The item tower of the target generation, as ``mirror_plan.ItemEncoder``."""

    def __init__(self, tower: Tower) -> None:
        self._tower = tower

    @classmethod
    def of(cls, table: RoutingTable) -> "TargetEncoder | None":
        """None: the generation has none, so what is written by features cannot be encoded for it.

        Raises:
            CorruptFile, NotFound, NewerFormat: it should be there and does not load.
        """
        tower = load_item_encoder(table)
        return None if tower is None else cls(tower)

    def encode(self, item_ids: IdArray, rows: Sequence[dict[str, Any]], /) -> FloatArray:
        return self._tower.encode(item_ids, rows, lambda row, name, where: f"features.{name}")


def open_mirror(
    order: MirrorOrder,
    target: Target,
    encoder: ItemEncoder | None,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Mirror:
    """Not running yet. encoder: the item tower of the target generation, which is asked where the
    two are of different models; None: it has none. Every mirror that was opened on one of the two
    before sends nothing new from now on.

    Reads the logs of both from their newest compactions on, so call it before anything is sent.

    Raises:
        VersionMismatch: the models are the same by name, and their vectors are not comparable.
        WritesLost: as ``start_of``; or the source's log is shorter than what was read of it before.
        NotFound, CorruptFile, NewerFormat, OSError: of a generation, or the target's log.
    """
    store = Store(Path(order.store))
    folder = store.generation(order.target)
    made, wanted = read_generation(store.generation(order.source)), read_generation(folder)
    is_other = made.model_version != wanted.model_version
    if not is_other and (made.dim, made.metric) != (wanted.dim, wanted.metric):
        raise VersionMismatch(
            f"generations {order.source} and {order.target} name the same model, "
            f"{made.model_version}, with other vectors",
            expected=f"{made.dim} dimensions, {made.metric}",
            got=f"{wanted.dim} dimensions, {wanted.metric}",
            hint="give a new model a version of its own, and build again",
        )
    term = MirrorTerm(store, (order.source, order.target))
    note, noted_back = read_note(store.writes(order.target)), read_note(store.writes(order.source))
    if noted_back is not None and noted_back.generation != order.target:
        noted_back = None
    start = start_of(note, Made.of(made), Made.of(wanted), new_run())
    _check_source(store.generation(order.source), start, sleep)
    seqs = tuple(newest_write(folder, each.shard) for each in wanted.shards)
    known = known_back(order.target, noted_back, made.cut, start, len(seqs))
    logs = [live_folder(folder, each.shard) for each in wanted.shards]
    is_back = has_all(logs, known, seqs, start)
    columns = _schema(folder, wanted)
    checked = retyped(_schema(store.generation(order.source), made), columns)
    if checked.names:
        logger.warning(
            "generation %d has other types than %d for %s; items with values that do not fit are "
            "not brought over",
            *(order.target, order.source, ", ".join(checked.names)),
        )
    route = Route(
        source=order.source,
        target=order.target,
        source_live=store.writes(order.source),
        target_live=store.writes(order.target),
        term=term,
        columns=tuple(columns.names),
        checked=checked,
        other_model=is_other,
        encoder=encoder,
        target_seqs=seqs,
        back=is_back,
        lacking=NONE_UNREPLAYED if noted_back is None else noted_back.unreplayed,
    )
    sources = [
        SourceShard(live_folder(store.generation(order.source), shard), shard, seq)
        for shard, seq in enumerate(start.seqs)
    ]
    return Mirror(route, sources, target, replace(start, back=seqs if is_back else None))


def _check_source(folder: Path, start: Replayed, sleep: Callable[[float], None]) -> None:
    """As ``check_not_ahead``. A log that seems too short is read again for a moment: its last group
    is not proven while a primary begins, and a network mount may show it late."""
    for left in reversed(range(LOOKS)):
        try:
            check_not_ahead(start, [_end_of(folder, *each) for each in enumerate(start.sending)])
        except WritesLost:
            if not left:
                raise
            sleep(LOOK_S)
        else:
            return


def _end_of(folder: Path, shard: int, at_least: int) -> int:
    """Of a shard's log. Where that does not go back to a main index it is not known, but no less
    than ``at_least``: the mirror itself says then what it lacks."""
    try:
        return newest_write(folder, shard)
    except NotFound:
        return at_least


def _schema(folder: Path, manifest: GenerationManifest) -> pa.Schema:
    """The attributes that items of a generation have; shards differ in the width of offsets."""
    table = read_attributes(folder, manifest, manifest.shards[0].shard, verify=False)
    return pa.schema([]) if table is None else table.schema
