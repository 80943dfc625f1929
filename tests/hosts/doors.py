"""A load on the HTTP front end of every host at once, from outside, while something is done to one.

Requests leave on schedule whether or not earlier ones are answered, one client process per host.
Those to a host that is itself away fail whatever the cluster does, so they are counted apart.
"""

import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from shardline.bench.load.http_bytes import message_of, search_request
from shardline.bench.load.load_client import OK, LoadClient, LoadJob, Records
from shardline.bench.load.stats import figures, timeline
from shardline.bench.plots import save
from tests.chaos.oracle import Corpus
from tests.hosts.launched import HTTP_PORT
from tests.hosts.rig import Host

RATE = 100.0  # requests per second to each host
QUIET_S = 10.0  # before the fault
K = 10
QUERIES = 500
TIMEOUT_S = 15.0
KEPT = ("p99_ms", "failed", "coverage_min")  # of each second, in a report
MARGIN_S = 1.0  # before an action
START_S = 4.0  # of the client processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What is done at ``at_s`` seconds from the beginning of the load."""

    at_s: float
    label: str
    do: Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What callers of the hosts that were not away saw, of requests that left a second before the
    first action or later. Seconds count from that action.

    failed: answered otherwise than with 200; partial: without the rows of some shard; last_harm_s:
    when the last request left that failed or was partial; None: none was. harmed_before: requests
    that failed or were partial earlier than that, which the machine alone is to blame for.
    """

    harmed_before: int
    asked: int
    failed: int
    partial: int
    failures: dict[str, int]
    last_harm_s: float | None
    p50_before_ms: float
    p99_before_ms: float
    p99_after_ms: float

    @property
    def answered_share(self) -> float:
        return 1 - self.failed / self.asked


def under_load(
    hosts: Sequence[Host],
    corpus: Corpus,
    key: str,
    actions: Sequence[Action],
    *,
    seconds: float,
) -> dict[str, Records]:
    """What became of the requests to each host, by its name, after all actions are done."""
    requests = [
        search_request({"vectors": vector[None], "k": K}, (("Authorization", f"Bearer {key}"),))
        for vector in corpus.vectors[:QUERIES]
    ]
    jobs = [_job(host, requests, seconds) for host in hosts]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(hosts), mp_context=spawn) as pool:
        start = time.monotonic() + START_S
        running = [pool.submit(_run, job, start) for job in jobs]
        for action in sorted(actions, key=lambda action: action.at_s):
            time.sleep(max(0.0, start + action.at_s - time.monotonic()))
            action.do()
        return {host.name: each.result() for host, each in zip(hosts, running, strict=True)}


def cost_of(records: dict[str, Records], actions: Sequence[Action], away: Sequence[Host]) -> Cost:
    """away: the hosts whose own front end could not be reached."""
    first_s = min(action.at_s for action in actions)
    lost = {host.name for host in away}
    parts = [each for name, each in records.items() if name not in lost]
    intended = np.concatenate([each.intended_s for each in parts])
    status = np.concatenate([each.status for each in parts])
    coverage = np.concatenate([each.coverage for each in parts])
    took_ms = 1e3 * np.concatenate([each.done_s - each.intended_s for each in parts])
    failed, partial = status != OK, coverage < 1
    since = intended >= first_s - MARGIN_S  # what was in flight then may be the first to be harmed
    harmed = intended[(failed | partial) & since]
    before, after = took_ms[~since & ~failed], took_ms[since & ~failed]
    return Cost(
        harmed_before=int(((failed | partial) & ~since).sum()),
        asked=int(since.sum()),
        failed=int((failed & since).sum()),
        partial=int((partial & since).sum()),
        failures=_failures(parts, first_s - MARGIN_S),
        last_harm_s=round(float(harmed.max() - first_s), 3) if harmed.size else None,
        p50_before_ms=round(float(np.percentile(before, 50)), 2),
        p99_before_ms=round(float(np.percentile(before, 99)), 2),
        p99_after_ms=round(float(np.percentile(after, 99)), 2),
    )


def write_report(
    folder: Path,
    name: str,
    records: dict[str, Records],
    actions: Sequence[Action],
    cost: Cost,
    more: dict[str, Any],
) -> None:
    """NAME.json with the figures and some of every second of every host, and NAME.png."""
    seconds = {host: [asdict(s) for s in timeline(r, warm_up_s=0)] for host, r in records.items()}
    content = {
        "fault": name,
        "rate_per_host": RATE,
        "actions": [{"at_s": action.at_s, "label": action.label} for action in actions],
        "cost": asdict(cost) | {"answered_share": cost.answered_share},
        "hosts": {
            host: asdict(figures(each, warm_up_s=0, seconds=each.intended_s.max(), batch=1))
            for host, each in records.items()
        },
        **more,
        "each_second": {
            host: {
                key: [each[key] for each in bins] for key in ("p99_ms", "failed", "coverage_min")
            }
            for host, bins in seconds.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content) + "\n")
    _plot(folder / f"{name}.png", name, seconds, actions)


def _plot(
    path: Path, name: str, seconds: dict[str, list[dict[str, Any]]], actions: Sequence[Action]
) -> None:
    """The p99 of each second, and the requests that failed or were partial, by host."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    latency, harmed = figure.subplots(2, 1, sharex=True)
    for number, (host, bins) in enumerate(seconds.items()):
        look = {"color": f"C{number}", "drawstyle": "steps-post"}
        at = [each["at_s"] for each in bins]
        p99 = [np.nan if each["p99_ms"] is None else each["p99_ms"] for each in bins]
        least = [1 if each["coverage_min"] is None else each["coverage_min"] for each in bins]
        latency.plot(at, p99, label=host, **look)
        harmed.plot(at, [each["failed"] for each in bins], label=f"{host}: failed", **look)
        missing = [100 * (1 - coverage) for coverage in least]
        harmed.plot(at, missing, label=f"{host}: rows missing, %", linestyle=":", **look)
    latency.set(ylabel="p99, ms", yscale="log")
    harmed.set(ylabel="per second", xlabel="seconds")
    for axes in (latency, harmed):
        for action in actions:
            axes.axvline(action.at_s, color="red", linewidth=1)
        axes.legend(loc="upper right", fontsize="x-small", ncols=2)
    labels = ", ".join(f"{action.label} at {action.at_s:g} s" for action in actions)
    figure.suptitle(f"{name}: {labels}; {RATE:g} requests/s to each host", fontsize="medium")
    save(figure, path)


def _job(host: Host, requests: Sequence[Any], seconds: float) -> LoadJob:
    address = (host.address, HTTP_PORT)
    count = int(seconds * RATE)
    return LoadJob(
        address=address,
        messages=tuple(message_of(request, address) for request in requests),
        order=np.arange(count) % len(requests),
        intended_s=np.arange(count) / RATE,
        kept=np.zeros(count, dtype=bool),
        timeout_s=TIMEOUT_S,
    )


def _run(job: LoadJob, start: float) -> Records:
    return LoadClient(job).run(start)


def _failures(parts: Sequence[Records], since_s: float) -> dict[str, int]:
    return dict(
        Counter(
            kind
            for records in parts
            for number, kind in records.errors.items()
            if records.intended_s[number] >= since_s
        )
    )
