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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import auto_init_hook
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
from shardline.cluster.batch.priority import give_way
from shardline.cluster.batch.ray_room import (
    HostRoom,
    StageCpus,
    StageNeed,
    no_room_left,
    planned_stages,
)
from shardline.cluster.batch.ray_stages import FAILURE, Reader, ShardStage, Writer
from shardline.cluster.batch.ray_tables import (
    NUMBER,
    START,
    STOP,
)
from shardline.cluster.batch.spans import Span
from shardline.shards.core.errors import DataError, ShardlineError, Unavailable, last_line
from shardline.shards.core.files import FileEntry

RESERVED_WITHIN_S = 60
SEEN_WITHIN_S = 65.0  # NFS remembers for up to a minute what a folder held
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
        DataError: a query that cannot be used, or a folder that is not shared by all hosts.
        OSError: the disk is full.
    """
    # a thread of Ray Data that is left behind would start a Ray of its own after this one's end
    auto_init_hook.enable_auto_connect = False
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
    dataset = dataset.map_batches(Reader, fn_constructor_args=(plan,), **stages.options(0), **whole)
    for place in range(1, last):
        arguments = (plan, place - 1, stages.share.threads)
        dataset = dataset.map_batches(
            ShardStage, fn_constructor_args=arguments, **stages.options(place), **whole
        )
    return dataset.map_batches(
        Writer, fn_constructor_args=(plan, stages.output), **stages.options(last), **whole
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
