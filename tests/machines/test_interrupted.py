"""Ctrl-C at any moment: within ten seconds, exit code 130, no crash, and nothing left."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.machines.conftest import Served, run, serving, started, traces

TRIES = int(os.environ.get("SHARDLINE_INTERRUPTIONS", "30"))
# on a machine that does little else; up to twice that where more runs than it has cores for
CTRL_C_S = 10.0 * min(2.0, max(1.0, os.getloadavg()[0] / (2 * len(os.sched_getaffinity(0)))))
AGAIN_S = 1.5  # before a second Ctrl-C
RAY = "starting Ray"


def interrupt(served: Served, *, twice: bool) -> float:
    """Ctrl-C as a terminal sends it; how long the command took to end, in seconds."""
    began = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(served.pid, signal.SIGINT)
        if twice:
            with contextlib.suppress(psutil.TimeoutExpired):
                served.process.wait(timeout=AGAIN_S)
            os.killpg(served.pid, signal.SIGINT)
    served.wait()
    return time.monotonic() - began


def test_ctrl_c_at_random_moments_of_the_start(store: Path) -> None:
    seed = int(os.environ.get("SHARDLINE_SEED", time.time()))
    draw = random.Random(seed)
    began = time.monotonic()
    with serving(store) as served:
        whole = time.monotonic() - began
        interrupt(served, twice=False)
    slowest = 0.0
    for number in range(TRIES):
        after = whole * number / TRIES * draw.uniform(0.8, 1.2)
        with started(store, "--set", "cluster.http_port=0", "serve", "--insecure") as served:
            served.wait_for(RAY)
            with contextlib.suppress(psutil.TimeoutExpired):
                served.process.wait(timeout=after)
            took = interrupt(served, twice=number % 3 == 2)
            last = served.lines[-2].strip() if len(served.lines) > 1 else ""
            print(f"{number}: after {after:.1f} s, {took:.1f} s, {served.process.poll()}, {last!r}")
            slowest = max(slowest, took)
            expected = {0, 130} if "serving generation" in served.text else {130}
            assert served.wait() in expected, f"seed {seed}, {after:.2f} s:\n{served.text}"
            assert "SIGSEGV" not in served.text
            assert "Traceback" not in served.text
            assert traces() == set()
    assert slowest < CTRL_C_S, f"seed {seed}"


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("] data:", signal.SIGTERM),
        (RAY, signal.SIGINT),
        ("] train:", signal.SIGTERM),
        ("] build:", signal.SIGHUP),
        ("loading generation", signal.SIGINT),
        ("] evaluate over HTTP:", signal.SIGTERM),
    ],
)
def test_demo_at_every_stage(tmp_path: Path, stage: str, number: signal.Signals) -> None:
    """Its Ray trains, builds and serves; its temporary folder goes as well."""
    arguments = ("demo", "--quick", "--report", str(tmp_path / "report.json"))
    with started(None, *arguments) as demo:
        demo.wait_for(stage, 600)
        began = time.monotonic()
        os.killpg(demo.pid, number)
        assert demo.wait() == 130, demo.text
        print(f"{stage} {number.name}: {time.monotonic() - began:.1f} s")
        assert traces() == set()
        assert "Traceback" not in demo.text


@pytest.mark.parametrize("after_s", [0.5, 3.0])
def test_build_and_train(store: Path, tmp_path: Path, after_s: float) -> None:
    run(
        tmp_path / "store",
        "data",
        "synth",
        "--users",
        "300",
        "--items",
        "2000",
        "--out",
        str(tmp_path / "data"),
    )
    newest = next((store / "embeddings").iterdir())
    train = ("--set", "training.num_workers=2", "train", "--data", str(tmp_path / "data"))
    for arguments in (("build", "--embeddings", str(newest)), (*train, "--epochs", "500")):
        with started(tmp_path / "store", *arguments) as command:
            wait_for_ray(command)
            with contextlib.suppress(psutil.TimeoutExpired):
                command.process.wait(timeout=after_s)
            took = interrupt(command, twice=False)
            print(f"{arguments[0]} after {after_s} s: {took:.1f} s")
            assert command.wait() == 130, command.text
            assert took < CTRL_C_S
            assert traces() == set()


def wait_for_ray(command: Served) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(child.name() == "gcs_server" for child in command.process.children()):
            return
        time.sleep(0.05)
    pytest.fail(f"Ray was not started:\n{command.text}")
