"""HTTP latency of single queries, in a row and at a fixed rate, beside its floor and a bare index.

Theory: a query costs the empty request (client, HAProxy, Serve, ASGI), plus one round trip to the
shards, plus the search itself. So three figures are printed from one run: an empty request over
the same connection path (the floor), the search over HTTP, and the same indexes searched in this
process without any socket (the bare index).

Both are asked for in two ways. In a row, one client sends a request as soon as the one before is
answered: all caches are warm, nothing queues, what is left is the way itself. Then open loop at a
rate: each request meets processes that slept in between, and counts from its intended send time.
"""

import json
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from shardline.bench.corpus import (
    clustered_queries,
    clustered_set,
    exact_ids,
    generation_of,
    load_bare,
)
from shardline.bench.load.openloop import LoadResult, Request, run_in_a_row, run_open_loop
from shardline.bench.vectors import recall_at_k
from shardline.cluster.build import run_on_ray
from shardline.cluster.commands.build import plan_of
from shardline.cluster.config import ShardlineConfig
from shardline.cluster.console import StageProgress, print_table
from shardline.cluster.serving.deployment import serving
from shardline.cluster.serving.endpoint import Endpoint
from shardline.cluster.serving.ray_session import cores
from shardline.cluster.store import Store
from shardline.router.http.codec import decode_answer, encode_query
from shardline.router.http.media import Media
from shardline.router.query import SearchQuery
from shardline.shards.core.errors import InvalidInput, Unavailable
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.shards.index.main_index import MainIndex
from shardline.shards.storage.generation import GenerationManifest

HEADER = ("HTTP, ms", "p50", "p90", "p99", "p99.9", "answered/s", "requests", "failed")
EMPTY = Request("GET", "/healthz")
WARM_UP = 100
LEAST_QUERIES = 2_000  # different ones in a row, so that the index is not asked the same few
BENCH_STORE = "bench"  # below the user's store, whose own generations stay as they are


def run(
    config: ShardlineConfig,
    *,
    rows: int,
    dim: int,
    k: int,
    rate: float,
    seconds: float,
    progress: StageProgress,
) -> dict[str, Any]:
    """Builds (or reuses) the corpus, serves it, measures; Ray must be running.

    Raises:
        InvalidInput: not one request in that time, or fewer rows than k.
        Unavailable: no empty request, or no search, was answered. As ``serving``.
    """
    count = num_requests(rate, seconds)
    if k > rows:
        raise InvalidInput("no answer is that long", field="-k", expected=f"<= {rows}", got=str(k))
    store = Store(config.store.resolve() / BENCH_STORE)
    config = config.model_copy(update={"store": store.root})
    corpus = clustered_set(store, rows, dim, progress)
    manifest = generation_of(store, corpus, plan_of(config), run_jobs=run_on_ray, progress=progress)
    different = clustered_queries(rows, dim, max(count, LEAST_QUERIES))
    queries = different[:count]
    progress.note("exact answers, for recall")
    exact = exact_ids(corpus, queries, k)
    bare = bare_latency(load_bare(store, manifest), queries, k)
    with serving(config, generation=manifest.generation, on_stage=progress.note) as endpoint:
        progress.note(f"empty requests, then searches, in a row, {seconds:g} s each")
        empty_in_a_row, search_in_a_row = in_a_row_over_http(endpoint, different, k, seconds)
        progress.note(f"{count} empty requests, then {count} searches, {rate:g} a second")
        empty, search = latency_over_http(endpoint, queries, k, rate)
    found = answered_ids(search)
    return {
        "setup": setup_of(manifest, rows, dim, k, rate) | {"seconds": seconds},
        "in_a_row": {
            "empty_request": empty_in_a_row.summary(),
            "search": search_in_a_row.summary(),
        },
        "empty_request": empty.summary(),
        "search": search.summary(),
        "bare_index_ms": bare,
        f"recall@{k}": round(recall_at_k(found, exact[list(search.bodies)]), 4),
        "build": manifest.quality,
    }


def num_requests(rate: float, seconds: float) -> int:
    """How many requests at ``rate`` a second are sent in that time; InvalidInput for none."""
    count = int(rate * seconds)
    if count < 1:
        raise InvalidInput(
            "too short for one request",
            field="--seconds",
            expected=f">= {1 / rate:g}",
            got=f"{seconds:g}",
        )
    return count


def setup_of(
    manifest: GenerationManifest, rows: int, dim: int, k: int, rate: float
) -> dict[str, Any]:
    """What was measured, and with what."""
    return {
        "rows": rows,
        "dim": dim,
        "k": k,
        "shards": len(manifest.shards),
        "index": manifest.index.factory,
        "nprobe": manifest.index.nprobe,
        "rate": rate,
        "cores": cores(),
        "faiss": faiss.__version__,
    }


