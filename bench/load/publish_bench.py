"""Publish and rollback under load and writes: what fails, is mixed or lost, and what it costs.

    python -m shardline.bench.load.publish_bench [--rows 200000] [--rate 200] [--write-rate 50]
        [--plot PNG]

Theory. A publish loads another generation beside the live one and changes the routing table in one
step, so no request may fail and no answer may hold results of two generations. To see a mixture,
both generations have the same ids, but the vectors of one are those of the other, rotated. So a
query has other neighbours in each. What each generation answers to every query is asked beforehand,
while it serves alone; under load every answer is compared with what the generation that it names
had answered. A rollback has nothing to load and takes as long as its change of the table. While a
candidate loads and is searched by the gate it takes CPU time from searches: the timeline shows how
much.

A writer adds and deletes items of its own meanwhile. Both generations say that they are of the same
model, so that its vectors are brought from one to the other, which has a shard more. After each
change, and at the end, every item that was acknowledged must be there, and no deleted one. Its
items may be among the results of searches, so only the others are compared.

Requests are sent on schedule, whatever the answers take (open loop), by ``--connections`` threads.
Latencies count from the intended time.
"""

import argparse
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from shardline.bench.corpus import clustered_queries, clustered_set, generation_of
from shardline.bench.load.changes import COMMAND
from shardline.bench.load.writing import FIRST_ITEM, Writing
from shardline.bench.plots import Line, plot_changes
from shardline.cluster.build import run_here
from shardline.cluster.commands.build import plan_of
from shardline.cluster.config import load_config
from shardline.cluster.console import StageProgress
from shardline.cluster.serving.deployment import serving
from shardline.cluster.serving.endpoint import Endpoint
from shardline.cluster.serving.ray_session import cores, local_ray
from shardline.cluster.store import Store
from shardline.router.client.sync_client import Client
from shardline.router.http.api_keys import Scope
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.partition import Partitioning
from shardline.shards.core.schema import EMPTY_ID, FloatArray, IdArray
from shardline.shards.storage.embedding_set import (
    EmbeddingSet,
    embedding_writer,
    open_embedding_set,
)

K = 100
QUERIES = 1000
SAME = 0.95  # share of an answer's ids from which it counts as that generation's

Expected = dict[int, IdArray]  # by generation: (queries, k) ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One request. at_s: when it was to be sent; generation: that the answer names, 0 for none."""

    at_s: float
    took_ms: float
    generation: int = 0
    failure: str = ""
    is_mixed: bool = False


