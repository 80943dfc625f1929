"""What ``shardline plan`` says beside what a cluster of this machine shows: memory and latency.

    python -m shardline.bench.plan_check [--rows 1000000] [--dim 128] [--rate 100]
    python -m shardline.bench.plan_check --rows 20000000 --dim 64

Theory: a plan is a sum of measured parts, so it can be wrong in each, and in what they leave out. A
clustered corpus is built and served by ``shardline bench load rate``, which measures resident
memory of every process and latencies over HTTP in the open loop. The plan is made for the same
index, search parameters, shards, rate and cores. Printed are both and measured / planned; the aim
is a ratio between .75 and 1.25 for memory and p50. Other work on the machine lengthens latencies.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from shardline.bench.load.command import BENCH_STORE
from shardline.cluster.console import print_table
from shardline.cluster.planner.plan_text import as_json
from shardline.cluster.planner.sizing import Asked, Plan, plan
from shardline.cluster.preflight.free_memory import free_memory
from shardline.cluster.store import Store
from shardline.shards.core.errors import Unavailable
from shardline.shards.core.schema import Metric
from shardline.shards.storage.generation import GenerationManifest, read_generation

MIB = 1 << 20
AIM = 0.25  # of the plan
NO_BOUND_MS = 1e6
SHARD, DRIVER = "shard", "driver"


def measure(
    store: Path, *, rows: int, dim: int, rate: float, seconds: float, shards: int, k: int
) -> dict[str, Any]:
    """The report of ``bench load rate`` over such a corpus; vectors and index stay in the store.

    Raises:
        Unavailable: it failed; carries the last line of its output.
    """
    store.mkdir(parents=True, exist_ok=True)
    figures = store / "plan_check.json"
    words = ["--store", str(store), "--set", f"cluster.shards={shards}"]
    words += ["bench", "load", "rate", "--rows", str(rows), "--dim", str(dim), "-k", str(k)]
    words += ["--rate", f"{rate:g}", "--seconds", f"{seconds:g}", "--json", str(figures)]
    done = subprocess.run(
        [sys.executable, "-m", "shardline.cluster.cli", *words],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["no output"]
        raise Unavailable("`shardline bench load rate` failed", got=lines[-1])
    report: dict[str, Any] = json.loads(figures.read_text())
    return report


def planned(report: dict[str, Any], manifest: GenerationManifest, host_bytes: int) -> Plan:
    """For what was measured: the index, its search parameters, shards, rate, and one host."""
    setup, index = report["setup"], manifest.index
    params = setup["params"]
    return plan(
        Asked(
            rows=setup["rows"],
            dim=setup["dim"],
            qps=setup["rate"],
            p99_ms=NO_BOUND_MS,
            k=setup["k"],
            metric=Metric(setup["metric"]),
            kind=index.kind,
            recall=None,
            nprobe=params["nprobe"] or index.nprobe,
            rerank_factor=params["rerank_factor"] or index.rerank_factor,
            nlist=index.nlist,
            shards=setup["shards"],
            replicas=1,
            host_bytes=host_bytes,
            host_cores=setup["cores"],
        )
    )


def compared(report: dict[str, Any], found: Plan, manifest: GenerationManifest) -> dict[str, Any]:
    """(planned, measured) by name."""
    step = next(each for each in report["steps"] if each["recall"] is not None)
    shards = [each["memory_mib"] for each in step["processes"] if each["role"] == SHARD]
    # this benchmark holds corpus and bare index in the process that serves
    every = [each["memory_mib"] for each in step["processes"] if each["role"] != DRIVER]
    busy = sum(each["cores"] for each in step["processes"] if each["role"] in (SHARD, "router"))
    files = [sum(file.bytes for file in entry.files) for entry in manifest.shards]
    size, layout, figures = found.layout.size, found.layout, step["figures"]
    return {
        "shard, files, MiB": (size.file_bytes / MIB, max(files) / MIB),
        "shard, resident, MiB": (size.resident_bytes / MIB, statistics.mean(shards)),
        "all processes but the first, resident, MiB": (
            (layout.host_bytes - layout.shards * size.filter_bytes) / MIB,
            sum(every),
        ),
        "p50, ms": (found.tails.p50_ms, figures["p50_ms"]),
        "p99, ms": (found.tails.p99_ms, figures["p99_ms"]),
        "CPU per query, shards and router, ms": (
            layout.query_us / 1e3,
            busy / report["setup"]["rate"] * 1e3,
        ),
    }


@click.command()
@click.option("--rows", type=click.IntRange(min=10_000), default=1_000_000, show_default=True)
@click.option("--dim", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--shards", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--rate", type=click.FloatRange(min=1), default=100.0, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=1), default=30.0, show_default=True)
@click.option("-k", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--store", type=click.Path(path_type=Path), default=Path("plan-check-store"))
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False))
def main(
    rows: int,
    dim: int,
    shards: int,
    rate: float,
    seconds: float,
    k: int,
    store: Path,
    json_path: Path | None,
) -> None:
    """Build and serve a clustered corpus, and compare it with its plan."""
    report = measure(store, rows=rows, dim=dim, rate=rate, seconds=seconds, shards=shards, k=k)
    manifest = read_generation(Store(store / BENCH_STORE).generation(report["setup"]["generation"]))
    found = planned(report, manifest, host_bytes=free_memory().available_bytes)
    pairs = compared(report, found, manifest)
    table = []
    for name, (ours, theirs) in pairs.items():
        ratio = theirs / ours
        within = "yes" if abs(ratio - 1) <= AIM else "no"
        table.append((name, f"{ours:,.2f}", f"{theirs:,.2f}", f"{ratio:.2f}", within))
    layout = found.layout
    title = (
        f"{rows:,} x {dim}, {layout.index.factory}, nprobe {layout.depth.nprobe}, rerank_factor "
        f"{layout.depth.rerank_factor}, {shards} shards, {rate:g}/s, "
        f"{report['setup']['cores']} cores"
    )
    header = ("", "planned", "measured", "measured / planned", f"within {AIM:.0%}")
    print_table(title, header, table)
    if json_path is not None:
        both = {"compared": pairs, "plan": as_json(found), "measured": report}
        json_path.write_text(json.dumps(both, indent=2) + "\n")


if __name__ == "__main__":
    main()
