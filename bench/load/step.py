"""One step of a scenario against a target: its requests, its clients, and everything seen."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shardline.bench.load.faults import Mark, surge_marks
from shardline.bench.load.fleet import BUSY, ClientFigures, judge, run_fleet
from shardline.bench.load.http_bytes import address_of
from shardline.bench.load.job import LoadJob, Records
from shardline.bench.load.processes import Usage
from shardline.bench.load.scenarios import Step
from shardline.bench.load.schedule import Arrivals, FloatTimes, offsets
from shardline.bench.load.stats import Figures, Recovery, Second, figures, recovery, timeline
from shardline.bench.load.target import Target
from shardline.bench.load.watch import Watch
from shardline.bench.load.workload import Queries, Workload, asked_rows, make_workload, recall_of
from shardline.bench.load.wrk import run_wrk

CLOSED_RATE = 20_000  # requests a second that a closed loop never reaches
WRK_WARM_UP_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """rate: requests a second; seconds: measured time of a step; clients: processes to begin with,
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
    """All of one step. client is None where wrk was the client; memory: (second, MiB by role)."""

    step: Step
    tool: str
    figures: Figures
    recall: float | None
    repeats: float
    client: ClientFigures | None
    processes: list[Usage]
    memory: list[tuple[float, dict[str, float]]]
    timeline: list[Second]
    marks: list[Mark]
    recoveries: list[Recovery]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(kw_only=True)
class StepRunner:
    """Measures steps; ``program`` is wrk, for closed loops, where it is there."""

    target: Target
    queries: Queries
    options: Options
    rng: np.random.Generator
    note: Callable[[str], None]
    program: str | None = None

    def measure(self, step: Step) -> StepReport:
        """Once more with twice the clients while the clients are what is slow."""
        clients = self.options.clients
        while True:
            report = self._attempt(step, clients)
            client = report.client
            if client is None or client.cpu_share_max <= BUSY:
                return report
            if clients >= self.options.most_clients:
                return report
            clients = min(clients * 2, self.options.most_clients)
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
        finally:
            watch.close()
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
        marks = sorted([*watch.marks, *surge_marks(step)], key=lambda mark: mark.at_s)
        p99 = measured.p99_ms if measured.p99_ms is not None else (measured.max_ms or 0.0)
        return StepReport(
            step=step,
            tool="own client",
            figures=measured,
            recall=self._recall(records.bodies, workload),
            repeats=workload.repeats if step.rate else _repeats(records, workload),
            client=judge(records, cpu_shares, p99, closed=step.rate is None),
            processes=watch.usage(),
            memory=watch.memory(),
            timeline=timeline(records, warm_up_s=warm_up_s),
            marks=marks,
            recoveries=[
                recovery(records, warm_up_s=warm_up_s, at_s=mark.at_s, label=mark.label)
                for mark in marks
            ],
        )

    def _with_wrk(self, program: str, step: Step, workload: Workload) -> StepReport:
        watch = Watch(self.target, step, warm_up_s=0, shard=self.options.shard)
        connections = step.connections or 1
        try:
            run_wrk(
                program,
                self.target.url,
                workload.messages,
                connections=connections,
                seconds=WRK_WARM_UP_S,
            )
            watch.look(0.0)
            began = time.monotonic()
            measured = run_wrk(
                program,
                self.target.url,
                workload.messages,
                connections=connections,
                seconds=step.seconds,
            )
            watch.look(time.monotonic() - began)
        finally:
            watch.close()
        return StepReport(
            step=step,
            tool="wrk",
            figures=measured,
            recall=None,
            repeats=round(measured.sent / len(workload.messages), 2),
            client=None,
            processes=watch.usage(),
            memory=[],
            timeline=[],
            marks=[],
            recoveries=[],
        )

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

    def _recall(self, bodies: dict[int, bytes], workload: Workload) -> float | None:
        rows = asked_rows(workload)
        if not bodies or not rows.size:
            return None
        exact = self.target.exact(self.queries.vectors[rows], max(workload.ks))
        return recall_of(bodies, workload, exact)


def _repeats(records: Records, workload: Workload) -> float:
    """Of a closed loop: requests sent for each distinct one."""
    sent = workload.order[~np.isnan(records.sent_s)]
    return round(sent.size / max(np.unique(sent).size, 1), 2)
