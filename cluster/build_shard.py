"""One shard of a generation, built and asked: a job that runs in any process.

``cluster.build`` plans the jobs and says where they run.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from shardline.shards.core.messages import SearchParams
from shardline.shards.core.partition import Partition
from shardline.shards.core.schema import EMPTY_ID, FloatArray, IdArray, Metric, normalise
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexKind, IndexSpec, ResolvedIndex
from shardline.shards.index.template import build_shard_index, train_template
from shardline.shards.storage.embedding_set import EmbeddingSet, open_embedding_set
from shardline.shards.storage.generation import (
    INDEX_NAME,
    ITEM_IDS_NAME,
    TEMPLATE_NAME,
    ShardEntry,
    describe_shard,
    shard_folder,
    write_item_ids,
)

QUALITY_K = 100

Answer: TypeAlias = tuple[FloatArray, IdArray]  # scores and item ids, both (n, k), in answer order


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """Everything one shard is built from; crosses to another process by pickling."""

    shard: int
    embeddings: Path
    generation: Path
    cut: Partition
    index: ResolvedIndex
    metric: Metric
    threads: int
    queries: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardBuilt:
    """A shard's files, and how it answers the quality queries: exactly, and through its index."""

    entry: ShardEntry
    exact: Answer
    found: Answer
    bytes_per_vector: float
    seconds: float


def build_shard(job: ShardJob) -> ShardBuilt:
    """Writes one shard's folder and answers the quality queries."""
    started = time.perf_counter()
    corpus = open_embedding_set(job.embeddings, verify=False)  # verified once, by the build
    item_ids, vectors = _rows_of(corpus, job.cut, job.shard)
    folder = job.generation / shard_folder(job.shard)
    folder.mkdir(exist_ok=True)  # a task that Ray tries again finds it
    build_shard_index(
        job.generation / TEMPLATE_NAME,
        vectors,
        folder / INDEX_NAME,
        metric=job.metric,
        threads=job.threads,
    )
    write_item_ids(folder / ITEM_IDS_NAME, item_ids)
    seconds = time.perf_counter() - started
    main = MainIndex.load(folder / INDEX_NAME, metric=job.metric, defaults=job.index.search_params)
    exact = _exact(vectors, job.queries, job.metric)
    return ShardBuilt(
        entry=describe_shard(job.generation, job.shard, item_ids),
        exact=_with_ids(exact, item_ids),
        found=_with_ids(main.search(job.queries, QUALITY_K, SearchParams()), item_ids),
        bytes_per_vector=main.bytes_per_vector,
        seconds=seconds,
    )


def _rows_of(corpus: EmbeddingSet, cut: Partition, shard: int) -> tuple[IdArray, FloatArray]:
    """The shard's item ids, ascending, and their vectors; only these rows are kept in memory."""
    ids: list[IdArray] = []
    vectors: list[FloatArray] = []
    for batch in corpus.batches():
        mine = cut.shard_of(batch.item_ids) == shard
        ids.append(batch.item_ids[mine])
        vectors.append(batch.vectors[mine])
    item_ids = np.concatenate(ids)
    order = np.argsort(item_ids)
    rows = np.concatenate(vectors)[order]
    return item_ids[order], normalise(rows) if corpus.metric is Metric.COSINE else rows


def _exact(vectors: FloatArray, queries: FloatArray, metric: Metric) -> Answer:
    """The exact answer over local rows, by the flat index: the standard recall is measured by."""
    flat = resolve(
        IndexSpec(kind=IndexKind.FLAT), rows=len(vectors), dim=vectors.shape[1], metric=metric
    )
    index = train_template(flat, vectors[:1], metric=metric, seed=0, threads=1)
    index.add(vectors)
    return MainIndex(index, metric=metric, defaults=flat.search_params).search(
        queries, QUALITY_K, SearchParams()
    )


def _with_ids(answer: Answer, item_ids: IdArray) -> Answer:
    scores, rows = answer
    return scores, np.where(rows < 0, EMPTY_ID, item_ids[rows])
