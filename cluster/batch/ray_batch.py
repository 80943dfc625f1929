"""A job on a Ray cluster: a Ray Data pipeline whose stages hold one shard each.

    read -> shard 0 -> shard 1 -> ... -> write

A block of queries flows through all shards and takes the best results so far along; Ray Data keeps
few blocks in flight. Every stage is an actor with its share of the CPUs, of lower priority than
serving. The store, the queries and the output folder must be the same on all hosts.
"""

import logging
import pickle
import time
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray._private.state import available_resources_per_node  # no public call counts per host
from ray.util.annotations import RayDeprecationWarning
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from shardline.cluster.batch.awaited import awaited
from shardline.cluster.batch.generation_items import GenerationItems
from shardline.cluster.batch.job_parts import Parts
from shardline.cluster.batch.loaded_shards import LoadedShards, block_bytes, loaded_bytes
from shardline.cluster.batch.local_batch import BatchPlan
from shardline.cluster.batch.part_files import OutputFolder
from shardline.cluster.batch.pipeline import finished_table
from shardline.cluster.batch.priority import give_way
from shardline.cluster.batch.ray_room import (
    HostRoom,
    StageCpus,
    StageNeed,
    no_room_left,
    planned_stages,
)
from shardline.cluster.batch.ray_tables import (
    NUMBER,
    START,
    STOP,
    block_table,
    parts_of,
    spans_in,
)
from shardline.cluster.batch.spans import Span
from shardline.cluster.batch.top_k import merge_parts
from shardline.shards.core.errors import DataError, ShardlineError, Unavailable, last_line
from shardline.shards.core.files import FileEntry
from shardline.shards.index.main_index import set_search_threads

RESERVED_WITHIN_S = 60
SEEN_WITHIN_S = 65.0  # NFS remembers for up to a minute what a folder held
FAILURE = "failure"  # the column of an error on its way to whoever waits for parts
ROOM = 1.2  # memory that a stage reserves, as a multiple of what is counted
LIBRARY_BYTES = 300 << 20  # of resident memory in each process of a stage


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
        Unavailable: a stage has no room on any host, also because a host was lost, or Ray failed.
            DataError: a query
            that cannot be used, or a folder that is not shared by all hosts. OSError: the disk is
            full.
    """
    memory = stage_memory(plan)
    share, needs = planned_stages(free_hosts(), memory, cpus)
    try:
        with _reserved(needs) as places:
            stages = _Stages(plan=plan, output=output, share=share, needs=needs, places=places)
            trouble = partial(_lost_room, stages)
            if isinstance(plan.source, GenerationItems):
                for _ in awaited(_item_vectors_kept(stages), trouble):
                    pass
            parts.begin()
            with warnings.catch_warnings():
                # until Ray 2.64 stages get their place in a reservation this way
                warnings.simplefilter("ignore", RayDeprecationWarning)
                pipeline = _pipeline(stages, todo)
            for row in awaited(pipeline.iter_rows(), trouble):
                if FAILURE in row:
                    raise pickle.loads(row[FAILURE])
                entry = FileEntry(
                    name=row["name"], bytes=row["bytes"], sha256=row["sha256"], rows=row["rows"]
                )
                await_part(output.path / entry.name)
                parts.written(Span(row[NUMBER], row[START], row[STOP]), entry)
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise _reason_of(error) from error


def free_hosts() -> list[HostRoom]:
    """What is free on each host of the Ray that this process is connected to."""
    free = available_resources_per_node()
    return [
        HostRoom(
            name=node["NodeManagerHostname"],
            cpus=free[node["NodeID"]].get("CPU", 0.0),
            memory=int(free[node["NodeID"]].get("memory", 0.0)),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] in free
    ]


def await_part(
    path: Path,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Waits until a part that another host has written is seen here.

    Raises:
        DataError: it does not come: the folder is another host's own.
    """
    until = clock() + SEEN_WITHIN_S
    while not path.exists():
        if clock() > until:
            raise DataError(
                f"{path.parent}: not the same folder on all hosts",
                got=f"{path.name} was written on another host, and is not here",
                hint="choose a folder on a disk that all hosts share, as the store's",
            )
        wait(1.0)