def in_a_row_over_http(
    endpoint: Endpoint, queries: FloatArray, k: int, seconds: float
) -> tuple[LoadResult, LoadResult]:
    """Empty requests, then searches, one after the other, for so many seconds each; the queries
    start over when all were asked.

    Raises:
        Unavailable: no empty request, or no search, was answered.
    """
    empty = run_in_a_row(endpoint.url, lambda number: EMPTY, seconds=seconds, warm_up=WARM_UP)
    refuse_unanswered(empty, "empty request")
    search = run_in_a_row(
        endpoint.url,
        search_requests(queries, k),
        seconds=seconds,
        warm_up=WARM_UP,
        headers=endpoint.address.headers,
    )
    refuse_unanswered(search, "search")
    return empty, search


def latency_over_http(
    endpoint: Endpoint, queries: FloatArray, k: int, rate: float
) -> tuple[LoadResult, LoadResult]:
    """As many empty requests as there are queries, then one search a query, with its answer.

    Raises:
        Unavailable: no empty request, or no search, was answered.
    """
    empty = run_open_loop(
        endpoint.url, lambda number: EMPTY, rate=rate, count=len(queries), warm_up=WARM_UP
    )
    refuse_unanswered(empty, "empty request")
    search = run_open_loop(
        endpoint.url,
        search_requests(queries, k),
        rate=rate,
        count=len(queries),
        warm_up=WARM_UP,
        keep_bodies=True,
        headers=endpoint.address.headers,
    )
    refuse_unanswered(search, "search")
    return empty, search


def refuse_unanswered(result: LoadResult, what: str) -> None:
    """Raises Unavailable, with the failures counted, when there is nothing to take figures from."""
    if not result.latencies_ms.size:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(result.failures.items()))
        raise Unavailable(f"no {what} was answered", got=kinds)


def search_requests(queries: FloatArray, k: int) -> "RequestOf":
    """One msgpack search per query row, the body encoded when it is asked for."""
    return RequestOf(queries, k)


class RequestOf:
    """number -> request; numbers beyond the queries start over."""

    def __init__(self, queries: FloatArray, k: int) -> None:
        self._bodies = [
            encode_query(SearchQuery(vectors=query[None], k=k, min_coverage=1.0))
            for query in queries
        ]
        self._headers = (("Content-Type", Media.MSGPACK.value), ("Accept", Media.MSGPACK.value))

    def __call__(self, number: int) -> Request:
        # the warm-up comes first, so request WARM_UP is query 0
        body = self._bodies[(number - WARM_UP) % len(self._bodies)]
        return Request("POST", "/v1/search", body, self._headers)


def answered_ids(result: LoadResult) -> IdArray:
    """(answered, k) item ids of the bodies kept, in the order of their numbers."""
    return np.concatenate([decode_answer(body).ids for body in result.bodies.values()])


def bare_latency(indexes: list[MainIndex], queries: FloatArray, k: int) -> dict[str, float]:
    """Milliseconds of one query through all shards' indexes, one after the other, one thread."""
    faiss.omp_set_num_threads(1)
    samples = []
    for query in queries:
        started = time.perf_counter()
        for index in indexes:
            index.search(query[None], k, SearchParams())
        samples.append((time.perf_counter() - started) * 1e3)
    p50, p99 = np.percentile(samples, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def print_report(report: dict[str, Any], out: Path | None, k: int) -> None:
    """The table, and the JSON after it (and in a file when asked)."""
    setup = report["setup"]
    title = (
        f"{setup['rows']:,} x {setup['dim']}, {setup['shards']} shards, {setup['index']}, "
        f"nprobe {setup['nprobe']}, k = {k}, {setup['cores']} cores: "
        f"recall@{k} {report[f'recall@{k}']:.3f}"
    )
    print_table(title, HEADER, table_rows(report))
    text = json.dumps(report, indent=2)
    if out is not None:
        out.write_text(text + "\n")
    print(text)  # noqa: T201 - a benchmark ends in JSON


def table_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows for HEADER: in a row, then open loop, each after its floor; then the bare index."""
    rows = []
    for how, parts in (
        ("in a row", report["in_a_row"]),
        (f"at {report['setup']['rate']:g} a second", report),
    ):
        for label, name in (("empty request (floor)", "empty_request"), ("search", "search")):
            part = parts[name]
            times = (part[f"{each}_ms"] for each in ("p50", "p90", "p99", "p99_9"))
            rows.append(
                (
                    f"{label}, {how}",
                    *(f"{time_ms:.2f}" for time_ms in times),
                    f"{part['rate_held']:,.1f}",
                    f"{part['requests']:,}",
                    f"{sum(part['failures'].values()):,}",
                )
            )
    bare = report["bare_index_ms"]
    p50, p99 = (f"{bare[name]:.2f}" for name in ("p50", "p99"))
    return [*rows, ("the same indexes, bare, in turn", p50, "", p99, "", "", "", "")]
