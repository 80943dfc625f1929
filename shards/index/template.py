"""Builds indexes: one template trained on a sample of the whole corpus, then one index per shard.

Every shard's index is the template plus the shard's own rows, at dense local row numbers 0..n-1 in
ascending item-id order. Because the template is shared, codes and scores of different shards are
on one scale, and sharding changes no answer.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from shardline.shards.core.errors import ConfigError, CorruptFile, InvalidInput
from shardline.shards.core.files import atomic_path
from shardline.shards.core.schema import FloatArray, Metric
from shardline.shards.index.layers import Layers, faiss_metric, layers_of
from shardline.shards.index.resolve import ROWS_PER_LIST_MIN
from shardline.shards.index.spec import ResolvedIndex

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # (stage, done, total)

ADD_BLOCK_ROWS = 65_536  # rows looked at for overflow at a time; more than faiss adds at a time
FP16_MAX = 65_504.0


def train_template(
    resolved: ResolvedIndex,
    sample: FloatArray,
    *,
    metric: Metric,
    seed: int,
    threads: int,
    progress: Progress | None = None,
    centroids: FloatArray | None = None,
    iterations: int | None = None,
) -> Any:
    """The empty, trained faiss index that every shard starts from.

    ``sample`` (n, dim) float32, checked and of unit length under cosine, is drawn from the whole
    corpus; ``resolved.train_rows`` rows are enough. The same sample, seed and thread count give the
    same template. centroids: as ``centroids_of`` a template with as many lists and the same
    transform; then only the codes are trained. iterations: of k-means, for a rough training.

    Raises:
        ConfigError: faiss cannot train this index on this sample.
    """
    dim = sample.shape[1]
    faiss.omp_set_num_threads(threads)
    index = faiss.index_factory(dim, resolved.factory, faiss_metric(metric))
    layers = layers_of(index)
    if centroids is not None:
        layers.base.quantizer.add(centroids)  # faiss trains no quantizer that is full
    _set_up(layers, resolved, seed, len(sample), iterations)
    _report(progress, "train", 0, len(sample))
    try:
        if metric is not Metric.L2:
            _train_transform_uncentred(layers, sample)
        layers.whole.train(sample)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot train {resolved.factory}",
            field="index",
            expected="an index that this corpus can train",
            got=f"{len(sample)} rows: {str(error).rsplit('Error: ', 1)[-1]}",
        ) from error
    _report(progress, "train", len(sample), len(sample))
    return layers.whole


def centroids_of(template: Any) -> FloatArray | None:
    """(nlist, d) float32: the centroids of a template's lists; None for a kind without lists."""
    layers = layers_of(template)
    if not layers.is_ivf:
        return None
    quantizer = faiss.downcast_index(layers.base.quantizer)
    return np.asarray(quantizer.reconstruct_n(0, quantizer.ntotal), dtype=np.float32)


def bytes_to_come(resolved: ResolvedIndex, *, dim: int, metric: Metric) -> float:
    """Bytes per vector of an index that is not built yet, without centroids."""
    index = faiss.index_factory(dim, resolved.factory, faiss_metric(metric))
    return layers_of(index).bytes_per_vector(0)


def write_index(index: Any, path: Path) -> None:
    """Writes any faiss index, complete or not at all."""
    with atomic_path(path) as temporary:
        faiss.write_index(index, str(temporary))


def read_index(path: Path) -> Any:
    """A faiss index from a file with a verified checksum: faiss itself checks almost nothing.

    Raises:
        CorruptFile: faiss cannot read it.
    """
    try:
        return faiss.read_index(str(path))  # already downcast, and the owner of the memory
    except (RuntimeError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or ["unreadable"])[-1]
        raise CorruptFile(f"{path}: not a faiss index", got=reason[-200:]) from error


def in_blocks(vectors: FloatArray) -> Iterator[FloatArray]:
    """Of (n, dim), some rows at a time."""
    return (vectors[at : at + ADD_BLOCK_ROWS] for at in range(0, len(vectors), ADD_BLOCK_ROWS))


