"""What a mirror reads of the two generations before its first round: from files alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardline.cluster.rollover.mirror import Mirror, Route, Target
from shardline.cluster.rollover.mirror_plan import ItemEncoder
from shardline.cluster.rollover.mirror_source import SourceShard
from shardline.cluster.rollover.replayed_note import (
    Replayed,
    has_all_before,
    new_run,
    read_note,
    start_of,
)
from shardline.cluster.store import Store
from shardline.router.encoder.item_encoder import ItemEncoder as Tower
from shardline.router.fanout.snapshot import load_item_encoder
from shardline.shards.core.errors import NotFound, VersionMismatch, WritesLost
from shardline.shards.core.messages import RoutingTable
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.log_tail import LogTail
from shardline.shards.live.mains import compacted_seqs
from shardline.shards.storage.cut import Cut
from shardline.shards.storage.generation import (
    GenerationManifest,
    read_attributes,
    read_generation,
)


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


def open_mirror(order: MirrorOrder, target: Target, encoder: ItemEncoder | None) -> Mirror:
    """Not running yet. encoder: the item tower of the target generation, which is asked where the
    two are of different models; None: it has none.

    Reads the target's logs from their newest compactions on, so call it before anything is sent.

    Raises:
        VersionMismatch: the models are the same by name, and their vectors are not comparable.
        WritesLost: the source was built with writes that the target lacks: no log brings them.
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
    note = read_note(store.writes(order.target))
    _check_nothing_is_lost(store, order, note, wanted.cut)
    start = start_of(note, wanted.cut, order.source, len(made.shards), new_run())
    route = Route(
        source=order.source,
        target=order.target,
        source_live=store.writes(order.source),
        target_live=store.writes(order.target),
        columns=_columns(folder, wanted),
        other_model=is_other,
        encoder=encoder,
        target_seqs=tuple(_last_write(folder, each.shard) for each in wanted.shards),
    )
    sources = [
        SourceShard(live_folder(store.generation(order.source), shard), shard, seq)
        for shard, seq in enumerate(start.seqs)
    ]
    return Mirror(route, sources, target, start)


def _check_nothing_is_lost(
    store: Store, order: MirrorOrder, note: Replayed | None, cut: Cut | None
) -> None:
    """Raises WritesLost."""

    def cut_of(generation: int) -> Cut | None:
        return read_generation(store.generation(generation)).cut

    noted = None if note is None else Cut(generation=note.generation, seqs=note.seqs)
    known = tuple(each for each in (noted, cut) if each is not None)
    try:
        if has_all_before(order.target, known, order.source, cut_of):
            return
        got = f"nothing says that {order.target} has the writes that {order.source} was built with"
    except NotFound as error:
        got = error.message
    raise WritesLost(
        f"generation {order.target} cannot be brought up to generation {order.source}",
        expected="the writes before it, which are not in its log",
        got=got,
        hint="build a generation from today's rows with `shardline build --from-live`, or publish "
        "with --without-writes, which loses what was written meanwhile",
    )


def _columns(folder: Path, manifest: GenerationManifest) -> tuple[str, ...]:
    """The names of the attributes that items of a generation have."""
    table = read_attributes(folder, manifest, manifest.shards[0].shard, verify=False)
    return () if table is None else tuple(table.column_names)


def _last_write(folder: Path, shard: int) -> int:
    """How many writes a shard has had, as its files say; not fewer than it has acknowledged."""
    live = live_folder(folder, shard)
    seq = (compacted_seqs(live) or [0])[-1]
    tail = LogTail(live, after_seq=seq)
    tail.read_proven()
    return tail.seq
