"""Online latency beside a live batch job: what `shardline batch --live` costs those who ask too.

    python -m shardline.bench.batch_live_bench [--rows 1000000] [--rate 100] [--pairs 5]

Theory. A job's searches are background ones: in a shard an online query waits for a piece of one,
about a millisecond, at most. What they take of the cores and of the router's event loop is bounded
by the job's pace (``cluster.batch.pace``). The promise is that online p99 rises by 20 % at most.
Single queries arrive at random (Poisson) at --rate; a measurement with the job and one without make
a pair, in alternating order, and a ratio is taken within a pair. The job's own rate is the price:
beside it stand its rate while nobody else asks, and what the endpoint gives, as its ceiling: to
ENDPOINT_THREADS threads that send requests as large as the job's largest, one after the other.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq

from shardline.bench.batch_bench import BatchCorpus, make_corpus
from shardline.bench.load.pairs import order_of
from shardline.bench.load.scenarios import Step
from shardline.bench.load.step import Options, StepRunner
from shardline.bench.load.target import Target, open_target, vector_queries
from shardline.cluster.batch.pace import SIZES
from shardline.cluster.config import load_config
from shardline.cluster.serving.deployment import serving
from shardline.cluster.serving.ray_session import cores, local_ray
from shardline.shards.core.schema import FloatArray

K = 100
WARM_UP_S = 5.0  # of a measurement: the job reaches its pace, or its absence is forgotten
JOB_QUERIES = 1_000_000  # more than any measurement leaves time for
BLOCK_ROWS, BLOCK_ROWS_ALONE = 256, 2048  # so that parts show how far the job is
STARTS_WITHIN_S = 3.0  # the load generator, from its call to its first request
ENDPOINT_THREADS = 4  # on two cores more make no difference
ENDPOINT_QUERIES = 1 << 16


@contextmanager
def running_job(target: Target, queries: Path, out: Path, block_rows: int) -> Iterator[None]:
    """The command beside the block, killed at its end."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", "from shardline.cluster.cli import main; main()"]
    command += ["--store", str(target.store.root), "batch", "--live", "-k", str(K)]
    command += ["--queries", str(queries), "--out", str(out), "--block-rows", str(block_rows)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not list(out.glob("part-*")):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the job does not run")
            time.sleep(0.05)
        yield
        if process.poll() is not None:
            raise RuntimeError("the job has ended before the measurement")
    finally:
        process.kill()
        process.wait()


def job_rate(out: Path, block_rows: int, start: float, stop: float) -> float:
    """Queries/s of a job by the parts that it wrote between two times of time.time."""
    times = sorted(path.stat().st_mtime for path in out.glob("part-*"))
    written = [at for at in times if start <= at <= stop]
    if len(written) < 2:
        raise RuntimeError(f"the job wrote {len(written)} parts in {stop - start:.0f} s")
    return (len(written) - 1) * block_rows / (written[-1] - written[0])


def endpoint_rate(target: Target, queries: FloatArray, seconds: float) -> float:
    """Queries/s that the endpoint answers to requests of the job's largest size, nobody else
    asking."""
    size, until = SIZES[-1], time.monotonic() + seconds
    starts = itertools.cycle(range(0, len(queries) - size, size))
    answered = [0] * ENDPOINT_THREADS

    def ask(number: int) -> None:
        with target.address.client() as client:
            while time.monotonic() < until:
                start = next(starts)
                answer = client.search(vectors=queries[start : start + size], k=K)
                answered[number] += len(answer.ids)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(ENDPOINT_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(answered) / seconds


def measure(runner: StepRunner, rate: float, seconds: float) -> dict[str, Any]:
    """Online figures at a rate."""
    step = Step(label=f"{rate:g}/s", rate=rate, seconds=seconds, batch=1, ks=((K, 1.0),))
    report = runner.measure(step)
    found = report.figures
    return {
        "p50_ms": found.p50_ms,
        "p99_ms": found.p99_ms,
        "failed": found.failed,
        "rejected": found.rejected,
        "partial": found.partial,
    }


def compare(
    target: Target, corpus: BatchCorpus, *, rate: float, seconds: float, pairs: int
) -> dict[str, Any]:
    """Pairs of measurements, with and without the job."""
    options = Options(rate=rate, seconds=seconds, warm_up_s=WARM_UP_S, k=K)
    rng = np.random.default_rng(0)
    runner = StepRunner(
        target=target,
        queries=vector_queries(target, int(rate * (seconds + WARM_UP_S)) + 2000, rng),
        options=options,
        rng=rng,
        note=lambda line: click.echo(line, err=True),
    )
    out = corpus.store.root / "live-out"
    table = pq.read_table(corpus.queries, columns=["embedding"])["embedding"].combine_chunks()
    vectors = table.slice(0, ENDPOINT_QUERIES).flatten().to_numpy().reshape(ENDPOINT_QUERIES, -1)
    endpoint = endpoint_rate(target, vectors, seconds)
    started = time.time()
    with running_job(target, corpus.queries, out, BLOCK_ROWS_ALONE):
        time.sleep(seconds)
    alone = job_rate(out, BLOCK_ROWS_ALONE, started, time.time())
    samples: list[dict[str, Any]] = []
    for pair in range(pairs):
        sample: dict[str, Any] = {}
        for side in order_of(pair):
            if side:
                with running_job(target, corpus.queries, out, BLOCK_ROWS):
                    warm = time.time() + WARM_UP_S + STARTS_WITHIN_S
                    sample["with"] = measure(runner, rate, seconds)
                # what the load generator does before and after its requests is left out
                stop = warm - STARTS_WITHIN_S + seconds
                sample["job_queries_per_s"] = job_rate(out, BLOCK_ROWS, warm, stop)
            else:
                sample["without"] = measure(runner, rate, seconds)
        for name in ("p50_ms", "p99_ms"):
            sample[f"{name}_ratio"] = sample["with"][name] / sample["without"][name]
        samples.append(sample)
        click.echo(json.dumps(sample), err=True)
    return {
        "rate": rate,
        "seconds": seconds,
        "rows": corpus.manifest.rows,
        "p99_ratio": statistics.median(each["p99_ms_ratio"] for each in samples),
        "p50_ratio": statistics.median(each["p50_ms_ratio"] for each in samples),
        "job_queries_per_s": statistics.median(each["job_queries_per_s"] for each in samples),
        "job_alone_queries_per_s": alone,
        "endpoint_queries_per_s": endpoint,
        "job_alone_ratio": alone / endpoint,
        "samples": samples,
    }


def main() -> None:
    """Builds, serves, measures, and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("bench-batch"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--queries", type=int, default=JOB_QUERIES)
    asked = parser.parse_args()
    root = asked.store.resolve()
    corpus = make_corpus(root, asked.rows, asked.dim, asked.shards, asked.queries)
    assert pq.read_metadata(corpus.queries).num_rows == asked.queries
    config = load_config(None, [f"store={root}", "cluster.http_port=0"])
    with local_ray(num_cpus=cores()), serving(config) as endpoint:
        target = open_target(endpoint.address, endpoint.pid, [corpus.store])
        report = compare(target, corpus, rate=asked.rate, seconds=asked.seconds, pairs=asked.pairs)
    click.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
