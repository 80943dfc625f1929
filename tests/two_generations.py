"""Generations of one store, each with shards that are written without Ray and sockets."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pyarrow as pa

from shardline.cluster.build import check_plan, fill_generation, run_here
from shardline.cluster.control.opening import empty_table
from shardline.cluster.store import Store
from shardline.router.written import Part, by_shard
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.messages import (
    DeleteRequest,
    ReplicaRoute,
    RoutingTable,
    ShardRoute,
    UpsertRequest,
    WriteReply,
)
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.loading import load_caught_up
from shardline.shards.live.writes import ShardWrites
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer
from shardline.shards.storage.generation import read_generation
from tests.engine import plan_of, write_set
from tests.fake_shard import SECRET
from tests.live_shard import contents

ROWS, DIM = 60, 8


def unit_vectors(ids: Iterable[int], seed: int) -> np.ndarray:
    """(n, DIM) float32: another one for each id and seed."""
    rows = [np.random.default_rng((seed, item)).standard_normal(DIM) for item in ids]
    vectors = np.array(rows, np.float32).reshape(-1, DIM)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def build(
    store: Path,
    number: int,
    num_shards: int,
    *,
    partitioning: str = "range",
    columns: Sequence[str] = ("title",),
    numbers: Sequence[str] = (),
) -> Path:
    """A generation of ROWS items; its folder. columns: attributes that are texts; numbers: those of
    them that are integers instead."""
    ids = range(ROWS)
    attributes = {
        name: pa.array([item if name in numbers else f"{name} {item}" for item in ids])
        for name in columns
    }
    batch = pa.RecordBatch.from_pydict(attributes) if columns else None
    corpus = write_set(store / f"set-{number}", unit_vectors(ids, 0), attributes=batch)
    folder = store / "generations" / f"{number:06d}"
    folder.mkdir(parents=True)
    plan = check_plan(corpus.folder, plan_of(num_shards, kind="flat", partitioning=partitioning))
    fill_generation(folder, number, plan, run_jobs=run_here, progress=lambda *_: None)
    return folder


class Written:
    """The shards of a generation as their primaries hold them."""

    def __init__(self, folder: Path, epoch: int = 1, **live: float) -> None:
        self.folder = folder
        self.manifest = read_generation(folder)
        self.shards: list[Shard] = []
        self.writes: list[ShardWrites] = []
        for entry in self.manifest.shards:
            loaded = load_caught_up(folder, self.manifest, entry.shard)
            shard = Shard(
                shard=entry.shard, generation=self.manifest.generation, state=loaded.state
            )
            live_ = live_folder(folder, entry.shard)
            writes = ShardWrites(shard, live_, keys=loaded.keys, config=LiveConfig(**live))
            writes.lead(epoch)
            self.shards.append(shard)
            self.writes.append(writes)

    @property
    def table(self) -> RoutingTable:
        return empty_table(Store(self.folder.parents[1]), self.folder, self.manifest, "c")

    @contextlib.contextmanager
    def served(self) -> Iterator[RoutingTable]:
        """On sockets, until the block ends; its table."""
        servers, routes = [], []
        for shard, writes in zip(self.shards, self.writes, strict=True):
            server = ShardServer(shard, secret=SECRET, writes=writes)
            address = server.bind()
            server.start(1)
            servers.append(server)
            replica = ReplicaRoute(key=server.key, epoch=1, address=address)
            routes.append(
                ShardRoute(
                    shard=shard.shard,
                    rows=shard.rows,
                    replicas=(replica,),
                    primary=0,
                    primary_epoch=writes.epoch,
                )
            )
        try:
            yield replace(self.table, version=1, shards=tuple(routes))
        finally:
            for server in servers:
                server.stop()

    @property
    def seqs(self) -> tuple[int, ...]:
        return tuple(writes.seq for writes in self.writes)

    def seal(self, epoch: int) -> tuple[int, ...]:
        return tuple(writes.seal(epoch) for writes in self.writes)

    def upsert(
        self,
        ids: Sequence[int],
        seed: int,
        *,
        key: str = "",
        features: Sequence[dict] = (),
        **attributes: Sequence,
    ) -> None:
        """Each to its shard, with the vector of its id and the seed."""
        item_ids = np.array(ids, np.int64)
        vectors = unit_vectors(ids, seed)
        for shard, rows in by_shard(item_ids, np.arange(len(ids)), self.table, 4096):
            chosen = rows.tolist()
            columns = {name: [of[row] for row in chosen] for name, of in attributes.items()}
            request = UpsertRequest(
                item_ids=item_ids[rows],
                vectors=vectors[rows],
                attributes=msgpack.packb(columns) if columns else b"",
                features=msgpack.packb([features[row] for row in chosen]) if features else b"",
                key=key,
                timeout_ms=0.0,
            )
            self.deliver(Part(shard=shard, message=request))

    def delete(self, ids: Sequence[int]) -> None:
        item_ids = np.array(ids, np.int64)
        for shard, rows in by_shard(item_ids, np.arange(len(ids)), self.table, 4096):
            request = DeleteRequest(item_ids=item_ids[rows], key="", timeout_ms=0.0)
            self.deliver(Part(shard=shard, message=request))

    def deliver(self, part: Part) -> WriteReply:
        """Raises ShardlineError: as the shard answers."""
        (reply,) = self.writes[part.shard].write([part.message])
        if isinstance(reply, ShardlineError):
            raise reply
        return reply

    def contents(self) -> dict[int, bytes]:
        """Every live item and its vector's bytes; each is in its own shard."""
        found: dict[int, bytes] = {}
        for shard in self.shards:
            here = contents(shard)
            homes = self.table.partition.shard_of(np.array(list(here), np.int64))
            assert set(homes.tolist()) <= {shard.shard}
            found |= here
        return found

    def column(self, name: str) -> dict[int, object]:
        """The attribute of every live item."""
        found: dict[int, object] = {}
        for shard in self.shards:
            ids = np.array(sorted(contents(shard)), np.int64)
            answer = shard.state.attributes_of(ids, [name], np.inf, 1 << 20)
            assert answer is not None
            unpacker = msgpack.Unpacker()
            unpacker.feed(answer[1])
            values = [value for part in unpacker for value in part]
            found |= dict(zip(ids.tolist(), values, strict=True))
        return found
