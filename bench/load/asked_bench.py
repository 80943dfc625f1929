"""Searches with filters and exclusions over HTTP, beside plain ones: latency, throughput, recall.

    python -m shardline.bench.load.asked_bench --store S [--rows 1000000 --shards 4]

Filters are those of ``bench.index.filter_bench``: random ones of several selectivities, and ones
that are correlated with the vectors, by categories made of clusters. ``new``: of every request
another filter that takes a tenth of the rows, so that nothing is known of it. ``excluded``: 1,000
random items per query. ``farthest``: of one query each the half, or the tenth, of all rows that is
farthest from it, which are nearly equal in score; recall is then the share of results that score
within NEAR of the last of the exact answer.

In each round all kinds are asked one after the other, first by one connection, whose median latency
counts, then by CONNECTIONS, whose rate counts; ratios are taken within a round, and of them the
median. No answer comes from a cache. Shards, router, HAProxy and wrk share the cores.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np
import pyarrow as pa

from shardline.bench.corpus import SEED, clusters_of, generation_of
from shardline.bench.index.filter_bench import (
    CATEGORIES,
    CATEGORY_SAMPLE,
    CORRELATED,
    SELECTIVITIES,
    exact,
)
from shardline.bench.load.http_bytes import address_of, message_of, search_request
from shardline.bench.load.pairs import CONNECTIONS
from shardline.bench.load.wrk import find_wrk, run_wrk
from shardline.bench.vectors import BLOCK_ROWS, clustered
from shardline.cluster.build import run_here
from shardline.cluster.commands.build import plan_of
from shardline.cluster.config import load_config
from shardline.cluster.console import StageProgress
from shardline.cluster.serving.deployment import serving
from shardline.cluster.serving.endpoint import Address
from shardline.cluster.serving.ray_session import cores, local_ray
from shardline.cluster.store import Store
from shardline.router.client.sync_client import Client
from shardline.shards.core.recall import exact_scores, recall_at_k
from shardline.shards.core.schema import IdArray, Metric
from shardline.shards.storage.embedding_set import embedding_writer, open_embedding_set

K = 100
PLAIN = "plain"
EXCLUDED = 1000
FARTHEST = {"farthest half": 0.5, "farthest tenth": 0.1}
FAR_QUERIES = 5
NEAR = 0.01  # of the exact answer's last score
NEW_SHARE = 0.1
RECALL_QUERIES = 100


@dataclass(slots=True)
class Kind:
    """Requests of one kind: of each query the fields beside its vector. masks: of some queries, by
    number, which rows they are about."""

    name: str
    asked: list[tuple[int, dict[str, Any]]]
    masks: dict[int, np.ndarray] = field(default_factory=dict)
    is_far: bool = False


class Corpus:
    """vectors (m, dim), and columns of them that filters ask for: ``share``, random in [0, 1);
    ``category``; ``far_<q>``: the rank of a row by its distance from query q, farthest first."""

    def __init__(self, rows: int, dim: int, count: int) -> None:
        clusters = clusters_of(rows)
        self.vectors = clustered(rows, dim, clusters, SEED)
        first_row = -(-rows // BLOCK_ROWS) * BLOCK_ROWS
        self.queries = clustered(count, dim, clusters, SEED, first_row=first_row)
        rng = np.random.default_rng(SEED)
        self.share = rng.random(rows)
        trained = faiss.Kmeans(dim, CATEGORIES, niter=8, seed=SEED, spherical=True)
        trained.train(self.vectors[rng.permutation(rows)[:CATEGORY_SAMPLE]])
        self.category = trained.index.search(self.vectors, 1)[1][:, 0]
        self.own = trained.index.search(self.queries, 1)[1][:, 0]
        self.far = {
            query: np.argsort(np.argsort(self.vectors @ self.queries[query])) / rows
            for query in range(FAR_QUERIES)
        }

    def columns(self) -> pa.RecordBatch:
        far = {f"far_{query}": pa.array(ranks) for query, ranks in self.far.items()}
        return pa.RecordBatch.from_pydict(
            {"share": pa.array(self.share), "category": pa.array(self.category), **far}
        )

    def kinds(self) -> Iterator[Kind]:
        every = range(len(self.queries))
        rng = np.random.default_rng(SEED)
        yield Kind(PLAIN, [(query, {}) for query in every])
        for most in SELECTIVITIES:
            packed = {"filter": {"share": {"$lt": most}}}
            mask = self.share < most
            yield Kind(
                f"random {most:g}",
                [(query, packed) for query in every],
                dict.fromkeys(every, mask),
            )
        for name in CORRELATED:
            chosen = {own: self._categories(name, own, rng) for own in np.unique(self.own).tolist()}
            masks = {own: np.isin(self.category, ids) for own, ids in chosen.items()}
            yield Kind(
                name,
                [
                    (query, {"filter": {"category": {"$in": chosen[int(self.own[query])]}}})
                    for query in every
                ],
                {query: masks[int(self.own[query])] for query in every},
            )
        bounds = NEW_SHARE + rng.random(len(self.queries)) * 1e-4
        yield Kind(
            "new", [(q, {"filter": {"share": {"$lt": float(b)}}}) for q, b in enumerate(bounds)]
        )
        excluded = rng.integers(0, len(self.vectors), (len(self.queries), EXCLUDED))
        yield Kind(
            "excluded",
            [(query, {"exclude": [ids]}) for query, ids in enumerate(excluded)],
            {query: self._without(ids) for query, ids in enumerate(excluded[:RECALL_QUERIES])},
        )
        for name, most in FARTHEST.items():
            yield Kind(
                name,
                [(query, {"filter": {f"far_{query}": {"$lt": most}}}) for query in self.far],
                {query: ranks < most for query, ranks in self.far.items()},
                is_far=True,
            )

    def _categories(self, name: str, own: int, rng: np.random.Generator) -> list[int]:
        others = rng.permutation(np.delete(np.arange(CATEGORIES), own)).tolist()
        counts = {"own": 0, "one other": 1, "ten others": 10, "half, not own": 50}
        return [own] if name == "own" else others[: counts[name]]

    def _without(self, ids: IdArray) -> np.ndarray:
        mask = np.ones(len(self.vectors), np.bool_)
        mask[ids] = False
        return mask


def stored(store: Store, corpus: Corpus, settings: Sequence[str], progress: StageProgress) -> None:
    """The corpus as the store's current generation; an earlier one like it is reused."""
    rows, dim = corpus.vectors.shape
    version = f"asked-{rows}x{dim}-s{SEED}"
    target = store.embeddings / version
    if not target.exists():
        with embedding_writer(
            target,
            model_version=version,
            dim=dim,
            metric=Metric.COSINE,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        ) as writer:
            writer.append(np.arange(rows), corpus.vectors, corpus.columns())
    plan = plan_of(load_config(None, list(settings)))
    items = open_embedding_set(target, verify=False)
    manifest = generation_of(store, items, plan, run_jobs=run_here, progress=progress)
    store.set_current(manifest.generation)


