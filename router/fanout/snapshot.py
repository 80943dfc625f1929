"""What one query runs on from start to end: a routing table, its encoders, its connections.

They are of one generation and change together, so no answer mixes two generations or two
model versions. The encoder is known here by what the router needs of it.
"""

import asyncio
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from shardline.router.encoder.history_rows import NewItems
from shardline.router.encoder.item_encoder import ItemEncoder
from shardline.router.encoder.new_item_cache import NewItemCache
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.router.fanout.attempts import Redundancy
from shardline.router.fanout.choice import Replicas
from shardline.router.fanout.connection import ShardConnection
from shardline.shards.core.attribute_kinds import AttributeKind
from shardline.shards.core.encoder_files import ITEM_ENCODER_FOLDER, QUERY_ENCODER_FOLDER
from shardline.shards.core.errors import (
    EncoderUnavailable,
    InvalidInput,
    Unavailable,
    VersionMismatch,
)
from shardline.shards.core.messages import Absence, ReplicaRoute, RoutingTable, ShardRoute
from shardline.shards.core.schema import FloatArray

# Rows encoded in the event loop, a few milliseconds; more go to a thread so that other requests,
# health checks among them, are not held up.
ENCODE_IN_LOOP = 64


class Encoder(Protocol):
    """The query tower of one model version."""

    @property
    def model_version(self) -> str: ...

    @property
    def features(self) -> Any:
        """What a caller may send: one description per feature, ready for JSON."""

    def encode(self, rows: list[dict[str, Any]], /) -> FloatArray:
        """(n, dim) float32, one row per map of features.

        Raises:
            InvalidInput: a feature is missing, unknown or of the wrong type; field names it.
        """


@dataclass(frozen=True, slots=True)
class UnusableEncoder:
    """Stands for an encoder that the generation has and that did not load. Only queries, or writes,
    by features need it; all others are answered."""

    reason: Absence


@dataclass(eq=False, slots=True)
class TableSnapshot:
    """shards: of each of ``table.shards``, the connections to its replicas; ``redundancy`` is None
    where no shard has more than one, which is in ``only`` then.

    ``encoder``, ``items`` None: the generation has none for queries, or for items. ``running``
    counts the queries that use the snapshot, so its connections outlive its replacement.
    ``attribute_kinds``: of the generation's attributes, those that searches have asked about.
    """

    table: RoutingTable
    encoder: Encoder | UnusableEncoder | None
    shards: tuple[Replicas, ...]
    redundancy: Redundancy | None = None
    running: int = 0
    items: ItemEncoder | UnusableEncoder | None = None
    only: tuple[ShardConnection | None, ...] = field(init=False)
    new_items: NewItemCache = field(default_factory=NewItemCache, init=False)
    attribute_kinds: dict[str, AttributeKind] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        known = [[each for each in replicas if each is not None] for replicas in self.shards]
        if all(len(replicas) < 2 for replicas in known):
            self.redundancy = None
        self.only = tuple(replicas[0] if replicas else None for replicas in known)

    @property
    def all_connections(self) -> list[ShardConnection]:
        return [c for replicas in self.shards for c in replicas if c is not None]

    @property
    def connected_shards(self) -> int:
        """Those that can be asked: a shard that is silent about what it owes is not."""
        return sum(map(_answers, self.shards))

    @property
    def share_connected(self) -> float:
        """The share of the rows whose shards can be asked; 0 of none."""
        told = self.connectivity()
        return told["rows_connected"] / told["rows"] if told["rows"] else 0.0

    async def encode(
        self, features: list[dict[str, Any]], new_items: NewItems | None = None
    ) -> FloatArray:
        """(n, dim) float32, by the encoder that belongs to the table.

        new_items: where ``encoder_of_new_items`` gives an encoder, those that histories may name.

        Raises:
            InvalidInput: there is no encoder, or it does not take these features.
            EncoderUnavailable: there is one, and it did not load.
            VersionMismatch: the encoder is of another model.
        """
        encoder = self.query_encoder("features")
        encode = partial(encoder.encode, features)
        if new_items is not None:
            assert isinstance(encoder, QueryEncoder)
            encode = partial(encoder.encode, features, new_items)
        return encode() if len(features) <= ENCODE_IN_LOOP else await asyncio.to_thread(encode)

    def query_encoder(self, field: str) -> Encoder:
        """The query encoder that belongs to the table; field: what errors call what needs it.

        Raises:
            InvalidInput: there is none. EncoderUnavailable: there is one, and it did not load.
            VersionMismatch: it is of another model.
        """
        encoder = self.encoder
        if encoder is None:
            raise InvalidInput(
                "this generation has no query encoder",
                field=field,
                hint="its vectors were imported; send vectors or item_ids",
            )
        if isinstance(encoder, UnusableEncoder):
            raise _unavailable("query", encoder, "send vectors or item_ids", field)
        self._check_model("query", encoder.model_version)
        return encoder

    def encoder_of_new_items(self) -> ItemEncoder | None:
        """What makes items that the query encoder does not know countable in histories.

        None where there are no histories, or no item encoder of the same model that loaded, or
        where it knows items by their ids alone.
        """
        items = self.items
        has_history = isinstance(self.encoder, QueryEncoder) and self.encoder.has_history
        if not has_history or not isinstance(items, ItemEncoder):
            return None
        is_of_model = items.model_version == self.table.model_version
        return items if is_of_model and items.names else None

    def item_encoder(self) -> ItemEncoder:
        """The item encoder that belongs to the table.

        Raises:
            InvalidInput: there is none. EncoderUnavailable: there is one, and it did not load.
            VersionMismatch: it is of another model.
        """
        encoder = self.items
        if encoder is None:
            raise InvalidInput(
                "this generation has no item encoder",
                field="features",
                expected="vectors",
                hint="export the model again and build a generation from it, or send vectors",
            )
        if isinstance(encoder, UnusableEncoder):
            raise _unavailable("item", encoder, "send vectors")
        self._check_model("item", encoder.model_version)
        return encoder

    def _check_model(self, of: str, model_version: str) -> None:
        if model_version != self.table.model_version:
            raise VersionMismatch(
                f"the {of} encoder is of another model than the index",
                expected=self.table.model_version,
                got=model_version,
                hint="build and publish a generation from one model",
            )

    def connectivity(self) -> dict[str, int]:
        """Shards and rows, and how many of them can be asked now."""
        rows_connected = sum(
            route.rows
            for route, replicas in zip(self.table.shards, self.shards, strict=True)
            if _answers(replicas)
        )
        return {
            "shards_connected": self.connected_shards,
            "shards": len(self.shards),
            "rows_connected": rows_connected,
            "rows": self.table.rows,
        }

    def describe(self) -> dict[str, Any]:
        """Table, shards and encoder, for JSON.

        ``warnings``: what people who look after the cluster should see to, {about, code, text}.
        """
        table = self.table
        warnings = [("state", note) for note in table.notes]
        for name, encoder in (
            (QUERY_ENCODER_FOLDER, self.encoder),
            (ITEM_ENCODER_FOLDER, self.items),
        ):
            if isinstance(encoder, UnusableEncoder):
                warnings.append((name, encoder.reason))
        return {
            "cluster_id": table.cluster_id,
            "version": table.version,
            "generation": table.generation,
            "model_version": table.model_version,
            "index": table.index,
            "dim": table.dim,
            "metric": str(table.metric),
            "rows": table.rows,
            "shards": [
                _describe_shard(route, replicas)
                for route, replicas in zip(table.shards, self.shards, strict=True)
            ],
            "encoder": _describe_encoder(self.encoder),
            "item_encoder": _describe_encoder(self.items),
            "warnings": [
                {"about": about, "code": note.code, "text": note.text} for about, note in warnings
            ],
        }


