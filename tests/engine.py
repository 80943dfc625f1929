"""Small indexes, generations and shards for tests of the engine."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from shardline.cluster.build import BuildPlan, check_plan, fill_generation, run_here
from shardline.shards.core.files import number_of, write_bytes
from shardline.shards.core.partition import Partitioning
from shardline.shards.core.schema import Metric
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexSpec
from shardline.shards.index.template import train_template
from shardline.shards.live.state import ShardState
from shardline.shards.server.shard import Shard
from shardline.shards.storage.embedding_set import (
    EmbeddingSet,
    embedding_writer,
    open_embedding_set,
)
from shardline.shards.storage.generation import GenerationManifest

WHEN = "2026-11-22T00:00:00+00:00"


def write_set(
    target: Path,
    vectors: np.ndarray,
    ids: np.ndarray | None = None,
    *,
    metric: Metric = Metric.COSINE,
    attributes: pa.RecordBatch | None = None,
    queries: np.ndarray | None = None,
    encoder: dict[str, bytes] | None = None,
    item_encoder: dict[str, bytes] | None = None,
    rows_per_file: int = 1 << 20,
) -> EmbeddingSet:
    """An embedding set of model m1 over all vectors; ids are row numbers unless given."""
    with embedding_writer(
        target,
        model_version="m1",
        dim=vectors.shape[1],
        metric=metric,
        created_at=WHEN,
        rows_per_file=rows_per_file,
    ) as writer:
        writer.append(np.arange(len(vectors)) if ids is None else ids, vectors, attributes)
        if queries is not None:
            writer.queries(queries)
        for name, content in (encoder or {}).items():
            write_bytes(writer.folder / "query_encoder" / name, content)
        for name, content in (item_encoder or {}).items():
            write_bytes(writer.folder / "item_encoder" / name, content)
    return open_embedding_set(target)


def plan_of(num_shards: int = 1, *, partitioning: str = "range", **fields) -> BuildPlan:
    """One thread, so that the same corpus gives the same files."""
    return BuildPlan(
        spec=IndexSpec(**fields),
        num_shards=num_shards,
        partitioning=Partitioning(partitioning),
        threads=1,
    )


def build_main(vectors: np.ndarray, *, metric: Metric = Metric.COSINE, **fields) -> MainIndex:
    """A main index in memory over all vectors, built with one thread."""
    rows, dim = vectors.shape
    resolved = resolve(IndexSpec(**fields), rows=rows, dim=dim, metric=metric)
    index = train_template(resolved, vectors, metric=metric, seed=0, threads=1)
    index.add(vectors)
    return MainIndex(index, metric=metric, defaults=resolved.search_params)


def build_generation(
    folder: Path,
    vectors: np.ndarray,
    ids: np.ndarray,
    num_shards: int,
    *,
    metric: Metric = Metric.COSINE,
    query_encoder: dict[str, bytes] | None = None,
    item_encoder: dict[str, bytes] | None = None,
    **fields,
) -> GenerationManifest:
    """The generation of its folder's number, else 7, by the real builder; ids ascending, cut into
    equal ranges."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = write_set(
            Path(scratch) / "set",
            vectors,
            ids,
            metric=metric,
            encoder=query_encoder,
            item_encoder=item_encoder,
        )
        return fill_generation(
            folder,
            number_of(folder.name) or 7,
            check_plan(corpus.folder, plan_of(num_shards, **fields)),
            run_jobs=run_here,
            progress=lambda stage, done, total: None,
        )


def flat_shard(vectors: np.ndarray, ids: np.ndarray, *, metric: Metric = Metric.DOT) -> Shard:
    """A shard in memory over a flat index."""
    main = build_main(vectors, metric=metric, kind="flat")
    return Shard(shard=0, generation=7, state=ShardState.of(main, ids))
