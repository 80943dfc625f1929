"""A store with one small generation, queries for it, and the batch command on it, for tests."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner

from shardline.cluster.build import check_plan, fill_generation, run_here
from shardline.cluster.cli import cli
from shardline.cluster.store import Store
from shardline.shards.core.encoder_files import write_encoder
from shardline.shards.core.schema import Metric, normalise
from tests.engine import plan_of, write_set

DIM, ROWS, USERS, SHARDS = 8, 300, 40, 3


@dataclass(frozen=True)
class BatchStore:
    """vectors (ROWS, DIM) of unit length, of items ids (ROWS,); users (USERS, DIM): their query
    vectors, by the generation's encoder."""

    store: Store
    vectors: np.ndarray
    ids: np.ndarray
    users: np.ndarray

    @property
    def folder(self) -> Path:
        return self.store.generation(self.store.current())

    def batch(self, *arguments: object) -> str:
        """What the command prints; its errors are raised."""
        words = ["--store", str(self.store.root), "batch", *map(str, arguments)]
        done = CliRunner().invoke(cli, words, standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        return done.stdout


def make_store(root: Path, num_shards: int = SHARDS, **index: object) -> BatchStore:
    """With some vectors that several items share, so that scores tie."""
    rng = np.random.default_rng(3)
    vectors = normalise(rng.standard_normal((ROWS, DIM)).astype(np.float32))
    vectors[200:260] = vectors[:60]
    ids = np.arange(ROWS, dtype=np.int64) * 7 + 5
    users = normalise(rng.standard_normal((USERS, DIM)).astype(np.float32))
    attributes = pa.record_batch(
        {"title": [f"item {item}" for item in ids.tolist()], "price": np.arange(ROWS) / 2}
    )
    store = Store(root / "store")
    folder = store.generation(1)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = write_set(
            Path(scratch) / "set",
            vectors,
            ids,
            metric=Metric.COSINE,
            attributes=attributes,
            encoder=_encoder(users),
        )
        plan = check_plan(corpus.folder, plan_of(num_shards, **({"kind": "flat"} | index)))
        fill_generation(
            folder, 1, plan, run_jobs=run_here, progress=lambda stage, done, total: None
        )
    store.set_current(1)
    return BatchStore(store, vectors, ids, users)


def write_queries(path: Path, vectors: np.ndarray, ids: object = None, **more: object) -> Path:
    """Vectors as a Parquet file with several row groups; ids are texts unless given."""
    names = pa.array([f"q{row}" for row in range(len(vectors))]) if ids is None else ids
    flat = pa.array(np.ascontiguousarray(vectors).ravel())
    lists = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    pq.write_table(pa.table({"id": names, "embedding": lists, **more}), path, row_group_size=37)
    return path


def read_parts(folder: Path) -> pa.Table:
    """The whole result, in the order of its parts."""
    return pa.concat_tables([pq.read_table(path) for path in part_paths(folder)])


def part_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a result."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _encoder(users: np.ndarray) -> dict[str, bytes]:
    """A tower that is a table: user u's vector is users[u]. Row 0 is that of unknown users."""
    config = {
        "model_version": "m1",
        "dim": DIM,
        "projection": "identity",
        "features": [
            {"kind": "id", "column": "user", "value_type": "int", "values": list(range(len(users)))}
        ],
    }
    weights = {"embedding.0": np.concatenate([users.mean(axis=0, keepdims=True), users])}
    with tempfile.TemporaryDirectory() as folder:
        write_encoder(Path(folder), config, weights)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
