"""Batch jobs beside bare faiss: the same index files, parameters and threads.

    python -m shardline.bench.batch_bench [--rows 1000000] [--queries 262144] [--rounds 5]
    python -m shardline.bench.batch_bench --memory

Theory. A job reads queries from Parquet, checks them, searches every shard, merges, and writes
Parquet. Bare faiss searches the same queries in the same indexes, one call per shard and block on
all threads, in blocks of the size at which it was the fastest before the rounds, and drops the
results. A job may come near it, or beyond: it searches queries of one list together, which this
baseline does not. Both run in one process, alternating within a round; the ratio is taken within a
round. Loading is left out on both sides: a job's clock starts with its first block.

--memory runs the command for growing numbers of queries, each in a process of its own, and prints
its peak memory: it may not grow with them.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import faiss
import pyarrow as pa
import pyarrow.parquet as pq

from shardline.bench.corpus import clustered_queries, clustered_set, generation_of
from shardline.bench.load.pairs import order_of
from shardline.cluster.batch.batch_job import Wanted
from shardline.cluster.batch.job_parts import SEARCH
from shardline.cluster.batch.loaded_shards import cores
from shardline.cluster.batch.local_batch import Room
from shardline.cluster.batch.part_files import claimed_folder
from shardline.cluster.batch.spans import default_block_rows
from shardline.cluster.build import run_here
from shardline.cluster.commands.batch import answer_here, offline_plan
from shardline.cluster.commands.batch_sources import Asked
from shardline.cluster.commands.build import plan_of
from shardline.cluster.config import load_config
from shardline.cluster.console import StageProgress
from shardline.cluster.preflight.free_memory import free_memory
from shardline.cluster.store import Store
from shardline.shards.core.schema import FloatArray
from shardline.shards.storage.generation import (
    INDEX_NAME,
    GenerationManifest,
    read_generation,
)

MEMORY_QUERIES = (50_000, 200_000, 1_000_000)
WRITTEN_ROWS = 1 << 16
BARE_ROWS = (4096, 8192, 16_384, 32_768)  # blocks that bare faiss is tried with
TRIES = 3  # of each; the fastest counts


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCorpus:
    """A generation, and a Parquet file of queries for it."""

    store: Store
    folder: Path
    manifest: GenerationManifest
    queries: Path


@dataclass(slots=True)
class SearchClock:
    """The progress of a job: when its search began, on the wall and in CPU time."""

    began: float = 0.0
    cpu_began: float = 0.0
    lines: list[str] = field(default_factory=list)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == SEARCH and not self.began:
            self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def note(self, line: str) -> None:
        self.lines.append(line)


class BareFaiss:
    """The shards' indexes as faiss reads them, with the generation's parameters."""

    def __init__(self, corpus: BatchCorpus, threads: int) -> None:
        faiss.omp_set_num_threads(threads)
        paths = [corpus.folder / entry.folder / INDEX_NAME for entry in corpus.manifest.shards]
        self._indexes = [faiss.read_index(str(path)) for path in paths]
        params = corpus.manifest.index.search_params
        for index in self._indexes:
            space = faiss.ParameterSpace()
            if params.nprobe:
                space.set_index_parameter(index, "nprobe", params.nprobe)
            if params.rerank_factor:
                space.set_index_parameter(index, "k_factor_rf", params.rerank_factor)

    def seconds(self, vectors: FloatArray, block_rows: int, k: int) -> float:
        """Of all shards for all blocks, results dropped."""
        started = time.perf_counter()
        for start in range(0, len(vectors), block_rows):
            block = vectors[start : start + block_rows]
            for index in self._indexes:
                index.search(block, k)
        return time.perf_counter() - started

    def best_rows(self, vectors: FloatArray, k: int) -> int:
        """The block size of BARE_ROWS at which it is the fastest."""
        sample = vectors[: max(BARE_ROWS)]
        self.seconds(sample, len(sample), k)  # pages of the indexes
        fastest = dict.fromkeys(BARE_ROWS, math.inf)
        for rows in BARE_ROWS * TRIES:
            fastest[rows] = min(fastest[rows], self.seconds(sample, rows, k))
        return min(fastest, key=fastest.__getitem__)


def make_corpus(root: Path, rows: int, dim: int, shards: int, count: int) -> BatchCorpus:
    """Made once, reused after."""
    store = Store(root)
    config = load_config(None, [f"store={root}", f"cluster.shards={shards}"])
    with StageProgress() as progress:
        items = clustered_set(store, rows, dim, progress)
        manifest = generation_of(
            store, items, plan_of(config), run_jobs=run_here, progress=progress
        )
    store.set_current(manifest.generation)
    path = root / f"queries-{rows}x{dim}-{count}.parquet"
    if not path.exists():
        write_queries(path, clustered_queries(rows, dim, count))
    folder = store.generation(manifest.generation)
    return BatchCorpus(store=store, folder=folder, manifest=read_generation(folder), queries=path)


def write_queries(path: Path, vectors: FloatArray) -> None:
    """Ids from 0 and the vectors."""
    ids = pa.array(range(len(vectors)))
    flat = pa.array(vectors.ravel())
    lists = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    pq.write_table(
        pa.table({"query_id": ids, "embedding": lists}), path, row_group_size=WRITTEN_ROWS
    )


def job_seconds(corpus: BatchCorpus, out: Path, k: int, threads: int) -> dict[str, float]:
    """Seconds of a job from its first block on, and in all."""
    asked = Asked(
        queries=(str(corpus.queries),),
        features=False,
        users=None,
        items=False,
        id_column=None,
        vector_column=None,
    )
    clock, started = SearchClock(), time.perf_counter()
    with claimed_folder(out) as claimed:
        plan = offline_plan(asked, Wanted(k=k), corpus.folder, claimed, clock.note, None)
        available = free_memory().available_bytes
        room = Room(cpus=threads, available_bytes=available)
        report = answer_here(plan, claimed, clock, room)
    assert report.searched == report.queries
    ended = time.perf_counter()
    return {
        "job": ended - clock.began,
        "job_cpu": time.process_time() - clock.cpu_began,
        "job_with_loading": ended - started,
    }


def compare(corpus: BatchCorpus, *, k: int, rounds: int, threads: int) -> dict[str, Any]:
    """Both sides, round by round."""
    table = pq.read_table(corpus.queries, columns=["embedding"])
    column = table["embedding"].combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(column), -1)
    bare = BareFaiss(corpus, threads)
    bare_rows = bare.best_rows(vectors, k)
    samples = []
    for round_number in range(rounds):
        seconds: dict[str, float] = {}
        for side in order_of(round_number):
            if side == 0:
                cpu_began = time.process_time()
                seconds["bare"] = bare.seconds(vectors, bare_rows, k)
                seconds["bare_cpu"] = time.process_time() - cpu_began
                continue
            with tempfile.TemporaryDirectory(dir=corpus.store.root) as scratch:
                seconds |= job_seconds(corpus, Path(scratch) / "out", k, threads)
        samples.append(seconds)
        click.echo(json.dumps({"round": round_number, **seconds}), err=True)
    ratios = [each["bare"] / each["job"] for each in samples]
    return {
        "queries": len(vectors),
        "rows": corpus.manifest.rows,
        "k": k,
        "threads": threads,
        "block_rows": default_block_rows(k),
        "bare_block_rows": bare_rows,
        "index": corpus.manifest.index.model_dump(mode="json"),
        "bare_queries_per_s": len(vectors) / statistics.median(s["bare"] for s in samples),
        "job_queries_per_s": len(vectors) / statistics.median(s["job"] for s in samples),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        # what a busy machine changes less; with one thread nobody spins while waiting
        "cpu_ratio": statistics.median(s["bare_cpu"] / s["job_cpu"] for s in samples),
        "samples": samples,
    }


def memory(root: Path, corpus: BatchCorpus, counts: Sequence[int], k: int) -> list[dict[str, Any]]:
    """The report of the command for each number of queries."""
    reports = []
    for count in counts:
        dim, rows = corpus.manifest.dim, corpus.manifest.rows
        path = root / f"queries-{rows}x{dim}-{count}.parquet"
        if not path.exists():
            write_queries(path, clustered_queries(rows, dim, count))
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            code = "from shardline.cluster.cli import main; main()"
            command = [sys.executable, "-c", code, "--store", str(root), "batch"]
            command += ["--queries", str(path), "--out", f"{scratch}/out", "-k", str(k), "--json"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        reports.append(json.loads(done.stdout))
        click.echo(f"{count:,} queries: {reports[-1]['peak_rss_bytes'] >> 20:,} MiB", err=True)
    return reports


def main() -> None:
    """Runs what is asked for and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("bench-batch"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--queries", type=int, default=262_144)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpus", type=int, default=cores())
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    asked = parser.parse_args()
    root = asked.store.resolve()
    corpus = make_corpus(root, asked.rows, asked.dim, asked.shards, asked.queries)
    if asked.memory:
        click.echo(json.dumps(memory(root, corpus, MEMORY_QUERIES, asked.k), indent=2))
        return
    click.echo(
        json.dumps(compare(corpus, k=asked.k, rounds=asked.rounds, threads=asked.cpus), indent=2)
    )


if __name__ == "__main__":
    main()
