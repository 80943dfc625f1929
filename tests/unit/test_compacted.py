"""An index whose rows were copied is, byte for byte, the one made of all rows' first vectors."""

from pathlib import Path

import numpy as np
import pytest

from shardline.bench.vectors import manifold
from shardline.shards.core.schema import FloatArray, Metric, normalise
from shardline.shards.index.compacted import NEW, build_compacted_index
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexSpec, ResolvedIndex
from shardline.shards.index.template import (
    build_shard_index,
    in_blocks,
    train_template,
    write_index,
)

ROWS, DIM = 700, 16
KINDS = [
    {"kind": "flat"},
    {"kind": "ivf", "nlist": 8},
    {"kind": "hnsw", "hnsw_m": 8},
    {"kind": "pq", "m": 4, "nbits": 5},
    {"kind": "pq", "m": 4, "nbits": 5, "rerank": "fp16"},
    {"kind": "ivfpq", "nlist": 4, "m": 4, "nbits": 5},
    {"kind": "ivfpq", "nlist": 4, "m": 4, "nbits": 5, "rerank": "fp32"},
    {"kind": "ivfpq-fs", "nlist": 4, "m": 8},
    {"kind": "ivfpq-fs", "nlist": 40, "m": 16, "rerank": "fp32"},  # some lists are empty
    {"kind": "ivfpq-fs", "nlist": 4, "pca": 8},
    {"kind": "sq8"},
    {"kind": "sq8", "pca": 8, "rerank": "fp16"},
    {"kind": "factory", "factory": "IVF4,SQ8"},
    {"kind": "factory", "factory": "RR15,IVF4,PQ5x4fsr,RFlat"},  # an odd number of sub-vectors
    {"kind": "factory", "factory": "PQ8x4fs,RFlat"},
]


@pytest.fixture(params=KINDS, ids=lambda fields: "-".join(map(str, fields.values())))
def fields(request) -> dict:
    return request.param


def a_template(folder: Path, fields: dict, metric: Metric) -> tuple[ResolvedIndex, Path]:
    sample = manifold(1000, DIM, 4, seed=1)
    resolved = resolve(IndexSpec(**fields), rows=ROWS, dim=DIM, metric=metric)
    path = folder / "template.faiss"
    write_index(train_template(resolved, sample, metric=metric, seed=0, threads=1), path)
    return resolved, path


class Rows:
    """A shard's vectors by item, and the index that compactions make of them."""

    def __init__(self, folder: Path, fields: dict, metric: Metric) -> None:
        self.resolved, self._template = a_template(folder, fields, metric)
        self._metric, self._folder = metric, folder
        self.vectors: dict[int, FloatArray] = {}
        self.index: MainIndex | None = None

    def write(self, vectors: dict[int, FloatArray], deleted: list[int] | None = None) -> None:
        """Compacts: items with new vectors, and without those deleted."""
        before = sorted(self.vectors)
        self.vectors |= vectors
        for item in deleted or ():
            del self.vectors[item]
        row_of = {item: row for row, item in enumerate(before) if item not in vectors}
        source = np.array([row_of.get(item, NEW) for item in sorted(self.vectors)])
        new = [vectors[item] for item in sorted(vectors) if item in self.vectors]
        path = self._folder / "compacted.faiss"
        array = np.array(new, np.float32).reshape(-1, DIM)
        if self.index is None:
            build_shard_index(self._template, in_blocks(array), path, threads=1)
        else:
            build_compacted_index(self._template, self.index, source, array, path, threads=1)
        defaults = self.resolved.search_params
        self.index = MainIndex.load(path, metric=self._metric, defaults=defaults)

    def made_anew(self) -> bytes:
        path = self._folder / "anew.faiss"
        every = np.array([self.vectors[item] for item in sorted(self.vectors)])
        build_shard_index(self._template, in_blocks(every), path, threads=1)
        return path.read_bytes()

    @property
    def written(self) -> bytes:
        return (self._folder / "compacted.faiss").read_bytes()


def vectors_of(items: np.ndarray, seed: int) -> dict[int, FloatArray]:
    made = np.random.default_rng(seed).standard_normal((len(items), DIM)).astype(np.float32)
    return dict(zip(items.tolist(), normalise(made), strict=True))


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
def test_copied_rows_are_as_those_made_anew(tmp_path: Path, fields: dict, metric: Metric) -> None:
    rng = np.random.default_rng(5)
    rows = Rows(tmp_path, fields, metric)
    rows.write(vectors_of(np.arange(0, 2 * ROWS, 2), 0))
    for turn in range(1, 3):  # each on what the one before has made
        known = np.array(sorted(rows.vectors))
        deleted = rng.choice(known, int(rng.integers(0, 90)), replace=False)
        written = rng.choice(3 * ROWS, int(rng.integers(1, 150)), replace=False)
        rows.write(vectors_of(written, turn), [each for each in deleted if each not in written])
        assert rows.written == rows.made_anew()


def test_all_rows_new_and_none(tmp_path: Path, fields: dict) -> None:
    rows = Rows(tmp_path, fields, Metric.DOT)
    rows.write(vectors_of(np.arange(40), 0))
    for written, deleted in (
        ({}, list(range(0, 40, 3))),
        (vectors_of(np.arange(100, 133), 1), sorted(set(range(40)) - set(range(0, 40, 3)))),
        (vectors_of(np.arange(33), 2), []),
        ({}, []),
    ):
        rows.write(written, deleted)
        assert rows.written == rows.made_anew()
