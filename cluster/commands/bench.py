"""``bench``: what this machine makes of it, each figure beside its floor."""

from contextlib import ExitStack
from pathlib import Path

import click

from cluster.cli import Settings
from cluster.commands.address import key_file_option
from cluster.commands.serve import serving_cpus
from cluster.console import StageProgress
from cluster.keys import client_key
from cluster.launch import cores, local_ray
from shards.errors import InvalidInput

out_option = click.option(
    "--out", type=click.Path(path_type=Path), help="Write the JSON to this file too."
)
json_file_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the figures to this file."
)
plot_option = click.option(
    "--plot", "plot_path", type=click.Path(path_type=Path), help="Draw them into this PNG file."
)

# Tuned to this clustered corpus: recall@100 .99 with half the work of the defaults
DEFAULT_INDEX = {"kind": "ivfpq-fs", "nlist": 1024, "nprobe": 4, "rerank_factor": 1}
TUNED_ROWS = 500_000  # from which on that index suits the corpus


@click.group()
def bench() -> None:
    """Measure, with the floor beside the figure. Each benchmark ends in JSON."""


@bench.command()
@click.option("--rows", default=1_000_000, show_default=True, help="Vectors to index.")
@click.option("--dim", default=128, show_default=True, help="Their dimension.")
@click.option("-k", default=100, show_default=True, help="Results a query.")
@click.option("--rate", default=20.0, show_default=True, help="Requests a second, open loop.")
@click.option("--seconds", default=60.0, show_default=True, help="Length of each measurement.")
@out_option
@click.pass_obj
def latency(
    settings: Settings, rows: int, dim: int, k: int, rate: float, seconds: float, out: Path | None
) -> None:
    """HTTP latency of single queries, beside an empty request and the bare index.

    Vectors and index are kept in the store and reused. Use `taskset -c 0,1 shardline bench
    latency` for two cores.
    """
    from bench.latency import print_report, run

    settings.preferences |= {"index": DEFAULT_INDEX, "router.cache_bytes": 0}
    config = settings.config
    cpus = serving_cpus(config)
    with StageProgress() as progress, local_ray(num_cpus=cpus, verbose=settings.verbose):
        report = run(config, rows=rows, dim=dim, k=k, rate=rate, seconds=seconds, progress=progress)
    print_report(report, out, k)


@bench.command()
@click.argument("scenario", default="rate")
@click.option("--url", help="A running endpoint.  [default: the one that serves this store]")
@key_file_option
@click.option("--rows", type=int, help="Bring up a clustered corpus of this many rows instead.")
@click.option("--dim", default=128, show_default=True, help="Its dimension.")
@click.option("--data", type=click.Path(path_type=Path), help="Ask as the users of this data set.")
@click.option("-k", default=100, show_default=True, help="Results a query.")
@click.option("--rate", default=50.0, show_default=True, help="Requests/s; where a sweep begins.")
@click.option("--seconds", default=30.0, show_default=True, help="Measured time of a step.")
@click.option("--warm-up", default=3.0, show_default=True, help="Seconds before, not counted.")
@click.option(
    "--arrivals",
    type=click.Choice(["poisson", "constant"]),
    default="poisson",
    show_default=True,
    help="When requests leave.",
)
@click.option("--clients", default=1, show_default=True, help="Client processes to begin with.")
@click.option("--shard", default=0, show_default=True, help="The shard that faults hit.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same requests.")
@json_file_option
@plot_option
@click.pass_obj
def load(
    settings: Settings,
    scenario: str,
    url: str | None,
    key_file: Path | None,
    rows: int | None,
    dim: int,
    data: Path | None,
    k: int,
    rate: float,
    seconds: float,
    warm_up: float,
    arrivals: str,
    clients: int,
    shard: int,
    seed: int,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Load on an endpoint, beside its floor and the bare index.

    SCENARIO: rate, sweep, batch, zipf, mixed-k, features, kill-shard, stall-shard,
    restart-router, overload, capacity. Requests leave on a schedule fixed beforehand, and
    latencies count from the time a request was meant to leave; errors and refusals are counted
    apart. The store must hold the generation served: recall and the bare index need it.
    """
    from bench.load.command import Where, run, show
    from bench.load.scenarios import find_scenario
    from bench.load.schedule import Arrivals
    from bench.load.step import Options

    if url is not None and rows is not None:
        raise InvalidInput("--url and --rows exclude each other")
    chosen = find_scenario(scenario)
    where = Where(url=url, key=client_key(key_file), rows=rows, dim=dim)
    options = Options(
        rate=rate,
        seconds=seconds,
        warm_up_s=warm_up,
        k=k,
        arrivals=Arrivals(arrivals),
        clients=clients,
        shard=shard,
        seed=seed,
    )
    if rows is not None:
        settings.preferences["index"] = index_for(rows)
        if chosen.name != "zipf":  # else repeated queries would measure the cache
            settings.preferences["router.cache_bytes"] = 0
    config = settings.config
    with ExitStack() as stack:
        progress = stack.enter_context(StageProgress())
        if rows is not None:
            cpus = serving_cpus(config)
            stack.enter_context(local_ray(num_cpus=cpus, verbose=settings.verbose))
        report = run(config, chosen, where, options, data=data, progress=progress)
    for line in show(report, json_path, plot_path):
        click.echo(line)


def index_for(rows: int) -> dict[str, object]:
    """The index of a clustered corpus: the tuned one, or the defaults where it has too few rows."""
    return DEFAULT_INDEX if rows >= TUNED_ROWS else {"kind": DEFAULT_INDEX["kind"]}


@bench.command()
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
@click.option("--rows", default=100_000, show_default=True, help="Rows of clustered.")
@click.option("--dim", default=128, show_default=True, help="Their dimension.")
@click.option("--queries", default=500, show_default=True, help="Queries, none of them indexed.")
@click.option("-k", default=100, show_default=True, help="Results a query.")
@click.option("--threads", type=int, help="Of builds and batches.  [default: the cores there are]")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(["flat", "ivf", "hnsw", "pq", "ivfpq", "ivfpq-fs", "sq8"]),
    help="Only these, and flat. Repeatable.",
)
@json_file_option
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
    """Index kinds side by side: build time, size, recall, time of a query; Pareto plot."""
    from bench.index_bench import run, show
    from bench.index_data import Source, clustered_data, mnist_data, vectors_data
    from bench.index_kinds import ALL_KINDS
    from shards.index_spec import IndexKind
    from shards.schema import Metric

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


@bench.command()
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Folder of the data set."
)
@click.option("--seeds", default=2, show_default=True, help="Runs of each strategy.")
@out_option
@click.pass_obj
def mining(settings: Settings, data: Path, seeds: int, out: Path | None) -> None:
    """Hard negatives: examples/s through a cluster, and what each strategy does to Recall.

    All runs are trained with `training` of the configuration for equal steps; they are kept in the
    store, whose folder bench-mining must not exist yet.
    """
    from bench.mining import print_report, run

    config = settings.config
    cpus = serving_cpus(config)
    with StageProgress() as progress, local_ray(num_cpus=cpus, verbose=settings.verbose):
        report = run(config, data, range(seeds), progress)
    print_report(report, out)
