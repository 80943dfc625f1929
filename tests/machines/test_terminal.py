"""A terminal that closes while `serve` runs, and a reader that leaves: no error, an orderly end."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import termios
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardline.cluster.serving.ray_session import free_port
from tests.machines.conftest import PORTS, START_S, STOP_S, command, environment, traces


@dataclass
class InTerminal:
    process: subprocess.Popen[bytes]
    port: int
    terminal: int  # the other end; closing it closes the terminal

    def close(self) -> None:
        os.close(self.terminal)

    def answers(self) -> bool:
        url = f"http://127.0.0.1:{self.port}/readyz"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)


@contextlib.contextmanager
def serving_in_terminal(store: Path, *, deaf: bool) -> Iterator[InTerminal]:
    """`serve` at the head of a session with a terminal; deaf: started with SIGHUP ignored."""
    port = free_port()
    PORTS.append(port)
    ours, its = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        if deaf:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = subprocess.Popen(
        command("--store", str(store), "serve", "--insecure", "--port", str(port)),
        stdin=its,
        stdout=its,
        stderr=its,
        env=environment(),
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(its)
    killer = threading.Timer(START_S, process.kill)
    killer.start()
    try:
        seen = b""
        while b"serving generation" not in seen:
            seen += os.read(ours, 4096)
        killer.cancel()
        yield InTerminal(process, port, ours)
    finally:
        killer.cancel()
        if process.poll() is None:
            process.terminate()
        process.wait(START_S)


def test_a_terminal_that_closes_ends_serve_in_order(store: Path) -> None:
    with serving_in_terminal(store, deaf=False) as served:
        served.close()
        assert served.process.wait(STOP_S) == 0
        assert traces() == set()
        assert not (store / "serving.json").exists()


def test_serve_outlives_its_terminal_if_it_ignores_that(store: Path) -> None:
    with serving_in_terminal(store, deaf=True) as served:
        served.close()
        with pytest.raises(subprocess.TimeoutExpired):
            served.process.wait(2)
        assert served.answers()
        served.process.terminate()
        assert served.process.wait(STOP_S) == 0
        assert traces() == set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_reader_that_leaves_changes_nothing(store: Path, number: signal.Signals) -> None:
    port = free_port()
    PORTS.append(port)
    process = subprocess.Popen(
        command("--store", str(store), "serve", "--insecure", "--port", str(port)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
    )
    assert process.stdout is not None
    lines = iter(process.stdout.readline, b"")
    assert any(line.startswith(b"serving generation") for line in lines)
    process.stdout.close()
    process.send_signal(number)
    assert process.wait(STOP_S) == 0
    assert traces() == set()
