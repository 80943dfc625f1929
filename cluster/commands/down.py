"""``down``: stop a cluster, or Ray itself on all of its hosts."""

import signal
import time

import click
import psutil

from shardline.cluster.cli import Settings
from shardline.cluster.serving.ending import ORDERLY_S
from shardline.cluster.serving.endpoint import Endpoint, find_endpoint, remove_note
from shardline.cluster.serving.leftovers import reap_orphans
from shardline.cluster.serving.ray_session import attached_ray
from shardline.cluster.serving.stopping import end_ray, stop_launched
from shardline.shards.core.errors import InvalidInput, NotFound, Unavailable

STOP_TIMEOUT_S = ORDERLY_S + 5.0  # it ends itself sooner unless it hangs altogether
KILL_TIMEOUT_S = 5.0
STOP_POLL_S = 0.1


@click.command()
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="On a launched cluster, end Ray on every host too: every Ray process that "
    "this user runs there, other jobs and other Ray clusters included.",
)
@click.pass_obj
def down(settings: Settings, everything: bool) -> None:
    """Stop the cluster that serves this store, and clean up after ones that were killed.

    On a launched cluster its Ray goes on, and so does Serve if it runs other applications.
    """
    config = settings.config
    is_local = config.cluster.address == "local"
    if everything and is_local:
        raise InvalidInput(
            "--all is for a launched cluster",
            expected='cluster.address "auto" or HOST:PORT',
            got='"local", whose private Ray ends with it anyway',
        )
    for pid in reap_orphans():
        click.echo(f"ended process {pid}, left by a session that was killed")
    if is_local:
        _stop_local(settings)
    else:
        _stop_launched(settings, everything)


def _stop_launched(settings: Settings, everything: bool) -> None:
    """Raises Unavailable: there is no such Ray; or Ray may still run on some host."""
    left: tuple[str, ...] = ()
    with attached_ray(settings.config.cluster.address, verbose=settings.verbose) as head:
        found, listening = stop_launched()
        click.echo("stopped" if found else "nothing was served on this Ray")
        if everything:
            left = end_ray(head, click.echo)
    if left:
        raise Unavailable(
            f"Ray may still run on {', '.join(left)}: not reached, or not ended in time",
            hint="run `ray stop` there",
        )
    if listening and not everything:
        raise Unavailable(
            f"HAProxy still listens at {', '.join(listening)}",
            hint="it ends within a minute; `shardline serve` finds the port taken until then",
        )


def _stop_local(settings: Settings) -> None:
    try:
        endpoint = find_endpoint(settings.store)
    except NotFound:
        click.echo("nothing is serving this store")
        return
    if _stop(endpoint):
        click.echo(f"stopped {endpoint.url}")
        return
    reap_orphans()
    remove_note(settings.store, endpoint)
    click.echo(
        f"process {endpoint.pid} did not stop within {STOP_TIMEOUT_S:.0f} s: killed, with all that "
        f"it had started at {endpoint.url}"
    )


def _stop(endpoint: Endpoint) -> bool:
    """Whether the serving process has ended in order; False: it had to be killed.

    Raises:
        Unavailable: it is another user's, or not even that ended it.
    """
    for number in (signal.SIGTERM, signal.SIGCONT):  # a stopped process acts on nothing else
        _send(endpoint, number)
    if _has_ended(endpoint, STOP_TIMEOUT_S):
        return True
    _send(endpoint, signal.SIGKILL)
    if not _has_ended(endpoint, KILL_TIMEOUT_S):
        raise Unavailable(
            f"process {endpoint.pid} cannot be killed",
            hint="it waits for a disk or a network share that does not answer",
        )
    return False


def _send(endpoint: Endpoint, number: signal.Signals) -> None:
    try:
        psutil.Process(endpoint.pid).send_signal(number)
    except psutil.NoSuchProcess:  # it has ended since
        pass
    except psutil.AccessDenied as error:
        raise _not_ours(endpoint) from error


def _has_ended(endpoint: Endpoint, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while endpoint.is_alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(STOP_POLL_S)
    return True


def _not_ours(endpoint: Endpoint) -> Unavailable:
    owner = psutil.Process(endpoint.pid).username()
    return Unavailable(
        f"process {endpoint.pid} is another user's, who alone may stop {endpoint.url}",
        hint=f"run `shardline down` as {owner}",
    )