def build_shard_index(
    template: Path,
    blocks: Iterable[FloatArray],
    out: Path,
    *,
    threads: int,
) -> None:
    """Writes the index of one shard: the template plus ``blocks``, each (n, dim) float32, in row
    order.

    The vectors are checked already, and of unit length under cosine.

    HNSW links depend on the order in which threads insert: only one thread gives the same graph
    twice. Every other kind is deterministic.

    Raises: as ``filled``.
    """
    write_index(filled(template, blocks, threads=threads).whole, out)


def filled(template: Path, blocks: Iterable[FloatArray], *, threads: int) -> Layers:
    """What ``build_shard_index`` writes.

    Raises:
        CorruptFile: the template cannot be read.
        InvalidInput: a vector overflows fp16 copies.
    """
    return _with_rows(layers_of(read_index(template)), blocks, threads)


def filled_copy(template: Any, blocks: Iterable[FloatArray], *, threads: int) -> Layers:
    """As ``filled``, of a template in memory, which stays as it is."""
    return _with_rows(layers_of(faiss.clone_index(template)), blocks, threads)


def _with_rows(layers: Layers, blocks: Iterable[FloatArray], threads: int) -> Layers:
    faiss.omp_set_num_threads(threads)
    is_fp16 = keeps_fp16(layers)
    for block in blocks:
        if is_fp16 and float(np.abs(block).max()) > FP16_MAX:
            raise InvalidInput(
                "too large for fp16 copies",
                field="vectors",
                expected=f"values within ±{FP16_MAX:g}",
                got=f"{float(np.abs(block).max()):g}",
                hint="set index.rerank to fp32",
            )
        layers.whole.add(block)
    return layers


def _set_up(
    layers: Layers, resolved: ResolvedIndex, seed: int, rows: int, iterations: int | None
) -> None:
    """Seeds every random choice of training and sets what a factory string cannot say."""
    centroids = 0
    clusterings = []
    if layers.is_ivf:
        clusterings.append(layers.base.cp)
        centroids = layers.base.nlist
    if hasattr(layers.base, "pq"):
        clusterings.append(layers.base.pq.cp)
        centroids = max(centroids, layers.base.pq.ksub)
    if hasattr(layers.base, "do_polysemous_training"):
        # A factory string turns it on; it takes ten seconds, for a Hamming filter never used here.
        layers.base.do_polysemous_training = False
    for clustering in clusterings:
        clustering.seed = seed
        clustering.min_points_per_centroid = 1  # no print by faiss: it is logged below
        clustering.niter = iterations or clustering.niter
    if iterations is None and rows < ROWS_PER_LIST_MIN * centroids:
        logger.warning(
            "training %d centroids on %d rows; %d would be better",
            centroids,
            rows,
            ROWS_PER_LIST_MIN * centroids,
        )
    if layers.is_hnsw:
        layers.base.hnsw.efConstruction = resolved.ef_construction


def _train_transform_uncentred(layers: Layers, vectors: FloatArray) -> None:
    """Trains a PCA on the vectors and their mirror images, so that the mean it subtracts is zero.

    Inner products survive a rotation but not a shift: with the mean removed from both sides,
    q.x would lose the term that depends on x alone, and the order of results with it.
    """
    if layers.transform is None:
        return
    first = faiss.downcast_VectorTransform(layers.transform.chain.at(0))
    if isinstance(first, faiss.PCAMatrix):
        first.train(np.concatenate([vectors, -vectors]))


def keeps_fp16(layers: Layers) -> bool:
    """Whether vectors are kept in half precision."""
    outer = faiss.downcast_index(layers.refine.refine_index) if layers.refine else layers.base
    quantizer = getattr(outer, "sq", None)
    return quantizer is not None and quantizer.qtype == faiss.ScalarQuantizer.QT_fp16


def _report(progress: Progress | None, stage: str, done: int, total: int) -> None:
    if progress is not None:
        progress(stage, done, total)
