"""Searches while items are written: their rate and latency, and how soon a write is seen.

    python -m shardline.bench.load.live_bench [--rows 1000000] [--write-rate 500] [--pairs 5]

Theory. An upserted row costs its fsync, shared by a group, some tens of microseconds of the shard's
process, and its comparison with every later query until the next compaction: 512 bytes that are
read, in a product of a matrix with a vector. Half of the rows replace others, which hides rows of
the main index at the cost of a bit each. So the price grows with the delta and falls back with a
compaction, which takes a second of a core that is idle. A measurement with writes and one
without make a pair, in alternating order, and ratios are taken within a pair; the delta is not
emptied between, so later pairs carry more. The writer is one process with one connection, which
upserts ``--batch`` rows per request on schedule. After each of some requests it searches, without
pause, for what it has just been acknowledged, until it is there.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from shardline.bench.batch_bench import BatchCorpus, make_corpus
from shardline.bench.load.http_bytes import address_of, message_of, search_request
from shardline.bench.load.pairs import CONNECTIONS, order_of
from shardline.bench.load.scenarios import Step
from shardline.bench.load.step import Options, StepRunner
from shardline.bench.load.target import Target, open_target, vector_queries
from shardline.bench.load.wrk import find_wrk, run_wrk
from shardline.cluster.config import load_config
from shardline.cluster.serving.deployment import serving
from shardline.cluster.serving.ray_session import cores, local_ray
from shardline.router.http.api_keys import Scope

K = 100
CLOSED_QUERIES = 4000  # different ones of the closed loop
WARM_UP_S = 2.0
SEEN_ONE_IN = 20  # requests after which the writer looks for what it wrote
NEW_ITEMS = 1 << 40  # ids that the corpus does not have
METRICS = ("qps", "p50_ms", "p99_ms")


def write(url: str, key: str | None, plan: dict[str, Any], seed: int, pipe: Any) -> None:
    """Upserts on schedule until the pipe says so, and tells it of the first; then sends what it
    saw."""
    from shardline.router.client.sync_client import Client

    rng = np.random.default_rng(seed)
    batch, interval_s = plan["batch"], plan["batch"] / plan["rate"]
    acknowledged_ms: list[float] = []
    seen_ms: list[float] = []
    began, sent = time.perf_counter(), 0
    with Client(url, key=key) as client:
        while not pipe.poll(max(0.0, began + sent * interval_s - time.perf_counter())):
            ids = rng.choice(plan["rows"], batch, replace=False)
            ids[: batch // 2] += NEW_ITEMS
            vectors = rng.standard_normal((batch, plan["dim"])).astype(np.float32)
            asked = time.perf_counter()
            client.upsert(item_ids=ids, vectors=vectors)
            done = time.perf_counter()
            acknowledged_ms.append((done - asked) * 1e3)
            sent += 1
            if sent == 1:
                pipe.send(None)
            if sent % SEEN_ONE_IN == 0:
                while client.search(vectors=vectors[:1], k=1).ids[0, 0] != ids[0]:
                    pass
                seen_ms.append((time.perf_counter() - done) * 1e3)
        seconds = time.perf_counter() - began
    pipe.send(
        {
            "rows_per_s": round(sent * batch / seconds, 1),
            "acknowledged_ms": percentiles(acknowledged_ms),
            "seen_ms": percentiles(seen_ms),
        }
    )


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 2) for p in (50, 99)}


@contextmanager
def writing(target: Target, key: str | None, rate: float, batch: int, seed: int) -> Iterator[Any]:
    """A writer beside the block; the dict holds what it saw when the block has ended."""
    plan = {"rate": rate, "batch": batch, "dim": target.manifest.dim, "rows": target.manifest.rows}
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=write, args=(target.url, key, plan, seed, theirs))
    process.start()
    theirs.close()  # or nobody would learn that it has died
    seen: dict[str, Any] = {}
    try:
        ours.recv()  # its start takes a second of a core, which is no price of writes
        time.sleep(WARM_UP_S)
        yield seen
        ours.send(None)
        seen |= ours.recv()
        process.join()
    finally:
        process.kill()
        process.join()


class Measure:
    """Figures of one moment: the rate of a closed loop, and latencies at a fixed rate."""

    def __init__(self, target: Target, rate: float, seconds: float) -> None:
        rng = np.random.default_rng(0)
        count = int(rate * (seconds + WARM_UP_S)) + CLOSED_QUERIES
        queries = vector_queries(target, count, rng)
        self._target, self._rate, self._seconds = target, rate, seconds
        options = Options(rate=rate, seconds=seconds, warm_up_s=WARM_UP_S, k=K)
        self._runner = StepRunner(
            target=target,
            queries=queries,
            options=options,
            rng=rng,
            note=lambda line: click.echo(line, err=True),
        )
        bodies = ({"vectors": queries.vectors[at : at + 1], "k": K} for at in range(CLOSED_QUERIES))
        headers, address = target.address.headers, address_of(target.url)
        self._messages = [message_of(search_request(each, headers), address) for each in bodies]

    def __call__(self, first: int) -> dict[str, float]:
        wrk = find_wrk()
        assert wrk is not None, "wrk is not installed"
        closed = run_wrk(
            wrk,
            self._target.url,
            self._messages,
            connections=CONNECTIONS,
            seconds=self._seconds,
            first=first,
        )
        assert not closed.failed, closed.failures
        step = Step(
            label=f"{self._rate:g}/s",
            rate=self._rate,
            seconds=self._seconds,
            batch=1,
            ks=((K, 1.0),),
        )
        found = self._runner.measure(step).figures
        assert not found.failed + found.rejected + found.partial, found
        assert found.p50_ms is not None
        assert found.p99_ms is not None
        return {"qps": closed.qps, "p50_ms": found.p50_ms, "p99_ms": found.p99_ms}


def compare(
    target: Target, measure: Measure, key: str | None, *, rate: float, batch: int, pairs: int
) -> dict[str, Any]:
    """Pairs of measurements, with and without ``rate`` rows per second being written."""
    samples: list[dict[str, Any]] = []
    for pair in range(pairs):
        sample: dict[str, Any] = {}
        for side in order_of(pair):
            if side:
                with writing(target, key, rate, batch, seed=pair) as seen:
                    sample["with"] = measure(pair)
                sample["writes"] = seen
            else:
                sample["without"] = measure(pair)
        for name in METRICS:
            sample[f"{name}_ratio"] = round(sample["with"][name] / sample["without"][name], 3)
        samples.append(sample)
        click.echo(json.dumps(sample), err=True)
    ratios = {
        f"{name}_ratio": statistics.median(each[f"{name}_ratio"] for each in samples)
        for name in METRICS
    }
    return {"rows_per_s": rate, "batch": batch, **ratios, "samples": samples}


def main() -> None:
    """Builds, serves, measures, and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("bench-batch"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--search-rate", type=float, default=100.0)
    parser.add_argument("--write-rate", type=float, action="append")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    root = asked.store.resolve()
    corpus: BatchCorpus = make_corpus(root, asked.rows, asked.dim, asked.shards, 1000)
    settings = [f"store={root}", "cluster.http_port=0", "router.cache_bytes=0"]
    config = load_config(None, settings)
    with local_ray(num_cpus=cores()), serving(config) as endpoint:
        key = endpoint.address_for(Scope.WRITE).key
        target = open_target(endpoint.address, endpoint.pid, [corpus.store])
        measure = Measure(target, asked.search_rate, asked.seconds)
        reports = [
            compare(target, measure, key, rate=rate, batch=asked.batch, pairs=asked.pairs)
            for rate in asked.write_rate or [500.0]
        ]
    click.echo(
        json.dumps({"rows": asked.rows, "seconds": asked.seconds, "runs": reports}, indent=2)
    )


if __name__ == "__main__":
    main()
