"""Asks every host of the attached Ray what it has, and judges whether a generation can be served
there: room for the replicas, memory, one store, one version, the port.

A small task is pinned to each host; the rules are in ``cluster.preflight.host_checks``.
"""

import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.control.hosts import Host, fits
from shardline.cluster.control.placement import open_generation
from shardline.cluster.control.placement_state import Rules
from shardline.cluster.control.ray_hosts import living_hosts
from shardline.cluster.http_address import is_loopback
from shardline.cluster.preflight.check import Check, failed, passed, warned
from shardline.cluster.preflight.folders import Folder, check_writable
from shardline.cluster.preflight.free_memory import FreeMemory
from shardline.cluster.preflight.host_checks import (
    Answer,
    check_hosts,
    check_room,
    check_silent,
    on_host,
)
from shardline.cluster.preflight.host_facts import Question, host_facts
from shardline.cluster.preflight.open_files import requests_in_flight
from shardline.cluster.store import Store
from shardline.shards.core.errors import ConfigError, Unavailable, last_line
from shardline.shards.core.messages import RoutingTable, ShardRoute
from shardline.shards.core.partition import Partitioning
from shardline.shards.core.schema import Metric
from shardline.shards.index.spec import Device
from shardline.shards.process.shard_actor import NODE_HOST
from shardline.shards.storage.generation import (
    ATTRIBUTES_NAME,
    GenerationManifest,
    read_generation,
)

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 60.0  # a worker process is started for it, and imports our code
PROBE_PREFIX = ".shardline-probe-"
# Serve's replicas and its fallback proxy listen there too, and HAProxy asks them on the loopback
HTTP_HOSTS = ("0.0.0.0", "127.0.0.1", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Replicas of each shard, and the CPUs and GPUs that each of them reserves in Ray."""

    shards: int
    replicas: int
    cpus: float
    gpus: float = 0


def wanted_of(config: ShardlineConfig, manifest: GenerationManifest) -> Wanted:
    cluster = config.cluster
    return Wanted(
        shards=len(manifest.shards),
        replicas=cluster.replicas,
        cpus=cluster.cpus_per_shard,
        gpus=cluster.gpus_per_shard if manifest.index.device is Device.CUDA else 0,
    )


def survey(
    config: ShardlineConfig, number: int | None, *, is_served: bool, has_serve: bool
) -> list[Check]:
    """The checks of all hosts. number: the generation to serve, None where there is none.

    is_served: its cluster runs, so its memory is in use; has_serve: Serve does, so the port is.
    """
    hosts = living_hosts()
    checks = [check_http_options(config), *check_several(config, len(hosts))]
    manifest = None
    if number is not None:
        manifest = read_generation(Store(config.store.resolve()).generation(number))
        checks.append(check_fits(hosts, wanted_of(config, manifest)))
    own_node = ray.get_runtime_context().get_node_id()
    own_address = next((host.address for host in hosts if host.node_id == own_node), "this host")
    root = config.store.resolve()
    question = Question(
        store=str(root),
        generation=number,
        probe=None,
        http_host=config.cluster.http_host,
        port=None if has_serve else config.cluster.http_port,
    )
    with ExitStack() as stack:
        try:
            question = replace(question, probe=stack.enter_context(probe_in(root)))
        except OSError as error:
            refused = Folder(path=root, free_bytes=0, can_execute=False, refusal=error)
            checks.append(check_writable("store", refused))
        own = host_facts(own_address, question)
        answers, silent = ask_hosts(hosts, question)
    checks += check_silent(silent)
    checks += check_hosts(answers, own, in_flight=requests_in_flight(config))
    if manifest is not None and not is_served:
        memory = {answer.facts.address: answer.facts.memory for answer in answers}
        loaded, cache = shard_bytes(manifest), config.router.cache_bytes
        checks += check_rooms(hosts, wanted_of(config, manifest), memory, loaded, cache_bytes=cache)
    return checks


def check_beside(config: ShardlineConfig, number: int) -> list[Check]:
    """Whether the hosts have memory for a generation beside what they hold now."""
    manifest = read_generation(Store(config.store.resolve()).generation(number))
    return _check_loaded(config, manifest, shard_bytes(manifest))


def check_one_beside(config: ShardlineConfig, number: int) -> list[Check]:
    """Whether each host has memory for its largest shard of a generation beside what it holds now,
    twice: while its index is made it is in memory once more."""
    manifest = read_generation(Store(config.store.resolve()).generation(number))
    return _check_loaded(config, manifest, [2 * size for size in shard_bytes(manifest)], most=1)


def _check_loaded(
    config: ShardlineConfig,
    manifest: GenerationManifest,
    loaded: Sequence[int],
    most: int | None = None,
) -> list[Check]:
    """loaded: bytes of each shard. most: so many of the largest of a host at a time; None: all."""
    hosts, number = living_hosts(), manifest.generation
    question = Question(
        store=str(config.store.resolve()),
        generation=number,
        probe=None,
        http_host=config.cluster.http_host,
        port=None,
    )
    answers, silent = ask_hosts(hosts, question)
    memory = {answer.facts.address: answer.facts.memory for answer in answers}
    wanted = wanted_of(config, manifest)
    rooms = check_rooms(hosts, wanted, memory, loaded, cache_bytes=0, most=most)
    return [*check_silent(silent), *rooms]


def check_http_options(config: ShardlineConfig) -> Check:
    """What a launched cluster cannot listen on."""
    cluster, name = config.cluster, "HTTP address"
    if cluster.http_host not in HTTP_HOSTS:
        return failed(
            name,
            ConfigError(
                "a launched cluster listens on every address of its hosts, or on none but loopback",
                field="cluster.http_host",
                expected='"0.0.0.0", or "127.0.0.1" for a proxy of your own on the same host',
                got=repr(cluster.http_host),
            ),
        )
    if not cluster.http_port:
        return failed(
            name,
            ConfigError(
                "a launched cluster has the same port on every host",
                field="cluster.http_port",
                expected="1 to 65535",
                got="0",
            ),
        )
    return passed(name, f"{cluster.http_host}, port {cluster.http_port}, on every host")


def check_several(config: ShardlineConfig, hosts: int) -> Iterator[Check]:
    """What only a cluster of one host can have: addresses that other hosts cannot reach."""
    cluster = config.cluster
    if hosts < 2:
        return
    if cluster.shard_host != NODE_HOST:
        error = ConfigError(
            f"routers reach the shards of {hosts} hosts at the addresses of those",
            field="cluster.shard_host",
            expected=f'"{NODE_HOST}"',
            got=repr(cluster.shard_host),
        )
        yield failed("shard address", error)
    if not is_loopback(cluster.http_host):
        return
    if cluster.router_replicas is not None and cluster.router_replicas < hosts:
        error = ConfigError(
            f"with cluster.http_host {cluster.http_host} a host's HTTP port reaches the router of "
            "that host alone",
            field="cluster.router_replicas",
            expected=f"null, or at least {hosts}, the number of hosts",
            got=str(cluster.router_replicas),
            hint='or set cluster.http_host to "0.0.0.0"',
        )
        yield failed("HTTP address", error)
    else:
        yield warned(
            "HTTP address",
            f"with cluster.http_host {cluster.http_host} a host whose router is away answers 503: "
            'routers of other hosts cannot be asked in its stead, as with "0.0.0.0"',
        )


def check_fits(hosts: Sequence[Host], wanted: Wanted) -> Check:
    """Whether Ray's hosts have room for every replica."""
    reason = fits(
        hosts,
        shards=wanted.shards,
        replicas=wanted.replicas,
        cpus_per_shard=wanted.cpus,
        gpus_per_shard=wanted.gpus,
    )
    if reason is None:
        count = wanted.shards * wanted.replicas
        return passed("placement", f"{count} replicas on {len(hosts)} hosts")
    error = Unavailable(
        "the hosts have no room for the shards",
        got=reason,
        hint="lower cluster.replicas or cluster.cpus_per_shard, or add hosts",
    )
    return failed("placement", error)


def check_rooms(
    hosts: Sequence[Host],
    wanted: Wanted,
    memory: Mapping[str, FreeMemory],
    loaded: Sequence[int],
    *,
    cache_bytes: int,
    most: int | None = None,
) -> Iterator[Check]:
    """Each host's memory against the shards that the controller will place there.

    memory: by the host's address; loaded: bytes of each shard; most: as of ``_check_loaded``.
    """
    for address, shards in first_placement(hosts, wanted).items():
        if address in memory:
            sizes = sorted((loaded[shard] for shard in shards), reverse=True)[:most]
            yield on_host(address, check_room(memory[address], sizes, cache_bytes=cache_bytes))


def first_placement(hosts: Sequence[Host], wanted: Wanted) -> dict[str, list[int]]:
    """The shards that each host gets at the first start, by its address: by the controller's own
    rules. What fits nowhere is left out."""
    rules = Rules(replicas=wanted.replicas, cpus=wanted.cpus, gpus=wanted.gpus)
    table = _table_of(wanted.shards)
    placement, _ = open_generation(table, counter=1, rules=rules, hosts=hosts, found={})
    placed = placement.staying()
    return {
        host.address: [state.key.shard for state in placed if state.node_id == host.node_id]
        for host in hosts
    }


def _table_of(shards: int) -> RoutingTable:
    """Of a generation of which nothing but the number of its shards matters."""
    return RoutingTable(
        version=0,
        generation=1,
        generation_dir="",
        model_version="",
        dim=1,
        metric=Metric.DOT,
        index="",
        partitioning=Partitioning.RANGE,
        boundaries=(),
        shards=tuple(ShardRoute(shard=shard, rows=0, replicas=()) for shard in range(shards)),
    )


def shard_bytes(manifest: GenerationManifest) -> list[int]:
    """What each shard loads; attributes are mapped files, so page cache."""
    return [
        sum(file.bytes for file in entry.files if not file.name.endswith(ATTRIBUTES_NAME))
        for entry in manifest.shards
    ]


def ask_hosts(hosts: Sequence[Host], question: Question) -> tuple[list[Answer], dict[str, str]]:
    """What the hosts say, and why others do not, by address."""
    asked_s = time.time()
    references = {host.address: _ask(host, question) for host in hosts}
    answers, silent = [], {}
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    for address, reference in references.items():
        try:
            facts = ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            silent[address] = f"nothing within {ANSWER_TIMEOUT_S:.0f} s"
        except ray.exceptions.RayError as error:
            silent[address] = last_line(error)
        else:
            answers.append(Answer(facts=facts, asked_s=asked_s, answered_s=time.time()))
    return answers, silent


@contextmanager
def probe_in(root: Path) -> Iterator[str]:
    """The name of a file that is in the folder for the length of the block.

    Raises:
        OSError: it cannot be written.
    """
    path = root / f"{PROBE_PREFIX}{secrets.token_hex(8)}"
    path.write_text("whether every host sees the same store\n")
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


def _ask(host: Host, question: Question) -> Any:
    pinned = NodeAffinitySchedulingStrategy(host.node_id, soft=False)
    task = ray.remote(host_facts).options(
        num_cpus=0, max_retries=0, scheduling_strategy=pinned, name="look at the host"
    )
    return task.remote(host.address, question)
