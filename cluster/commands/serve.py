"""``serve`` and ``down``: a cluster's life."""

import signal
import threading
import time

import click
import psutil

from cluster.cli import Settings
from cluster.config import ShardlineConfig
from cluster.console import StageProgress
from cluster.deployment import check_http_port, serving, start_serving, stop_serving
from cluster.endpoint import Endpoint, find_endpoint
from cluster.launch import attached_ray, cores, ray_for, reap_orphans
from shards.errors import NotFound, Unavailable

STOP_TIMEOUT_S = 60.0
STOP_POLL_S = 0.1


@click.command()
@click.option("--generation", type=int, help="Serve this one instead of the live one.")
@click.option("--port", type=int, help="Short for --set cluster.http_port=PORT.")
@click.pass_obj
def serve(settings: Settings, generation: int | None, port: int | None) -> None:
    """Serve the live generation over HTTP until Ctrl-C.

    With `cluster.address: local`, the default, a private Ray is started and stopped again with
    this command. With any other address the cluster's Ray is used, and the command returns once
    all shards answer; `shardline down` stops them.
    """
    if port is not None:
        settings.extra_overrides.append(f"cluster.http_port={port}")
    config = settings.config
    address = config.cluster.address
    check_http_port(config)
    with StageProgress() as progress:
        progress.note("starting Ray" if address == "local" else f"joining Ray at {address}")
        with ray_for(address, num_cpus=serving_cpus(config), verbose=settings.verbose):
            if address != "local":
                endpoint = start_serving(config, generation=generation, on_stage=progress.note)
                progress.note(_ready_line(endpoint))
                return
            # Ray has put its own handlers on the signals by now; ours go over them
            with stop_on_signals() as stopped:
                with serving(config, generation=generation, on_stage=progress.note) as endpoint:
                    progress.note(_ready_line(endpoint))
                    stopped.wait()
                progress.note("stopping")


@click.command()
@click.pass_obj
def down(settings: Settings) -> None:
    """Stop the cluster that serves this store, and clean up after ones that were killed."""
    config = settings.config
    for pid in reap_orphans():
        click.echo(f"ended process {pid}, left by a session that was killed")
    if config.cluster.address != "local":
        with attached_ray(config.cluster.address, verbose=settings.verbose):
            stop_serving()
        click.echo("stopped")
        return
    try:
        endpoint = find_endpoint(settings.store)
    except NotFound:
        click.echo("nothing is serving this store")
        return
    process = psutil.Process(endpoint.pid)
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while not _has_ended(process):
        if time.monotonic() > deadline:
            raise Unavailable(f"process {endpoint.pid} did not stop within {STOP_TIMEOUT_S:.0f} s")
        time.sleep(STOP_POLL_S)
    click.echo(f"stopped {endpoint.url}")


def _has_ended(process: psutil.Process) -> bool:
    """Gone, or a zombie that its parent has not collected yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class stop_on_signals:  # noqa: N801 - used as a function: `with stop_on_signals() as stopped`
    """SIGINT and SIGTERM set the event it yields, and the block ends in good order."""

    def __enter__(self) -> threading.Event:
        self._stopped = threading.Event()
        self._before = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self._stopped

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        if self._stopped.is_set():  # asked twice: do not wait for good order
            raise KeyboardInterrupt
        self._stopped.set()


def _ready_line(endpoint: Endpoint) -> str:
    return (
        f"serving generation {endpoint.generation} at {endpoint.url}  "
        f"(POST {endpoint.url}/v1/search, docs at {endpoint.url}/docs)"
    )


def serving_cpus(config: ShardlineConfig) -> int:
    """Room for every actor: Ray counts CPUs as permits here, the cores are shared anyway."""
    needed = config.cluster.shards * config.cluster.cpus_per_shard + 2
    return max(cores(), int(needed + 1))
