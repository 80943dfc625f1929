"""A job in this process: all shards in memory if they fit, else pass by pass over groups of them.

Blocks are read ahead and written behind in threads of their own while the main thread searches;
faiss has the cores.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardline.cluster.batch.batch_job import BatchJob
from shardline.cluster.batch.generation_items import GenerationItems
from shardline.cluster.batch.job_parts import Parts
from shardline.cluster.batch.loaded_shards import (
    LoadedShards,
    block_bytes,
    groups_of,
    loaded_bytes,
)
from shardline.cluster.batch.parked_blocks import ParkedBlocks, parked_bytes
from shardline.cluster.batch.part_files import OutputFolder
from shardline.cluster.batch.pipeline import PartWriter, ahead
from shardline.cluster.batch.queries import Queries, QuerySource
from shardline.cluster.batch.result_columns import ItemColumns
from shardline.cluster.batch.spans import Span, waves_of
from shardline.cluster.batch.top_k import merge_parts
from shardline.shards.core.progress import Progress
from shardline.shards.core.schema import Ranked
from shardline.shards.storage.generation import GenerationManifest

PARKED_SHARE = 0.5  # of the free disk space, for blocks between two passes
LOAD = "load shards"  # a stage, for progress


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """A job, its queries, and the generation that answers them."""

    job: BatchJob
    source: QuerySource
    folder: Path
    manifest: GenerationManifest

    def columns(self) -> ItemColumns | None:
        """What to add to results; None where nothing is. Raises as ``ItemColumns``."""
        wanted = self.job.wanted
        if not wanted.attributes and not wanted.original_ids:
            return None
        return ItemColumns(self.folder, self.manifest, wanted.attributes, wanted.original_ids)


def run_local(
    plan: BatchPlan,
    output: OutputFolder,
    todo: Sequence[Span],
    parts: Parts,
    *,
    threads: int,
    available_bytes: int,
) -> int:
    """Answers the blocks ``todo``; the number of passes over the shards.

    threads: of faiss; available_bytes: of memory, that are free.

    Raises:
        Unavailable: a shard does not fit into memory. DataError: a query that cannot be used.
        InvalidInput: a search parameter out of range. OSError: the disk is full.
    """
    groups = shard_groups(plan, available_bytes)
    with PartWriter(output, plan.columns(), parts.written) as writer:
        if len(groups) == 1:
            loaded = _load(plan, groups[0], threads, parts.progress)
            if isinstance(plan.source, GenerationItems):
                plan.source.keep_vectors(loaded)
            parts.begin()
            for span, queries in ahead(plan.source.read(todo)):
                writer.put(span, queries, _search(loaded, queries, plan))
            return 1
        _keep_item_vectors(plan, threads, parts.progress)
        parts.begin()
        for wave in waves_of(todo, _blocks_per_wave(plan, output.work)):
            _answer_wave(plan, output, wave, groups, writer, parts.progress, threads)
    return len(groups)


def shard_groups(plan: BatchPlan, available_bytes: int) -> list[list[int]]:
    """The shards that are in memory at once. Raises Unavailable: one alone does not fit."""
    sizes, k = loaded_bytes(plan.manifest), plan.job.wanted.searched_k
    needed = block_bytes(plan.job.block_rows, plan.manifest.dim, k, len(sizes))
    return groups_of(sizes, available_bytes, needed)


def _answer_wave(
    plan: BatchPlan,
    output: OutputFolder,
    wave: Sequence[Span],
    groups: Sequence[Sequence[int]],
    writer: PartWriter,
    progress: Progress,
    threads: int,
) -> None:
    """Every block of the wave by every group of shards; the last group's results are parts."""
    parked = ParkedBlocks(output.work)
    for place, group in enumerate(groups):
        loaded = _load(plan, group, threads, progress)
        for done, (span, queries) in enumerate(ahead(_blocks(plan, wave, parked, place))):
            ranked = _search(loaded, queries, plan)
            if place:
                ranked = merge_parts([parked.kept(span), ranked])
            if place < len(groups) - 1:
                parked.keep(span, ranked)
                progress(f"pass {place + 1} of {len(groups)}", done + 1, len(wave))
            else:
                writer.put(span, queries, ranked)
                parked.drop(span)
        del loaded  # before the next group comes


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


def _keep_item_vectors(plan: BatchPlan, threads: int, progress: Progress) -> None:
    if isinstance(plan.source, GenerationItems):
        for shard in range(len(plan.manifest.shards)):
            plan.source.keep_vectors(_load(plan, [shard], threads, progress))


def _load(plan: BatchPlan, group: Sequence[int], threads: int, progress: Progress) -> LoadedShards:
    progress(LOAD, group[0], len(plan.manifest.shards))
    loaded = LoadedShards.load(plan.folder, group, threads=threads)
    progress(LOAD, group[-1] + 1, len(plan.manifest.shards))
    return loaded


def _search(loaded: LoadedShards, queries: Queries, plan: BatchPlan) -> Ranked:
    assert queries.vectors is not None
    return loaded.search(queries.vectors, plan.job.wanted)


def _blocks_per_wave(plan: BatchPlan, work: Path) -> int:
    k = plan.job.wanted.searched_k
    one = parked_bytes(plan.job.block_rows, plan.manifest.dim, k)
    return max(1, int(shutil.disk_usage(work).free * PARKED_SHARE) // one)
