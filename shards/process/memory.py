"""Prepares the memory of a router replica or shard, after loading and before serving.

What is loaded is taken out of garbage collection and, unless turned off, moved to huge pages.
A query touches some hundred pages of 4 KiB in every process it passes, and after a few idle
milliseconds none of their addresses is known to the processor any more; under virtualisation each
costs a walk through two page tables. In pages of 2 MiB there are few to look up
(docs/PERFORMANCE.md has what that is worth).

Linux merges pages by itself only where its setting says so ("always"); here a process asks for it,
which the usual setting ("madvise") allows. MADV_COLLAPSE, which does it at once, is there from
Linux 6.1; before that the kernel gets to it in its own time.
"""

import ctypes
import gc
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

HUGE = 2 << 20
# of <linux/mman.h>; the standard library does not know the second
MADV_HUGEPAGE = 14
MADV_COLLAPSE = 25
MAPS = Path("/proc/self/maps")
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def prepare_memory(*, huge_pages: bool) -> None:
    """Excludes loaded objects from garbage collection, moves them to huge pages; some 100 ms."""
    gc.collect()
    gc.freeze()  # a full collection over Ray's and all other objects takes 50 ms
    if huge_pages:
        use_huge_pages()


def use_huge_pages() -> int:
    """Bytes that lie in huge pages now; 0 where the system offers none.

    Copies the process's memory once, some GB per second, and rounds it up: 14 to 25 MiB more for a
    small shard or a router. Other threads may run meanwhile.
    """
    if sys.platform != "linux" or not _allowed():
        logger.info("no huge pages: this system does not offer them")
        return 0
    started = time.perf_counter()
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    regions = list(private_regions(MAPS.read_text().splitlines()))
    collapsed = 0
    for start, end in regions:
        libc.madvise(start, end - start, MADV_HUGEPAGE)
        for page in range(-(-start // HUGE) * HUGE, end - HUGE + 1, HUGE):
            # fails for unused pages, and if the kernel has no free huge page
            collapsed += libc.madvise(page, HUGE, MADV_COLLAPSE) == 0
    took_ms = (time.perf_counter() - started) * 1e3
    logger.info("%d MiB in huge pages, after %.0f ms", collapsed * HUGE >> 20, took_ms)
    return collapsed * HUGE


def private_regions(maps: Iterable[str]) -> Iterator[tuple[int, int]]:
    """(start, end) of a process's own writable memory that no file backs, stacks left out.

    ``maps`` are the lines of /proc/<pid>/maps, see proc(5).
    """
    for line in maps:
        region, permissions, _, _, inode, *name = line.split(maxsplit=5)
        is_own = permissions.startswith("rw") and permissions.endswith("p") and inode == "0"
        if is_own and not (name and name[0].startswith("[stack")):
            start, end = (int(address, 16) for address in region.split("-"))
            yield start, end


def _allowed() -> bool:
    return ENABLED.exists() and "[never]" not in ENABLED.read_text()
