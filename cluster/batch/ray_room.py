"""Where the stages of a job on Ray have room: hosts and stages in, a host for each stage out. Pure.

Ray waits for ever for a host that can hold a stage, so this says beforehand which stage has none,
and with what numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shardline.shards.core.errors import Unavailable

SIDE_SHARE = 0.1  # of the CPUs, each for reading and for writing
MOST_NAMED = 8  # hosts, or stages, in an error
UNIT = 10_000  # parts of a CPU that Ray counts in


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRoom:
    """What is free on a host: CPUs, and bytes of memory."""

    name: str
    cpus: float
    memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageNeed:
    """What a stage reserves on one host."""

    name: str
    cpus: float
    memory: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCpus:
    """What each stage reserves; ``threads`` of faiss in a shard's stage."""

    shard: float
    side: float
    threads: int


def stage_cpus(cpus: int, shards: int, most: float = math.inf) -> StageCpus:
    """The share of each stage in ``cpus``; more than one CPU is a whole number, as Ray asks.

    most: that one host has.
    """
    side = min(1.0, cpus * SIDE_SHARE)
    each = min((cpus - 2 * side) / shards, most)
    shard = float(math.floor(each)) if each >= 1 else max(1, math.floor(each * UNIT)) / UNIT
    return StageCpus(shard=shard, side=side, threads=max(1, math.floor(each)))


def needs_of(share: StageCpus, memory: Sequence[int]) -> list[StageNeed]:
    """The reader, a stage for each shard, and the writer. memory: bytes of each shard's stage."""
    shards = (
        StageNeed(name=f"shard {shard}", cpus=share.shard, memory=size)
        for shard, size in enumerate(memory)
    )
    return [
        StageNeed(name="reading", cpus=share.side),
        *shards,
        StageNeed(name="writing", cpus=share.side),
    ]


def planned_stages(
    hosts: Sequence[HostRoom], memory: Sequence[int], cpus: int | None
) -> tuple[StageCpus, list[StageNeed]]:
    """The shares of ``cpus``, and stages that fit on the hosts.

    cpus None: all that are free but one per host, where Serve may have to start a router again; or
    fewer, until the stages fit.

    Raises:
        Unavailable: they do not fit; names the stage, with the arithmetic.
    """
    free = math.floor(sum(host.cpus for host in hosts) + 1 / UNIT)
    if free < (cpus or 1):
        raise Unavailable(
            "too few CPUs of the Ray cluster are free",
            expected=f"{cpus or 1}",
            got=f"{free}",
            hint="give the job fewer with --cpus, add hosts, or lower cluster.cpus_per_shard",
        )
    most = max(host.cpus for host in hosts)
    wanted = cpus or min(free, max(1, free - len(hosts)))
    while True:
        share = stage_cpus(wanted, len(memory), most)
        needs = needs_of(share, memory)
        try:
            packed(needs, hosts)
        except Unavailable:
            if cpus is not None or wanted == 1:
                raise
            wanted -= 1
            continue
        return share, needs


def packed(needs: Sequence[StageNeed], hosts: Sequence[HostRoom]) -> list[int]:
    """The place among ``hosts`` of the host of each stage: the largest stage first, each where the
    most memory is left.

    Raises:
        Unavailable: a stage fits on none; with the arithmetic.
    """
    cpus = [math.floor(host.cpus * UNIT + 0.5) for host in hosts]
    memory = [host.memory for host in hosts]
    chosen = [-1] * len(needs)
    for place in sorted(range(len(needs)), key=lambda at: (-needs[at].memory, -needs[at].cpus)):
        need = needs[place]
        units = math.floor(need.cpus * UNIT + 0.5)
        fitting = [
            at for at in range(len(hosts)) if cpus[at] >= units and memory[at] >= need.memory
        ]
        if not fitting:
            left = [
                HostRoom(name=host.name, cpus=units_left / UNIT, memory=bytes_left)
                for host, units_left, bytes_left in zip(hosts, cpus, memory, strict=True)
            ]
            raise Unavailable(
                f"no host of the Ray cluster has room for {need.name}, one of {len(needs)} stages",
                expected=f"{_amount(need)} free on one host",
                got=f"{_listed(left)} left beside the stages before it",
                hint="give the job other --cpus, add hosts, build more and smaller shards, or run "
                "it on one host with cluster.address=local, which takes the shards in passes",
            )
        best = max(fitting, key=lambda at: (memory[at], cpus[at]))
        chosen[place] = best
        cpus[best] -= units
        memory[best] -= need.memory
    return chosen


def no_room_left(lost: Sequence[StageNeed], hosts: Sequence[HostRoom]) -> Unavailable:
    """The error of a job whose stages ``lost``, at least one, have had no room since their host was
    lost. hosts: what is free."""
    return Unavailable(
        f"the host of {', '.join(need.name for need in lost[:MOST_NAMED])} is lost, and no other "
        "has room",
        expected="; ".join(f"{_amount(need)} for {need.name}" for need in lost[:MOST_NAMED]),
        got=f"{_listed(hosts) or 'nothing'} free",
        hint="add a host, or free some room, and start the same command again: what is written "
        "stays, and the job goes on from there",
    )


def _amount(room: HostRoom | StageNeed) -> str:
    return f"{room.cpus:g} CPUs and {_mib(room.memory)}"


def _listed(hosts: Sequence[HostRoom]) -> str:
    return "; ".join(f"{host.name} {_amount(host)}" for host in hosts[:MOST_NAMED])


def _mib(number: int) -> str:
    return f"{number / 2**20:,.0f} MiB"
