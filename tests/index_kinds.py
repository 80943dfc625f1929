"""Indexes of every kind over one small corpus: what tests of main indexes and of filters search."""

import faiss
import numpy as np
import pytest

from shardline.bench.vectors import manifold
from shardline.shards.core.messages import SearchParams

ROWS, DIM = 600, 16
FULL = SearchParams(nprobe=2048)
KINDS = {
    "flat": {"kind": "flat"},
    "ivf": {"kind": "ivf", "nlist": 8},
    "hnsw": {"kind": "hnsw"},
    "pq": {"kind": "pq", "m": 8, "nbits": 6},
    "pq-rerank": {"kind": "pq", "m": 8, "nbits": 6, "rerank": "fp32"},
    "ivfpq": {"kind": "ivfpq", "nlist": 8, "m": 8, "nbits": 6},
    "ivfpq-fs": {"kind": "ivfpq-fs", "nlist": 8, "m": 8},
    "ivfpq-fs-fp32": {"kind": "ivfpq-fs", "nlist": 8, "m": 8, "rerank": "fp32"},
    "sq8": {"kind": "sq8"},
    "pca-flat": {"kind": "flat", "pca": 8},
    "pca-ivf": {"kind": "ivf", "nlist": 8, "pca": 8, "rerank": "none"},
    "pca-hnsw": {"kind": "hnsw", "pca": 8},
    "pca-pq": {"kind": "pq", "m": 8, "nbits": 6, "pca": 8},
    "ivf-sq8": {"kind": "factory", "factory": "IVF8,SQ8"},
    "pq-fs": {"kind": "factory", "factory": "PQ8x4fs,RFlat"},
    "hnsw-sq8": {"kind": "factory", "factory": "HNSW16,SQ8,RFlat"},
}


@pytest.fixture(scope="module")
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rows = manifold(ROWS, DIM, 4, seed=1)
    rows[100:110] = rows[0]  # eleven exact copies
    return rows


@pytest.fixture(scope="module")
def queries(vectors: np.ndarray) -> np.ndarray:
    return np.concatenate([vectors[:2], manifold(4, DIM, 4, seed=1, stream=1)])
