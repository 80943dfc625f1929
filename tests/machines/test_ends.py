"""However `serve`, `build`, `train` and `demo` end, they end in time, and nothing is left."""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.machines.conftest import STOP_S, Served, serving, traces


def to_process(served: Served, number: int) -> None:
    os.kill(served.pid, number)


def to_group(served: Served, number: int) -> None:
    """As a terminal does, and `timeout`, and many a supervisor."""
    os.killpg(served.pid, number)


def to_all(served: Served, number: int) -> None:
    """As systemd does: to every process of a service."""
    for process in [*psutil.Process(served.pid).children(recursive=True), served.process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@pytest.mark.parametrize(
    ("send", "number"),
    [
        *itertools.product((to_process, to_group), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)),
        (to_all, signal.SIGTERM),
    ],
)
def test_every_signal_ends_serve_in_order(
    store: Path, send: Callable[[Served, int], None], number: signal.Signals
) -> None:
    with serving(store) as served:
        started = time.monotonic()
        send(served, number)
        assert served.wait(STOP_S) == 0, served.text
        print(f"{number.name} {send.__name__}: {time.monotonic() - started:.1f} s")
        assert traces() == set()
        assert "stopping\n" in served.lines
        assert "Traceback" not in served.text


@pytest.mark.parametrize(("name", "said"), [("gcs_server", "GCS"), ("raylet", "raylet")])
def test_serve_ends_when_ray_has_died(store: Path, name: str, said: str) -> None:
    with serving(store) as served:
        children = psutil.Process(served.pid).children()
        victim = next(child for child in children if child.name() == name)
        started = time.monotonic()
        victim.kill()
        assert served.wait(STOP_S) == 4, served.text
        print(f"{name}: {time.monotonic() - started:.1f} s")
        assert traces() == set()
        assert f"error: Ray's {said} ended unexpectedly; " in served.text
        assert not (store / "serving.json").exists()
