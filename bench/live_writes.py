"""Durable writes to one shard over sockets: rate and latency beside the disk's own fsync.

    python -m shardline.bench.live_writes [--rows 250000] [--seconds 5] [--rounds 3]

Theory. A write is answered after its group is in the log, fsynced. One writer alone waits for one
fsync per write, so it cannot be faster than the disk; many writers share an fsync, and then what
is left is the work per row. Each measurement stands beside appends of the same number of bytes to
a file in the same folder with fdatasync after each, made just before. The shard is a process as in
service, with compactions; the clients are one loop in this process, each with one request under
way (closed loop), half of its rows new items, half in the place of others. The bound of the delta
is raised: by default, writes that come faster than compactions take them are refused.
"""

import argparse
import json
import os
import select
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from shardline.bench.live_corpus import SHARD, one_shard, opened, setup, upsert, written_vectors
from shardline.bench.shard_link import ShardLink
from shardline.shards.core.messages import ErrorReply, WriteReply
from shardline.shards.live.changeover import Changeover
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.server.shard_server import ShardServer
from shardline.shards.storage.generation import read_generation
from shardline.shards.wire.handshake import ServerAddress

SECRET = b"of this benchmark"
TIMEOUT_S = 60.0
FSYNCS_S = 1.0
RECORD_BYTES = 88  # of a record and its group, beside ids and vectors
MAX_DELTA_ROWS = 1 << 20
POOL_ROWS = 20_000  # different vectors that are written


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """So many clients at once, each with so many rows per request."""

    writers: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.writers} writers, {self.rows} rows per request"


CASES = (
    Case(writers=1, rows=1),
    Case(writers=8, rows=1),
    Case(writers=64, rows=1),
    Case(writers=1, rows=100),
    Case(writers=8, rows=100),
)


def measure(root: Path, rows: int, dim: int, kind: str, seconds: float, rounds: int) -> Any:
    generation = one_shard(root, rows, dim, kind)
    vectors = written_vectors(read_generation(generation), POOL_ROWS)
    found: dict[str, list[dict[str, Any]]] = {case.name: [] for case in CASES}
    context = get_context("forkserver")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, str(generation)), daemon=True)
    process.start()
    try:
        address = pipe.recv()
        for round_ in range(rounds):
            for case in CASES if round_ % 2 == 0 else reversed(CASES):
                fsync_ms = fsyncs(root, RECORD_BYTES + case.rows * (8 + 4 * dim))
                result = one(address, case, vectors, rows, seconds)
                found[case.name].append({**result, "fsync_ms": fsync_ms})
        pipe.send("state")
        state = pipe.recv()
    finally:
        process.kill()
        process.join()
    return {
        "setup": {
            "rows": rows,
            "dim": dim,
            "kind": kind,
            "seconds": seconds,
            "rounds": rounds,
            **setup(),
        },
        "shard_at_the_end": state,
        "cases": {name: medians(results) for name, results in found.items()},
    }


def medians(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the rounds; refusals are summed up."""
    names = [name for name in results[0] if name != "refused"]
    figures = {name: round(statistics.median(r[name] for r in results), 3) for name in names}
    rates = sorted(round(result["rows_per_s"]) for result in results)
    refused = sum(result["refused"] for result in results)
    return {**figures, "rows_per_s_of_rounds": rates, "refused": refused}


def fsyncs(folder: Path, size: int) -> float:
    """Milliseconds, median: an append of ``size`` bytes and its fdatasync."""
    data, samples = bytes(size), []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        until = time.perf_counter() + FSYNCS_S
        while (began := time.perf_counter()) < until:
            file.write(data)
            os.fdatasync(file.fileno())
            samples.append(time.perf_counter() - began)
    return statistics.median(samples) * 1e3


def one(
    address: ServerAddress, case: Case, vectors: np.ndarray, rows: int, seconds: float
) -> dict[str, Any]:
    """Closed loop. Latencies are of acknowledged requests alone."""
    rng = np.random.default_rng(case.writers * case.rows)
    links = [ShardLink(address, SECRET, timeout_s=TIMEOUT_S) for _ in range(case.writers)]
    sent_at, samples, refused, number = [0.0] * len(links), [], 0, 0

    def send(writer: int) -> None:
        nonlocal number
        number += 1
        ids = rng.choice(2 * rows, case.rows, replace=False) if case.rows > 1 else None
        ids = rng.integers(2 * rows, size=1) if ids is None else ids
        first = int(rng.integers(len(vectors) - case.rows + 1))
        request = upsert(ids.astype(np.int64), vectors[first : first + case.rows])
        sent_at[writer] = time.perf_counter()
        links[writer].send(number, request)

    by_socket = {link.fileno(): writer for writer, link in enumerate(links)}
    poller = select.epoll()
    for descriptor in by_socket:
        poller.register(descriptor, select.EPOLLIN)
    began = time.perf_counter()
    for writer in range(len(links)):
        send(writer)
    waiting = len(links)
    while waiting:
        for descriptor, _ in poller.poll(TIMEOUT_S):
            writer = by_socket[descriptor]
            received = links[writer].receive(0.0)
            if received is None:  # a sign of life
                continue
            now = time.perf_counter()
            if isinstance(received[1], WriteReply):
                samples.append(now - sent_at[writer])
            elif isinstance(received[1], ErrorReply):
                refused += 1
            if now < began + seconds:
                send(writer)
            else:
                waiting -= 1
    took = time.perf_counter() - began
    poller.close()
    for link in links:
        link.close()
    p50, p99 = np.percentile(np.array(samples) * 1e3, (50, 99))
    return {
        "requests_per_s": len(samples) / took,
        "rows_per_s": len(samples) * case.rows / took,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "refused": refused,
    }


def serve(pipe: Connection, folder: str) -> None:
    """The shard's process, until it is killed."""
    generation = Path(folder)
    config = LiveConfig(max_delta_rows=MAX_DELTA_ROWS)
    shard, writes, main_seq = opened(generation, config)
    change = Changeover(generation, SHARD, main_seq=main_seq, config=config)
    server = ShardServer(shard, secret=SECRET, writes=writes, changeover=change)
    address = server.bind()
    server.start(1)
    server.lead(1)
    pipe.send(address)
    while pipe.recv():
        state = shard.state
        pipe.send(
            {
                "writes": state.seq,
                "rows": state.rows,
                "delta_rows": state.delta.rows,
                "writes_in_newest_main_index": change.main_seq,
                "trouble": str(change.trouble),
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=250_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--kind", default="ivfpq-fs")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", type=Path, help="kept, and reused; default: temporary")
    args = parser.parse_args()
    shape = args.rows, args.dim, args.kind, args.seconds, args.rounds
    if args.store is not None:
        report = measure(args.store, *shape)
    else:
        with tempfile.TemporaryDirectory(prefix="shardline-live-") as folder:
            report = measure(Path(folder), *shape)
    print(json.dumps(report, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
