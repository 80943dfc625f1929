"""Memory moved to huge pages: more of it than before, and all of it as it was."""

import gc
import re
from pathlib import Path

import numpy as np
import pytest

from shardline.shards.process import memory
from shardline.shards.process.memory import HUGE, prepare_memory, private_regions, use_huge_pages

MAPS = """\
00400000-00952000 r-xp 00000000 fe:00 1234 /usr/bin/python3.11
00b53000-00c99000 rw-p 00552000 fe:00 1234 /usr/bin/python3.11
01a2b000-02a2b000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0000800000 rw-p 00000000 00:00 0
7f0000800000-7f0000900000 ---p 00000000 00:00 0
7f0000900000-7f0000a00000 rw-s 00000000 00:01 99 /dev/shm/some thing (deleted)
7f0000a00000-7f0000b00000 r--p 00000000 00:00 0
7ffc00000000-7ffc00100000 rw-p 00000000 00:00 0 [stack]
"""


def test_only_the_process_own_memory_is_moved() -> None:
    found = list(private_regions(MAPS.splitlines()))
    assert found == [(0x1A2B000, 0x2A2B000), (0x7F0000000000, 0x7F0000800000)]


def in_huge_pages() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"AnonHugePages:\s+(\d+) kB", rollup)[1]) << 10


def test_what_is_held_is_moved_and_stays_as_it_was() -> None:
    if not memory._allowed():
        pytest.skip("no huge pages here")
    held = np.arange(4 * HUGE, dtype=np.int64)
    moved = use_huge_pages()
    if moved == 0:
        pytest.skip("a kernel without MADV_COLLAPSE")
    assert moved >= held.nbytes - 2 * HUGE, "all but what shares its first and last page"
    assert in_huge_pages() >= moved // 2
    np.testing.assert_array_equal(held, np.arange(4 * HUGE))


def test_where_there_are_none_nothing_happens(monkeypatch, tmp_path) -> None:
    setting = tmp_path / "enabled"
    monkeypatch.setattr(memory, "ENABLED", setting)
    assert use_huge_pages() == 0
    setting.write_text("always madvise [never]\n")
    assert use_huge_pages() == 0
    monkeypatch.setattr("sys.platform", "darwin")
    assert use_huge_pages() == 0


@pytest.mark.parametrize("huge_pages", [True, False])
def test_memory_is_moved_only_where_the_setting_says_so(
    monkeypatch: pytest.MonkeyPatch, huge_pages: bool
) -> None:
    moved: list[bool] = []
    monkeypatch.setattr(memory, "use_huge_pages", lambda: moved.append(True))
    try:
        prepare_memory(huge_pages=huge_pages)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
    assert moved == [True] * huge_pages
