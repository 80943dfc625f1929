"""Runs a scenario against a target, step by step, and puts every figure beside its floor.

Order of a run: the index is checked to be whole; the same index is searched bare, while the
endpoint is idle; empty requests give the floor; then the scenario's steps.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from shardline.bench.corpus import load_bare
from shardline.bench.load.bare import search_bare
from shardline.bench.load.fleet import ClientFigures, judge, run_fleet
from shardline.bench.load.http_bytes import address_of, message_of
from shardline.bench.load.job import LoadJob
from shardline.bench.load.openloop import Request
from shardline.bench.load.scenarios import Pace, Scenario, steps
from shardline.bench.load.schedule import offsets
from shardline.bench.load.stats import Figures, figures
from shardline.bench.load.step import Options, StepReport, StepRunner
from shardline.bench.load.target import Target, check_answers
from shardline.bench.load.workload import Queries
from shardline.bench.load.wrk import find_wrk
from shardline.cluster.serving.ray_session import cores
from shardline.shards.core.errors import InvalidInput

EMPTY = Request("GET", "/healthz")
FLOOR_S = 10.0
BARE_S = 3.0  # of searching, for each batch size and number of threads
PROBES = 8
MOST_QUERIES = 100_000  # 51 MB of 128-d vectors


@dataclass(kw_only=True)
class Runner:
    """One scenario against one target; ``note`` takes a line of news."""

    target: Target
    scenario: Scenario
    queries: Queries
    options: Options
    note: Callable[[str], None] = lambda line: None
    _rng: np.random.Generator = field(init=False)
    _address: tuple[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.options.seed)
        self._address = address_of(self.target.url)

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
        floor, floor_client = self._floor()
        reports, knee = self._steps()
        with self.target.address.client() as client:
            status = client.status()
        return {
            "scenario": self.scenario.name,
            "setup": self._setup(),
            "floor": floor.as_json() | {"client": asdict(floor_client)},
            "bare": bare,
            "knee": knee,
            "steps": [report.as_json() for report in reports],
            "status_after": status,
        }

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
            rng=self._rng,
            note=self.note,
            program=find_wrk() if self.scenario.pace is Pace.CLOSED else None,
        )
        reports: list[StepReport] = []
        try:
            step = next(plan)
            while True:
                self.note(f"{self.scenario.name}: {step.label}, {step.seconds:g} s")
                reports.append(runner.measure(step))
                step = plan.send(reports[-1].figures)
        except StopIteration as stop:
            return reports, stop.value

    def _bare(self, k: int) -> list[dict[str, Any]]:
        """One query at a time on one thread, as a shard does it; batches on one and all cores,
        because either may be the faster where others use the cores too."""
        self.note("the same index, bare, in this process")
        indexes = load_bare(self.target.store, self.target.manifest)
        return [
            asdict(
                search_bare(
                    indexes,
                    self.queries.vectors,
                    batch=batch,
                    k=k,
                    threads=threads,
                    seconds=min(BARE_S, self.options.seconds),
                )
            )
            for batch in self.scenario.batches
            for threads in ((1,) if batch == 1 else sorted({1, cores()}))
        ]

    def _floor(self) -> tuple[Figures, ClientFigures]:
        """Empty requests at the scenario's rate: client, HAProxy, Serve, ASGI, and no search."""
        options = self.options
        seconds = min(options.seconds, FLOOR_S)
        self.note(f"empty requests at {options.rate:g}/s, {seconds:g} s: the floor")
        times = offsets(
            options.arrivals,
            rate=options.rate,
            warm_up_s=options.warm_up_s,
            seconds=seconds,
            rng=self._rng,
        )
        job = LoadJob(
            address=self._address,
            messages=(message_of(EMPTY, self._address),),
            order=np.zeros(len(times), dtype=np.int64),
            intended_s=times,
            kept=np.zeros(len(times), dtype=np.bool_),
            max_connections=options.connections,
            timeout_s=options.timeout_s,
        )
        records, cpu_shares = run_fleet(job, options.clients)
        measured = figures(records, warm_up_s=options.warm_up_s, seconds=seconds, batch=1)
        return measured, judge(records, cpu_shares, measured.p99_ms or measured.max_ms or 0.0)

    def _setup(self) -> dict[str, Any]:
        manifest, options = self.target.manifest, self.options
        return {
            "url": self.target.url,
            "generation": manifest.generation,
            "model_version": manifest.model_version,
            "rows": manifest.rows,
            "dim": manifest.dim,
            "metric": str(manifest.metric),
            "shards": len(manifest.shards),
            "index": manifest.index.factory,
            "nprobe": manifest.index.nprobe,
            "queries": self.queries.source,
            "k": options.k,
            "rate": options.rate,
            "seconds": options.seconds,
            "warm_up_s": options.warm_up_s,
            "arrivals": str(options.arrivals),
            "seed": options.seed,
            "cores": cores(),
        }


def requests_needed(scenario: Scenario, options: Options) -> int:
    """Queries worth preparing so that none is asked twice in a step."""
    if scenario.distinct is not None:
        return scenario.distinct
    if scenario.pace is not Pace.FIXED:
        return MOST_QUERIES  # nobody knows how many there will be
    most = max((factor for _, _, factor in scenario.surges), default=1.0)
    return int(options.rate * most * (options.warm_up_s + options.seconds) * 1.2) + 1
