"""The cluster's processes on this machine: which is which, what they use, which to hit.

They are the descendants of the process that serves in the foreground, found by their titles; a
shard's process by the port that the router's status gives for it, because it changes with every
restart.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from shardline.shards.core.errors import NotFound

# how a process's title or command line begins or what it holds -> its role
TITLES = (
    ("ray::ShardActor", "shard"),
    ("ray::MirrorActor", "mirror"),
    ("ray::ServeReplica", "router"),
    ("ray::Controller", "controller"),
    ("ray::ServeController", "serve controller"),
    ("ray::HAProxyManager", "haproxy manager"),
    ("ray::ProxyActor", "serve proxy"),
)
BINARIES = {"haproxy": "haproxy", "raylet": "raylet", "gcs_server": "gcs"}
ROUTER = "router"
SHARD = "shard"
DRIVER = "driver"
OTHER = "other ray"
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """One process over the measured time. cores: CPU seconds per second; memory: resident."""

    role: str
    pid: int
    cores: float
    memory_mib: float
    memory_max_mib: float


def role_of(name: str, command: Sequence[str]) -> str:
    """The role of a cluster's process by its name and command line."""
    title = command[0] if command else name
    for start, role in TITLES:
        if title.startswith(start):
            return role
    return BINARIES.get(name, OTHER)


def tree(pid: int) -> list[tuple[str, psutil.Process]]:
    """(role, process) of the serving process and its descendants, clients of ours left out.

    Raises:
        NotFound: it is gone.
    """
    try:
        root = psutil.Process(pid)
        children = root.children(recursive=True)
    except psutil.NoSuchProcess as error:
        raise NotFound(f"the serving process {pid} is gone") from error
    found = [(DRIVER, root)]
    for child in children:
        try:
            if not _is_client(child):
                found.append((role_of(child.name(), child.cmdline()), child))
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # it ended between the listing and the look
    return found


def listener(processes: Sequence[psutil.Process], port: int) -> psutil.Process | None:
    """The process that listens on a TCP port."""
    for process in processes:
        try:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return process
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue
    return None


def shard_process(pid: int, addresses: dict[int, str | None], shard: int) -> psutil.Process:
    """The process of one shard. addresses: shard -> "host:port", as /v1/status gives them.

    Raises:
        NotFound: there is no such shard, or no process here listens at its address.
    """
    address = addresses.get(shard)
    shards = [process for role, process in tree(pid) if role == SHARD]
    found = listener(shards, int(address.rpartition(":")[2])) if address else None
    if found is None:
        raise NotFound(
            f"no process of shard {shard} on this machine",
            expected=f"one of shards {sorted(addresses)}",
            got=f"address {address}",
        )
    return found


def router_process(pid: int) -> psutil.Process:
    """The (first) router replica; NotFound when none runs here."""
    for role, process in tree(pid):
        if role == ROUTER:
            return process
    raise NotFound("no router replica on this machine")


@dataclass(slots=True)
class Sampler:
    """CPU and memory of every process of the tree, from look to look; new ones join in."""

    pid: int
    _seen: dict[int, "_Seen"] = field(default_factory=dict)
    _since: float = 0.0
    _until: float = 0.0

    def look(self, at_s: float) -> None:
        """Notes what every process has used so far; at_s on any clock in seconds."""
        is_first = not self._seen
        if is_first:
            self._since = at_s
        self._until = at_s
        for role, process in tree(self.pid):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # it may end meanwhile
                times, resident = process.cpu_times(), process.memory_info().rss / MIB
                seen = self._seen.setdefault(
                    process.pid, _Seen(role, times.user + times.system, not is_first)
                )
                seen.role = role  # a process starts under another title than it goes by later
                seen.note(times.user + times.system, resident)

    def usage(self) -> list[Usage]:
        """Every process seen, busiest first; a process that ended shows what it had used."""
        elapsed = max(self._until - self._since, 1e-9)
        found = [
            Usage(
                role=seen.role,
                pid=pid,
                cores=round(seen.used / elapsed, 3),
                memory_mib=round(seen.memory_mib, 1),
                memory_max_mib=round(seen.memory_max_mib, 1),
            )
            for pid, seen in self._seen.items()
        ]
        return sorted(found, key=lambda usage: -usage.cores)


class _Seen:
    """One process between its first look and its last; born: it began after the first look."""

    def __init__(self, role: str, cpu_s: float, born: bool) -> None:
        self.role = role
        self.used = cpu_s if born else 0.0
        self.memory_mib = self.memory_max_mib = 0.0
        self._from = cpu_s - self.used

    def note(self, cpu_s: float, memory_mib: float) -> None:
        self.used = cpu_s - self._from
        self.memory_mib = memory_mib
        self.memory_max_mib = max(self.memory_max_mib, memory_mib)


def _is_client(process: psutil.Process) -> bool:
    """A client process of ours, where the endpoint runs in this very process."""
    return any("multiprocessing" in part for part in process.cmdline())
