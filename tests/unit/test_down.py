"""`shardline down` ends the serving process in whatever state it is; others stand for it here."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from shardline.cluster.cli import main
from shardline.cluster.commands import down as command
from shardline.cluster.serving.endpoint import NOTE_NAME, Endpoint, leave_note
from shardline.cluster.store import Store

URL = "http://127.0.0.1:1"
ORDERLY = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a process and leaves a note that it serves the store; kills it after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(first: str) -> subprocess.Popen[str]:
        code = f"import signal, sys, time; {first}; print('up', flush=True); time.sleep(99)"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        own = psutil.Process(process.pid).create_time()
        endpoint = Endpoint(url=URL, generation=1, pid=process.pid, started=own)
        leave_note(Store(tmp_path), endpoint)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def down(store: Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["--store", str(store), "down"])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_stopped_process_is_let_go_on_to_end(
    tmp_path: Path,
    stand_in: Callable[[str], subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    process = stand_in(ORDERLY)
    process.send_signal(signal.SIGSTOP)
    assert down(tmp_path) == 0
    assert process.wait(1) == 0
    assert capsys.readouterr().out == f"stopped {URL}\n"


def test_one_that_does_not_end_is_killed(
    tmp_path: Path,
    stand_in: Callable[[str], subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "STOP_TIMEOUT_S", 0.3)
    process = stand_in(DEAF)
    assert down(tmp_path) == 0
    assert process.wait(1) == -signal.SIGKILL
    said = capsys.readouterr().out
    assert said.startswith(f"process {process.pid} did not stop within 0 s: killed, ")
    assert not (tmp_path / NOTE_NAME).exists()


def test_one_that_has_ended_meanwhile_has_stopped(
    tmp_path: Path,
    stand_in: Callable[[str], subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = stand_in(ORDERLY)
    found = command.find_endpoint

    def find(store: Store) -> Endpoint:
        endpoint = found(store)
        process.kill()
        process.wait()
        return endpoint

    monkeypatch.setattr(command, "find_endpoint", find)
    assert down(tmp_path) == 0
    assert capsys.readouterr().out == f"stopped {URL}\n"
