"""A shard of a small generation on disk, with what writes it, for tests of live writes."""

import time
from collections.abc import Callable
from pathlib import Path

import msgpack
import numpy as np
import pyarrow as pa

from shardline.cluster.build import check_plan, fill_generation, run_here
from shardline.shards.core.messages import DeleteRequest, UpsertRequest, WriteReply
from shardline.shards.core.schema import Metric
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.loading import load_caught_up
from shardline.shards.live.log_files import FILES, LogFiles
from shardline.shards.live.writes import ShardWrites
from shardline.shards.server.shard import Shard
from shardline.shards.storage.generation import read_generation
from tests.engine import plan_of, write_set

ROWS, DIM = 60, 8
NEW_ITEMS = 1000  # ids from here on are not in the generation


def unit_vectors(rows: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def built(store: Path, *, metric: Metric = Metric.COSINE, **fields) -> Path:
    """A generation of ROWS items with the attributes title and price, in one shard; its folder."""
    folder = store / "generations" / "000007"
    folder.mkdir(parents=True)
    attributes = pa.RecordBatch.from_pydict(
        {
            "title": pa.array([f"item {item}" for item in range(ROWS)]),
            "price": pa.array(np.arange(ROWS) / 2, pa.float64()),
        }
    )
    corpus = write_set(store / "set", unit_vectors(ROWS), attributes=attributes, metric=metric)
    plan = check_plan(corpus.folder, plan_of(1, **{"kind": "flat", **fields}))
    fill_generation(folder, 7, plan, run_jobs=run_here, progress=lambda stage, done, total: None)
    return folder


def opened(
    generation: Path,
    *,
    files: LogFiles = FILES,
    clock: Callable[[], float] = time.monotonic,
    **limits: int,
) -> tuple[Shard, ShardWrites]:
    """As a process that starts: the newest files and the log."""
    manifest = read_generation(generation)
    loaded = load_caught_up(generation, manifest, 0)
    shard = Shard(shard=0, generation=manifest.generation, state=loaded.state)
    writes = ShardWrites(
        shard,
        live_folder(generation, 0),
        keys=loaded.keys,
        config=LiveConfig(**limits),
        files=files,
        clock=clock,
    )
    return shard, writes


def upsert_request(ids, *, seed: int = 1, key: str = "", **attributes) -> UpsertRequest:
    ids = np.array(ids, np.int64)
    packed = msgpack.packb(attributes) if attributes else b""
    vectors = unit_vectors(len(ids), seed)
    return UpsertRequest(item_ids=ids, vectors=vectors, attributes=packed, key=key, timeout_ms=1e3)


def delete_request(ids, *, key: str = "") -> DeleteRequest:
    return DeleteRequest(item_ids=np.array(ids, np.int64), key=key, timeout_ms=1e3)


def wrote(writes: ShardWrites, *requests) -> list[WriteReply]:
    """The replies to requests that succeed."""
    replies = writes.write(requests)
    assert all(isinstance(reply, WriteReply) for reply in replies), replies
    return [reply for reply in replies if isinstance(reply, WriteReply)]


def contents(shard: Shard) -> dict[int, bytes]:
    """Every live item and its vector's bytes."""
    state = shard.state
    kept = state.ids_by_row[:-1]
    if state.selection is not None:
        kept = kept[state.selection.live]
    ids = np.sort(np.concatenate((kept, state.delta.ids)))
    found, vectors = state.fetch(ids)
    assert found.tolist() == ids.tolist()
    assert state.rows == len(ids)
    return {item: row.tobytes() for item, row in zip(ids.tolist(), vectors, strict=True)}
