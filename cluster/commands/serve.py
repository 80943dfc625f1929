"""``serve``: start a cluster."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import click

from shardline.cluster.cli import Settings
from shardline.cluster.config import ShardlineConfig
from shardline.cluster.console import StageProgress, print_warnings
from shardline.cluster.preflight.check import enforce
from shardline.cluster.preflight.machine import before_serving, check_store
from shardline.cluster.preflight.open_files import requests_in_flight
from shardline.cluster.preflight.servable import servable_generation
from shardline.cluster.serving.deployment import serving, start_serving
from shardline.cluster.serving.endpoint import refuse_if_served, remove_own_note
from shardline.cluster.serving.leftovers import reap_orphans
from shardline.cluster.serving.ray_session import cores, ray_for
from shardline.cluster.serving.serving_keys import serving_keys
from shardline.cluster.serving.start_lock import starting
from shardline.cluster.store import Store
from shardline.shards.storage.generation import read_generation


@click.command()
@click.option("--generation", type=int, help="Serve this one instead of the live one.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    help="Short for --set cluster.http_port=PORT; 0 picks a free one.",
)
@click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    help="Short for --set cluster.key_file=FILE.  [default: $SHARDLINE_KEYS, else <store>/keys]",
)
@click.option("--insecure", is_flag=True, help="Ask for no API key.")
@click.pass_obj
def serve(
    settings: Settings,
    generation: int | None,
    port: int | None,
    key_file: Path | None,
    insecure: bool,
) -> None:
    """Serve the live generation over HTTP until Ctrl-C.

    With `cluster.address: local`, the default, a private Ray is started and stopped again with
    this command. With any other address the cluster's Ray is used, and the command returns once
    all shards answer; `shardline down` stops them.

    Requests need an API key. Without a key file one is made in the store; `shardline keys` lists
    and changes what is in it.
    """
    if port is not None:
        settings.extra_overrides.append(f"cluster.http_port={port}")
    if key_file is not None:
        settings.extra_overrides.append(f"cluster.key_file={json.dumps(str(key_file))}")
    if insecure:
        settings.extra_overrides.append("cluster.insecure=true")
    config = settings.config
    address = config.cluster.address
    reap_orphans()  # one of them may hold the port that is looked at next
    with ExitStack() as until_served, StageProgress() as progress:
        until_served.enter_context(starting(settings.store))
        check_serving(config, generation)  # not its number: another may go live while Ray starts
        keys = serving_keys(config)
        _warn_of_other_shards(settings, config, generation)
        progress.note("starting Ray" if address == "local" else f"joining Ray at {address}")
        with ray_for(
            address,
            num_cpus=serving_cpus(config),
            verbose=settings.verbose,
            in_flight=requests_in_flight(config),
        ) as ending:
            if address != "local":
                started = start_serving(
                    config, keys=keys, generation=generation, on_stage=progress.note
                )
                progress.note(_ready_line(started.generation, started.urls))
                return
            ending.also(partial(remove_own_note, settings.store))
            with serving(
                config, keys=keys, generation=generation, on_stage=progress.note
            ) as endpoint:
                until_served.close()
                line = _ready_line(endpoint.generation, (endpoint.url,))
                ending.wait(partial(progress.note, line))
                progress.note("stopping")


def check_serving(config: ShardlineConfig, generation: int | None) -> int:
    """Everything that can be known before Ray is started, which takes seconds.

    The number of the generation to serve; generation None: the live one.

    Raises:
        Unavailable: the store is served already, its port cannot be listened on, or this machine
            lacks what a cluster needs.
        ConfigError: the address to listen on is not this machine's.
        DataError: the store cannot be written to.
        NotFound: there is no such generation.
        CorruptFile, NewerFormat: it cannot be used; the hint says what can be done.
    """
    store = Store(config.store.resolve())
    if store.root.exists():  # a file, say; what is not there has no generation
        enforce([check_store(store)])
    refuse_if_served(store)
    number = servable_generation(store, generation)
    print_warnings(enforce(before_serving(config, number)))
    return number


def _warn_of_other_shards(
    settings: Settings, config: ShardlineConfig, generation: int | None
) -> None:
    """The number of shards was decided when the generation was built."""
    asked = config.cluster.shards
    number = generation or settings.store.current()
    built = len(read_generation(settings.store.generation(number)).shards)
    if asked != built and "shards" in config.cluster.model_fields_set:
        click.echo(
            f"warning: cluster.shards={asked} changes nothing: generation {number} was built "
            f"with {built} shards; `shardline build` makes one with {asked}",
            err=True,
        )


def _ready_line(generation: int, urls: Sequence[str]) -> str:
    first = urls[0]
    return (
        f"serving generation {generation} at {', '.join(urls)}  "
        f"(POST {first}/v1/search, docs at {first}/docs)"
    )


def serving_cpus(config: ShardlineConfig) -> int:
    """Logical CPUs for Ray: enough for every actor, because the cores are shared anyway."""
    needed = config.cluster.shards * config.cluster.cpus_per_shard + 2
    return max(cores(), int(needed + 1))
