"""What can be asked of an endpoint, by name: plain data, and the steps that follow from it. Pure.

``steps`` is a generator: it yields what to measure next and is sent the figures, so that a sweep
can choose its rates; whoever drives it does the measuring.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace
from enum import StrEnum

from shardline.bench.load.knee import Point, knee, next_rate
from shardline.bench.load.schedule import Surge
from shardline.bench.load.stats import Figures
from shardline.shards.core.errors import InvalidInput

KNEE_SHARES = (0.5, 0.7, 0.9)
SEARCH_SHARE = 3  # a rate of the search for the knee gets this part of the measured time
LEAST_SEARCH_S = 2.0
CLOSED_CONNECTIONS = (1, 4, 16, 64)
FLOOR_S = 10.0  # of empty requests at most, where searches are not compared with them one by one
BATCH_CONNECTIONS = 4  # of the closed loop that finds a batch size's peak
BATCH_LOAD = 0.5  # of that peak, for the latencies

StepPlan = Generator["Step", Figures, float | None]


class Pace(StrEnum):
    """How the rates of a scenario come about."""

    FIXED = "fixed"  # one step at the rate asked for
    SWEEP = "sweep"  # rates up to the knee, then shares of it
    BATCHES = "batches"  # for each batch size its peak, then half of that
    LATENCY = "latency"  # sequential, then at each of ``rates``
    CLOSED = "closed"  # the peak, for several numbers of connections


class Ask(StrEnum):
    """What a query holds."""

    VECTORS = "vectors"
    FEATURES = "features"
    EMPTY = "empty"  # no search at all: the floor


class FaultKind(StrEnum):
    KILL_SHARD = "kill-shard"  # SIGKILL
    STALL_SHARD = "stall-shard"  # SIGSTOP, SIGCONT after lasts_s
    RESTART_ROUTER = "restart-router"  # SIGKILL; Ray Serve starts it again
    PUBLISH = "publish"  # of another generation of the store
    ROLLBACK = "rollback"


CHANGES = (FaultKind.PUBLISH, FaultKind.ROLLBACK)  # of what is live; they hit no process


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """at_share: when, as a share of the measured time."""

    kind: FaultKind
    at_share: float
    lasts_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """summary: for people; what is sent, what is marked, what the figures show. ks: (k, share of
    the requests); empty: the k asked for. zipf: exponent of the popularity of distinct queries;
    None: every query is new. rates: requests per second, of a latency scenario. write_rows_per_s:
    of a writer beside the searches."""

    name: str
    summary: str
    pace: Pace = Pace.FIXED
    ask: Ask = Ask.VECTORS
    batches: tuple[int, ...] = (1,)
    ks: tuple[tuple[int, float], ...] = ()
    zipf: float | None = None
    distinct: int | None = None
    faults: tuple[Fault, ...] = ()
    surges: tuple[Surge, ...] = ()
    rates: tuple[float, ...] = ()
    write_rows_per_s: float = 0.0


_ALL = (
    Scenario(
        name="latency",
        summary=(
            "Single queries, sequential over one connection, then in the open loop at 100 and at "
            "20 requests/s, each after empty requests in the same way; --rate has no effect."
        ),
        pace=Pace.LATENCY,
        rates=(100.0, 20.0),
    ),
    Scenario(
        name="rate",
        summary="Single queries at --rate: latency, recall and coverage at that load.",
    ),
    Scenario(
        name="sweep",
        summary=(
            "Single queries, at twice the rate again and again from --rate on, until it is not "
            "held; then between the last two, a third of --seconds each. Shows the highest rate "
            "held (the knee), then the latencies at 50, 70 and 90 % of it."
        ),
        pace=Pace.SWEEP,
    ),
    Scenario(
        name="batch",
        summary=(
            "1, 8, 64 and 512 queries per request: each over 4 connections as fast as answers come "
            "(closed loop, the peak), then at half that rate. Shows queries/s beside the bare "
            "index's in such batches; --rate has no effect."
        ),
        pace=Pace.BATCHES,
        batches=(1, 8, 64, 512),
    ),
    Scenario(
        name="zipf",
        summary=(
            "10,000 different single queries at --rate, the n-th most popular one 1/n as often as "
            "the first. Shows what the result cache saves: run it with --set router.cache_bytes=0 "
            "too."
        ),
        zipf=1.0,
        distinct=10_000,
    ),
    Scenario(
        name="mixed-k",
        summary=(
            "Single queries at --rate: 60 % for 10 results, 30 % for 100, 10 % for 1000; -k has "
            "no effect. Shows what the long answers cost all of them together."
        ),
        ks=((10, 0.6), (100, 0.3), (1000, 0.1)),
    ),
    Scenario(
        name="features",
        summary=(
            "Users of --data by their features at --rate, encoded by the router. Beside `rate` "
            "with the same --data, which sends their vectors: what the query tower costs."
        ),
        ask=Ask.FEATURES,
    ),
    Scenario(
        name="kill-shard",
        summary=(
            "As rate; a quarter into the time the process of --shard is killed with -9, which is "
            "marked. Shows how many answers missed its rows, from when to when, and how many "
            "failed."
        ),
        faults=(Fault(kind=FaultKind.KILL_SHARD, at_share=0.25),),
    ),
    Scenario(
        name="stall-shard",
        summary=(
            "As rate; a quarter into the time the process of --shard stands still for 5 s "
            "(SIGSTOP, SIGCONT; both marked), so --seconds must be more than 6.7. Shows the same, "
            "and the wait until the router goes on without it."
        ),
        faults=(Fault(kind=FaultKind.STALL_SHARD, at_share=0.25, lasts_s=5.0),),
    ),
    Scenario(
        name="restart-router",
        summary=(
            "As rate; a quarter into the time the router's process is killed with -9, which is "
            "marked, and Ray Serve starts another. Shows how many requests failed, and for how "
            "long."
        ),
        faults=(Fault(kind=FaultKind.RESTART_ROUTER, at_share=0.25),),
    ),
    Scenario(
        name="swap",
        summary=(
            "As rate, beside a writer of 50 rows/s (new items, which it deletes at the end); "
            "`shardline publish` of another generation of the same model a fifth into the time, "
            "`shardline rollback` at three fifths; both are marked, and when they were done. "
            "Shows what failed and which acknowledged items were lost (nothing should), and what "
            "loading and measuring the other cost."
        ),
        write_rows_per_s=50.0,
        faults=(
            Fault(kind=FaultKind.PUBLISH, at_share=0.2),
            Fault(kind=FaultKind.ROLLBACK, at_share=0.6),
        ),
    ),
    Scenario(
        name="overload",
        summary=(
            "Single queries at --rate, three times as many in the middle half of the time "
            "(marked): give the peak that `capacity` finds as --rate. Shows answers/s before, "
            "during and after, and how many requests were refused (429)."
        ),
        surges=((0.25, 0.75, 3.0),),
    ),
    Scenario(
        name="capacity",
        summary=(
            "Single queries as fast as answers come over 1, 4, 16 and 64 connections (closed "
            "loop), by wrk where it is installed, by our own slower client where it is not. Shows "
            "the peak; --rate has no effect."
        ),
        pace=Pace.CLOSED,
    ),
)
SCENARIOS = {scenario.name: scenario for scenario in _ALL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One measurement. rate: requests per second; None: a closed loop over ``connections``."""

    label: str
    rate: float | None
    seconds: float
    batch: int
    ks: tuple[tuple[int, float], ...]
    ask: Ask = Ask.VECTORS
    zipf: float | None = None
    distinct: int | None = None
    faults: tuple[Fault, ...] = ()
    surges: tuple[Surge, ...] = ()
    write_rows_per_s: float = 0.0
    connections: int | None = None


