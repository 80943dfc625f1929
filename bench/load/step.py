"""One step of a scenario against a target: its requests, its clients, and everything seen."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from shardline.bench.load.faults import Mark, Watch, surge_marks
from shardline.bench.load.fleet import BUSY, CLOSED_RATE, ClientFigures, judge, run_fleet
from shardline.bench.load.http_bytes import address_of
from shardline.bench.load.load_client import LoadJob, Records
from shardline.bench.load.processes import Usage
from shardline.bench.load.scenarios import Ask, Step
from shardline.bench.load.schedule import Arrivals, FloatTimes, offsets
from shardline.bench.load.stats import Figures, Recovery, Second, figures, recovery, timeline
from shardline.bench.load.target import Target
from shardline.bench.load.workload import Queries, Workload, answers_of, make_workload
from shardline.bench.load.wrk import run_wrk

WRK_WARM_UP_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """rate: requests/s; seconds: measured time of a step; clients: processes to begin with,
    doubled up to most_clients while they are what is slow; shard: the one that faults hit."""

    rate: float
    seconds: float
    warm_up_s: float
    k: int
    arrivals: Arrivals = Arrivals.POISSON
    clients: int = 1
    most_clients: int = 4
    connections: int = 4096
    timeout_s: float = 10.0
    shard: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """All of one step. wrk tells its figures alone: client is None then, and nothing is known of
    single requests. writes: of a writer beside the searches."""

    step: Step
    tool: str
    figures: Figures
    repeats: float
    processes: list[Usage]
    recall: float | None = None
    client: ClientFigures | None = None
    timeline: list[Second] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    writes: dict[str, Any] | None = None


@dataclass(kw_only=True)
class StepRunner:
    """Measures steps; ``program`` is wrk, for closed loops, where it is there."""

    target: Target
    queries: Queries
    options: Options
    rng: np.random.Generator
    note: Callable[[str], None]
    program: str | None = None
    _asked: int = 0  # single queries of earlier steps: the next step goes on behind them

    def measure(self, step: Step) -> StepReport:
        """Once more with twice the clients while the clients are what is slow."""
        most = min(self.options.most_clients, step.connections or self.options.most_clients)
        clients = min(self.options.clients, most)
        while True:
            report = self._attempt(step, clients)
            client = report.client
            if client is None or client.cpu_share_max <= BUSY or clients >= most:
                return report
            clients = min(clients * 2, most)
            self.note(f"{client.bottleneck}; again with {clients}")

    def _attempt(self, step: Step, clients: int) -> StepReport:
        options = self.options
        closed_s = options.warm_up_s + step.seconds if step.rate is None else None
        times = self._times(step)
        workload = make_workload(
            step,
            self.queries,
            requests=len(times),
            first_counted=int(np.searchsorted(times, options.warm_up_s)) if step.rate else 0,
            first_query=0 if step.zipf else self._asked,
            address=address_of(self.target.url),
            headers=self.target.address.headers,
            rng=self.rng,
        )
        if self.program is not None and step.rate is None:
            return self._with_wrk(self.program, step, workload)
        job = LoadJob(
            address=address_of(self.target.url),
            messages=workload.messages,
            order=workload.order,
            intended_s=times,
            kept=workload.kept,
            max_connections=step.connections or options.connections,
            timeout_s=options.timeout_s,
            closed_s=closed_s,
        )
        watch = Watch(self.target, step, warm_up_s=options.warm_up_s, shard=options.shard)
        try:
            records, cpu_shares = run_fleet(job, clients, watch.tick)
            watch.finish()
        finally:
            watch.close()
        self._count(step, int((~np.isnan(records.sent_s)).sum()))
        return self._report(step, workload, records, cpu_shares, watch)

    def _report(
        self,
        step: Step,
        workload: Workload,
        records: Records,
        cpu_shares: list[float],
        watch: Watch,
    ) -> StepReport:
        warm_up_s = self.options.warm_up_s
        measured = figures(records, warm_up_s=warm_up_s, seconds=step.seconds, batch=step.batch)
        sent = workload.order[~np.isnan(records.sent_s)]
        marks = sorted([*watch.marks, *surge_marks(step)], key=lambda mark: mark.at_s)
        p99 = measured.p99_ms if measured.p99_ms is not None else (measured.max_ms or 0.0)
        return StepReport(
            step=step,
            tool="own client",
            figures=measured,
            recall=self.target.recall(self.queries.vectors, answers_of(records.bodies, workload)),
            repeats=self._repeats(step, len(sent), len(np.unique(sent))),
            client=judge(records, cpu_shares, p99, closed=step.rate is None),
            processes=watch.usage(),
            timeline=timeline(records, warm_up_s=warm_up_s),
            writes=watch.writing.report() if watch.writing is not None else None,
            marks=marks,
            recoveries=[
                recovery(records, warm_up_s=warm_up_s, at_s=mark.at_s, label=mark.label)
                for mark in marks
            ],
        )

    def _with_wrk(self, program: str, step: Step, workload: Workload) -> StepReport:
        watch = Watch(self.target, step, warm_up_s=0, shard=self.options.shard)
        connections = step.connections or 1
        send = partial(
            run_wrk, program, self.target.url, workload.messages, connections=connections
        )
        try:
            # as many more as there are connections are under way when the warm-up ends
            warmed = send(seconds=WRK_WARM_UP_S).sent + connections
            watch.look(0.0)
            began = time.monotonic()
            measured = send(seconds=step.seconds, first=warmed)
            watch.look(time.monotonic() - began)
        finally:
            watch.close()
        self._count(step, warmed + measured.sent + connections)
        return StepReport(
            step=step,
            tool="wrk",
            figures=measured,
            repeats=self._repeats(step, warmed + measured.sent, len(workload.messages)),
            processes=watch.usage(),
        )

    def _count(self, step: Step, sent: int) -> None:
        if step.ask is not Ask.EMPTY and step.batch == 1:
            self._asked += sent

    def _repeats(self, step: Step, sent: int, distinct: int) -> float:
        """How often each query was asked, in this step or in the run; more than once where the
        queries were too few. The floor's requests are all alike on purpose."""
        if step.ask is Ask.EMPTY:
            return 1.0
        in_run = self._asked / len(self.queries.vectors) if step.batch == 1 else 1.0
        return round(max(sent / max(distinct, 1), in_run, 1.0), 2)

    def _times(self, step: Step) -> FloatTimes:
        options = self.options
        if step.rate is None:
            most = int(CLOSED_RATE / step.batch * (options.warm_up_s + step.seconds)) + 1
            return np.zeros(most)
        return offsets(
            options.arrivals,
            rate=step.rate,
            warm_up_s=options.warm_up_s,
            seconds=step.seconds,
            rng=self.rng,
            surges=step.surges,
        )
