"""A job in this process: all shards in memory if they fit, else pass by pass over groups of them.

A thread reads ahead; every core searches a block of its own, and others write what was found.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from shardline.cluster.batch.batch_job import BatchJob, Wanted
from shardline.cluster.batch.generation_items import GenerationItems
from shardline.cluster.batch.job_parts import Parts
from shardline.cluster.batch.loaded_shards import (
    COPIES,
    LoadedShards,
    block_bytes,
    groups_of,
    loaded_bytes,
)
from shardline.cluster.batch.parked_blocks import ParkedBlocks, parked_bytes
from shardline.cluster.batch.part_files import OutputFolder
from shardline.cluster.batch.pipeline import BlockWorkers, ahead, finished_table
from shardline.cluster.batch.queries import Queries, QuerySource
from shardline.cluster.batch.result_columns import ItemColumns
from shardline.cluster.batch.spans import Span, waves_of
from shardline.cluster.batch.top_k import merge_parts
from shardline.shards.core.files import FileEntry
from shardline.shards.core.filter_language import read_filter
from shardline.shards.core.progress import Progress
from shardline.shards.core.schema import Ranked
from shardline.shards.filters.bound import bind
from shardline.shards.index.spec import Device
from shardline.shards.storage.generation import GenerationManifest, read_attributes

PARKED_SHARE = 0.5  # of the free disk space, for blocks between two passes
LOAD = "load shards"  # a stage, for progress


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """A job, its queries, and the generation that answers them.

    attribute_bytes: of all attributes of a result, on average.
    """

    job: BatchJob
    source: QuerySource
    folder: Path
    manifest: GenerationManifest
    attribute_bytes: float = 0.0

    def columns(self) -> ItemColumns | None:
        """What to add to results, verified; None where nothing is. Raises as ``ItemColumns``."""
        return columns_of(self.folder, self.manifest, self.job.wanted, verify=True)

    def needed_bytes(self, workers: int) -> int:
        """Of memory, for the blocks of that many workers."""
        job, shards = self.job, len(self.manifest.shards)
        k = job.wanted.searched_k
        attributes = COPIES * int(job.block_rows * job.wanted.k * self.attribute_bytes)
        blocks = block_bytes(job.block_rows, self.manifest.dim, k, shards, workers)
        return blocks + workers * attributes  # read by the workers that write


def columns_of(
    folder: Path, manifest: GenerationManifest, wanted: Wanted, *, verify: bool
) -> ItemColumns | None:
    """What to add to results; None where nothing is. Raises as ``ItemColumns``."""
    if not wanted.attributes and not wanted.original_ids:
        return None
    return ItemColumns(folder, manifest, wanted.attributes, wanted.original_ids, verify=verify)


def check_filter_fits(folder: Path, manifest: GenerationManifest, wanted: Wanted) -> None:
    """Raises InvalidInput: the filter has a column that items lack, or a value of another type."""
    if wanted.filter is not None:
        table = read_attributes(folder, manifest, 0, verify=False)
        schema = pa.schema([]) if table is None else table.schema
        bind(read_filter(wanted.packed_filter, "--filter"), schema)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Of this process: cores, and bytes of memory that are free."""

    cpus: int
    available_bytes: int


def run_local(
    plan: BatchPlan, output: OutputFolder, todo: Sequence[Span], parts: Parts, room: Room
) -> int:
    """Answers the blocks ``todo``; the number of passes over the shards.

    Raises:
        Unavailable: a shard does not fit into memory. DataError: a query that cannot be used.
        InvalidInput: a search parameter out of range. OSError: the disk is full.
    """
    groups = shard_groups(plan, room)
    columns, k = plan.columns(), plan.job.wanted.k

    def write(span: Span, queries: Queries, ranked: Ranked) -> FileEntry:
        return output.write(span, finished_table(queries, ranked, k, columns))

    if len(groups) == 1:
        loaded = _load(plan, groups[0], parts.progress)
        if isinstance(plan.source, GenerationItems):
            plan.source.keep_vectors(loaded)
        parts.begin()

        def search(span: Span, queries: Queries) -> Ranked:
            return _search(loaded, queries, plan)

        workers, threads = _division(plan, len(todo), room)
        with BlockWorkers(
            workers, threads, search=search, finish=write, done=parts.written
        ) as blocks:
            for span, queries in ahead(plan.source.read(todo)):
                blocks.put(span, queries)
        return 1
    _keep_item_vectors(plan, parts.progress)
    parts.begin()
    for spans in waves_of(todo, _blocks_per_wave(plan, output.work)):
        _Wave(
            plan=plan,
            spans=spans,
            groups=groups,
            parked=ParkedBlocks(output.work),
            write=write,
            parts=parts,
            room=room,
        ).answer()
    return len(groups)


