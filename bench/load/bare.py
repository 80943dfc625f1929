"""The generation's indexes searched in this process: what is left when no socket is in the way."""

import time
from dataclasses import dataclass

import numpy as np

from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import FloatArray
from shardline.shards.index.main_index import MainIndex, set_search_threads

LEAST_CALLS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BareFigures:
    """One request of ``batch`` queries through all shards' indexes in turn, on ``threads``."""

    batch: int
    k: int
    threads: int
    p50_ms: float
    p99_ms: float
    qps: float
    calls: int


def search_bare(
    indexes: list[MainIndex],
    queries: FloatArray,
    *,
    batch: int,
    k: int,
    threads: int,
    seconds: float,
) -> BareFigures:
    """Searches ``batch`` of queries (n, dim) at a time, for ``seconds``; the first is left out."""
    set_search_threads(threads)
    starts = range(0, max(len(queries) - batch + 1, 1), batch)
    samples: list[float] = []
    began = time.perf_counter()
    call = 0
    while call <= LEAST_CALLS or time.perf_counter() - began < seconds:
        at = starts[call % len(starts)]
        part = np.ascontiguousarray(np.resize(queries[at : at + batch], (batch, queries.shape[1])))
        started = time.perf_counter()
        for index in indexes:
            index.search(part, k, SearchParams())
        samples.append((time.perf_counter() - started) * 1e3)
        call += 1
    times = np.array(samples[1:])
    p50, p99 = np.percentile(times, [50, 99])
    return BareFigures(
        batch=batch,
        k=k,
        threads=threads,
        p50_ms=round(float(p50), 3),
        p99_ms=round(float(p99), 3),
        qps=round(batch * 1e3 / float(times.mean()), 1),
        calls=times.size,
    )
