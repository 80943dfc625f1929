"""A job on a Ray cluster: a Ray Data pipeline whose stages hold one shard each.

    read -> shard 0 -> shard 1 -> ... -> write

A block of queries flows through all shards and takes the best results so far along; Ray Data keeps
few blocks in flight. Every stage is an actor with its share of the CPUs, of lower priority than
serving. The store, the queries and the output folder must be the same on all hosts.
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from shardline.cluster.batch.generation_items import GenerationItems
from shardline.cluster.batch.job_parts import Parts
from shardline.cluster.batch.loaded_shards import LoadedShards, block_bytes, loaded_bytes
from shardline.cluster.batch.local_batch import BatchPlan
from shardline.cluster.batch.part_files import OutputFolder
from shardline.cluster.batch.pipeline import finished_table
from shardline.cluster.batch.queries import Queries
from shardline.cluster.batch.spans import Span
from shardline.cluster.batch.top_k import merge_parts
from shardline.shards.core.errors import DataError, ShardlineError, Unavailable, last_line
from shardline.shards.core.files import FileEntry
from shardline.shards.core.schema import Ranked
from shardline.shards.index.main_index import set_search_threads

NICENESS = 10  # of the stages: a shard that serves on the same host comes first
SIDE_SHARE = 0.1  # of the CPUs, each for reading and for writing
ROOM = 1.2  # memory that a stage reserves, as a multiple of what is counted
LIBRARY_BYTES = 300 << 20  # of resident memory in each process of a stage
NUMBER, START, STOP = "number", "start", "stop"
QUERY_ID, VECTOR, OWN, ITEM_IDS, SCORES = "query_id", "vector", "own", "item_ids", "scores"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCpus:
    """What each stage reserves; ``threads`` of faiss in a shard's stage."""

    shard: float
    side: float
    threads: int


def stage_cpus(cpus: int, shards: int) -> StageCpus:
    """The share of each stage in ``cpus``; more than one CPU is a whole number, as Ray asks."""
    side = min(1.0, cpus * SIDE_SHARE)
    each = (cpus - 2 * side) / shards
    shard = float(math.floor(each)) if each >= 1 else math.floor(each * 1000) / 1000
    return StageCpus(shard=shard, side=side, threads=max(1, math.floor(each)))


def run_on_ray(
    plan: BatchPlan,
    output: OutputFolder,
    todo: Sequence[Span],
    parts: Parts,
    *,
    cpus: int | None,
) -> None:
    """Answers the blocks ``todo`` on the Ray that this process is connected to.

    cpus: of all stages together; None: all that are free but one per host.

    Raises:
        Unavailable: too few CPUs or too little memory are free, or Ray failed. DataError: a query
            that cannot be used, or a folder that is not shared by all hosts. OSError: the disk is
            full.
    """
    share = stage_cpus(_checked_cpus(cpus), len(plan.manifest.shards))
    memory = stage_memory(plan)
    _check_memory(memory)
    try:
        if isinstance(plan.source, GenerationItems):
            _keep_item_vectors(plan, share, memory)
        parts.begin()
        for row in _pipeline(plan, output, todo, share, memory).iter_rows():
            entry = FileEntry(
                name=row["name"], bytes=row["bytes"], sha256=row["sha256"], rows=row["rows"]
            )
            if not (output.path / entry.name).exists():
                raise DataError(
                    f"{output.path}: not the same folder on all hosts",
                    got=f"{entry.name} was written on another host, and is not here",
                    hint="choose a folder on a disk that all hosts share, as the store's",
                )
            parts.written(Span(row[NUMBER], row[START], row[STOP]), entry)
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise _reason_of(error) from error


def stage_memory(plan: BatchPlan) -> list[int]:
    """Bytes that the stage of each shard reserves."""
    k = plan.job.wanted.searched_k
    blocks = block_bytes(plan.job.block_rows, plan.manifest.dim, k, 1, 1)
    return [int(ROOM * (size + blocks)) + LIBRARY_BYTES for size in loaded_bytes(plan.manifest)]


def _checked_cpus(cpus: int | None) -> int:
    """None: all that are free but one per host, where Serve may have to start a router again.

    Raises Unavailable: fewer are free; the pipeline would wait for ever.
    """
    free = math.floor(ray.available_resources().get("CPU", 0.0))
    hosts = sum(node["Alive"] for node in ray.nodes())
    wanted = cpus or min(free, max(1, free - hosts))
    if wanted > free or wanted < 1:
        raise Unavailable(
            "too few CPUs of the Ray cluster are free",
            expected=f"{max(1, wanted)}",
            got=f"{free}",
            hint="give the job fewer with --cpus, add hosts, or lower cluster.cpus_per_shard",
        )
    return wanted


def _check_memory(needed: Sequence[int]) -> None:
    """Raises Unavailable: the stages do not fit; with the arithmetic."""
    free = int(ray.available_resources().get("memory", 0.0))
    if sum(needed) > free:
        raise Unavailable(
            "the shards do not fit into the memory that Ray has free",
            expected=f"{sum(needed) / 2**20:,.0f} MiB for {len(needed)} shards",
            got=f"{free / 2**20:,.0f} MiB",
            hint="add hosts, build a smaller index, or run the job on one host with "
            "cluster.address=local, which takes the shards in passes",
        )


