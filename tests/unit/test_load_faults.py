"""Processes are told apart, measured, stopped and killed: on real ones, started here."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from shardline.bench.load import faults
from shardline.bench.load.faults import FaultRunner
from shardline.bench.load.processes import Sampler, listener, role_of, shard_process, tree
from shardline.bench.load.scenarios import Fault, FaultKind
from shardline.shards.core.errors import InvalidInput, NotFound

# Waits for a line or the end of its standard input. First it uses two ticks of the kernel's CPU
# clock, or a quick start would count as none.
SLEEPER = """
import os, sys
while sum(os.times()[:2]) < 0.02:
    pass
print("up", flush=True)
sys.stdin.readline()
"""


@contextmanager
def sleeper() -> Iterator[psutil.Process]:
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


@pytest.mark.parametrize(
    ("name", "command", "role"),
    [
        ("ray::ShardActor", ["ray::ShardActor.describe"], "shard"),
        ("ray::ServeReplica:shardline:router", ["ray::ServeReplica:shardline:router"], "router"),
        ("ray::Controller.table_after", ["ray::Controller.table_after"], "controller"),
        ("ray::MirrorActor", ["ray::MirrorActor.progress"], "mirror"),
        ("ray::ServeController", ["ray::ServeController.listen"], "serve controller"),
        ("haproxy", ["/x/haproxy", "-db"], "haproxy"),
        ("raylet", ["/x/raylet"], "raylet"),
        ("gcs_server", ["/x/gcs_server"], "gcs"),
        ("python3", ["python3", "log_monitor.py"], "other ray"),
        ("x", [], "other ray"),
    ],
)
def test_roles(name: str, command: list[str], role: str) -> None:
    assert role_of(name, command) == role


def test_the_tree_holds_descendants_and_leaves_clients_out() -> None:
    client = [sys.executable, "-c", f"multiprocessing = 1; {SLEEPER}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with sleeper() as child, subprocess.Popen(client, **pipes) as other:
        assert other.stdout is not None
        other.stdout.readline()  # before it runs its command line, it still has ours
        found = {process.pid: role for role, process in tree(os.getpid())}
        assert found[os.getpid()] == "driver"
        assert found[child.pid] == "other ray"
        assert other.pid not in found
        other.kill()


def test_a_tree_that_is_gone_says_so() -> None:
    with sleeper() as process:
        pid = process.pid
    with pytest.raises(NotFound, match=f"{pid} is gone"):
        tree(pid)


def test_a_shard_is_found_by_the_port_it_listens_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = listener([psutil.Process()], port)
        assert found is not None and found.pid == os.getpid()
    assert listener([psutil.Process()], port) is None


@pytest.mark.parametrize("addresses", [{}, {1: None}, {1: "127.0.0.1:9"}])
def test_a_shard_that_is_not_here_is_named(addresses: dict[int, str | None]) -> None:
    with pytest.raises(NotFound, match="no process of shard 1"):
        shard_process(os.getpid(), addresses, 1)


def test_usage_counts_from_the_first_look_and_all_of_what_comes_later() -> None:
    sampler = Sampler(os.getpid())
    sampler.look(0.0)
    spent = psutil.Process().cpu_times()
    with sleeper() as child:
        while psutil.Process().cpu_times().user - spent.user < 0.05:
            pass
        sampler.look(2.0)
        used = {usage.pid: usage for usage in sampler.usage()}
        assert used[os.getpid()].cores >= 0.025
        assert used[os.getpid()].cores < 1.0, "not what was used before the first look"
        assert used[child.pid].cores > 0, "it started between the looks: all of it counts"
        assert used[os.getpid()].memory_max_mib >= used[os.getpid()].memory_mib > 1
    assert used[os.getpid()].role == "driver"


@pytest.fixture
def victim(monkeypatch: pytest.MonkeyPatch) -> Iterator[psutil.Process]:
    """Stands for shard 0 and for the router."""
    with sleeper() as process:
        monkeypatch.setattr(faults, "shard_process", lambda *_: process)
        monkeypatch.setattr(faults, "router_process", lambda *_: process)
        yield process


def runner(kind: FaultKind, *, lasts_s: float = 0.0, seconds: float = 20.0) -> FaultRunner:
    made = FaultRunner(pid=os.getpid(), shard=0, addresses=lambda: {0: "127.0.0.1:1"})
    made.arm((Fault(kind=kind, at_share=0.25, lasts_s=lasts_s),), seconds)
    return made


def wait_for(process: psutil.Process, status: str) -> None:
    while process.status() != status:
        pass


def test_a_stall_stops_the_process_and_lets_it_go_on(victim: psutil.Process) -> None:
    made = runner(FaultKind.STALL_SHARD, lasts_s=5)
    made.tick(4.9)
    assert victim.status() != psutil.STATUS_STOPPED and made.marks == []
    made.tick(5.1)
    wait_for(victim, psutil.STATUS_STOPPED)
    made.tick(10.0)
    assert victim.status() == psutil.STATUS_STOPPED
    made.tick(10.2)
    wait_for(victim, psutil.STATUS_SLEEPING)
    assert [(mark.at_s, mark.label) for mark in made.marks] == [
        (5.1, "shard 0 stalls"),
        (10.2, "shard 0 goes on"),
    ]


def test_no_process_stays_stopped_when_the_run_ends_early(victim: psutil.Process) -> None:
    made = runner(FaultKind.STALL_SHARD, lasts_s=5)
    made.tick(6.0)
    wait_for(victim, psutil.STATUS_STOPPED)
    made.close()
    wait_for(victim, psutil.STATUS_SLEEPING)


@pytest.mark.parametrize(
    ("kind", "label"),
    [(FaultKind.KILL_SHARD, "shard 0 killed"), (FaultKind.RESTART_ROUTER, "router killed")],
)
def test_a_kill_is_a_kill(victim: psutil.Process, kind: FaultKind, label: str) -> None:
    made = runner(kind)
    made.tick(5.0)
    wait_for(victim, psutil.STATUS_ZOMBIE)
    assert [mark.label for mark in made.marks] == [label]


def test_a_run_too_short_for_its_stall_is_refused(victim: psutil.Process) -> None:
    with pytest.raises(InvalidInput, match="too short"):
        runner(FaultKind.STALL_SHARD, lasts_s=5, seconds=6.0)
