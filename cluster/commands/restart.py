"""``restart``: every shard process is replaced by a new one, without a partial answer."""

import time
from collections.abc import Callable
from typing import Any

import click

from shardline.cluster.cli import Settings
from shardline.cluster.console import StageProgress
from shardline.cluster.serving.launched import asked, controller
from shardline.cluster.serving.ray_session import attached_ray
from shardline.shards.core.errors import InvalidInput, Unavailable

POLL_S = 0.5
ANSWERS_WITHIN_S = 10.0
# A controller that dies is started again by Ray, and says then what became of the restart.
AWAY_S = 60.0


@click.command()
@click.option("--rolling", is_flag=True, help="One replica after the other.")
@click.option("--stop", is_flag=True, help="End a restart that is under way; replicas stay.")
@click.pass_obj
def restart(settings: Settings, rolling: bool, stop: bool) -> None:
    """Replace every shard process of a launched cluster, without a partial answer.

    A new process loads the shard and takes part before the old one ends, so a host needs room for
    one more shard than it holds. Use it after new code has been installed on the hosts.
    Interrupting the command stops the display, not the restart; run again, it goes on showing.
    --stop ends the restart itself, after the replica that is being replaced.
    """
    if rolling == stop:
        raise InvalidInput(
            "restart does one thing",
            expected="--rolling or --stop",
            got="both" if rolling else "neither",
        )
    address = settings.config.cluster.address
    if address == "local":
        raise InvalidInput(
            "restart is for a launched cluster",
            expected='cluster.address "auto" or HOST:PORT',
            got='"local": stop `shardline serve` and start it again',
        )
    with attached_ray(address, verbose=settings.verbose), StageProgress() as progress:
        if stop:
            stopped = asked(controller().stop_restart.remote(), timeout_s=ANSWERS_WITHIN_S)
            click.echo(stopped_line(stopped))
            return
        begun = asked(controller().restart_rolling.remote(), timeout_s=ANSWERS_WITHIN_S)
        replaced = follow(begun, _progress, progress, progress.note)
    click.echo(f"replaced {replaced} replicas")


def stopped_line(progress: dict[str, Any] | None) -> str:
    """What became of a restart that was to be stopped, from the progress of the newest; None: there
    was none."""
    if progress is None or not progress["is_stopped"]:
        return "no restart is under way"
    return f"stopped: {progress['done']} of {progress['total']} replicas were replaced"


def follow(
    begun: dict[str, Any],
    ask: Callable[[], dict[str, Any] | None],
    update: Callable[[str, int, int], None],
    note: Callable[[str], None],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Waits for the end of a rolling restart; the number of replicas it replaced.

    ask: the progress of the newest restart, None if there was none; raises Unavailable.

    Raises:
        Unavailable: it was cut short or stopped, or the controller has not answered for AWAY_S.
    """
    found: dict[str, Any] | None = begun
    told: object = None
    heard_at = clock()
    while True:
        if found is None or found["number"] != begun["number"]:
            raise Unavailable(
                "the restart was cut short",
                got="another generation is served, or the controller began anew",
                hint="run the command again to replace the rest",
            )
        update("replacing shards", found["done"], found["total"])
        if found["trouble"] != told and found["trouble"] is not None:
            note(f"warning: {found['trouble']['text']}")
        told = found["trouble"]
        if found["is_stopped"]:
            raise Unavailable(
                "the restart was stopped",
                got=f"{found['done']} of {found['total']} replicas replaced",
                hint="run the command again to replace them all",
            )
        if found["is_over"]:
            return int(found["done"])
        sleep(POLL_S)
        try:
            found, heard_at = ask(), clock()
        except Unavailable:  # a controller that died is back within seconds
            if clock() - heard_at > AWAY_S:
                raise


def _progress() -> dict[str, Any] | None:
    progress: dict[str, Any] | None = asked(
        controller().restart_progress.remote(), timeout_s=ANSWERS_WITHIN_S
    )
    return progress
