"""``bench load``: measures an endpoint under load and under faults."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardline.bench.load.scenarios import SCENARIOS, Scenario, find_scenario
from shardline.cluster.cli import Settings
from shardline.cluster.commands.address import address_of, key_file_option
from shardline.cluster.commands.bench_options import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    index_for,
    json_option,
    plot_option,
)
from shardline.cluster.commands.serve import serving_cpus
from shardline.cluster.console import StageProgress, print_warnings
from shardline.cluster.preflight.check import enforce
from shardline.cluster.preflight.machine import before_ray
from shardline.cluster.preflight.open_files import requests_in_flight
from shardline.cluster.serving.ray_session import ray_for
from shardline.cluster.serving.serving_keys import client_key
from shardline.shards.core.errors import InvalidInput

if TYPE_CHECKING:
    from shardline.bench.load.command import Where
    from shardline.bench.load.step import Options

WARM_UP_S = 3.0
LOAD_EXAMPLE = (
    "shardline bench load kill-shard --rows 100000 --rate 100 --seconds 20 \\",
    "  --json kill-shard.json --plot kill-shard.png",
)


class LoadCommand(click.Command):
    """A command whose help lists the scenarios as their module describes them."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Scenarios"):
            formatter.write_dl([(each.name, each.summary) for each in SCENARIOS.values()])
        with formatter.section("Example, from an empty folder to a plot"):
            for line in LOAD_EXAMPLE:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


@click.command(cls=LoadCommand, short_help="Measure an endpoint under load and under faults.")
@click.argument("scenario", default="rate")
@click.option("--url", help="A running endpoint.  [default: the one that serves this store]")
@key_file_option
@click.option(
    "--rows", type=AT_LEAST_ONE, help="Bring up a clustered corpus of this many rows instead."
)
@click.option("--dim", default=128, show_default=True, type=AT_LEAST_ONE, help="Its dimension.")
@click.option("--data", type=click.Path(path_type=Path), help="Ask as the users of this data set.")
@click.option("-k", default=100, show_default=True, type=AT_LEAST_ONE, help="Results per query.")
@click.option(
    "--rate",
    default=50.0,
    show_default=True,
    type=POSITIVE,
    help="Requests per second, also of the floor.",
)
@click.option(
    "--seconds",
    default=30.0,
    show_default=True,
    type=POSITIVE,
    help="Measured time of one step; most scenarios have one step.",
)
@click.option(
    "--warm-up",
    default=WARM_UP_S,
    show_default=True,
    type=NOT_NEGATIVE,
    help="Seconds of load before the measurement.",
)
@click.option(
    "--arrivals",
    type=click.Choice(["poisson", "constant"]),
    default="poisson",
    show_default=True,
    help="Random (Poisson) as from independent users, or evenly spaced.",
)
@click.option(
    "--clients",
    default=1,
    show_default=True,
    type=AT_LEAST_ONE,
    help="Client processes at first; doubled up to 4 while they are the bottleneck.",
)
@click.option(
    "--shard",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="The shard that faults hit.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Same seed, same requests.",
)
@json_option
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

    SCENARIO is one of those below; `rate` when it is left out. The endpoint is the one that serves
    this store (`shardline serve` in another terminal), or that of --url, or one that is brought
    up for the run with a corpus of --rows.

    Requests leave on a schedule fixed beforehand, and latencies count from the time a request was
    meant to leave; errors and refusals are counted apart. Where a scenario says closed loop, a
    request leaves when the one before on its connection is answered instead. Queries are new
    vectors near the items, or the users of --data.

    Each run first checks that every shard answers, searches the bare index in this process, and
    sends empty requests in the way of its searches: these are the floors. The store must hold the
    generation served: recall and the bare index need it. The line above the table says which share
    of the searches the result cache answered; queries do not repeat within a run, except in `zipf`.
    """
    from shardline.bench.load.command import Where
    from shardline.bench.load.schedule import Arrivals
    from shardline.bench.load.step import Options

    if url is not None and rows is not None:
        raise InvalidInput("--url and --rows exclude each other")
    chosen = find_scenario(scenario)
    key = client_key(key_file)
    if url is None and rows is None and settings.config.cluster.address != "local":
        address = address_of(settings, url, key_file)
        url, key = address.url, address.key
    where = Where(url=url, key=key, rows=rows, dim=dim)
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
    measure(settings, chosen, where, options, data=data, json_path=json_path, plot_path=plot_path)


def measure(
    settings: Settings,
    scenario: Scenario,
    where: "Where",
    options: "Options",
    *,
    data: Path | None = None,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Brings up what ``where`` names, runs the scenario and shows its report."""
    from shardline.bench.load.command import check, run, show

    check(scenario, where, options)
    if where.rows is not None:
        settings.preferences["index"] = index_for(where.rows)
        if scenario.name != "zipf":  # else repeated queries would measure the cache
            settings.preferences["router.cache_bytes"] = 0
    config = settings.config
    with ExitStack() as stack:
        progress = stack.enter_context(StageProgress())
        if where.rows is not None:
            cpus, in_flight = serving_cpus(config), requests_in_flight(config)
            print_warnings(enforce(before_ray(in_flight)))
            stack.enter_context(
                ray_for("local", num_cpus=cpus, verbose=settings.verbose, in_flight=in_flight)
            )
        report = run(config, scenario, where, options, data=data, progress=progress)
    for line in show(report, json_path, plot_path):
        click.echo(line)
