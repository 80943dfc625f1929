"""A store whose live generation has been written to, and what it must hold, for tests of what
reads it from files."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
from click.testing import CliRunner

from shardline.cluster.build import build_generation
from shardline.cluster.cli import cli
from shardline.cluster.store import Store
from shardline.shards.core.messages import DeleteRequest, UpsertRequest
from shardline.shards.core.partition import Partition, Partitioning
from shardline.shards.core.schema import Metric, normalise
from shardline.shards.live.compaction import compact
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.live_rows import open_live_rows
from shardline.shards.live.loading import load_caught_up
from shardline.shards.live.writes import ShardWrites
from shardline.shards.server.shard import Shard
from shardline.shards.storage.generation import GenerationManifest, read_generation
from tests.engine import plan_of, write_set

ROWS, DIM = 90, 8
Rows = dict[int, tuple[bytes, dict[str, Any]]]  # id -> the vector's bytes, attributes


def vectors_of(rows: int, seed: int) -> np.ndarray:
    return normalise(np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32))


@dataclass
class LiveStore:
    """``expected``: every live item of the live generation."""

    store: Store
    expected: Rows = field(default_factory=dict)
    epochs: Iterator[int] = field(default_factory=lambda: iter(range(1, 10_000)))
    written: int = 0

    @property
    def number(self) -> int:
        return self.store.current()

    @property
    def folder(self) -> Path:
        return self.store.generation(self.number)

    @property
    def manifest(self) -> GenerationManifest:
        return read_generation(self.folder)

    def shards_of(self, ids: np.ndarray) -> np.ndarray:
        manifest = self.manifest
        keys = np.array(manifest.boundaries, np.uint64)
        return Partition(Partitioning(manifest.partitioning), keys).shard_of(ids)

    def copied(self, root: Path) -> "LiveStore":
        """The same in a folder of its own: building one takes longer."""
        shutil.copytree(self.store.root, root / "store")
        epochs = iter(range(1000, 100_000))
        return LiveStore(Store(root / "store"), dict(self.expected), epochs, self.written)

    def shards_of_item(self, item: int) -> int:
        return int(self.shards_of(np.array([item]))[0])

    def upsert(self, ids: list[int], **attributes: list[Any]) -> None:
        """One request per shard; attributes are lists of one value per id."""
        self.written += 1
        all_ids = np.array(ids, np.int64)
        vectors = vectors_of(len(ids), 100 + self.written)
        shards = self.shards_of(all_ids)
        for shard in np.unique(shards).tolist():
            at = np.flatnonzero(shards == shard)
            columns = {name: [values[row] for row in at] for name, values in attributes.items()}
            self._write(
                shard,
                UpsertRequest(
                    item_ids=all_ids[at],
                    vectors=vectors[at],
                    attributes=msgpack.packb(columns) if columns else b"",
                    key=f"{self.written}",
                    timeout_ms=1e3,
                ),
            )
        for row, item in enumerate(ids):
            values = {name: attributes.get(name, [None] * len(ids))[row] for name in self.names}
            self.expected[item] = (vectors[row].tobytes(), values)

    def delete(self, ids: list[int]) -> None:
        self.written += 1
        all_ids = np.array(ids, np.int64)
        shards = self.shards_of(all_ids)
        for shard in np.unique(shards).tolist():
            part = all_ids[shards == shard]
            self._write(shard, DeleteRequest(item_ids=part, key=f"{self.written}", timeout_ms=1e3))
        for item in ids:
            self.expected.pop(item, None)

    def compact(self, *shards: int) -> None:
        """A new main index of these shards, as their primary takes it over."""
        for shard in shards:
            compact(self.folder, shard)
            loaded = load_caught_up(self.folder, self.manifest, shard)
            writes = self.opened(shard)
            writes.lead(next(self.epochs))
            assert writes.adopt(loaded)
            writes.close()

    @property
    def names(self) -> list[str]:
        return ["title", "price"]

    def opened(self, shard: int) -> ShardWrites:
        """What a process of the shard has that starts now."""
        loaded = load_caught_up(self.folder, self.manifest, shard)
        holder = Shard(shard=shard, generation=self.number, state=loaded.state)
        return ShardWrites(holder, live_folder(self.folder, shard), keys=loaded.keys)

    def _write(self, shard: int, request: UpsertRequest | DeleteRequest) -> None:
        writes = self.opened(shard)
        writes.lead(next(self.epochs))
        (reply,) = writes.write([request])
        assert not isinstance(reply, Exception), reply
        writes.close()

    def run(self, *arguments: object, options: tuple[str, ...] = ()) -> str:
        """What a command prints; its errors are raised."""
        words = ["--store", str(self.store.root), *options, *map(str, arguments)]
        done = CliRunner().invoke(cli, words, standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        return done.stdout


def rows_of(folder: Path) -> Rows:
    """Every live item of a generation, from its files."""
    manifest = read_generation(folder)
    found: Rows = {}
    for entry in manifest.shards:
        for block in open_live_rows(folder, manifest, entry.shard).blocks(7):
            columns = block.attributes.to_pylist() or [{}] * len(block.item_ids)
            for item, vector, values in zip(
                block.item_ids.tolist(), block.vectors, columns, strict=True
            ):
                assert item not in found
                found[item] = (vector.tobytes(), values)
    return found


def live_store(root: Path, num_shards: int = 3, *, encoder: bool = True, **index: Any) -> LiveStore:
    """Generation 1 of items 0, 2, 4, ..., live, with the attributes title and price."""
    store = Store(root / "store")
    ids, vectors = np.arange(ROWS) * 2, vectors_of(ROWS, 0)
    attributes = pa.RecordBatch.from_pydict(
        {
            "title": pa.array([f"item {item}" for item in ids]),
            "price": pa.array(ids / 4, pa.float64()),
        }
    )
    write_set(
        root / "set",
        vectors,
        ids,
        metric=Metric.COSINE,
        attributes=attributes,
        queries=vectors_of(20, 1),
        encoder={"config.json": b"{}"} if encoder else None,
    )
    build_generation(store, root / "set", plan_of(num_shards, **({"kind": "flat"} | index)))
    store.set_current(1)
    made = LiveStore(store)
    for row, item in enumerate(ids.tolist()):
        made.expected[item] = (
            vectors[row].tobytes(),
            {"title": f"item {item}", "price": item / 4},
        )
    return made
