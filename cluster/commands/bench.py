"""``bench``: latency, index kinds, mining and load on this machine, each beside its floor."""

import json
from dataclasses import replace
from pathlib import Path

import click

from shardline.bench.load.scenarios import find_scenario
from shardline.cluster.cli import Settings
from shardline.cluster.commands.bench_ab import ab
from shardline.cluster.commands.bench_load import WARM_UP_S, load, measure
from shardline.cluster.commands.bench_options import (
    AT_LEAST_ONE,
    POSITIVE,
    json_option,
    plot_option,
)
from shardline.cluster.commands.serve import serving_cpus
from shardline.cluster.console import StageProgress, print_warnings
from shardline.cluster.preflight.check import enforce
from shardline.cluster.preflight.machine import before_ray
from shardline.cluster.preflight.open_files import requests_in_flight
from shardline.cluster.serving.ray_session import cores, ray_for
from shardline.shards.core.errors import InvalidInput


@click.group()
def bench() -> None:
    """Measure latency, throughput and quality, each beside its floor.

    Each benchmark prints tables, and writes all its figures as JSON with --json FILE. `mining`,
    whose figures are few, prints that JSON after its tables too.
    """


@bench.command(short_help="HTTP latency of single queries; `load latency` with its own corpus.")
@click.option(
    "--rows", default=1_000_000, show_default=True, type=AT_LEAST_ONE, help="Vectors to index."
)
@click.option("--dim", default=128, show_default=True, type=AT_LEAST_ONE, help="Their dimension.")
@click.option("-k", default=100, show_default=True, type=AT_LEAST_ONE, help="Results per query.")
@click.option(
    "--rate",
    "rates",
    default=(100.0, 20.0),
    show_default=True,
    multiple=True,
    type=POSITIVE,
    help="Requests per second of an open loop. Repeatable.",
)
@click.option(
    "--seconds",
    default=30.0,
    show_default=True,
    type=POSITIVE,
    help="Length of each measurement: two sequential ones, and two for each rate.",
)
@json_option
@plot_option
@click.pass_obj
def latency(
    settings: Settings,
    rows: int,
    dim: int,
    k: int,
    rates: tuple[float, ...],
    seconds: float,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """HTTP latency of single queries, beside an empty request and the bare index.

    The scenario `latency` of `shardline bench load` on a clustered corpus that is brought up for
    it. Empty requests and searches are each sent in two ways:

    Sequential: one client sends a request as soon as the one before is answered, over one
    connection. Nothing queues and every cache is warm: the lowest latency a query can have.

    Open loop: requests leave at each --rate, whether the ones before are answered or not, and a
    latency counts from the time a request was meant to leave. Between two of them the processes
    sleep and lose the processor's caches, and time in queues counts: what a user of a live system
    sees.

    The first three seconds of each are not counted; the result cache is off, API keys are on. The
    bare index is the same shards searched one after the other in this process.

    Vectors and index are kept in the store and reused; the first run with a million rows takes
    minutes to make them. Use `taskset -c 0,1 shardline bench latency` for two cores.
    """
    from shardline.bench.load.command import Where
    from shardline.bench.load.schedule import Arrivals
    from shardline.bench.load.step import Options

    measure(
        settings,
        replace(find_scenario("latency"), rates=rates),
        Where(url=None, rows=rows, dim=dim),
        Options(
            rate=min(rates), seconds=seconds, warm_up_s=WARM_UP_S, k=k, arrivals=Arrivals.CONSTANT
        ),
        json_path=json_path,
        plot_path=plot_path,
    )


@bench.command(short_help="Compare index kinds; Pareto plot.")
@click.option(
    "--data",
    "source",
    type=click.Choice(["clustered", "mnist784"]),
    default="clustered",
    show_default=True,
)
@click.option("--path", type=click.Path(path_type=Path), help="Folder of the files of mnist784.")
@click.option(
    "--vectors",
    type=click.Path(path_type=Path),
    help="Instead: a Parquet or Arrow file with an id and a vector column.",
)
@click.option(
    "--metric",
    type=click.Choice(["cosine", "dot", "l2"]),
    default="cosine",
    show_default=True,
    help="How the vectors of --vectors are compared.",
)
@click.option(
    "--rows", default=100_000, show_default=True, type=AT_LEAST_ONE, help="Rows of clustered."
)
@click.option("--dim", default=128, show_default=True, type=AT_LEAST_ONE, help="Their dimension.")
@click.option(
    "--queries",
    default=500,
    show_default=True,
    type=AT_LEAST_ONE,
    help="Queries, none of them indexed.",
)
@click.option("-k", default=100, show_default=True, type=AT_LEAST_ONE, help="Results per query.")
@click.option(
    "--threads", type=AT_LEAST_ONE, help="Threads of builds and batches.  [default: all cores]"
)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(["flat", "ivf", "hnsw", "pq", "ivfpq", "ivfpq-fs", "sq8"]),
    help="Only these kinds, and flat. Repeatable.",
)
@json_option
@plot_option
def index(
    source: str,
    path: Path | None,
    vectors: Path | None,
    metric: str,
    rows: int,
    dim: int,
    queries: int,
    k: int,
    threads: int | None,
    kinds: tuple[str, ...],
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Compare index kinds: build time, size, recall, time per query; Pareto plot."""
    from shardline.bench.index.datasets import Source, clustered_data, mnist_data, vectors_data
    from shardline.bench.index.index_bench import run, show
    from shardline.bench.index.kinds import ALL_KINDS
    from shardline.shards.core.schema import Metric
    from shardline.shards.index.spec import IndexKind

    if vectors is not None:
        data = vectors_data(vectors, metric=Metric(metric), queries=queries)
    elif Source(source) is Source.MNIST784:
        if path is None:
            raise InvalidInput("--data mnist784 needs --path, the folder of its files")
        data = mnist_data(path, queries)
    else:
        data = clustered_data(rows, dim, queries)
    chosen = tuple(IndexKind(kind) for kind in kinds) or ALL_KINDS
    with StageProgress() as progress:
        report = run(data, kinds=chosen, k=k, threads=threads or cores(), progress=progress)
    for line in show(report, json_path, plot_path):
        click.echo(line)


@bench.command(short_help="Hard negatives: examples/s, and their effect on Recall.")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Folder of the data set."
)
@click.option(
    "--seeds", default=2, show_default=True, type=AT_LEAST_ONE, help="Runs of each strategy."
)
@json_option
@click.pass_obj
def mining(settings: Settings, data: Path, seeds: int, json_path: Path | None) -> None:
    """Hard negatives: examples/s through a cluster, and the effect of each strategy on Recall.

    All runs are trained with `training` of the configuration for equal steps; they are kept in the
    store, whose folder bench-mining must not exist yet.
    """
    from shardline.bench.training.mining_bench import print_report, run

    config = settings.config
    needs = {"num_cpus": serving_cpus(config), "in_flight": requests_in_flight(config)}
    print_warnings(enforce(before_ray(needs["in_flight"])))
    with StageProgress() as progress, ray_for("local", **needs, verbose=settings.verbose):
        report = run(config, data, range(seeds), progress)
    print_report(report, json_path)


@bench.command(short_help="What the Python clients cost per call, beside a raw socket.")
@click.option("--calls", default=3000, show_default=True, type=AT_LEAST_ONE, help="Of each client.")
@json_option
def client(calls: int, json_path: Path | None) -> None:
    """What Client and AsyncClient cost per call, beside a raw socket, against canned answers."""
    from shardline.bench.load.client_cost import lines_of, measure

    report = measure(calls)
    click.echo("\n".join(lines_of(report)))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")


bench.add_command(load)
bench.add_command(ab)
