"""Which processes belong to a session: those with its folder, but nobody's who looks at it."""

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shardline.cluster.serving.leftovers import end_session

SLEEP = "import sys, time; print('up', flush=True); time.sleep(60)"


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "shardline-1-x"
    folder.mkdir()
    yield folder


def started(session: Path, *words: str) -> subprocess.Popen[bytes]:
    """A process with the session's folder on its command line, without a terminal."""
    command = [*words, sys.executable, "-c", SLEEP, str(session / "log")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def test_a_process_with_the_sessions_folder_is_ended(session: Path) -> None:
    process = started(session)
    try:
        assert end_session(session, wait_s=1.0) == [process.pid]
        assert not psutil.pid_exists(process.pid)
    finally:
        process.kill()
        process.communicate()
    assert not session.exists()


def test_who_looks_at_its_files_in_a_terminal_is_left_alone(session: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", SLEEP, str(session / "log")])
    try:
        assert b"up" in os.read(terminal, 100)
        assert end_session(session, wait_s=0) == []
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)
