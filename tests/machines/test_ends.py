"""However `serve`, `build`, `train` and `demo` end, they end in time, and nothing is left."""

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


@pytest.mark.parametrize("send", [to_process, to_group])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_ends_serve_in_order(
    store: Path, send: Callable[[Served, int], None], number: signal.Signals
) -> None:
    with serving(store) as served:
        started = time.monotonic()
        send(served, number)
        assert served.wait(STOP_S) == 0, served.text
        print(f"{number.name} {send.__name__}: {time.monotonic() - started:.1f} s")
        assert traces() == set()
        assert served.lines[-2:] == ["stopping\n", ""]


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