def stage_memory(plan: BatchPlan) -> list[int]:
    """Bytes that the stage of each shard reserves."""
    k = plan.job.wanted.searched_k
    blocks = block_bytes(plan.job.block_rows, plan.manifest.dim, k, 1, 1)
    return [int(ROOM * (size + blocks)) + LIBRARY_BYTES for size in loaded_bytes(plan.manifest)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stages:
    """What a pipeline is made of. places: what ``needs`` have reserved, in their order."""

    plan: BatchPlan
    output: OutputFolder
    share: StageCpus
    needs: Sequence[StageNeed]
    places: PlacementGroup

    def options(self, place: int) -> dict[str, Any]:
        """Of the task or actor of a stage, for Ray."""
        need = self.needs[place]
        inside = PlacementGroupSchedulingStrategy(self.places, placement_group_bundle_index=place)
        options = {"num_cpus": need.cpus, "scheduling_strategy": inside}
        return options | ({"memory": need.memory} if need.memory else {})


@contextmanager
def _reserved(needs: Sequence[StageNeed]) -> Iterator[PlacementGroup]:
    """Room for all stages at once, or none.

    Raises:
        Unavailable: it was taken since it was counted.
    """
    bundles = [
        {"CPU": need.cpus} | ({"memory": float(need.memory)} if need.memory else {})
        for need in needs
    ]
    group = placement_group(bundles, strategy="PACK")
    try:
        if not group.wait(RESERVED_WITHIN_S):
            raise Unavailable(
                "the Ray cluster did not give the job its CPUs and memory",
                expected=f"{sum(need.cpus for need in needs):g} CPUs within {RESERVED_WITHIN_S} s",
                got="others have taken them meanwhile, or they lie on too many hosts",
                hint="start it again, or give it fewer with --cpus",
            )
        yield group
    finally:
        remove_placement_group(group)


def _lost_room(stages: _Stages) -> Unavailable | None:
    """Why stages wait for room, if some do: Ray has not found any since their host was lost."""
    table = placement_group_table(stages.places)
    if table["state"] == "CREATED":
        return None
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    hosts = table["bundles_to_node_id"]
    lost = [need for place, need in enumerate(stages.needs) if hosts.get(place) not in alive]
    return no_room_left(lost, free_hosts()) if lost else None


def _pipeline(stages: _Stages, todo: Sequence[Span]) -> Any:
    import ray.data  # takes a second, and needs the batch extra

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1 << 40  # a block of queries stays one block
    spans = [{NUMBER: span.number, START: span.start, STOP: span.stop} for span in todo]
    dataset = ray.data.from_items(spans, override_num_blocks=len(spans))
    one = ray.data.ActorPoolStrategy(size=1)
    whole = {"batch_size": None, "batch_format": "pyarrow", "compute": one}
    plan, last = stages.plan, len(stages.needs) - 1
    dataset = dataset.map_batches(
        _Reader, fn_constructor_args=(plan,), **stages.options(0), **whole
    )
    for place in range(1, last):
        arguments = (plan, place - 1, stages.share.threads)
        dataset = dataset.map_batches(
            _ShardStage, fn_constructor_args=arguments, **stages.options(place), **whole
        )
    return dataset.map_batches(
        _Writer, fn_constructor_args=(plan, stages.output), **stages.options(last), **whole
    )


class _Stage(ABC):
    """A stage gives what it raises as its result, which all stages after it hand on: Ray Data's own
    error for a stage that raises is another one, with the text of ours at most.
    """

    _failed: pa.Table | None = None  # of the first failure: nothing comes after it

    def __call__(self, table: pa.Table) -> pa.Table:
        if FAILURE in table.column_names:
            return table
        if self._failed is None:
            try:
                return self.work(table)
            except (ShardlineError, OSError) as error:
                self._failed = pa.table({FAILURE: [pickle.dumps(error)]})
        return self._failed

    @abstractmethod
    def work(self, table: pa.Table, /) -> pa.Table:
        """What the stage makes of a block."""


class _Reader(_Stage):
    """Spans to queries: one row per query from here on."""

    def __init__(self, plan: BatchPlan) -> None:
        give_way()
        self._asked: deque[Span] = deque()
        # one reader for all: a file is opened again only where a block was done before
        self._blocks = plan.source.read(iter(self._asked.popleft, None))

    def work(self, spans: pa.Table) -> pa.Table:
        (span,) = spans_in(spans)
        self._asked.append(span)
        found, queries = next(self._blocks)
        assert found == span
        return block_table(span, queries, None)


class _ShardStage(_Stage):
    """Queries, with the best of the shards before, to the best with this one."""

    def __init__(self, plan: BatchPlan, shard: int, threads: int) -> None:
        give_way()
        self._wanted, self._threads = plan.job.wanted, threads
        self._loaded = LoadedShards.load(plan.folder, [shard])

    def work(self, table: pa.Table) -> pa.Table:
        span, queries, before = parts_of(table)
        assert queries.vectors is not None
        set_search_threads(self._threads)  # Ray may call from any thread
        found = self._loaded.search(queries.vectors, self._wanted)
        return block_table(span, queries, found if before is None else merge_parts([before, found]))


class _Writer(_Stage):
    """Results to parts on disk: one row per part from here on."""

    def __init__(self, plan: BatchPlan, output: OutputFolder) -> None:
        give_way()
        self._k, self._columns, self._output = plan.job.wanted.k, plan.columns(), output

    def work(self, table: pa.Table) -> pa.Table:
        span, queries, ranked = parts_of(table)
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


def _item_vectors_kept(stages: _Stages) -> Iterator[int]:
    """Each shard once the vectors of its items are kept, one after the other where there is room:
    the indexes are loaded once more for the search."""
    task = ray.remote(_keep_vectors_of)
    for shard in range(len(stages.plan.manifest.shards)):
        ray.get(task.options(**stages.options(shard + 1)).remote(stages.plan, shard))
        yield shard


def _keep_vectors_of(plan: BatchPlan, shard: int) -> None:
    give_way()
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
