"""Runs a scenario against a target, step by step, and puts every figure beside its floor.

Order of a run: the index is checked to be whole; the same index is searched bare, while the
endpoint is idle; then the scenario's steps, the first of which is the floor.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shardline.bench.corpus import load_bare
from shardline.bench.load.scenarios import CLOSED_CONNECTIONS, Pace, Scenario, steps
from shardline.bench.load.stats import p50_p99, refuse_unanswered
from shardline.bench.load.step import WRK_WARM_UP_S, Options, StepReport, StepRunner
from shardline.bench.load.target import Target, check_answers
from shardline.bench.load.workload import Queries
from shardline.bench.load.wrk import find_wrk
from shardline.cluster.serving.ray_session import cores
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import FloatArray
from shardline.shards.index.main_index import MainIndex, set_search_threads

LEAST_CALLS = 5  # of the bare index
BARE_S = 3.0  # of searching, for each batch size and number of threads
PROBES = 8
MANY_QUERIES = 100_000  # 51 MB of 128-d vectors
PEAK_RATE = 4_000  # queries/s of a closed loop that queries are prepared for
MOST_QUERIES = 400_000


@dataclass(kw_only=True)
class Runner:
    """One scenario against one target; ``note`` takes a line of news."""

    target: Target
    scenario: Scenario
    queries: Queries
    options: Options
    note: Callable[[str], None] = lambda line: None

    def run(self) -> dict[str, Any]:
        """The report, ready for JSON.

        Raises:
            InvalidInput: k beyond the rows; faults on an endpoint of another machine.
            Unavailable, DataError: the index is not whole; a client process failed.
        """
        options = self.options
        most_k = max(k for k, _ in self.scenario.ks) if self.scenario.ks else options.k
        check_answers(self.target, self.queries.vectors[:PROBES], most_k)
        if self.scenario.faults and self.target.pid is None:
            raise InvalidInput(
                "this scenario needs the cluster's processes",
                field=self.scenario.name,
                expected="an endpoint of this machine, found through its store",
                got=self.target.url,
            )
        bare = self._bare(most_k)
        before = self._status()
        reports, knee = self._steps()
        status = self._status()
        return {
            "scenario": self.scenario.name,
            "setup": self._setup(),
            "bare": bare,
            "knee": knee,
            "steps": [asdict(report) for report in reports],
            "cache_hit_share": hit_share(before["cache"], status["cache"]),
            "status_after": status,
        }

    def _status(self) -> dict[str, Any]:
        with self.target.address.client() as client:
            return client.status()

    def _steps(self) -> tuple[list[StepReport], float | None]:
        plan = steps(
            self.scenario,
            rate=self.options.rate,
            seconds=self.options.seconds,
            k=self.options.k,
        )
        runner = StepRunner(
            target=self.target,
            queries=self.queries,
            options=self.options,
            rng=np.random.default_rng(self.options.seed),
            note=self.note,
            program=find_wrk() if self.scenario.pace is Pace.CLOSED else None,
        )
        reports: list[StepReport] = []
        try:
            step = next(plan)
            while True:
                self.note(f"{self.scenario.name}: {step.label}, {step.seconds:g} s")
                report = runner.measure(step)
                refuse_unanswered(report.figures, step.label)
                reports.append(report)
                step = plan.send(reports[-1].figures)
        except StopIteration as stop:
            return reports, stop.value

    def _bare(self, k: int) -> list[dict[str, Any]]:
        """One query at a time on one thread, as a shard does it; batches on one and all cores,
        because either may be the faster where others use the cores too."""
        self.note("the same index, bare, in this process")
        indexes = load_bare(self.target.store, self.target.manifest)
        return [
            search_bare(
                indexes,
                self.queries.vectors,
                batch=batch,
                k=k,
                threads=threads,
                seconds=min(BARE_S, self.options.seconds),
            )
            for batch in self.scenario.batches
            for threads in ((1,) if batch == 1 else sorted({1, cores()}))
        ]

    def _setup(self) -> dict[str, Any]:
        manifest = self.target.manifest
        return {
            "url": self.target.url,
            "generation": manifest.generation,
            "model_version": manifest.model_version,
            "rows": manifest.rows,
            "dim": manifest.dim,
            "metric": str(manifest.metric),
            "shards": len(manifest.shards),
            "index": manifest.index.factory,
            "params": asdict(manifest.index.search_params),
            "queries": self.queries.source,
            "cores": cores(),
            **asdict(self.options),
        }


def search_bare(
    indexes: list[MainIndex],
    queries: FloatArray,
    *,
    batch: int,
    k: int,
    threads: int,
    seconds: float,
) -> dict[str, float]:
    """Figures of requests of ``batch`` of queries (n, dim) through all shards' indexes, one after
    the other, on ``threads``, for ``seconds``; the first request is left out. Ready for JSON."""
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
    times = p50_p99(samples[1:])
    return {
        "batch": batch,
        "k": k,
        "threads": threads,
        "p50_ms": times["p50"],
        "p99_ms": times["p99"],
        "qps": round(batch * 1e3 / float(np.mean(samples[1:])), 1),
        "calls": len(samples) - 1,
    }


def hit_share(before: dict[str, int] | None, after: dict[str, int] | None) -> float | None:
    """Share of the look-ups between two states of a router's result cache that found an answer;
    None where it is off, or the two are of different routers."""
    if before is None or after is None:
        return None
    hits, misses = (after[name] - before[name] for name in ("hits", "misses"))
    return round(hits / max(hits + misses, 1), 4) if min(hits, misses) >= 0 else None


def queries_needed(scenario: Scenario, options: Options) -> int:
    """Queries worth preparing so that none is asked twice in a run."""
    if scenario.distinct is not None:
        return scenario.distinct
    seconds = options.warm_up_s + options.seconds
    if scenario.pace is Pace.CLOSED:
        seconds += WRK_WARM_UP_S
        return min(int(PEAK_RATE * len(CLOSED_CONNECTIONS) * seconds), MOST_QUERIES)
    if scenario.pace is not Pace.FIXED:
        return MANY_QUERIES  # nobody knows how many there will be
    most = max((factor for _, _, factor in scenario.surges), default=1.0)
    return min(int(options.rate * most * seconds * 1.2) + 1, MANY_QUERIES)
