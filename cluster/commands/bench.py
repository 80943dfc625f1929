"""``bench``: what this machine makes of it, each figure beside its floor."""

from pathlib import Path

import click

from cluster.cli import Settings
from cluster.commands.serve import serving_cpus
from cluster.console import StageProgress
from cluster.launch import local_ray

out_option = click.option(
    "--out", type=click.Path(path_type=Path), help="Write the JSON to this file too."
)

# Tuned to this clustered corpus: recall@100 .99 with a third less work than the defaults
DEFAULT_INDEX = {"kind": "ivfpq-fs", "nlist": 1024, "nprobe": 8, "rerank_factor": 2}


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

    settings.preferences["index"] = DEFAULT_INDEX  # as a whole, or not at all
    config = settings.config
    cpus = serving_cpus(config)
    with StageProgress() as progress, local_ray(num_cpus=cpus, verbose=settings.verbose):
        report = run(config, rows=rows, dim=dim, k=k, rate=rate, seconds=seconds, progress=progress)
    print_report(report, out, k)
