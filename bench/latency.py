"""HTTP latency of single queries at a low, fixed rate, beside its floor and a bare index.

Theory: a query costs the empty request (client, HAProxy, Serve, ASGI), plus one round trip to the
shards, plus the search itself. So three figures are printed from one run: an empty request over
the same connection path (the floor), the search over HTTP, and the same indexes searched in this
process without any socket (the bare index). Open loop: latency counts from the intended send time.
"""

import json
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from bench.corpus import (
    clustered_queries,
    clustered_set,
    exact_ids,
    generation_of,
    load_bare,
)
from bench.openloop import LoadResult, Request, run_open_loop
from bench.vectors import recall_at_k
from cluster.build import run_on_ray
from cluster.commands.build import plan_of
from cluster.config import ShardlineConfig
from cluster.console import StageProgress, print_table
from cluster.deployment import serving
from cluster.endpoint import Endpoint
from cluster.launch import cores
from cluster.store import Store
from router.codec import decode_answer, encode_query
from router.media import Media
from router.messages import SearchQuery
from shards.errors import InvalidInput, Unavailable
from shards.generation import GenerationManifest
from shards.main_index import MainIndex
from shards.schema import FloatArray, IdArray
from shards.types import SearchParams

EMPTY = Request("GET", "/healthz")
WARM_UP = 100
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
        InvalidInput: not one request in that time.
        Unavailable: no empty request, or no search, was answered. As ``serving``.
    """
    count = num_requests(rate, seconds)
    store = Store(config.store.resolve() / BENCH_STORE)
    config = config.model_copy(update={"store": store.root})
    corpus = clustered_set(store, rows, dim, progress)
    manifest = generation_of(store, corpus, plan_of(config), run_jobs=run_on_ray, progress=progress)
    queries = clustered_queries(rows, dim, count)
    progress.note("exact answers, for recall")
    exact = exact_ids(corpus, queries, k)
    bare = bare_latency(load_bare(store, manifest), queries, k)
    with serving(config, generation=manifest.generation, on_stage=progress.note) as endpoint:
        progress.note(f"{count} empty requests and {count} searches at {rate:g} a second each")
        empty, search = latency_over_http(endpoint, queries, k, rate)
    found = answered_ids(search)
    return {
        "setup": setup_of(manifest, rows, dim, k, rate),
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
            field="seconds",
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
    """number -> request; numbers beyond the queries start over, for the warm-up."""

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
    rows = []
    for label, name in (("empty request (floor)", "empty_request"), ("search", "search")):
        part = report[name]
        rows.append(
            (
                label,
                f"{part['p50_ms']:.2f}",
                f"{part['p90_ms']:.2f}",
                f"{part['p99_ms']:.2f}",
                str(part["answered"]),
                str(sum(part["failures"].values())),
            )
        )
    bare = report["bare_index_ms"]
    rows.append(
        ("the same indexes, bare, in turn", f"{bare['p50']:.2f}", "", f"{bare['p99']:.2f}", "", "")
    )
    title = (
        f"{setup['rows']:,} x {setup['dim']}, {setup['shards']} shards, {setup['index']}, "
        f"nprobe {setup['nprobe']}, k = {k}, {setup['rate']:g} requests/s, {setup['cores']} cores: "
        f"recall@{k} {report[f'recall@{k}']:.3f}"
    )
    print_table(title, ("HTTP, ms", "p50", "p90", "p99", "answered", "failed"), rows)
    text = json.dumps(report, indent=2)
    if out is not None:
        out.write_text(text + "\n")
    print(text)  # noqa: T201 - a benchmark ends in JSON