def shard_groups(plan: BatchPlan, room: Room) -> list[list[int]]:
    """The shards that are in memory at once. Raises Unavailable: one alone does not fit."""
    workers, _ = _division(plan, room.cpus, room)
    needed = plan.needed_bytes(workers)
    return groups_of(loaded_bytes(plan.manifest), room.available_bytes, needed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wave:
    """Blocks on their way through all groups of shards, the results so far parked on disk."""

    plan: BatchPlan
    spans: Sequence[Span]
    groups: Sequence[Sequence[int]]
    parked: ParkedBlocks
    write: Callable[[Span, Queries, Ranked], FileEntry]
    parts: Parts
    room: Room

    def answer(self) -> None:
        for place in range(len(self.groups)):
            self._pass(place)  # a function of its own: its shards are gone before the next come

    def _pass(self, place: int) -> None:
        """Every block by one group of shards; the last group's results are parts."""
        loaded = _load(self.plan, self.groups[place], self.parts.progress)

        def search(span: Span, queries: Queries) -> Ranked:
            return _search(loaded, queries, self.plan)

        def finish(span: Span, queries: Queries, ranked: Ranked) -> FileEntry | None:
            if place:
                ranked = merge_parts([self.parked.kept(span), ranked])
            if place < len(self.groups) - 1:
                self.parked.keep(span, ranked)
                return None
            entry = self.write(span, queries, ranked)
            self.parked.drop(span)
            return entry

        def done(span: Span, entry: FileEntry | None) -> None:
            if entry is not None:
                self.parts.written(span, entry)
                return
            stage, at = f"pass {place + 1} of {len(self.groups)}", self.spans.index(span) + 1
            self.parts.progress(stage, at, len(self.spans))

        workers, threads = _division(self.plan, len(self.spans), self.room)
        with BlockWorkers(workers, threads, search=search, finish=finish, done=done) as blocks:
            for span, queries in ahead(_blocks(self.plan, self.spans, self.parked, place)):
                blocks.put(span, queries)


def _division(plan: BatchPlan, blocks: int, room: Room) -> tuple[int, int]:
    """Blocks that are searched at once, and the threads of each: together, all cores.

    As many blocks as cores, unless there are fewer, or they would take more than a quarter of the
    memory; one block on a GPU, whose searches may not overlap.
    """
    if plan.manifest.index.device is not Device.CPU:
        return 1, room.cpus
    another = plan.needed_bytes(2) - plan.needed_bytes(1)
    affordable = max(1, room.available_bytes // 4 // another)
    workers = max(1, min(room.cpus, blocks, affordable))
    return workers, max(1, room.cpus // workers)


def _blocks(
    plan: BatchPlan, wave: Sequence[Span], parked: ParkedBlocks, place: int
) -> Iterator[tuple[Span, Queries]]:
    """The wave's queries: from their source the first time, which may cost more than a search."""
    if place:
        yield from ((span, parked.queries(span)) for span in wave)
        return
    for span, queries in plan.source.read(wave):
        parked.park(span, queries)
        yield span, queries


def _keep_item_vectors(plan: BatchPlan, progress: Progress) -> None:
    if isinstance(plan.source, GenerationItems):
        for shard in range(len(plan.manifest.shards)):
            plan.source.keep_vectors(_load(plan, [shard], progress))


def _load(plan: BatchPlan, group: Sequence[int], progress: Progress) -> LoadedShards:
    progress(LOAD, group[0], len(plan.manifest.shards))
    loaded = LoadedShards.load(plan.folder, group)
    progress(LOAD, group[-1] + 1, len(plan.manifest.shards))
    return loaded


def _search(loaded: LoadedShards, queries: Queries, plan: BatchPlan) -> Ranked:
    assert queries.vectors is not None
    return loaded.search(queries.vectors, plan.job.wanted)


def _blocks_per_wave(plan: BatchPlan, work: Path) -> int:
    k = plan.job.wanted.searched_k
    one = parked_bytes(plan.job.block_rows, plan.manifest.dim, k)
    return max(1, int(shutil.disk_usage(work).free * PARKED_SHARE) // one)
