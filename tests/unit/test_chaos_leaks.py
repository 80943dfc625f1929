"""The chaos test looks for what is left: memory, open files, a session's processes and folders."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shardline.cluster.serving.ray_session import SESSION_PREFIX
from shardline.cluster.store import Store
from tests.chaos.memory import GROWTH_MIB, OPEN_FILES, Peaks, grown, left_open
from tests.chaos.oracle import FindingKind
from tests.chaos.served import Served, traces_of

NOBODY = 99_999_999  # above the largest pid of Linux


def test_memory_beyond_its_limit_is_found() -> None:
    served = Served(Store(Path("nowhere")), 1, Path("nowhere"))
    peaks = Peaks(served, lambda: 0.0)
    before = {"router": 200.0, "shard": 100.0}
    peaks.mib.update({"router": 200.0 + GROWTH_MIB["router"], "shard": 101.0 + GROWTH_MIB["shard"]})
    peaks.at_s.update({"router": 3.0, "shard": 7.0})
    (found,) = grown(before, peaks)
    assert (found.kind, found.at_s) == (FindingKind.LEAK, 7.0)
    assert found.text.startswith("shard: ")


def test_files_left_open_are_found() -> None:
    before = {"router": 40, "haproxy": 10}
    assert left_open(before, {"router": 40 + OPEN_FILES, "haproxy": 3}) == []
    (found,) = left_open(before, {"router": 41 + OPEN_FILES})
    assert found.text.startswith("router: ")


def test_what_is_left_of_a_session_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert traces_of(NOBODY) == []
    folder = tmp_path / f"{SESSION_PREFIX}{NOBODY}-abc"
    folder.mkdir()
    waiting = [sys.executable, "-c", "print(flush=True); input()", str(folder / "x.sock")]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = traces_of(NOBODY)
        process.communicate(b"\n")
    assert found[0] == str(folder)
    assert [name.rpartition(" ")[2] for name in found[1:]] == [str(process.pid)]