class Measure:
    """Asks one endpoint."""

    def __init__(self, address: Address, corpus: Corpus, seconds: float) -> None:
        self._address, self._corpus, self._seconds = address, corpus, seconds
        wrk = find_wrk()
        assert wrk is not None, "wrk is not installed"
        self._wrk = wrk

    def messages(self, kind: Kind) -> list[bytes]:
        made = []
        for query, fields in kind.asked:
            content = {"vectors": self._corpus.queries[query : query + 1], "k": K, **fields}
            request = search_request(content, self._address.headers)
            made.append(message_of(request, address_of(self._address.url)))
        return made

    def times(self, messages: list[bytes], first: int) -> tuple[float, float, float]:
        """p50 and p99 of one connection in ms, and queries per second of CONNECTIONS."""
        found = []
        for connections in (1, CONNECTIONS):
            figures = run_wrk(
                self._wrk,
                self._address.url,
                messages,
                connections=connections,
                seconds=self._seconds,
                first=first,
            )
            assert not figures.failed, figures.failures
            found.append(figures)
        one, many = found
        assert one.p50_ms is not None
        assert one.p99_ms is not None
        return one.p50_ms, one.p99_ms, many.qps

    def recall(self, kind: Kind) -> tuple[float | None, set[str]]:
        """Against exact answers, and the kinds of reasons that came with short answers."""
        asked = [(q, fields) for q, fields in kind.asked if q in kind.masks][:RECALL_QUERIES]
        if not asked:
            return None, set()
        queries, vectors = self._corpus.queries, self._corpus.vectors
        found, reasons = [], set[str]()
        with Client(self._address.url, key=self._address.key) as client:
            for query, fields in asked:
                one = queries[query : query + 1]
                answer = client.search(vectors=one, k=K, **fields)
                found.append(exact_scores(one, vectors, answer.ids, Metric.COSINE))
                reasons |= {each.code for each in answer.reasons}
        scores, best = np.concatenate(found), np.empty((len(asked), K), np.float32)
        by_mask: dict[int, list[int]] = {}
        for place, (query, _) in enumerate(asked):
            by_mask.setdefault(id(kind.masks[query]), []).append(place)
        for places in by_mask.values():
            numbers = [asked[place][0] for place in places]
            best[places] = exact(queries[numbers], vectors, kind.masks[numbers[0]], K)
        if kind.is_far:
            return float((scores >= best[:, -1:] - NEAR).mean()), reasons
        return recall_at_k(scores, best), reasons


