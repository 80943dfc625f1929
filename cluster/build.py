"""Builds a generation: one template trained on a sample of the whole corpus, one index per shard.

Shards are independent jobs. ``run_here`` does them one after the other in this process,
``run_on_ray`` as Ray tasks; both give the same files. Queries sampled from the corpus are answered
by every shard, exactly and through its index, so the manifest carries the recall of the build.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import ray

from shardline.cluster.build_shard import QUALITY_K, ShardBuilt, ShardJob, build_shard
from shardline.cluster.store import Store
from shardline.router.merge import merge_top_k
from shardline.shards.core import files
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.partition import Partition, Partitioning, partition
from shardline.shards.core.schema import FloatArray, Metric, normalise
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexSpec, ResolvedIndex
from shardline.shards.index.template import train_template, write_index
from shardline.shards.storage.embedding_set import EmbeddingSet, open_embedding_set
from shardline.shards.storage.generation import (
    QUERY_ENCODER_FOLDER,
    TEMPLATE_NAME,
    GenerationManifest,
    write_generation,
)

QUALITY_QUERIES = 200
CANCEL_S = 10.0
MIN_TRAIN_ROWS = 1  # an index that needs no training still takes its dimension from a sample

Progress = Callable[[str, int, int], None]
RunJobs = Callable[[Sequence[ShardJob]], Iterator[ShardBuilt]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """What to build. threads: faiss threads of the template's training and of each shard's job."""

    spec: IndexSpec
    num_shards: int
    partitioning: Partitioning
    threads: int
    seed: int = 0
    gpu: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPlan:
    """A plan that can be carried out: the whole corpus, the index it gets, the cut into shards.

    seconds: what it took to open, check and cut the corpus.
    """

    plan: BuildPlan
    corpus: EmbeddingSet
    index: ResolvedIndex
    cut: Partition
    seconds: float


def check_plan(embeddings: Path, plan: BuildPlan) -> CheckedPlan:
    """Opens an embedding set, every checksum verified, and refuses what cannot be built from it.

    Raises:
        NotFound, CorruptFile, NewerFormat, DataError: the embedding set is absent or damaged.
        ConfigError: the index cannot be built over this corpus.
        InvalidInput: more shards than items.
    """
    started = time.perf_counter()
    corpus = open_embedding_set(embeddings)
    index = resolve(plan.spec, rows=corpus.rows, dim=corpus.dim, metric=corpus.metric, gpu=plan.gpu)
    cut = partition(corpus.item_ids(), plan.num_shards, plan.partitioning)
    seconds = time.perf_counter() - started
    return CheckedPlan(plan=plan, corpus=corpus, index=index, cut=cut, seconds=seconds)


def build_generation(
    store: Store,
    embeddings: Path,
    plan: BuildPlan,
    *,
    run_jobs: RunJobs | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> GenerationManifest:
    """Writes the next generation from an embedding set; it is not made the live one.

    Raises as ``check_plan``.
    """
    return build_checked(
        store, check_plan(embeddings, plan), run_jobs=run_jobs or run_here, progress=progress
    )


def build_checked(
    store: Store, checked: CheckedPlan, *, run_jobs: RunJobs, progress: Progress
) -> GenerationManifest:
    """``build_generation`` with the checks behind it.

    The build's seconds are those of both parts, not of what the caller did between them.
    """
    started = time.perf_counter()
    plan, corpus, index = checked.plan, checked.corpus, checked.index
    number = store.next_generation()
    with files.staged_folder(store.generation(number)) as staging:
        sample, queries = _samples(corpus, max(index.train_rows, MIN_TRAIN_ROWS), plan.seed)
        template = train_template(
            index,
            sample,
            metric=corpus.metric,
            seed=plan.seed,
            threads=plan.threads,
            progress=progress,
        )
        write_index(template, staging / TEMPLATE_NAME)
        train_seconds = time.perf_counter() - started
        jobs = _jobs(checked, staging, queries)
        built = _collect(run_jobs(jobs), len(jobs), progress)
        manifest = GenerationManifest(
            generation=number,
            model_version=corpus.model_version,
            metric=corpus.metric,
            dim=corpus.dim,
            spec=plan.spec,
            index=index,
            partitioning=plan.partitioning.value,
            boundaries=tuple(int(key) for key in checked.cut.upper_keys),
            shards=tuple(shard.entry for shard in built),
            template=files.describe_file(staging, TEMPLATE_NAME),
            query_encoder=_copy_encoder(corpus, staging),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            quality=_quality(built, train_seconds, checked.seconds + time.perf_counter() - started),
        )
        write_generation(staging, manifest)
    return manifest


def _jobs(checked: CheckedPlan, generation: Path, queries: FloatArray) -> list[ShardJob]:
    return [
        ShardJob(
            shard=shard,
            embeddings=checked.corpus.folder,
            generation=generation,
            cut=checked.cut,
            index=checked.index,
            metric=checked.corpus.metric,
            threads=checked.plan.threads,
            queries=queries,
        )
        for shard in range(checked.plan.num_shards)
    ]


def run_here(jobs: Sequence[ShardJob]) -> Iterator[ShardBuilt]:
    """Builds shards one after the other in this process."""
    return map(build_shard, jobs)


def run_on_ray(jobs: Sequence[ShardJob]) -> Iterator[ShardBuilt]:
    """Builds shards as Ray tasks, as many at a time as Ray has CPUs for; in order of completion."""
    most = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    task = ray.remote(max_retries=2)(build_shard)
    # a task that asks for more CPUs than any host has would wait for ever
    waiting = [task.options(num_cpus=min(job.threads, most)).remote(job) for job in jobs]
    try:
        while waiting:
            (done,), waiting = ray.wait(waiting)
            try:
                yield ray.get(done)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, ShardlineError | OSError):  # a full disk, say
                    raise error.cause from error
                raise
    finally:
        for reference in waiting:  # none unless a shard failed: nobody writes on after this
            ray.cancel(reference, force=True)
        if waiting:
            ray.wait(waiting, num_returns=len(waiting), timeout=CANCEL_S)


def _samples(corpus: EmbeddingSet, train_rows: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """(train_rows, dim) for the template and (QUALITY_QUERIES, dim) as queries, of all rows."""
    rng = np.random.default_rng(seed)
    train = np.sort(rng.choice(corpus.rows, min(train_rows, corpus.rows), replace=False))
    asked = np.sort(rng.choice(corpus.rows, min(QUALITY_QUERIES, corpus.rows), replace=False))
    picked: tuple[list[FloatArray], list[FloatArray]] = ([], [])
    start = 0
    for batch in corpus.batches():
        stop = start + len(batch.item_ids)
        for rows, parts in zip((train, asked), picked, strict=True):
            chosen = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
            parts.append(batch.vectors[chosen - start])
        start = stop
    sample, queries = (np.concatenate(parts) for parts in picked)
    return sample, normalise(queries) if corpus.metric is Metric.COSINE else queries


def _collect(results: Iterator[ShardBuilt], total: int, progress: Progress) -> list[ShardBuilt]:
    built: list[ShardBuilt] = []
    progress("shards", 0, total)
    for shard in results:
        built.append(shard)
        progress("shards", len(built), total)
    return sorted(built, key=lambda shard: shard.entry.shard)


def _quality(built: list[ShardBuilt], train_seconds: float, seconds: float) -> dict[str, Any]:
    k = min(QUALITY_K, sum(shard.entry.rows for shard in built))
    _, exact = merge_top_k([b.exact[0] for b in built], [b.exact[1] for b in built], k)
    _, found = merge_top_k([b.found[0] for b in built], [b.found[1] for b in built], k)
    hits = sum(np.intersect1d(*pair).size for pair in zip(exact, found, strict=True))
    rows = np.array([shard.entry.rows for shard in built])
    return {
        "queries": len(exact),
        "k": k,
        f"recall@{k}": round(hits / exact.size, 4),
        "bytes_per_vector": round(
            float(np.average([shard.bytes_per_vector for shard in built], weights=rows)), 1
        ),
        "train_seconds": round(train_seconds, 2),
        "shard_seconds": [round(shard.seconds, 2) for shard in built],
        "build_seconds": round(seconds, 2),
    }


def _copy_encoder(corpus: EmbeddingSet, staging: Path) -> tuple[files.FileEntry, ...]:
    if corpus.encoder_folder is None:
        return ()
    copytree(corpus.encoder_folder, staging / QUERY_ENCODER_FOLDER)
    names = sorted(
        path.relative_to(staging).as_posix()
        for path in (staging / QUERY_ENCODER_FOLDER).rglob("*")
        if path.is_file()
    )
    return tuple(files.describe_file(staging, name) for name in names)