def _pipeline(
    plan: BatchPlan,
    output: OutputFolder,
    todo: Sequence[Span],
    share: StageCpus,
    memory: Sequence[int],
) -> Any:
    import ray.data  # takes a second, and needs the batch extra

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1 << 40  # a block of queries stays one block
    spans = [{NUMBER: span.number, START: span.start, STOP: span.stop} for span in todo]
    dataset = ray.data.from_items(spans, override_num_blocks=len(spans))
    one = ray.data.ActorPoolStrategy(size=1)
    whole = {"batch_size": None, "batch_format": "pyarrow", "compute": one}
    dataset = dataset.map_batches(
        _Reader, fn_constructor_args=(plan,), num_cpus=share.side, **whole
    )
    for shard, size in enumerate(memory):
        dataset = dataset.map_batches(
            _ShardStage,
            fn_constructor_args=(plan, shard, share.threads),
            num_cpus=share.shard,
            memory=size,
            **whole,
        )
    return dataset.map_batches(
        _Writer, fn_constructor_args=(plan, output), num_cpus=share.side, **whole
    )


class _Reader:
    """Spans to queries: one row per query from here on."""

    def __init__(self, plan: BatchPlan) -> None:
        os.nice(NICENESS)
        self._plan = plan

    def __call__(self, spans: pa.Table) -> pa.Table:
        (span,) = _spans_of(spans)
        ((_, queries),) = self._plan.source.read([span])
        return _table(span, queries, None)


class _ShardStage:
    """Queries, with the best of the shards before, to the best with this one."""

    def __init__(self, plan: BatchPlan, shard: int, threads: int) -> None:
        os.nice(NICENESS)
        self._wanted, self._threads = plan.job.wanted, threads
        self._loaded = LoadedShards.load(plan.folder, [shard])

    def __call__(self, table: pa.Table) -> pa.Table:
        span, queries, before = _parts_of(table)
        assert queries.vectors is not None
        set_search_threads(self._threads)  # Ray may call from any thread
        found = self._loaded.search(queries.vectors, self._wanted)
        return _table(span, queries, found if before is None else merge_parts([before, found]))


class _Writer:
    """Results to parts on disk: one row per part from here on."""

    def __init__(self, plan: BatchPlan, output: OutputFolder) -> None:
        os.nice(NICENESS)
        self._k, self._columns, self._output = plan.job.wanted.k, plan.columns(), output

    def __call__(self, table: pa.Table) -> pa.Table:
        span, queries, ranked = _parts_of(table)
        assert ranked is not None
        rows = finished_table(queries, ranked, self._k, self._columns)
        entry = self._output.write(span, rows)
        return pa.table(
            {
                NUMBER: [span.number],
                START: [span.start],
                STOP: [span.stop],
                "name": [entry.name],
                "bytes": [entry.bytes],
                "sha256": [entry.sha256],
                "rows": [entry.rows],
            }
        )


def _table(span: Span, queries: Queries, ranked: Ranked | None) -> pa.Table:
    """One row per query; the span is in every row, where no stage can lose it."""
    assert queries.vectors is not None
    count = len(queries)
    columns = {
        NUMBER: pa.repeat(span.number, count),
        START: pa.repeat(span.start, count),
        STOP: pa.repeat(span.stop, count),
        QUERY_ID: queries.ids,
        VECTOR: _lists(queries.vectors),
    }
    if queries.own is not None:
        columns[OWN] = pa.array(queries.own)
    if ranked is not None:
        columns |= {ITEM_IDS: _lists(ranked.ids), SCORES: _lists(ranked.scores)}
    return pa.table(columns)


def _parts_of(table: pa.Table) -> tuple[Span, Queries, Ranked | None]:
    (span,) = set(_spans_of(table.slice(0, 1)))
    assert table.num_rows == len(span), "Ray Data has cut a block"
    names = table.column_names
    own = _one(table, OWN).to_numpy() if OWN in names else None
    queries = Queries(ids=_one(table, QUERY_ID), vectors=_matrix(table, VECTOR), own=own)
    if ITEM_IDS not in names:
        return span, queries, None
    return span, queries, Ranked(_matrix(table, ITEM_IDS), _matrix(table, SCORES))


def _spans_of(table: pa.Table) -> Iterator[Span]:
    columns = [table.column(name).to_pylist() for name in (NUMBER, START, STOP)]
    yield from (Span(*row) for row in zip(*columns, strict=True))


def _lists(matrix: np.ndarray[Any, Any]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(matrix).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])


def _one(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name).combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column


def _matrix(table: pa.Table, name: str) -> Any:
    column = _one(table, name)
    return column.flatten().to_numpy().reshape(len(column), -1)


def _keep_item_vectors(plan: BatchPlan, share: StageCpus, memory: Sequence[int]) -> None:
    """Shard by shard, where there is room: the indexes are loaded once more for the search."""
    task = ray.remote(_keep_vectors_of)
    for shard, size in enumerate(memory):
        ray.get(task.options(num_cpus=share.shard, memory=size).remote(plan, shard))


def _keep_vectors_of(plan: BatchPlan, shard: int) -> None:
    assert isinstance(plan.source, GenerationItems)
    plan.source.keep_vectors(LoadedShards.load(plan.folder, [shard]))


def _reason_of(error: BaseException) -> BaseException:
    """What a stage raised, as it would have been raised here; else that Ray failed."""
    seen: BaseException | None = error
    while seen is not None:
        for found in (seen, getattr(seen, "cause", None)):
            if isinstance(found, ShardlineError | OSError):
                return found
        seen = seen.__cause__ or seen.__context__
    return Unavailable("the job failed in Ray", got=last_line(error), hint="start it again")
