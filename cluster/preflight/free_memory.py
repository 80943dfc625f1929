"""Whether a generation fits into the memory that is free: by the files of its shards.

What shards load is known exactly. What processes take besides (docs/OPERATIONS.md) is measured, and
counts pages of libraries once per process though they are shared. So a start is refused only where
what is exact does not fit, swap included, because then the system ends a process sooner or later;
where only the sum does not fit, it is warned of.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.preflight.check import Check, failed, mib, passed, warned
from shardline.cluster.preflight.control_groups import lines, own_groups
from shardline.shards.core.errors import Unavailable
from shardline.shards.storage.generation import ATTRIBUTES_NAME, GenerationManifest

# as docs/OPERATIONS.md lists them, in bytes of resident memory
SHARD_BYTES = 165 << 20
# of a shard that is searched with many filters, at most: which rows match (``live.filtered``), and
# copies of those that are few (``index.filtered_search``)
FILTER_BYTES = 128 << 20
ROUTER_BYTES = 240 << 20
# the serving process, Serve's controller, HAProxy's manager, Serve's proxy, our controller, Ray's
# own agents and monitor
OTHER_BYTES = (245 + 210 + 210 + 210 + 150 + 500) << 20
V1_UNLIMITED = 1 << 60  # what control groups of version 1 say when there is no limit
# limit, what counts against it, and the part of that which can be dropped
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """Bytes that may be taken without swapping, and by swapping; ``limit``: what bounds them."""

    available_bytes: int
    swap_bytes: int
    limit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NeededMemory:
    """Bytes of what shards load, of processes besides, and of the routers' caches."""

    loaded_bytes: int
    process_bytes: int
    shards: int


def needed_memory(config: ShardlineConfig, manifest: GenerationManifest) -> NeededMemory:
    """For all processes of a cluster on one machine. Attributes are mapped files: page cache."""
    loaded = sum(
        file.bytes
        for entry in manifest.shards
        for file in entry.files
        if not file.name.endswith(ATTRIBUTES_NAME)
    )
    routers = config.cluster.routers_per_host * (ROUTER_BYTES + config.router.cache_bytes)
    processes = len(manifest.shards) * (SHARD_BYTES + FILTER_BYTES) + routers + OTHER_BYTES
    return NeededMemory(loaded_bytes=loaded, process_bytes=processes, shards=len(manifest.shards))


def check_memory(needed: NeededMemory, free: FreeMemory) -> Check:
    """Refuses what cannot fit, warns of what may not."""
    name = "memory"
    loaded, total = needed.loaded_bytes, needed.loaded_bytes + needed.process_bytes
    sums = (
        f"{mib(loaded)} in {needed.shards} shards + about {mib(needed.process_bytes)} of processes"
    )
    has = f"{mib(free.available_bytes)} free by {free.limit}"
    if loaded > free.available_bytes + free.swap_bytes:
        error = Unavailable(
            "the generation does not fit into memory",
            expected=f"at least {mib(loaded)} for what its {needed.shards} shards load",
            got=f"{has}, and {mib(free.swap_bytes)} of swap",
            hint="build a smaller index (index.kind=ivfpq-fs), free memory, or serve on more hosts",
        )
        return failed(name, error)
    if total > free.available_bytes:
        return warned(name, f"{sums} are more than {has}: processes may be ended for want of it")
    return passed(name, f"{sums}, {has}")


def free_memory(root: Path = Path("/")) -> FreeMemory:
    """Of this machine, or of the control group around this process where that allows less.

    root: where /proc and /sys are, for tests.
    """
    table = dict(_meminfo(root / "proc/meminfo"))
    # kernels before 3.14 do not say what could be freed
    available, limit = table.get("MemAvailable", table["MemFree"]), "this machine"
    swap = table.get("SwapFree", 0)
    for folder, room in _groups(root):
        if room < available:
            available, limit, swap = max(0, room), f"the control group {folder}", 0
    return FreeMemory(available_bytes=available, swap_bytes=swap, limit=limit)


def _meminfo(path: Path) -> Iterator[tuple[str, int]]:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        fields = value.split()
        if len(fields) == 2 and fields[1] == "kB":
            yield name, int(fields[0]) << 10


def _groups(root: Path) -> Iterator[tuple[str, int]]:
    """The memory groups that limit this process, each with what it may still take."""
    for folder in own_groups(root, "memory"):
        for names in (VERSION_2, VERSION_1):
            room = _room(folder, *names)
            if room is not None:
                yield str(folder.relative_to(root)), room


def _room(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """Limit less what is used and cannot be dropped; None: not limited, or not to be seen."""
    most, used = lines(folder / limit), lines(folder / usage)
    if not most or not used or not most[0].isdigit() or int(most[0]) >= V1_UNLIMITED:
        return None
    stat = dict(line.split(" ", 1) for line in lines(folder / "memory.stat") if " " in line)
    return int(most[0]) - int(used[0]) + int(stat.get(cache, 0))
