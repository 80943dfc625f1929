"""Data sets that index kinds are compared on: vectors to index, and queries that are not in it."""

import gzip
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from shardline.bench.corpus import SEED, clusters_of
from shardline.bench.vectors import clustered
from shardline.shards.core.errors import DataError, InvalidInput, NotFound
from shardline.shards.core.schema import FloatArray, IdArray, Metric, normalise
from shardline.shards.storage.foreign_vectors import read_foreign

MNIST_BASE = "train-images-idx3-ubyte.gz"
MNIST_QUERIES = "t10k-images-idx3-ubyte.gz"
MNIST_TRUTH = "groundtruth_first1000q_top100.ivecs"
IDX_IMAGES = 0x00000803  # unsigned bytes, three dimensions


class Source(StrEnum):
    CLUSTERED = "clustered"  # synthetic
    MNIST784 = "mnist784"  # the files of MNIST, and the exact neighbours of 1000 queries


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexData:
    """vectors (m, dim), queries (n, dim) float32, ready for the metric. truth: (n, k) int64 exact
    rows from elsewhere, where the set brings them."""

    name: str
    vectors: FloatArray
    queries: FloatArray
    metric: Metric
    truth: IdArray | None = None


def clustered_data(rows: int, dim: int, queries: int) -> IndexData:
    """Clustered unit vectors; the queries are further ones of the same clusters."""
    both = clustered(rows + queries, dim, clusters_of(rows), SEED)
    return IndexData(
        name=f"clustered {rows:,} x {dim}",
        vectors=both[:rows],
        queries=both[rows:],
        metric=Metric.COSINE,
    )


def mnist_data(folder: Path, queries: int) -> IndexData:
    """The 60,000 images under Euclidean distance, asked by the first ``queries`` test images.

    Raises:
        NotFound: a file is missing. DataError: it is not what its name says.
    """
    base = read_idx(folder / MNIST_BASE)
    asked = read_idx(folder / MNIST_QUERIES)[:queries]
    truth_path = folder / MNIST_TRUTH
    truth = read_ivecs(truth_path) if truth_path.is_file() else None
    return IndexData(
        name=f"mnist784 {len(base):,} x {base.shape[1]}",
        vectors=base,
        queries=asked,
        metric=Metric.L2,
        truth=None if truth is None or len(truth) < len(asked) else truth[: len(asked)],
    )


def vectors_data(path: Path, *, metric: Metric, queries: int) -> IndexData:
    """Somebody's vectors, of which ``queries`` drawn at random are held out and asked.

    Raises:
        InvalidInput: fewer than twice as many vectors as queries. As ``read_foreign``.
    """
    parts = [batch.vectors for batch in read_foreign([path], metric=metric)]
    everything = np.concatenate(parts) if parts else np.empty((0, 1), np.float32)
    if len(everything) < 2 * queries:
        raise InvalidInput(
            "too few vectors",
            field="queries",
            expected=f"<= {len(everything) // 2}, half of the vectors",
            got=str(queries),
        )
    if metric is Metric.COSINE:
        everything = normalise(everything)
    order = np.random.default_rng(SEED).permutation(len(everything))
    rows, dim = len(everything) - queries, everything.shape[1]
    return IndexData(
        name=f"{path.name} {rows:,} x {dim}",
        vectors=np.ascontiguousarray(everything[np.sort(order[queries:])]),
        queries=np.ascontiguousarray(everything[order[:queries]]),
        metric=metric,
    )


def read_idx(path: Path) -> FloatArray:
    """(n, rows * columns) float32 of a gzipped IDX file of images.

    Raises:
        NotFound: there is no such file. DataError: it is no such file, or cut short.
    """
    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: not a gzip file", got=str(error)) from error
    header = np.frombuffer(content[:16], dtype=">i4")
    if header.size < 4 or header[0] != IDX_IMAGES:
        raise DataError(f"{path}: not images in IDX format", expected=f"magic {IDX_IMAGES:#x}")
    count, height, width = (int(size) for size in header[1:])
    pixels = np.frombuffer(content, dtype=np.uint8, offset=16)
    if pixels.size != count * height * width:
        raise DataError(
            f"{path}: cut short", expected=f"{count * height * width} bytes", got=str(pixels.size)
        )
    return pixels.reshape(count, height * width).astype(np.float32)


def read_ivecs(path: Path) -> IdArray:
    """(n, k) int64 of a file of int32 rows, each after its length.

    Raises:
        DataError: rows of different lengths, or a cut file.
    """
    values = np.fromfile(path, dtype="<i4")
    width = int(values[0]) + 1 if values.size else 1
    if values.size % width or (values[::width] != width - 1).any():
        raise DataError(f"{path}: not an ivecs file of rows of one length")
    return values.reshape(-1, width)[:, 1:].astype(np.int64)
