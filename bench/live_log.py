"""The log of a shard beside the disk's own fsync: appends, replay, and a follower's polls.

Theory: an append is one write, one fdatasync, and one small file read; so its floor is a bare write
and fdatasync of the same bytes to a file of its own, measured in the same rounds, because disks of
virtual machines change by the minute. What the log adds is processor time: encoding, checksums, and
EPOCH read again. Replay is the time that a new primary or follower takes for the whole log, from
the page cache. An idle poll is what a follower costs while nothing is written.

    python -m shardline.bench.live_log [--folder DIR]
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from shardline.bench.load.stats import p50_p99
from shardline.cluster.console import print_table
from shardline.cluster.serving.ray_session import cores
from shardline.shards.live.log import Log
from shardline.shards.live.log_segments import encode_group
from shardline.shards.live.log_tail import LogTail
from shardline.shards.live.records import Record, Upsert, encode_record

POLLS = 2000


def a_write(seq: int, rows: int, dim: int) -> Record:
    rng = np.random.default_rng(seq)
    change = Upsert(
        item_ids=np.arange(seq * rows, (seq + 1) * rows),
        vectors=rng.random((rows, dim), dtype=np.float32),
        attributes=b"",
    )
    return Record(seq=seq, epoch=1, key=f"key-{seq}", change=change)


def measure(folder: Path, *, rows: int, dim: int, count: int) -> dict[str, Any]:
    """Appends of one record each, beside bare writes of as many bytes; then replay and polls."""
    writes = [a_write(seq, rows, dim) for seq in range(1, count + 1)]
    log, _ = Log.open(folder, 1, after_seq=0)
    size = len(encode_group([encode_record(writes[0])], first_seq=1, chain=0)[0])
    took_ms: dict[str, list[float]] = {"bare": [], "append": []}
    cpu_ms = dict.fromkeys(took_ms, 0.0)
    with _bare_file(folder / "bare") as bare_write:
        calls: dict[str, Callable[[Record], None]] = {
            "bare": lambda write: bare_write(bytes(size)),
            "append": lambda write: log.append([write]),
        }
        for write in writes:
            for name, call in calls.items():
                began, spent = time.perf_counter(), time.thread_time()
                call(write)
                took_ms[name].append((time.perf_counter() - began) * 1e3)
                cpu_ms[name] += (time.thread_time() - spent) * 1e3 / count
    log.close()
    began = time.perf_counter()
    tail = LogTail(folder, 0)
    assert len(tail.read_new()) == count
    replay_s = time.perf_counter() - began
    spent = time.thread_time()
    for _ in range(POLLS):
        assert not tail.read_new()
    return {
        "rows": rows,
        "bytes": size,
        "took_ms": {name: p50_p99(samples) for name, samples in took_ms.items()},
        "mean_ms": {name: float(np.mean(samples)) for name, samples in took_ms.items()},
        "cpu_ms": cpu_ms,
        "replay_records_per_s": count / replay_s,
        "replay_mib_per_s": count * size / replay_s / 2**20,
        "idle_poll_us": (time.thread_time() - spent) * 1e6 / POLLS,
    }


@contextmanager
def _bare_file(path: Path) -> Iterator[Callable[[bytes], None]]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(data: bytes) -> None:
        os.write(descriptor, data)
        os.fdatasync(descriptor)

    try:
        yield write
    finally:
        os.close(descriptor)


@click.command()
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path(),
    help="On the disk to measure; a folder is made in it, and removed.",
)
@click.option("--dim", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--count", type=click.IntRange(min=10), default=500, show_default=True)
def main(folder: Path, dim: int, count: int) -> None:
    """Appends of 1 and 100 rows beside bare writes of as many bytes, each with one fdatasync."""
    found = []
    for rows in (1, 100):
        with tempfile.TemporaryDirectory(dir=folder, prefix="live-log-") as made:
            found.append(measure(Path(made), rows=rows, dim=dim, count=count))
    table = [
        (
            f"{each['rows']}",
            label,
            f"{each['took_ms'][name]['p50']:.3f}",
            f"{each['took_ms'][name]['p99']:.3f}",
            f"{1e3 / each['mean_ms'][name]:,.0f}",
            f"{each['rows'] * 1e3 / each['mean_ms'][name]:,.0f}",
            f"{each['cpu_ms'][name]:.3f}",
        )
        for each in found
        for name, label in (("bare", "write, fdatasync (floor)"), ("append", "append"))
    ]
    title = f"one record per fsync, {dim}-d, {count} of each, {cores()} cores"
    print_table(title, ("rows", "", "p50 ms", "p99 ms", "per s", "rows/s", "cpu ms"), table)
    report = {"setup": {"dim": dim, "count": count, "cores": cores()}, "measured": found}
    click.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
