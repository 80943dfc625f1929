"""The corpus of the chaos test: random unit vectors, four flat shards, users known to an encoder.

Flat, so that every answer can be known exactly. Ids are spread out; each item has a title.
"""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from shardline.cluster.build import build_generation
from shardline.cluster.store import Store
from shardline.shards.core.encoder_files import write_encoder
from tests.chaos.oracle import TITLE, Corpus, title_of
from tests.engine import plan_of, write_set

ROWS, DIM, SHARDS = 20_000, 64, 4
USERS = 200
USER = "user"  # the encoder's one feature
MODEL = "m1"  # the model version of tests.engine.write_set
SEED = 11


def make_store(root: Path) -> Corpus:
    """Writes the embedding set and a live generation into a store at ``root``."""
    rng = np.random.default_rng(SEED)
    vectors, users = _units(rng, ROWS), _units(rng, USERS)
    ids = np.sort(rng.choice(10 * ROWS, ROWS, replace=False)).astype(np.int64)
    store = Store(root)
    written = write_set(
        store.embeddings / MODEL,
        vectors,
        ids,
        attributes=pa.record_batch({TITLE: [title_of(item) for item in ids.tolist()]}),
        encoder=_encoder(users),
    )
    manifest = build_generation(store, written.folder, plan_of(SHARDS, kind="flat"))
    store.set_current(manifest.generation)
    return Corpus(
        vectors=vectors,
        ids=ids,
        users=users,
        rows=tuple(entry.rows for entry in manifest.shards),
        generation=manifest.generation,
        model_version=MODEL,
    )


def _units(rng: np.random.Generator, count: int) -> np.ndarray:
    drawn = rng.standard_normal((count, DIM))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def _encoder(users: np.ndarray) -> dict[str, bytes]:
    """A tower that is a table: user u's vector is users[u]. Row 0 is that of unknown users."""
    config = {
        "model_version": MODEL,
        "dim": DIM,
        "projection": "identity",
        "features": [
            {"kind": "id", "column": USER, "value_type": "int", "values": list(range(USERS))}
        ],
    }
    weights = {"embedding.0": np.concatenate([users.mean(axis=0, keepdims=True), users])}
    with tempfile.TemporaryDirectory() as folder:
        write_encoder(Path(folder), config, weights)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