@dataclass(slots=True)
class Load:
    """Requests at a rate from ``begin`` to ``end``; ``seen`` has them all then."""

    url: str
    key: str | None
    queries: FloatArray
    expected: Expected
    rate: float
    seen: list[Seen] = field(default_factory=list)
    began: float = 0.0
    _numbers: Any = field(default_factory=itertools.count)
    _is_over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def begin(self, connections: int) -> None:
        self.began = time.perf_counter()
        self._threads = [threading.Thread(target=self._ask_on) for _ in range(connections)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def now_s(self) -> float:
        return time.perf_counter() - self.began

    def _ask_on(self) -> None:
        with Client(self.url, key=self.key) as client:
            while True:
                number = next(self._numbers)
                at_s = number / self.rate
                if self._is_over.wait(max(0.0, at_s - self.now_s())):
                    return
                self.seen.append(self._ask(client, number % len(self.queries), at_s))

    def _ask(self, client: Client, row: int, at_s: float) -> Seen:
        try:
            answer = client.search(vectors=self.queries[row : row + 1], k=K)
        except ShardlineError as error:
            return Seen(at_s=at_s, took_ms=1e3 * (self.now_s() - at_s), failure=error.code)
        took_ms = 1e3 * (self.now_s() - at_s)
        is_partial = answer.coverage.degraded or answer.coverage.share < 1
        failure = "partial" if is_partial else ""
        expected = self.expected[answer.generation][row]
        is_mixed = built_share(answer.ids[0], expected) < SAME
        return Seen(
            at_s=at_s,
            took_ms=took_ms,
            generation=answer.generation,
            failure=failure,
            is_mixed=is_mixed,
        )


def overlap(found: IdArray, expected: IdArray) -> float:
    """Share of the expected ids that were found."""
    return float(np.isin(expected, found).mean())


def built_share(found: IdArray, expected: IdArray) -> float:
    """Share of what was found that was expected, empty places and items of the writer left out:
    those may take the places of others."""
    built = found[(found != EMPTY_ID) & (found < FIRST_ITEM)]
    return overlap(expected, built) if built.size else 0.0


def rotated_set(store: Store, items: EmbeddingSet, seed: int) -> EmbeddingSet:
    """The same ids with other vectors: those of ``items``, rotated. Its model version is that of
    ``items`` all the same, so its folder is no store's. Reused."""
    target = store.root / f"rotated-{items.model_version}-{seed}"
    if not target.exists():
        rng = np.random.default_rng(seed)
        dim = items.dim
        rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
        with embedding_writer(
            target,
            model_version=items.model_version,
            dim=dim,
            metric=items.metric,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        ) as writer:
            for block in items.batches():
                writer.append(block.item_ids, block.vectors @ rotation)
    return open_embedding_set(target)


def asked_alone(endpoint: Endpoint, queries: FloatArray) -> tuple[int, IdArray]:
    """The generation that serves, and what it answers: (queries, k) ids."""
    with endpoint.address.client() as client:
        answers = [client.search(vectors=queries[i : i + 1], k=K) for i in range(len(queries))]
    (generation,) = {answer.generation for answer in answers}
    return generation, np.concatenate([answer.ids for answer in answers])


def command(store: Path, *arguments: str) -> dict[str, Any]:
    """The report of ``publish`` or ``rollback``. Raises RuntimeError: it has failed."""
    run = subprocess.run(
        [sys.executable, "-c", COMMAND, "--store", str(store), *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit {run.returncode}: {run.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(run.stdout)
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A command under load: when it began and ended, and the first answer of what it made live."""

    what: str
    began_s: float
    ended_s: float
    report: dict[str, Any]


def changed(load: Load, what: str, run: Callable[[], dict[str, Any]]) -> Change:
    began_s = load.now_s()
    report = run()
    click.echo(f"{what}: {load.now_s() - began_s:.1f} s", err=True)
    return Change(what=what, began_s=began_s, ended_s=load.now_s(), report=report)


def summary(seen: Sequence[Seen], changes: Sequence[Change]) -> dict[str, Any]:
    """Counts of all requests, latencies away from changes and during each."""
    quiet = [s.took_ms for s in seen if not any(c.began_s <= s.at_s <= c.ended_s for c in changes)]
    ordered = sorted(seen, key=lambda each: each.at_s)
    generations = [each.generation for each in ordered if each.generation]
    return {
        "requests": len(seen),
        "failed": sum(bool(each.failure) for each in seen),
        "failures": sorted({each.failure for each in seen if each.failure}),
        "mixed": sum(each.is_mixed for each in seen),
        "answers_by_generation": {str(g): generations.count(g) for g in sorted(set(generations))},
        "quiet": percentiles(quiet),
        "changes": [
            {
                "what": change.what,
                "seconds": round(change.ended_s - change.began_s, 2),
                **percentiles(
                    [s.took_ms for s in seen if change.began_s <= s.at_s <= change.ended_s]
                ),
            }
            for change in changes
        ],
    }


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    found = np.percentile(values, (50, 99)) if len(values) else (None, None)
    return {
        name: None if value is None else round(float(value), 2)
        for name, value in zip(("p50_ms", "p99_ms"), found, strict=True)
    }


def written_line(writing: Writing) -> Line | None:
    """Acknowledged rows per second, and what was lost in all looks."""
    found = writing.report()
    at, rows = found["timeline"]
    if not at:
        return None
    label = (
        f"rows acknowledged: {found['acknowledged_rows']:,}, lost {found['lost']}, "
        f"deleted ones that came back {found['returned']}"
    )
    return at, rows, label


def main() -> None:
    """Builds two generations, serves, changes between them under load, and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("bench-publish"))
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--write-rate", type=float, default=50.0, help="rows per second; 0: none")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--quiet-s", type=float, default=10.0, help="before and after a change")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    root = asked.store.resolve()
    store = Store(root)
    settings = [f"store={root}", "cluster.http_port=0", "router.cache_bytes=0"]
    config = load_config(None, [*settings, f"cluster.shards={asked.shards}"])
    with StageProgress() as progress:
        first = clustered_set(store, asked.rows, asked.dim, progress)
        sets = (first, rotated_set(store, first, seed=1))
        plan = plan_of(config, Partitioning.HASH_RANGE)  # new ids are of all shards
        plans = (plan, replace(plan, num_shards=plan.num_shards + 1))
        old, new = (
            generation_of(store, each, its, run_jobs=run_here, progress=progress).generation
            for each, its in zip(sets, plans, strict=True)
        )
    store.set_current(old)
    queries = clustered_queries(asked.rows, asked.dim, QUERIES)
    with local_ray(num_cpus=cores()), serving(config) as endpoint:
        to_new = ("publish", str(new), "--skip-gate", "benchmark: unrelated models")
        expected: Expected = dict([asked_alone(endpoint, queries)])
        command(root, *to_new)
        expected |= dict([asked_alone(endpoint, queries)])
        command(root, "rollback")
        load = Load(endpoint.address.url, endpoint.address.key, queries, expected, asked.rate)
        writing = Writing(
            address=endpoint.address_for(Scope.WRITE),
            dim=asked.dim,
            model_version=first.model_version,
            rows_per_s=asked.write_rate,
        )
        load.begin(asked.connections)
        changes = []
        try:
            if asked.write_rate:
                writing.begin(load.now_s())
            for _ in range(asked.rounds):
                for what, words in (("publish", to_new), ("rollback", ("rollback",))):
                    time.sleep(asked.quiet_s)
                    changes.append(changed(load, what, partial(command, root, *words)))
                    writing.look(what)
            time.sleep(asked.quiet_s)
        finally:
            load.end()
            writing.stop()
        writing.end()
    distinct = float(np.mean([overlap(a, b) for a, b in zip(*expected.values(), strict=True)]))
    report = {
        "rows": asked.rows,
        "dim": asked.dim,
        "shards": asked.shards,
        "rate": asked.rate,
        "overlap_of_the_generations": round(distinct, 4),
        **summary(load.seen, changes),
        "writes": writing.report(),
    }
    click.echo(json.dumps(report, indent=2))
    if asked.plot is not None:
        plot_changes(
            [(each.at_s, each.took_ms, each.generation) for each in load.seen],
            [(each.what, each.began_s, each.ended_s) for each in changes],
            f"publish and rollback: {asked.rows:,} x {asked.dim}, {asked.rate:g} requests/s",
            asked.plot,
            writes=written_line(writing),
        )


if __name__ == "__main__":
    main()
