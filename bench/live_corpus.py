"""The shard that benchmarks of live writes use, and processes that hold it."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from shardline.bench.corpus import clustered_set, clusters_of, generation_of
from shardline.bench.vectors import BLOCK_ROWS, clustered
from shardline.cluster.build import run_here
from shardline.cluster.commands.build import plan_of
from shardline.cluster.config import load_config
from shardline.cluster.console import StageProgress
from shardline.cluster.store import Store
from shardline.shards.core.files import LIVE_FOLDER
from shardline.shards.core.messages import UpsertRequest
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.loading import load_newest
from shardline.shards.live.writes import ShardWrites
from shardline.shards.server.shard import Shard
from shardline.shards.storage.generation import GenerationManifest, read_generation

SHARD = 0
SEED = 11
TIMEOUT_MS = 60_000.0


def one_shard(root: Path, rows: int, dim: int, kind: str) -> Path:
    """A generation of one shard over clustered vectors, made once and reused, without any write;
    its folder."""
    store = Store(root)
    config = load_config(None, [f"store={root}", "cluster.shards=1", f"index.kind={kind}"])
    with StageProgress() as progress:
        items = clustered_set(store, rows, dim, progress)
        plan = plan_of(config)
        manifest = generation_of(store, items, plan, run_jobs=run_here, progress=progress)
    shutil.rmtree(root / LIVE_FOLDER, ignore_errors=True)
    return store.generation(manifest.generation)


def opened(generation: Path, config: LiveConfig | None = None) -> tuple[Shard, ShardWrites, int]:
    """The newest files of the shard, before its log is read; last the seq of its main index."""
    manifest = read_generation(generation)
    loaded = load_newest(generation, manifest, SHARD)
    shard = Shard(shard=SHARD, generation=manifest.generation, state=loaded.state)
    folder = live_folder(generation, SHARD)
    return shard, ShardWrites(shard, folder, keys=loaded.keys, config=config), loaded.main_seq


def written_vectors(manifest: GenerationManifest, rows: int) -> FloatArray:
    """(rows, dim) float32 of the corpus's clusters, none of them in the corpus."""
    corpus_rows = sum(entry.rows for entry in manifest.shards)
    first_row = -(-corpus_rows // BLOCK_ROWS) * BLOCK_ROWS
    return clustered(rows, manifest.dim, clusters_of(corpus_rows), 7, first_row=first_row)


def upsert(item_ids: IdArray, vectors: FloatArray, key: str = "") -> UpsertRequest:
    return UpsertRequest(
        item_ids=item_ids, vectors=vectors, attributes=b"", key=key, timeout_ms=TIMEOUT_MS
    )


def mixed_ids(rng: np.random.Generator, count: int, rows: int) -> IdArray:
    """Half of them new, half of items of the corpus; each once."""
    old = rng.choice(rows, count // 2, replace=False)
    new = rows + rng.permutation(count - count // 2)
    return rng.permutation(np.concatenate((old, new))).astype(np.int64)


def setup() -> dict[str, Any]:
    """What the figures depend on."""
    return {"cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1)}