def compare(measure: Measure, kinds: Sequence[Kind], rounds: int) -> list[dict[str, Any]]:
    """A line per kind."""
    messages = {kind.name: measure.messages(kind) for kind in kinds}
    samples: dict[str, list[tuple[float, float, float]]] = {kind.name: [] for kind in kinds}
    recalls = {kind.name: measure.recall(kind) for kind in kinds}
    for round_number in range(rounds):
        for kind in kinds:
            first = round_number * len(messages[kind.name]) // rounds
            samples[kind.name].append(measure.times(messages[kind.name], first))
            click.echo(f"{kind.name}: {samples[kind.name][-1]}", err=True)
    lines = []
    for kind in kinds:
        own, plain = samples[kind.name], samples[PLAIN]
        p50, p99, qps = (statistics.median(each[at] for each in own) for at in range(3))
        of_p50, of_qps = (
            statistics.median(a[at] / b[at] for a, b in zip(own, plain, strict=True))
            for at in (0, 2)
        )
        recall, reasons = recalls[kind.name]
        lines.append(
            {
                "kind": kind.name,
                "recall": recall,
                "reasons": sorted(reasons),
                "p50_ms": p50,
                "p50_ratio": of_p50,
                "p99_ms": p99,
                "qps": qps,
                "qps_ratio": of_qps,
            }
        )
    return lines


def main() -> None:
    """Builds, serves, measures, and prints a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("bench-asked"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", action="append", help="only these, and plain; repeatable")
    asked = parser.parse_args()
    root = asked.store.resolve()
    corpus = Corpus(asked.rows, asked.dim, asked.queries)
    settings = [
        f"store={root}",
        f"cluster.shards={asked.shards}",
        "cluster.http_port=0",
        "router.cache_bytes=0",
    ]
    with StageProgress() as progress:
        stored(Store(root), corpus, settings, progress)
    kinds = [kind for kind in corpus.kinds() if not asked.kind or kind.name in (PLAIN, *asked.kind)]
    config = load_config(None, settings)
    with local_ray(num_cpus=cores()), serving(config) as endpoint:
        lines = compare(Measure(endpoint.address, corpus, asked.seconds), kinds, asked.rounds)
    click.echo(
        f"{asked.rows:,} x {asked.dim} in {asked.shards} shards, k = {K}, HTTP, {cores()} cores; "
        f"one connection's latency, {CONNECTIONS} connections' rate"
    )
    click.echo("kind            recall  p50 ms  of plain  p99 ms  queries/s  of plain")
    for line in lines:
        recall = "" if line["recall"] is None else f"{line['recall']:.4f}"
        click.echo(
            f"{line['kind']:<15} {recall:<7} {line['p50_ms']:<7.2f} {line['p50_ratio']:<9.2f} "
            f"{line['p99_ms']:<7.2f} {line['qps']:<10.0f} {line['qps_ratio']:.2f}"
        )
    click.echo(json.dumps({"rows": asked.rows, "shards": asked.shards, "lines": lines}, indent=2))


if __name__ == "__main__":
    main()
