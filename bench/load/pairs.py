"""Measurements of two sides, pair by pair: what is asked of each, and how they compare.

A pair is one measurement of either side within seconds; every other pair begins with the other
side. A ratio is taken within a pair, and is a speed: above 1 the second side is faster. What tells
small differences apart is the measurement in which every other request goes to the other side.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection
from typing import Any

import numpy as np

from shardline.bench.corpus import best_scores, score_items
from shardline.bench.load.checkout import Checkout
from shardline.bench.load.fleet import ask
from shardline.bench.load.http_bytes import (
    Request,
    address_of,
    message_of,
    results_of,
    search_request,
)
from shardline.bench.load.stats import Figures
from shardline.bench.load.wrk import find_wrk, run_wrk
from shardline.cluster.serving.endpoint import Address
from shardline.shards.core.recall import recall_at_k
from shardline.shards.core.schema import FloatArray
from shardline.shards.storage.embedding_set import EmbeddingSet

K = 100
CONNECTIONS = 16
BATCH = 64
BATCH_CONNECTIONS = 4
RECALL_BATCHES = 8  # whose answers are compared with the exact ones
WARM_UP_S = 1.0
TIMEOUT_MS = 5000  # per query: a noisy moment makes it late, not partial
FANOUT_RATE = 100.0  # per second, of the spaced half
FANOUT_COUNT = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two: a server to ask, and the parameters to ask it with ({}: its own)."""

    name: str
    checkout: Checkout
    address: Address
    params: dict[str, int]


def order_of(pair: int) -> tuple[int, int]:
    """Which side is measured first in a pair: A B, B A, A B, ..."""
    return (0, 1) if pair % 2 == 0 else (1, 0)


