"""Builds a generation: one template trained on a sample of the whole corpus, one index per shard.

The corpus is read once: one pass takes the training sample and hands each row to the file of its
shard (``shards.storage.spill``). Shards are independent jobs. ``run_here`` does them one after the
other in this process, ``run_on_ray`` as Ray tasks; both give the same files. Sample queries are
answered by every shard, exactly and through its index, so that the search parameters are chosen by
measurement (``cluster.tuning``) and the manifest carries their recall.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any

import numpy as np
import ray

from shardline.cluster.build_shard import ShardBuilt, ShardJob, build_shard
from shardline.cluster.spread import Progress, Spread, spread_rows
from shardline.cluster.store import Store
from shardline.cluster.tuning import Measured, advice, choose, cost_us, ladder_of, measured
from shardline.shards.core import files
from shardline.shards.core.encoder_files import ITEM_ENCODER_FOLDER, QUERY_ENCODER_FOLDER
from shardline.shards.core.errors import ShardlineError, Unavailable, last_line
from shardline.shards.core.partition import (
    Partition,
    Partitioning,
    check_no_shard_empty,
    partition,
)
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import MEASURED_K, IndexSpec, ResolvedIndex
from shardline.shards.index.template import train_template, write_index
from shardline.shards.storage.embedding_set import EmbeddingSet, open_embedding_set
from shardline.shards.storage.generation import (
    TEMPLATE_NAME,
    GenerationManifest,
    write_generation,
)
from shardline.shards.storage.spill import SPILL_FOLDER, spill_file
from shardline.shards.storage.vector_files import QUERIES_NAME

CANCEL_S = 10.0
MIN_TRAIN_ROWS = 1  # an index that needs no training still takes its dimension from a sample

RunJobs = Callable[[Sequence[ShardJob]], Iterator[ShardBuilt]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """What to build. threads: faiss threads of the template's training and of each shard's job.
    cut: where shards begin and end; None: where each gets as many rows."""

    spec: IndexSpec
    num_shards: int
    partitioning: Partitioning
    threads: int
    seed: int = 0
    gpu: bool = False
    cut: Partition | None = None


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


def check_plan(embeddings: Path, plan: BuildPlan, version: str | None = None) -> CheckedPlan:
    """Opens an embedding set, every checksum verified, and refuses what cannot be built from it.

    ``version`` as ``open_embedding_set`` takes it.

    Raises:
        NotFound, CorruptFile, NewerFormat, DataError: the embedding set is absent or damaged.
        ConfigError: the index cannot be built over this corpus.
        InvalidInput: more shards than items, or none for one of them.
    """
    started = time.perf_counter()
    corpus = open_embedding_set(embeddings, version=version)
    if corpus.queries_file is not None:
        corpus.queries()
    index = resolve(plan.spec, rows=corpus.rows, dim=corpus.dim, metric=corpus.metric, gpu=plan.gpu)
    cut = plan.cut or partition(corpus.item_ids(), plan.num_shards, plan.partitioning)
    if plan.cut is not None:
        check_no_shard_empty(cut, corpus.item_ids())
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
        store,
        check_plan(embeddings, plan, store.version_of(embeddings)),
        run_jobs=run_jobs or run_here,
        progress=progress,
    )


def build_checked(
    store: Store, checked: CheckedPlan, *, run_jobs: RunJobs, progress: Progress
) -> GenerationManifest:
    """``build_generation`` with the checks behind it.

    The build's seconds are those of both parts, not of what the caller did between them.
    """
    store.generations.mkdir(parents=True, exist_ok=True)
    files.remove_abandoned(store.generations)
    number = store.claim_generation()  # a restore may put another one in place meanwhile
    with files.staged_folder(store.generation(number)) as staging:
        return fill_generation(staging, number, checked, run_jobs=run_jobs, progress=progress)


def fill_generation(
    staging: Path, number: int, checked: CheckedPlan, *, run_jobs: RunJobs, progress: Progress
) -> GenerationManifest:
    """Writes all files of a generation into a folder, the manifest last."""
    started = time.perf_counter()
    plan, corpus, index = checked.plan, checked.corpus, checked.index
    spread = spread_rows(
        corpus, checked.cut, staging, max(index.train_rows, MIN_TRAIN_ROWS), plan.seed, progress
    )
    template = train_template(
        index,
        spread.sample,
        metric=corpus.metric,
        seed=plan.seed,
        threads=plan.threads,
        progress=progress,
    )
    write_index(template, staging / TEMPLATE_NAME)
    train_seconds = time.perf_counter() - started
    built = _collect(run_jobs(_jobs(checked, staging, spread)), staging, plan, progress)
    choice, quality = _tuned(built, checked)
    seconds = checked.seconds + time.perf_counter() - started
    manifest = GenerationManifest(
        generation=number,
        model_version=corpus.model_version,
        metric=corpus.metric,
        dim=corpus.dim,
        spec=plan.spec,
        index=index.model_copy(update=asdict(choice.params)),
        partitioning=plan.partitioning.value,
        boundaries=tuple(int(key) for key in checked.cut.upper_keys),
        shards=tuple(shard.entry for shard in built),
        template=files.describe_file(staging, TEMPLATE_NAME),
        query_encoder=_copied(corpus.encoder_folder, staging / QUERY_ENCODER_FOLDER),
        item_encoder=_copied(corpus.item_encoder_folder, staging / ITEM_ENCODER_FOLDER),
        queries=_copy_queries(corpus, staging),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        quality=quality
        | {
            "query_source": spread.query_source,
            "train_seconds": round(train_seconds, 2),
            "build_seconds": round(seconds, 2),
            "rows_per_second": round(corpus.rows / seconds),
        },
        cut=corpus.cut,
    )
    write_generation(staging, manifest)
    return manifest


def _jobs(checked: CheckedPlan, staging: Path, spread: Spread) -> list[ShardJob]:
    plan = checked.plan
    return [
        ShardJob(
            shard=shard,
            rows=rows,
            share=rows / checked.corpus.rows,
            generation=staging,
            index=checked.index,
            metric=checked.corpus.metric,
            threads=plan.threads,
            queries=spread.queries,
            ladder=ladder_of(plan.spec, checked.index),
            target_recall=plan.spec.target_recall,
        )
        for shard, rows in enumerate(spread.rows)
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
            except ray.exceptions.RayError as error:  # its process was killed: by the system, say
                raise Unavailable(
                    "the build of a shard ended early",
                    got=last_line(error),
                    hint="the host's kernel log names what the system ended for want of memory; "
                    "`shardline build --in-process` builds one shard at a time",
                ) from error
    finally:
        for reference in waiting:  # none unless a shard failed: nobody writes on after this
            ray.cancel(reference, force=True)
        if waiting:
            ray.wait(waiting, num_returns=len(waiting), timeout=CANCEL_S)


def _collect(
    results: Iterator[ShardBuilt], staging: Path, plan: BuildPlan, progress: Progress
) -> list[ShardBuilt]:
    built: list[ShardBuilt] = []
    progress("shards", 0, plan.num_shards)
    for shard in results:
        spill_file(staging, shard.entry.shard).unlink()
        built.append(shard)
        progress("shards", len(built), plan.num_shards)
    (staging / SPILL_FOLDER).rmdir()
    return sorted(built, key=lambda shard: shard.entry.shard)


def _tuned(built: list[ShardBuilt], checked: CheckedPlan) -> tuple[Measured, dict[str, Any]]:
    """The chosen parameters, and the report of how they and the fixed defaults do."""
    index, spec = checked.index, checked.plan.spec
    k = min(MEASURED_K, checked.corpus.rows)
    exact = np.sort(np.concatenate([shard.exact for shard in built], axis=1), axis=1)[:, -k:]
    points = measured([shard.answers for shard in built], exact)
    rows = checked.corpus.rows / len(built)
    cost = {point.params: cost_us(point.params, index, rows) for point in points}
    choice = choose(points, target=spec.target_recall, cost=cost)
    default = next(point for point in points if point.params == index.search_params)
    weights = [shard.entry.rows for shard in built]
    return choice, {
        "queries": len(exact),
        "k": k,
        f"recall@{k}": round(choice.recall, 4),
        "target_recall": spec.target_recall,
        "advice": None if choice.recall >= spec.target_recall else advice(spec, index),
        "chosen": _reported(choice),
        "fixed_default": _reported(default),
        "bytes_per_vector": round(
            float(np.average([shard.bytes_per_vector for shard in built], weights=weights)), 1
        ),
        "shard_seconds": [round(shard.seconds, 2) for shard in built],
        "sweep_seconds": [round(shard.sweep_seconds, 2) for shard in built],
    }


def _reported(point: Measured) -> dict[str, Any]:
    return {
        "params": {name: value for name, value in asdict(point.params).items() if value},
        "recall": round(point.recall, 4),
        "ms_per_query": round(point.ms, 3),
    }


def _copy_queries(corpus: EmbeddingSet, staging: Path) -> files.FileEntry | None:
    if corpus.queries_file is None:
        return None
    copyfile(corpus.queries_file, staging / QUERIES_NAME)
    return files.describe_file(staging, QUERIES_NAME)


def _copied(encoder: Path | None, target: Path) -> tuple[files.FileEntry, ...]:
    """The files of an encoder, copied into a folder of the staged generation; none, nothing."""
    if encoder is None:
        return ()
    copytree(encoder, target)
    names = sorted(
        path.relative_to(target.parent).as_posix() for path in target.rglob("*") if path.is_file()
    )
    return tuple(files.describe_file(target.parent, name) for name in names)
