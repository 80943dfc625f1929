"""One shard of a generation, built and asked: a job that runs in any process.

``cluster.build`` plans the jobs and says where they run.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from shardline.cluster.tuning import Answers, Ladder, sweep
from shardline.shards.core.schema import FloatArray, Metric
from shardline.shards.index.exact import exact_top_k
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.spec import MEASURED_K, ResolvedIndex
from shardline.shards.index.template import build_shard_index, in_blocks
from shardline.shards.storage.generation import (
    ATTRIBUTES_NAME,
    INDEX_NAME,
    ITEM_IDS_NAME,
    TEMPLATE_NAME,
    ShardEntry,
    describe_shard,
    shard_folder,
    write_attributes,
    write_item_ids,
)
from shardline.shards.storage.spill import ShardRows, read_spill


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """Everything one shard is built from; crosses to another process by pickling.

    Its ``rows`` rows, a ``share`` of all, wait in the spill of the staged ``generation``. queries
    (n, dim): what it is asked afterwards, with the parameters of ``ladder``.
    """

    shard: int
    rows: int
    share: float
    generation: Path
    index: ResolvedIndex
    metric: Metric
    threads: int
    queries: FloatArray
    ladder: Ladder
    target_recall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardBuilt:
    """A shard's files, and how it answers the sample queries.

    exact: the best scores among its rows, (n, at most MEASURED_K). seconds: those of building, and
    sweep_seconds those of asking.
    """

    entry: ShardEntry
    exact: FloatArray
    answers: Answers
    bytes_per_vector: float
    seconds: float
    sweep_seconds: float


def build_shard(job: ShardJob) -> ShardBuilt:
    """Writes one shard's folder and answers the sample queries; its own rows are held in memory."""
    started = time.perf_counter()
    own = read_spill(job.generation, job.shard, rows=job.rows, dim=job.queries.shape[1])
    folder = write_shard(job.generation, job.shard, own, threads=job.threads)
    built = time.perf_counter()
    main = MainIndex.load(folder / INDEX_NAME, metric=job.metric, defaults=job.index.search_params)
    exact = exact_top_k(job.queries, own.vectors, MEASURED_K, job.metric).scores
    answers = sweep(
        main,
        own.vectors,
        job.queries,
        job.ladder,
        exact=exact,
        share=job.share,
        target=job.target_recall,
        metric=job.metric,
    )
    return ShardBuilt(
        entry=describe_shard(job.generation, job.shard, own.item_ids),
        exact=exact,
        answers=answers,
        bytes_per_vector=main.bytes_per_vector,
        seconds=built - started,
        sweep_seconds=time.perf_counter() - built,
    )


def write_shard(generation: Path, shard: int, rows: ShardRows, *, threads: int) -> Path:
    """The folder of one shard with its files: the staged generation's template, and these rows."""
    folder = generation / shard_folder(shard)
    folder.mkdir(exist_ok=True)  # a task that Ray tries again finds it
    template, vectors = generation / TEMPLATE_NAME, in_blocks(rows.vectors)
    build_shard_index(template, vectors, folder / INDEX_NAME, threads=threads)
    write_item_ids(folder / ITEM_IDS_NAME, rows.item_ids)
    write_attributes(folder / ATTRIBUTES_NAME, rows.attributes)
    return folder
