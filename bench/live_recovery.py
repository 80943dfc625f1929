"""How long a shard that was written takes to start, and what written rows cost.

    python -m shardline.bench.live_recovery [--rows 250000] [--records 50000] [--rounds 5]

Theory. A shard that starts verifies and reads its main index, then applies the log: decoding,
finding the rows that are replaced, appending vectors. Beside it stands the same shard without a
log (the floor), and the same after a compaction. Every start is a process of its own, and files are
in the page cache, as after the end of a process, not of a host. The memory of the delta is the
process's resident size after the log was applied, less that before; keys of writes included.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from shardline.bench.live_corpus import (
    SHARD,
    mixed_ids,
    one_shard,
    opened,
    setup,
    upsert,
    written_vectors,
)
from shardline.shards.live.compaction import compact
from shardline.shards.live.epoch_file import read_epoch
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.live.live_folder import live_folder
from shardline.shards.storage.generation import read_generation

GROUP = 64  # records of one fsync, as with so many writers


def measure(
    root: Path, rows: int, records: int, dim: int, kind: str, rounds: int
) -> dict[str, Any]:
    """The report, ready for JSON."""
    generation = one_shard(root, rows, dim, kind)
    without = starts(generation, rounds)
    log_bytes = write_log(generation, rows, records)
    with_log = starts(generation, rounds)
    began = time.perf_counter()
    compact(generation, SHARD)
    compaction_s = time.perf_counter() - began
    compacted = starts(generation, rounds)
    return {
        "setup": {
            "rows": rows,
            "dim": dim,
            "kind": kind,
            "records": records,
            "rows_per_record": 1,
            "records_per_group": GROUP,
            "rounds": rounds,
            **setup(),
        },
        "start_without_log": without,
        "start_with_log": with_log,
        "start_after_compaction": compacted,
        "compaction_s": round(compaction_s, 2),
        "log_bytes_per_row": round(log_bytes / records, 1),
        "vector_bytes_per_row": 4 * dim,
        "delta_bytes_per_row": round(with_log["log_memory_bytes"] / records, 1),
    }


def write_log(generation: Path, rows: int, records: int) -> int:
    """Writes single rows, half of them in place of others; the bytes of the log."""
    _, writes, _ = opened(generation, LiveConfig(max_delta_rows=records))
    writes.lead(1 + read_epoch(live_folder(generation, SHARD)))
    rng = np.random.default_rng(0)
    ids = mixed_ids(rng, records, rows)
    vectors = written_vectors(read_generation(generation), records)
    for start in range(0, records, GROUP):
        rows_of_group = range(start, min(start + GROUP, records))
        requests = [upsert(ids[n : n + 1], vectors[n : n + 1], f"key-{n}") for n in rows_of_group]
        for reply in writes.write(requests):
            if isinstance(reply, Exception):
                raise reply
    writes.close()
    folder = live_folder(generation, SHARD)
    return sum(path.stat().st_size for path in folder.glob("log-*.seg"))


def starts(generation: Path, rounds: int) -> dict[str, Any]:
    """Medians of so many processes, with the smallest and the largest total."""
    command = [sys.executable, "-m", "shardline.bench.live_recovery", "--start", str(generation)]
    found = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(rounds)
    ]
    medians = {name: statistics.median(each[name] for each in found) for name in found[0]}
    totals = sorted(each["total_s"] for each in found)
    return {**medians, "total_s_min": totals[0], "total_s_max": totals[-1]}


def start(generation: Path) -> dict[str, float]:
    """One start, in this process, up to the first write that it takes."""
    began = time.perf_counter()
    shard, writes, _ = opened(generation)
    loaded = time.perf_counter()
    before, cpu_before = resident_bytes(), time.process_time()
    while writes.catch_up():
        pass
    caught_up, cpu_s = time.perf_counter(), time.process_time() - cpu_before
    memory = resident_bytes() - before
    epoch = 1 + read_epoch(live_folder(generation, SHARD))
    asked = time.perf_counter()
    writes.lead(epoch)
    led = time.perf_counter()
    found = {
        "load_s": loaded - began,
        "log_s": caught_up - loaded,
        "log_cpu_s": cpu_s,
        "lead_s": led - asked,
        "total_s": caught_up - began + led - asked,
        "log_memory_bytes": float(memory),
        "writes": float(shard.state.seq),
    }
    writes.close()
    return {name: round(value, 4) for name, value in found.items()}


def resident_bytes() -> int:
    """What the process holds, without what malloc keeps for later."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=250_000)
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--kind", default="ivfpq-fs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", type=Path, help="kept, and reused; default: temporary")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = args.rows, args.records, args.dim, args.kind, args.rounds
    if args.start is not None:
        report: dict[str, Any] = start(args.start)
    elif args.store is not None:
        report = measure(args.store, *shape)
    else:
        with tempfile.TemporaryDirectory(prefix="shardline-live-") as folder:
            report = measure(Path(folder), *shape)
    print(json.dumps(report, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
