"""``shardline bench load``: a running endpoint, or a corpus of its own; then table, JSON, plot."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from shardline.bench.corpus import clustered_set, generation_of
from shardline.bench.load.report import (
    PROCESS_HEADER,
    STEP_HEADER,
    client_line,
    process_rows,
    remarks,
    step_rows,
    title_of,
)
from shardline.bench.load.runner import Runner, queries_needed
from shardline.bench.load.scenarios import CHANGES, Ask, Pace, Scenario
from shardline.bench.load.step import Options
from shardline.bench.load.target import Target, open_target, user_queries, vector_queries
from shardline.bench.load.workload import Queries
from shardline.bench.plots import plot_load
from shardline.cluster.build import run_on_ray
from shardline.cluster.commands.build import plan_of
from shardline.cluster.config import ShardlineConfig
from shardline.cluster.console import StageProgress, print_table
from shardline.cluster.serving.deployment import serving
from shardline.cluster.serving.endpoint import Address, Endpoint, find_endpoint
from shardline.cluster.store import Store
from shardline.router.http.api_keys import Scope
from shardline.shards.core.errors import ConfigError, InvalidInput, NotFound

LEAST_QUERIES = 2_000
BENCH_STORE = "bench"  # below the user's store, whose own generations stay as they are


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """What to load: the endpoint at ``url``; or a corpus of ``rows`` x ``dim`` brought up for it;
    or, when both are None, the cluster that serves the store. key: instead of the store's."""

    url: str | None
    key: str | None = field(default=None, repr=False)
    rows: int | None
    dim: int


def run(
    config: ShardlineConfig,
    scenario: Scenario,
    where: Where,
    options: Options,
    *,
    data: Path | None,
    progress: StageProgress,
) -> dict[str, Any]:
    """One scenario's report. Ray must be running when ``where`` names rows.

    Raises:
        InvalidInput: the scenario cannot be measured so; before anything is built.
        As ``Runner.run``.
    """
    check(scenario, where, options)
    if scenario.ask is Ask.FEATURES and data is None:
        raise InvalidInput(
            "this scenario asks by user features",
            field=scenario.name,
            expected="--data with the folder of a data set",
        )
    with _target(config, where, progress, scenario) as target:
        queries = _queries(target, scenario, options, data)
        runner = Runner(
            target=target,
            scenario=scenario,
            queries=queries,
            options=options,
            note=progress.note,
        )
        return runner.run()


def check(scenario: Scenario, where: Where, options: Options) -> None:
    """Raises InvalidInput where a whole run would end without a figure."""
    closed = scenario.pace in (Pace.CLOSED, Pace.BATCHES)
    slowest = min(scenario.rates, default=math.inf if closed else options.rate)
    if slowest * options.seconds < 1:
        raise InvalidInput(
            "too short for one request",
            field="--seconds",
            expected=f">= {1 / slowest:g}",
            got=f"{options.seconds:g}",
        )
    if where.rows is not None and options.k > where.rows:
        raise InvalidInput(
            "no answer is that long",
            field="-k",
            expected=f"<= {where.rows}",
            got=str(options.k),
        )


def show(report: dict[str, Any], json_path: Path | None, plot_path: Path | None) -> list[str]:
    """Prints the tables; writes JSON and plot where asked; the lines to print after them."""
    print_table(title_of(report), STEP_HEADER, step_rows(report))
    last = report["steps"][-1]
    processes = process_rows(last)
    if processes:
        print_table(f"processes, {last['step']['label']}", PROCESS_HEADER, processes)
    lines = [client_line(last), *remarks(report)]
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
        lines.append(f"figures: {json_path}")
    if plot_path is not None:
        plot_load(report, plot_path)
        lines.append(f"plot: {plot_path}")
    return lines


@contextmanager
def _target(
    config: ShardlineConfig, where: Where, progress: StageProgress, scenario: Scenario
) -> Iterator[Target]:
    """The endpoint, for the length of the block when it is our own."""
    root = config.store.resolve()
    own = Store(root / BENCH_STORE)
    if where.rows is None:
        yield _running(Store(root), where, own)
        return
    corpus = clustered_set(own, where.rows, where.dim, progress)
    plan = plan_of(config)
    manifest = generation_of(own, corpus, plan, run_jobs=run_on_ray, progress=progress)
    if any(fault.kind in CHANGES for fault in scenario.faults):  # one of another shape
        other = replace(plan, num_shards=plan.num_shards + 1)
        generation_of(own, corpus, other, run_jobs=run_on_ray, progress=progress)
    own.set_current(manifest.generation)
    served = config.model_copy(update={"store": own.root})
    with serving(served, on_stage=progress.note) as endpoint:
        yield _writable(open_target(endpoint.address, endpoint.pid, [own]), endpoint)


def _running(store: Store, where: Where, own: Store) -> Target:
    """The cluster at the URL, or the one that serves the store; its pid where that is known."""
    if where.url is None:
        served = find_endpoint(store)
        target = open_target(_with_key(served.address, where.key), served.pid, [store, own])
        return target if where.key else _writable(target, served)
    for each in (store, own):
        with suppress(NotFound):
            served = find_endpoint(each)
            if served.url == where.url:
                target = open_target(_with_key(served.address, where.key), served.pid, [store, own])
                return target if where.key else _writable(target, served)
    return open_target(Address(where.url, where.key), None, [store, own])


def _writable(target: Target, served: Endpoint) -> Target:
    """With the address for writes, where the cluster has such a key."""
    with suppress(NotFound, ConfigError):
        return replace(target, write_address=served.address_for(Scope.WRITE))
    return target


def _with_key(address: Address, key: str | None) -> Address:
    return address if key is None else Address(address.url, key)


def _queries(target: Target, scenario: Scenario, options: Options, data: Path | None) -> Queries:
    rng = np.random.default_rng(options.seed)
    count = max(queries_needed(scenario, options), LEAST_QUERIES)
    if data is not None:
        return user_queries(target, data, count, rng)
    return vector_queries(target, count, rng)
