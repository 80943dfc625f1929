"""``cluster check``: what the hosts of a launcher file lack, before `ray up` finds it out."""

import secrets
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from shardline.cluster.cli import Settings
from shardline.cluster.config import ShardlineConfig
from shardline.cluster.console import print_table
from shardline.cluster.control.hosts import Host
from shardline.cluster.preflight.check import Check, Verdict, failed, passed, warned
from shardline.cluster.preflight.free_memory import FreeMemory
from shardline.cluster.preflight.host_checks import on_host
from shardline.cluster.preflight.launch_checks import (
    check_answer,
    check_own_token,
    ports_of,
    read_token,
)
from shardline.cluster.preflight.launch_file import TOKEN_PLACE, LaunchFile, read_launch_file
from shardline.cluster.preflight.launch_hosts import NoAnswer, ProbeAnswer, ask_hosts_by_ssh
from shardline.cluster.serving.survey import (
    PROBE_PREFIX,
    Wanted,
    check_fits,
    check_http_options,
    check_rooms,
    check_several,
)
from shardline.shards.core.errors import Unavailable

TOOLS = ("ssh", "rsync")
SOMETHING_WRONG = 3


@click.group()
def cluster() -> None:
    """Look after the hosts of a launched cluster."""


@cluster.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_obj
def check(settings: Settings, file: Path) -> int:
    """Check the hosts of a launcher FILE over ssh, before `ray up`; exit code 3 when one fails.

    Store, port, shards and replicas are those of the configuration: give that of the cluster with
    -c. Nothing is installed; a small file is written into the store and removed.
    """
    launch, config = read_launch_file(file), settings.config
    store = config.store
    if not store.is_absolute():
        click.echo(f"warning: store {store} is relative; hosts look for it in the home folder")
    token_path = Path.home() / TOKEN_PLACE
    own = read_token(token_path)
    here = [
        *(_tool(name) for name in TOOLS),
        check_own_token(own, token_path, brings_token=launch.brings_token),
        check_http_options(config),
        *check_several(config, len(launch.hosts)),
    ]
    answers = ask_hosts_by_ssh(
        launch,
        store=store,
        probe=f"{PROBE_PREFIX}{secrets.token_hex(8)}",
        ports=ports_of(launch, config.cluster.http_host, config.cluster.http_port),
    )
    by_host = {answer.address: list(check_answer(answer, launch, own, store)) for answer in answers}
    together = list(check_together(config, answers))
    _print(launch, by_host)
    every = here + [on_host(host, each) for host, found in by_host.items() for each in found]
    for each in every + together:
        if each.verdict is not Verdict.OK:
            click.echo(str(each))
    has_failed = any(each.verdict is Verdict.FAIL for each in every + together)
    if not has_failed:
        click.echo(f"{len(launch.hosts)} hosts are ready for `ray up {file}`")
    return SOMETHING_WRONG if has_failed else 0


def check_together(
    config: ShardlineConfig, answers: Sequence[ProbeAnswer | NoAnswer]
) -> Iterable[Check]:
    """Whether the hosts have the cores and the memory for what is to be served, if all answered."""
    found = [answer for answer in answers if isinstance(answer, ProbeAnswer)]
    if len(found) < len(answers):
        lost = f"{len(answers) - len(found)} of {len(answers)} hosts did not answer"
        yield warned("placement", f"cores and memory are not compared: {lost}")
        return
    hosts = [
        Host(node_id=each.address, address=each.address, cpus=each.content["cores"])
        for each in found
    ]
    loaded = next(
        (each.content["store"]["shards"] for each in found if each.content["store"]["shards"]),
        None,
    )
    shards = config.cluster.shards if loaded is None else len(loaded)
    wanted = Wanted(
        shards=shards, replicas=config.cluster.replicas, cpus=config.cluster.cpus_per_shard
    )
    yield check_fits(hosts, wanted)
    if loaded is None:
        yield passed("memory", "the store has no live generation yet")
        return
    memory = {
        each.address: FreeMemory(
            available_bytes=each.content["memory"],
            swap_bytes=each.content["swap"],
            limit="the host",
        )
        for each in found
    }
    yield from check_rooms(hosts, wanted, memory, loaded, cache_bytes=config.router.cache_bytes)


def _tool(name: str) -> Check:
    path = shutil.which(name)
    if path is not None:
        return passed(f"{name} here", path)
    error = Unavailable(f"no {name} on this machine, which `ray up` needs", hint="install it")
    return failed(f"{name} here", error)


def _print(launch: LaunchFile, by_host: dict[str, list[Check]]) -> None:
    """One line per host, one column per step, as far as the host got."""
    steps = list(dict.fromkeys(check.name for found in by_host.values() for check in found))
    rows = []
    for host, found in by_host.items():
        verdicts = {check.name: check.verdict.value for check in found}
        role = "head" if host == launch.head else ""
        rows.append((f"{host} {role}".strip(), *(verdicts.get(step, "-") for step in steps)))
    print_table(str(launch.path), ("host", *steps), rows)