def find_scenario(name: str) -> Scenario:
    """Raises InvalidInput for an unknown name, listing those there are."""
    if name not in SCENARIOS:
        raise InvalidInput("no such scenario", expected=" | ".join(SCENARIOS), got=name)
    return SCENARIOS[name]


def steps(scenario: Scenario, *, rate: float, seconds: float, k: int) -> StepPlan:
    """Yields steps and is sent their figures; returns the knee in requests/s, of a sweep. Empty
    requests come first, in the way of the searches they are the floor of.

    ``rate`` is where a sweep begins.
    """
    base = _step(scenario, rate=rate, seconds=seconds, k=k)
    sequential = replace(base, label="sequential", rate=None, connections=1)
    if scenario.pace is Pace.LATENCY:
        open_loops = [replace(base, label=f"{each:g}/s", rate=each) for each in scenario.rates]
        for step in (sequential, *open_loops):
            yield _floor(step, seconds)
            yield step
        return None
    in_closed_loop = scenario.pace in (Pace.CLOSED, Pace.BATCHES)
    yield _floor(sequential if in_closed_loop else base, min(seconds, FLOOR_S))
    if scenario.pace is Pace.SWEEP:
        return (yield from _sweep(base))
    if scenario.pace is Pace.BATCHES:
        for batch in scenario.batches:
            closed = replace(
                base,
                label=f"{batch} per request, peak",
                rate=None,
                batch=batch,
                connections=BATCH_CONNECTIONS,
            )
            peak = yield closed
            if peak.goodput > 0:
                half = max(BATCH_LOAD * peak.goodput, 1 / seconds * 2)
                yield replace(base, label=f"{batch} per request, half", rate=half, batch=batch)
    elif scenario.pace is Pace.CLOSED:
        for connections in CLOSED_CONNECTIONS:
            label = f"closed, {connections} connections"
            yield replace(base, label=label, rate=None, connections=connections)
    else:
        yield base
    return None


def point_of(step: Step, measured: Figures) -> Point:
    """The step of an open loop as a point of the curve."""
    assert step.rate is not None
    lost = measured.rejected + measured.failed
    return Point(
        rate=step.rate,
        sent=measured.sent,
        offered=measured.offered_rate,
        goodput=measured.goodput,
        lost_share=lost / max(measured.sent, 1),
        p50_ms=measured.p50_ms,
    )


def _sweep(base: Step) -> StepPlan:
    points: list[Point] = []
    seconds = max(base.seconds / SEARCH_SHARE, LEAST_SEARCH_S)
    assert base.rate is not None
    while (rate := next_rate(points, base.rate)) is not None:
        step = replace(base, label=f"{rate:.0f}/s", rate=rate, seconds=seconds)
        points.append(point_of(step, (yield step)))
    found = knee(points)
    if found is not None:
        for share in KNEE_SHARES:
            yield replace(base, label=f"{share:.0%} of the knee", rate=share * found)
    return found


def _floor(step: Step, seconds: float) -> Step:
    """Empty requests instead of the step's searches."""
    return Step(
        label=f"empty request (floor), {step.label}",
        rate=step.rate,
        seconds=seconds,
        batch=1,
        ks=step.ks,
        ask=Ask.EMPTY,
        connections=step.connections,
    )


def _step(scenario: Scenario, *, rate: float, seconds: float, k: int) -> Step:
    return Step(
        label=f"{rate:g}/s",
        rate=rate,
        seconds=seconds,
        batch=scenario.batches[0],
        ks=scenario.ks or ((k, 1.0),),
        ask=scenario.ask,
        zipf=scenario.zipf,
        distinct=scenario.distinct,
        faults=scenario.faults,
        surges=scenario.surges,
        write_rows_per_s=scenario.write_rows_per_s,
    )
