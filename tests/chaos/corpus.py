"""The corpus of the chaos test: random unit vectors, four flat shards, users known to an encoder.

Flat, so that every answer can be known exactly. Ids are spread out; each item has a title. Some
items, and ids that no item has yet, belong to writers: these lie in dimensions of their own, see
``tests.chaos.written``.
"""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from shardline.bench.journal import ABSENT, Version
from shardline.cluster.build import build_generation
from shardline.cluster.store import Store
from shardline.shards.core.encoder_files import write_encoder
from tests.chaos.oracle import TITLE, Corpus, title_of
from tests.chaos.written import WRITTEN_DIM
from tests.engine import plan_of, write_set

ROWS, DIM, SHARDS = 20_000, 64, 4
USERS = 200
WRITERS = 2
OWNED = 5  # items per writer and shard that were built, and as many ids that are new
USER = "user"  # the encoder's one feature
MODEL = "m1"  # the model version of tests.engine.write_set
SEED = 11


def make_store(root: Path) -> Corpus:
    """Writes the embedding set and a live generation into a store at ``root``."""
    rng = np.random.default_rng(SEED)
    vectors, users = _units(rng, ROWS), _units(rng, USERS)
    ids = np.sort(rng.choice(10 * ROWS, ROWS, replace=False)).astype(np.int64)
    built_ids = _chosen(ids)
    vectors[np.searchsorted(ids, built_ids)] = in_space(
        rng.standard_normal((len(built_ids), WRITTEN_DIM)).astype(np.float32)
    )
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
        owned=_owned(ids, vectors, built_ids),
    )


def in_space(vectors: np.ndarray) -> np.ndarray:
    """(n, DIM) float32 of unit length from (n, WRITTEN_DIM): where written items lie."""
    found = np.zeros((len(vectors), DIM), np.float32)
    found[:, -WRITTEN_DIM:] = np.abs(vectors)
    unit: np.ndarray = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


def _chosen(ids: np.ndarray) -> np.ndarray:
    """Of each shard the same number, spread, each with a free id behind it in the same shard."""
    found = []
    for part in np.array_split(ids, SHARDS):
        has_room = np.flatnonzero(np.diff(part) > 1)
        places = np.linspace(0, len(has_room) - 1, WRITERS * OWNED).astype(int)
        found.append(part[has_room[places]])
    return np.concatenate(found)


def _owned(
    ids: np.ndarray, vectors: np.ndarray, built: np.ndarray
) -> tuple[dict[int, Version], ...]:
    """Of each writer every so many-th of the items, and the ids behind them."""
    owned: list[dict[int, Version]] = [{} for _ in range(WRITERS)]
    for place, (item, row) in enumerate(
        zip(built.tolist(), np.searchsorted(ids, built), strict=True)
    ):
        items = owned[place % WRITERS]
        items[item] = Version("the build", vectors[row], title_of(item))
        items[item + 1] = ABSENT
    return tuple(owned)


def _units(rng: np.random.Generator, count: int) -> np.ndarray:
    drawn = rng.standard_normal((count, DIM))
    drawn[:, -WRITTEN_DIM:] = 0
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