def comparison(name: str, unit: str, samples: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Medians of both sides over the pairs, and of the ratio within a pair, with its spread.

    A ratio is the second's speed by the first's: below 1 the second is slower, whatever the unit.
    ``unit`` "ms" is a time, less is faster; any other is a rate.
    """
    ratios = [first / second if unit == "ms" else second / first for first, second in samples]
    figures = {
        "first": statistics.median(first for first, _ in samples),
        "second": statistics.median(second for _, second in samples),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    rounded = {key: round(value, 4) for key, value in figures.items()}
    return {"name": name, "unit": unit, **rounded, "samples": list(samples)}


@dataclass(kw_only=True)
class Bench:
    """Takes the measurements; requests that were not answered whole are counted by side."""

    sides: tuple[Side, Side]
    queries: FloatArray  # (a multiple of BATCH, dim)
    seconds: float  # of each measurement of each side
    note: Callable[[str], None]
    failures: dict[str, int] = field(default_factory=dict)

    def run(self, pairs: int) -> list[dict[str, Any]]:
        """Every measurement of every pair, each of both sides within seconds."""
        measures: list[tuple[str, Callable[[Side], dict[str, float]]]] = [
            ("queries/s", self.batches),
            ("queries/s", self.throughput),
            ("ms", self.sequential),
        ]
        if self.sides[0].checkout != self.sides[1].checkout:
            measures.append(("ms", _fan_out))
        samples: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for pair in range(pairs):
            both = self.alternating()
            samples.setdefault(("alternating, p50", "ms"), []).append(both)
            self.note(f"pair {pair + 1}: alternating, p50: {both[0]:,.3f}, {both[1]:,.3f} ms")
            for unit, take in measures:
                found = {place: take(self.sides[place]) for place in order_of(pair)}
                for name in found[0]:
                    both = (found[0][name], found[1][name])
                    samples.setdefault((name, unit), []).append(both)
                    self.note(f"pair {pair + 1}: {name}: {both[0]:,.3f}, {both[1]:,.3f} {unit}")
        return [comparison(name, unit, taken) for (name, unit), taken in samples.items()]

    def alternating(self) -> tuple[float, float]:
        """Medians over one connection to each side, asked by turns for ``seconds`` each."""
        asked = [self._requests(side, 1) for side in self.sides]
        taken: tuple[list[float], list[float]] = ([], [])
        places = [address_of(side.address.url) for side in self.sides]
        with (
            closing(HTTPConnection(*places[0], timeout=TIMEOUT_MS / 1e3)) as first,
            closing(HTTPConnection(*places[1], timeout=TIMEOUT_MS / 1e3)) as second,
        ):
            connections, ends = (first, second), time.perf_counter() + 2 * self.seconds
            for number in itertools.count():
                if time.perf_counter() > ends:
                    break
                for place in order_of(number):
                    request = asked[place][number % len(asked[place])]
                    began = time.perf_counter()
                    ok = _is_answered(connections[place], request)
                    taken[place].append((time.perf_counter() - began) * 1e3)
                    name = self.sides[place].name
                    self.failures[name] = self.failures.get(name, 0) + (not ok)
        return statistics.median(taken[0]), statistics.median(taken[1])

    def sequential(self, side: Side) -> dict[str, float]:
        """Over one connection."""
        found = self._ask(side, self._requests(side, 1), connections=1)
        assert found.p50_ms is not None
        return {"sequential, p50": found.p50_ms}

    def throughput(self, side: Side) -> dict[str, float]:
        """Single queries, by wrk where it is installed: our client takes a core itself."""
        requests, program, name = self._requests(side, 1), find_wrk(), f"{CONNECTIONS} connections"
        if program is None:
            return {name: self._ask(side, requests, connections=CONNECTIONS).qps}
        url = side.address.url
        messages = [message_of(request, address_of(url)) for request in requests]
        send = partial(run_wrk, program, url, messages, connections=CONNECTIONS)
        send(seconds=WARM_UP_S)
        found = send(seconds=self.seconds)
        self._count(side, found)
        return {name: found.qps}

    def batches(self, side: Side) -> dict[str, float]:
        """Queries in requests of BATCH."""
        requests = self._requests(side, BATCH)
        found = self._ask(side, requests, connections=BATCH_CONNECTIONS, batch=BATCH)
        return {f"{BATCH} per request": found.qps}

    def recall(self, side: Side, corpus: EmbeddingSet) -> float:
        """Of RECALL_BATCHES requests against the exact scores."""
        requests = self._requests(side, BATCH)[:RECALL_BATCHES]
        _, bodies = ask(
            side.address.url,
            requests,
            seconds=self.seconds,
            warm_up_s=0,
            connections=1,
            batch=BATCH,
            kept=len(requests),
        )
        numbers = sorted(bodies)
        ids = np.concatenate([results_of(bodies[number])[0] for number in numbers])
        asked = self.queries.reshape(-1, BATCH, corpus.dim)[numbers].reshape(-1, corpus.dim)
        exact = best_scores(corpus, asked, K)
        return round(recall_at_k(score_items(corpus, asked, ids), exact), 4)

    def _ask(
        self, side: Side, requests: Sequence[Request], *, connections: int, batch: int = 1
    ) -> Figures:
        found, _ = ask(
            side.address.url,
            requests,
            seconds=self.seconds,
            warm_up_s=WARM_UP_S,
            connections=connections,
            batch=batch,
        )
        self._count(side, found)
        return found

    def _requests(self, side: Side, batch: int) -> list[Request]:
        fields: dict[str, Any] = {"k": K, "timeout_ms": TIMEOUT_MS}
        if side.params:
            fields["params"] = side.params
        parts = np.split(self.queries, len(self.queries) // batch)
        return [search_request(fields | {"vectors": p}, side.address.headers) for p in parts]

    def _count(self, side: Side, found: Figures) -> None:
        lost = found.failed + found.rejected + found.partial
        self.failures[side.name] = self.failures.get(side.name, 0) + lost


def _is_answered(connection: HTTPConnection, request: Request) -> bool:
    connection.request(request.method, request.path, request.body, dict(request.headers))
    answer = connection.getresponse()
    answer.read()
    return answer.status == 200


def _fan_out(side: Side) -> dict[str, float]:
    return side.checkout.fan_out(count=FANOUT_COUNT, rate=FANOUT_RATE)