def _unavailable(
    of: str, encoder: UnusableEncoder, instead: str, field: str = "features"
) -> EncoderUnavailable:
    return EncoderUnavailable(
        f"the {of} encoder of this generation could not be loaded",
        field=field,
        got=encoder.reason.code,
        hint=f"{instead}; `shardline status` says what is wrong with it",
    )


def _describe_encoder(
    encoder: Encoder | ItemEncoder | UnusableEncoder | None,
) -> dict[str, Any] | None:
    if encoder is None or isinstance(encoder, UnusableEncoder):
        return None
    return {"model_version": encoder.model_version, "features": encoder.features}


def _answers(replicas: Replicas) -> bool:
    return any(connection is not None and connection.answers for connection in replicas)


def _describe_shard(route: ShardRoute, replicas: Replicas) -> dict[str, Any]:
    """The shard, as its best replica is, and every replica; ``primary``: the number of the one that
    takes writes, None: none does."""
    described = list(map(_describe_replica, route.replicas, replicas))
    best = max(described, key=lambda replica: bool(replica["connected"]))
    about = {"shard": route.shard, "rows": route.rows, "primary": route.primary}
    return {**about, **best, "replicas": described}


def _describe_replica(route: ReplicaRoute, connection: ShardConnection | None) -> dict[str, Any]:
    address = None if route.address is None else f"{route.address[0]}:{route.address[1]}"
    reason, code = "", ""
    if connection is not None:
        reason, code = connection.reason, Unavailable.code if connection.reason else ""
    elif route.absence is None:
        reason, code = "not placed yet", Unavailable.code
    else:
        reason, code = route.absence.text, route.absence.code
    return {
        "replica": route.key.replica,
        "host": route.host,
        "epoch": route.epoch,
        "address": address,
        "connected": connection is not None and connection.connected,
        "code": code,
        "reason": reason,
    }


def load_query_encoder(table: RoutingTable) -> Encoder | None:
    """The encoder of a table's generation; None when it has none, as with imported vectors.

    Raises:
        NotFound, CorruptFile, NewerFormat: it should be there and is not, or does not load.
    """
    if table.encoder_checksum is None:
        return None
    folder = Path(table.generation_dir) / QUERY_ENCODER_FOLDER
    return QueryEncoder.load(folder, table.encoder_checksum)


def load_item_encoder(table: RoutingTable) -> ItemEncoder | None:
    """As ``load_query_encoder``; None also for a generation of an export that had none yet."""
    if table.item_encoder_checksum is None:
        return None
    folder = Path(table.generation_dir) / ITEM_ENCODER_FOLDER
    return ItemEncoder.load(folder, table.item_encoder_checksum)
