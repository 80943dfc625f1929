"""A batch job on a Ray of several logical hosts on this machine, one of which dies in its middle.

Run with a folder: writes what was seen there as JSON lines, {"event": ..., ...}. Every process is a
child of this one, and the folder holds all that Ray writes.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from shardline.cluster.batch.batch_job import Wanted
from shardline.cluster.batch.part_files import claimed_folder
from shardline.cluster.commands.batch import offline_plan
from shardline.cluster.commands.batch_ray import answer_here
from shardline.cluster.commands.batch_sources import Asked
from shardline.shards.core.errors import Unavailable
from shardline.shards.core.schema import normalise
from tests.batch_store import DIM, BatchStore, contents, make_store, write_queries

K, QUERIES, BLOCK_ROWS = 10, 12_000, 20
BLOCKS_BEFORE = 30  # of 600: then the host dies
HEAD = {"num_cpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
WORKER = HEAD | {"num_cpus": 2}
CPUS = 3  # more than one host has


class Killer:
    """A progress that removes a host which has stages, when BLOCKS_BEFORE blocks are done."""

    def __init__(self, cluster: Cluster, workers: dict[str, Any]) -> None:
        self._cluster, self._workers = cluster, workers
        self.killed_at = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.killed_at or stage != "search" or done < BLOCKS_BEFORE * BLOCK_ROWS:
            return
        self.killed_at = time.monotonic()
        (group,) = [each for each in placement_group_table().values() if each["state"] == "CREATED"]
        host = next(iter(group["bundles_to_node_id"].values()))
        self._cluster.remove_node(self._workers.pop(host), allow_graceful=False)

    def note(self, line: str) -> None: ...


def run(made: BatchStore, queries: Path, out: Path, progress: Killer) -> dict[str, Any]:
    asked = Asked(
        queries=(str(queries),),
        features=False, users=None, items=False, id_column=None, vector_column=None,
    )  # fmt: skip
    with claimed_folder(out) as claimed:
        plan = offline_plan(asked, Wanted(k=K), made.folder, claimed, progress.note, BLOCK_ROWS)
        try:
            report = answer_here(plan, claimed, progress, CPUS)
        except Unavailable as error:
            return {"error": str(error)}
    return {"parts": report.parts, "resumed": report.resumed_parts}


def scenario(cluster: Cluster, folder: Path) -> None:
    made = make_store(folder)
    drawn = np.random.default_rng(0).standard_normal((QUERIES, DIM)).astype(np.float32)
    queries = write_queries(folder / "q.parquet", normalise(drawn))
    local = folder / "local"
    made.batch("--queries", queries, "--out", local, "-k", K, "--block-rows", BLOCK_ROWS)

    def tell(event: str, killer: Killer, **rest: Any) -> None:
        seconds = time.monotonic() - killer.killed_at if killer.killed_at else None
        with (folder / "seen").open("a") as file:
            file.write(json.dumps({"event": event, "after_s": seconds} | rest) + "\n")

    workers = {}
    for _ in range(3):
        node = cluster.add_node(**WORKER)
        workers[node.node_id] = node
    cluster.wait_for_nodes()
    for event in ("a host to spare", "no host to spare"):
        killer = Killer(cluster, workers)
        out = folder / event.replace(" ", "-")
        found = run(made, queries, out, killer)
        tell(event, killer, **found, same=contents(out) == contents(local))
    cluster.add_node(**WORKER)
    cluster.wait_for_nodes()
    killer.killed_at = 1.0  # none dies
    tell("again", killer, **run(made, queries, out, killer), same=contents(out) == contents(local))


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        scenario(cluster, folder)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
