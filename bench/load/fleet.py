"""Several client processes as one: the schedule dealt out among them, the records put together.

The clients are processes of their own even when one is enough, so that neither the sampler nor
Ray's threads in this process make them late, and their CPU time is theirs alone.
"""

import contextlib
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from shardline.bench.load.http_bytes import Request, address_of, message_of
from shardline.bench.load.load_client import LoadClient, LoadJob, Records
from shardline.bench.load.stats import Figures, figures, refuse_unanswered
from shardline.shards.core.errors import Unavailable

READY_S = 60.0
END_S = 5.0  # for a process whose pipe has closed
START_DELAY_S = 0.2  # between the last client's readiness and the first request
GRACE_S = 30.0  # beyond schedule and timeout, before a client counts as lost
TICK_S = 0.05
OPEN_CONNECTIONS = 512
CLOSED_RATE = 20_000  # requests/s that a closed loop never reaches
BUSY = 0.9  # share of a core from which one client process cannot send on time
LATE_SHARE = 0.1  # of the latencies' p99
LATE_MS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientFigures:
    """How well the load generator itself kept up. lag_*_ms: actual minus intended send time."""

    processes: int
    connections: int
    lag_p50_ms: float
    lag_p99_ms: float
    cpu_share_max: float
    bottleneck: str | None


def ask(
    url: str,
    requests: Sequence[Request],
    *,
    seconds: float,
    warm_up_s: float,
    rate: float | None = None,
    connections: int = OPEN_CONNECTIONS,
    batch: int = 1,
    kept: int = 0,
) -> tuple[Figures, dict[int, bytes]]:
    """Sends ``requests`` from this process in order, starting over when all were sent: evenly
    spaced at ``rate`` per second (latencies from the intended send time), or, rate None, as fast
    as answers come over so many connections; one connection is sequential.

    Returns the figures after the warm-up, and the bodies of the first ``kept`` answers by number.

    Raises:
        InvalidInput: no http URL. Unavailable: nothing was answered.
    """
    lasts = warm_up_s + seconds
    count = int(lasts * rate) if rate else int(lasts * CLOSED_RATE / batch) + 1
    job = LoadJob(
        address=address_of(url),
        messages=tuple(message_of(request, address_of(url)) for request in requests),
        order=np.arange(count) % len(requests),
        intended_s=np.arange(count) / rate if rate else np.zeros(count),
        kept=np.arange(count) < kept,
        max_connections=connections,
        closed_s=None if rate else lasts,
    )
    records = LoadClient(job).run(time.monotonic() + START_DELAY_S)
    measured = figures(records, warm_up_s=warm_up_s, seconds=seconds, batch=batch)
    refuse_unanswered(measured, url)
    return measured, records.bodies


def run_fleet(
    job: LoadJob, processes: int, on_tick: Callable[[float], None] = lambda elapsed: None
) -> tuple[Records, list[float]]:
    """Records of the whole job, and each process's share of a core.

    ``on_tick`` is called about every TICK_S with the seconds since the start, negative before it.

    Raises:
        Unavailable: a client process ended without a result.
    """
    parts = [_part(job, number, processes) for number in range(processes)]
    with children(_serve, [(part,) for part in parts]) as pipes:
        for pipe in pipes:
            _receive(pipe, READY_S)
        start = time.monotonic() + START_DELAY_S
        for pipe in pipes:
            pipe.send(start)
        lasts = job.closed_s or float(job.intended_s[-1])
        limit = start + lasts + job.timeout_s + GRACE_S
        waiting, results = list(pipes), {}
        while waiting:
            for ready in wait(waiting, TICK_S):
                assert isinstance(ready, Pipe)
                results[pipes.index(ready)] = _receive(ready, 0)
                waiting.remove(ready)
            on_tick(time.monotonic() - start)
            if time.monotonic() > limit:
                raise Unavailable("a client process did not come to an end")
    records = [results[number] for number in range(processes)]
    return merge(records, job), [part.cpu_share for part in records]


def merge(parts: list[Records], job: LoadJob) -> Records:
    """The records of part p are those of requests p, p + P, p + 2 P, ..."""
    step = len(parts)
    whole = Records.empty(job.intended_s)
    for first, part in enumerate(parts):
        for name in ("intended_s", "sent_s", "done_s", "status", "coverage"):
            getattr(whole, name)[first::step] = getattr(part, name)
        whole.errors |= {first + step * number: kind for number, kind in part.errors.items()}
        whole.bodies |= {first + step * number: body for number, body in part.bodies.items()}
        whole.connections += part.connections
    whole.cpu_share = sum(part.cpu_share for part in parts)
    return whole


def judge(
    records: Records, cpu_shares: list[float], latency_p99_ms: float, *, closed: bool = False
) -> ClientFigures:
    """Whether the figures are the server's: says why not where the client was the bottleneck.

    A closed loop has no schedule to be late on; there only the CPU tells.
    """
    sent = ~np.isnan(records.sent_s)
    lags = (records.sent_s[sent] - records.intended_s[sent]) * 1e3
    lag_p50, lag_p99 = np.percentile(lags, [50, 99]) if lags.size else (np.nan, np.nan)
    busiest = max(cpu_shares)
    bottleneck = None
    if busiest > BUSY:
        bottleneck = f"a client process used {busiest:.0%} of a core: use more of them (--clients)"
    elif not closed and lag_p99 > max(LATE_MS, LATE_SHARE * latency_p99_ms):
        bottleneck = (
            f"the client sent {lag_p99:.1f} ms late at p99 while it used {busiest:.0%} of a core: "
            "others held the cores, or no connection was free"
        )
    return ClientFigures(
        processes=len(cpu_shares),
        connections=records.connections,
        lag_p50_ms=round(float(lag_p50), 3),
        lag_p99_ms=round(float(lag_p99), 3),
        cpu_share_max=round(busiest, 3),
        bottleneck=bottleneck,
    )


def _part(job: LoadJob, first: int, step: int) -> LoadJob:
    """Every step-th request, with only the messages it needs."""
    used, order = np.unique(job.order[first::step], return_inverse=True)
    return replace(
        job,
        messages=tuple(job.messages[message] for message in used),
        order=order,
        intended_s=job.intended_s[first::step],
        kept=job.kept[first::step],
        max_connections=max(job.max_connections // step, 1),
    )


@contextlib.contextmanager
def children(work: Callable[..., None], given: Sequence[tuple[Any, ...]]) -> Iterator[list[Pipe]]:
    """Runs ``work(pipe, *each)`` in a process per tuple of ``given``; yields our ends of the pipes.
    They are closed with the block, whereupon the processes are to end; none is left."""
    context = multiprocessing.get_context("spawn")  # fork would copy Ray's threads' locks
    processes: list[BaseProcess] = []
    pipes: list[Pipe] = []
    try:
        for each in given:
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=work, args=(theirs, *each), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(END_S)
            process.kill()
            process.join()


def _serve(pipe: Pipe, job: LoadJob) -> None:
    """The life of a client process: ready, start time in, records out."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a file for every connection
    client = LoadClient(job)
    pipe.send("ready")
    try:
        start: float = pipe.recv()
    except EOFError:
        return  # another client failed before the start
    pipe.send(client.run(start))


def _receive(pipe: Pipe, timeout_s: float) -> Records:
    """What a client sends next."""
    try:
        if not pipe.poll(timeout_s):
            raise Unavailable("a client process does not answer", expected=f"within {timeout_s} s")
        received: Records = pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        raise Unavailable("a client process ended without a result") from error
    return received
