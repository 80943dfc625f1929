"""One run: a shard of a small generation, its replicas, clients that write, and kills."""

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shardline.bench.crash.checks import Expected
from shardline.bench.crash.kills import Kills
from shardline.bench.crash.points import POINTS
from shardline.bench.crash.shard_cluster import Cluster, Ended
from shardline.bench.crash.trapped_replica import SHARD, TITLE, Contents
from shardline.bench.crash.writers import BUILT_ITEMS, DIM, Writer, paused
from shardline.bench.journal import Journal
from shardline.cluster.build import BuildPlan, check_plan, fill_generation, run_here
from shardline.shards.core.partition import Partitioning
from shardline.shards.core.schema import Metric, normalise
from shardline.shards.index.spec import IndexKind, IndexSpec
from shardline.shards.live.live_folder import live_folder
from shardline.shards.storage.embedding_set import embedding_writer

NUMBER = 1  # of the generation
PAUSED_WITHIN_S = 90.0
FOLLOWED_WITHIN_S = 30.0
WHEN = "2026-11-29T00:00:00+00:00"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """points: where processes are killed, besides any moment. min_rows: written rows that make a
    compaction due. check_every: kills between two checks of all that was acknowledged."""

    kills: int = 500
    seed: int = 0
    replicas: int = 2
    writers: int = 4
    points: Sequence[str] = tuple(POINTS)
    min_rows: int = 150
    check_every: int = 20
    seconds: float | None = None  # then it ends, with fewer kills


def build(store: Path, rows: int, seed: int) -> Path:
    """A generation of a flat index, whose vectors come back as they were written; its folder."""
    vectors = np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)
    titles = pa.RecordBatch.from_pydict({TITLE: pa.array([f"built {n}" for n in range(rows)])})
    corpus = store / "embeddings" / "crash"
    with embedding_writer(
        corpus, model_version="crash", dim=DIM, metric=Metric.COSINE, created_at=WHEN
    ) as writer:
        writer.append(np.arange(rows), normalise(vectors), titles)
    folder = store / "generations" / f"{NUMBER:06d}"
    folder.mkdir(parents=True)
    plan = BuildPlan(
        spec=IndexSpec(kind=IndexKind.FLAT),
        num_shards=1,
        partitioning=Partitioning.RANGE,
        threads=1,
    )
    checked = check_plan(corpus, plan)
    fill_generation(folder, NUMBER, checked, run_jobs=run_here, progress=lambda *_: None)
    return folder


def run(store: Path, options: Options, progress: Callable[[str], None]) -> dict[str, Any]:
    """The report; ``violations`` is empty if nothing was wrong. ``store`` is an empty folder."""
    started = time.monotonic()
    random.seed(options.seed)
    generation = build(store, options.writers * BUILT_ITEMS, options.seed)
    cluster = Cluster(generation, replicas=options.replicas, min_rows=options.min_rows)
    journal = Journal()
    kills = Kills(cluster, options.seed, options.points)
    with cluster.running():
        built = cluster.fresh_contents()
        if isinstance(built, str):
            raise RuntimeError(f"the generation cannot be loaded: {built}")
        expected = Expected(built, options.seed)
        cluster.elect(cluster.numbers)
        writers = [Writer(n, cluster, journal, options.seed) for n in range(options.writers)]
        for writer in writers:
            writer.start()
        checks, checked_at = 0, 0
        try:
            while not journal.violations:
                is_late = (
                    options.seconds is not None and time.monotonic() > started + options.seconds
                )
                is_last = is_late or kills.total >= options.kills
                if is_last or kills.total >= checked_at + options.check_every:
                    check(cluster, writers, journal, expected)
                    checks, checked_at = checks + 1, kills.total
                    journal.violations += cluster.defects
                    progress(
                        f"{kills.total} kills, {kills.stops.total()} stops, {journal.writes} "
                        f"writes acknowledged, {len(journal.violations)} violations"
                    )
                if is_last:
                    break
                kills.step()
        finally:
            for writer in writers:
                writer.end()
    return {
        "options": {**asdict(options), "points": len(options.points)},
        "seconds": round(time.monotonic() - started, 1),
        "kills": kills.total,
        "stops": kills.stops.total(),
        "disk_errors": kills.disk_errors.total(),
        "elections": cluster.epoch,
        "checks": checks,
        "acknowledged": journal.writes,
        "repeated_after_acknowledgement": journal.repeats,
        "reads_after_acknowledgement": journal.reads,
        "refused_writes": journal.refusals | journal.unknown,
        "refused_elections": len(cluster.refusals),
        "kills_by_point": dict(sorted(kills.kills.items())),
        "stops_by_point": dict(sorted(kills.stops.items())),
        "disk_errors_by_point": dict(sorted(kills.disk_errors.items())),
        "not_reached": dict(sorted(kills.missed.items())),
        "left_in_the_log_folder": leftovers(live_folder(generation, SHARD)),
        "violations": journal.violations,
    }


def check(cluster: Cluster, writers: list[Writer], journal: Journal, expected: Expected) -> None:
    """Every replica, and a process that loads the shard anew, hold what was acknowledged, exactly,
    once no write is under way."""
    if not paused(writers, cluster.leader, PAUSED_WITHIN_S):
        journal.violation(
            f"writes were not acknowledged within {PAUSED_WITHIN_S} s: {cluster.situation()}"
        )
        return
    expected.take(journal)
    held: dict[str, Contents | str] = {"a new process": cluster.fresh_contents()}
    for process in cluster.all_replicas():
        name = "the primary" if process is cluster.leader() else "a follower"
        held[f"{name}, replica {process.number},"] = followed(cluster, process.number, expected.seq)
    for name, found in held.items():
        if isinstance(found, str):
            journal.violation(f"{name} cannot be asked: {found}")
            continue
        for difference in expected.differences(found):
            journal.violation(f"{name} {difference}")
    for writer in writers:
        writer.resume()


def followed(cluster: Cluster, number: int, seq: int) -> Contents | str:
    """What a replica holds once it has applied ``seq`` writes, or when it had time enough."""
    process = cluster.replica(number)
    until = time.monotonic() + FOLLOWED_WITHIN_S
    try:
        while (state := process.ask("state"))["seq"] < seq and time.monotonic() < until:
            time.sleep(0.01)
        found: Contents = process.ask("contents")
    except Ended:
        return "it has ended"
    return found if found.seq == seq else f"at write {found.seq} of {seq}: {state['trouble']}"


def leftovers(folder: Path) -> dict[str, int]:
    """Bytes and files by kind in the folder of the log."""
    sizes: dict[str, int] = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            kind = path.relative_to(folder).parts[0].split("-")[0]
            if path.is_file():
                sizes[f"{kind} files"] = sizes.get(f"{kind} files", 0) + 1
                sizes[f"{kind} bytes"] = sizes.get(f"{kind} bytes", 0) + path.stat().st_size
    return sizes
