"""HAProxy killed, its manager killed, everything else killed: who answers then, and who is left.

Without Ray: an owner in the raylet's place starts a manager, which starts HAProxy as Ray's does.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from shardline.cluster.serving.ray_session import free_port
from shardline.router.router_config import RouterConfig
from shardline.router.serve import haproxy_follow, haproxy_watch
from shardline.router.serve.haproxy_start import launcher
from tests.haproxy_in_front import LIMITS, rendered
from tests.live_router import running_router
from tests.prober import probing, status_of

SOON_S = 5.0
ANSWERED_AGAIN_S = 2.0  # what issue and documentation promise
CONNECT_S = 0.001  # between two connections; HAProxy takes 10 ms and more to start
MANAGER = """
import queue, subprocess, sys, threading, time
launcher, config, admin_socket = sys.argv[1:]
ballast = bytearray(400 << 20)  # as slow to die as a worker of Ray's
def start(*more):
    process = subprocess.Popen([launcher, "-db", "-f", config, "-dR", *more])
    print(process.pid, flush=True)
    return process
starting = threading.Thread(target=lambda: started.put(start()) or time.sleep(1000), daemon=True)
started = queue.Queue()
starting.start()
process = started.get()
for line in sys.stdin:
    if line == "reload\\n":
        old, process = process, start("-sf", str(process.pid), "-x", admin_socket)
    elif line == "stop\\n":
        process.kill()
        process.wait()
        time.sleep(0.2)  # Ray's controller ends it after it has answered
        sys.exit()
"""
OWNER = """
import subprocess, sys, time
managers = [subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])]
print(managers[0].pid, flush=True)
managers[0].wait()
time.sleep(600)
"""


@dataclass
class Stand:
    """The processes by their pids; ``owner`` speaks for the manager: its input and output."""

    folder: Path
    url: str
    owner: subprocess.Popen[str]
    manager: int
    haproxy: int

    @property
    def config(self) -> Path:
        return self.folder / "haproxy.cfg"

    def ask(self, word: str) -> None:
        assert self.owner.stdin is not None
        self.owner.stdin.write(f"{word}\n")
        self.owner.stdin.flush()

    def reload(self) -> None:
        self.ask("reload")
        assert self.owner.stdout is not None
        self.haproxy = int(self.owner.stdout.readline())


def started(folder: Path, url: str) -> Stand:
    script = folder / "launcher"
    script.write_text(launcher(sys.executable, LIMITS.to_json()))
    script.chmod(0o700)
    paths = [str(folder / name) for name in ("haproxy.cfg", "a")]
    command = [sys.executable, "-c", OWNER, MANAGER, str(script), *paths]
    log = (folder / "log").open("a")
    with log:
        owner = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert owner.stdout is not None
    return Stand(folder, url, owner, int(owner.stdout.readline()), int(owner.stdout.readline()))


def processes_of(folder: Path, name: str = "") -> list[psutil.Process]:
    """HAProxys, watchers and managers of this folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            named = any(str(folder) in part for part in process.cmdline())
            if named and process.status() != psutil.STATUS_ZOMBIE and name in process.name():
                found.append(process)
    return found


def until(condition: Callable[[], bool], within_s: float = SOON_S) -> float:
    started_at = time.monotonic()
    while not condition():
        assert time.monotonic() - started_at < within_s, f"not within {within_s} s"
        time.sleep(0.01)
    return time.monotonic() - started_at


@contextlib.contextmanager
def connecting(url: str) -> Iterator[list[OSError]]:
    """Opens connections one after the other, in a thread; those errors that came of it."""
    errors: list[OSError] = []
    stop = threading.Event()
    address = ("127.0.0.1", int(url.rpartition(":")[2]))

    def run() -> None:
        while not stop.wait(CONNECT_S):
            try:
                socket.create_connection(address, timeout=SOON_S).close()
            except OSError as error:
                errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield errors
    finally:
        stop.set()
        thread.join(10)


@pytest.fixture(scope="module")
def router_port() -> Iterator[int]:
    with running_router(RouterConfig()) as router:
        yield int(router.url.rpartition(":")[2])


@pytest.fixture
def stand(tmp_path: Path, router_port: int) -> Iterator[Stand]:
    port = free_port()
    rendered(tmp_path, port, [router_port])
    stand = started(tmp_path, f"http://127.0.0.1:{port}")
    try:
        until(lambda: status_of(stand.url) == 200)
        until(lambda: haproxy_watch._pid_behind(str(tmp_path / "a")) == stand.haproxy)
        time.sleep(2 * haproxy_watch.POLL_S)  # the watcher asks so often, and watches from then on
        yield stand
    finally:
        end(stand.owner)
        for process in processes_of(tmp_path):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        until(lambda: not processes_of(tmp_path))


def end(owner: subprocess.Popen[str]) -> None:
    owner.kill()
    owner.wait(10)
    for stream in (owner.stdin, owner.stdout):
        assert stream is not None
        stream.close()


def the_next_manager(stand: Stand, port: int) -> Stand:
    """As Ray starts it: first without a server, then, once it knows them, with all."""
    rendered(stand.folder, int(stand.url.rpartition(":")[2]), [])
    then = started(stand.folder, stand.url)
    admin_socket = str(stand.folder / "a")
    until(lambda: haproxy_watch._pid_behind(admin_socket) == then.haproxy)
    rendered(stand.folder, int(stand.url.rpartition(":")[2]), [port])
    then.reload()
    until(lambda: haproxy_watch._pid_behind(admin_socket) == then.haproxy)
    return then


@pytest.mark.parametrize("victim", ["haproxy", "manager"])
def test_killed_it_is_replaced_at_once_and_taken_over_from(
    stand: Stand, router_port: int, victim: str
) -> None:
    admin_socket = str(stand.folder / "a")
    with (
        ExitStack() as stack,
        probing(stand.url) as prober,
        connecting(stand.url) as not_connected,
    ):
        time.sleep(0.2)
        os.kill(getattr(stand, victim), 9)
        until(lambda: haproxy_watch._pid_behind(admin_socket) is None)
        until(lambda: status_of(stand.url) == 200)
        # longer than a manager that has noticed would live on
        time.sleep(haproxy_watch.ORDERLY_S + 0.5)
        assert haproxy_watch._pid_behind(admin_socket) is None, "Ray must see that it is gone"
        (substitute,) = processes_of(stand.folder, "haproxy")
        if victim == "haproxy":
            os.kill(stand.manager, 9)  # as Ray does, after it has noticed
        then = the_next_manager(stand, router_port)
        stack.callback(end, then.owner)
        until(lambda: not substitute.is_running())
        until(lambda: [p.pid for p in processes_of(stand.folder, "haproxy")] == [then.haproxy])
        time.sleep(0.2)
    print(f"{victim} killed: {prober.away_s() * 1e3:.0f} ms without an answer")
    assert prober.away_s() < ANSWERED_AGAIN_S
    assert not_connected == []
    assert {status for _, status in prober.seen} <= {200, 0, 502, 503}
    # what was inside HAProxy when it was killed: one request at most, as they come one by one
    assert [status for _, status in prober.seen].count(0) <= 1


def test_it_is_replaced_again_and_again(stand: Stand, router_port: int) -> None:
    def answers() -> bool:
        return status_of(url) == 200

    url = stand.url
    with ExitStack() as stack:
        for victim in ("haproxy", "manager", "manager"):
            with probing(stand.url) as prober:
                time.sleep(0.2)
                os.kill(getattr(stand, victim), 9)
                time.sleep(0.2)
                until(answers)
                time.sleep(0.2)
            assert prober.away_s() < ANSWERED_AGAIN_S, (victim, prober.changes())
            if victim == "haproxy":
                os.kill(stand.manager, 9)
            stand = the_next_manager(stand, router_port)
            stack.callback(end, stand.owner)
            time.sleep(2 * haproxy_watch.POLL_S)


def test_a_substitute_that_is_killed_is_replaced_as_well(stand: Stand) -> None:
    os.kill(stand.haproxy, 9)
    until(lambda: status_of(stand.url) == 200)
    (first,) = processes_of(stand.folder, "haproxy")
    first.kill()
    until(lambda: not first.is_running() and status_of(stand.url) == 200)


def test_it_ends_with_the_raylet(stand: Stand) -> None:
    stand.owner.kill()
    assert until(lambda: not processes_of(stand.folder, "haproxy"), 2) < 2
    os.kill(stand.manager, 9)
    until(lambda: not processes_of(stand.folder))


def test_a_substitute_ends_with_the_raylet(stand: Stand) -> None:
    os.kill(stand.manager, 9)
    until(lambda: status_of(stand.url) == 200)
    stand.owner.kill()
    until(lambda: not processes_of(stand.folder), 2)


@pytest.mark.parametrize("first", ["haproxy", None])
def test_it_ends_when_everything_else_is_killed(stand: Stand, first: str | None) -> None:
    if first is not None:  # then a substitute serves
        os.kill(stand.haproxy, 9)
        until(lambda: status_of(stand.url) == 200)
    haproxys = processes_of(stand.folder, "haproxy")
    for process in processes_of(stand.folder):
        if process not in haproxys:
            process.kill()
    stand.owner.kill()
    until(lambda: not processes_of(stand.folder), 2)


def test_stopped_in_order_it_stays_stopped(stand: Stand) -> None:
    stand.ask("stop")
    left = lambda: {process.pid for process in processes_of(stand.folder)}  # noqa: E731
    until(lambda: left() == {stand.owner.pid}, haproxy_watch.ORDERLY_S + 2)
    assert status_of(stand.url) == 0


def test_a_reload_leaves_one_haproxy_and_nobody_is_refused(stand: Stand) -> None:
    first = stand.haproxy
    with connecting(stand.url) as not_connected:
        for _ in range(3):
            stand.reload()
            until(lambda: haproxy_watch._pid_behind(str(stand.folder / "a")) == stand.haproxy)
            until(lambda: [p.pid for p in processes_of(stand.folder, "haproxy")] == [stand.haproxy])
        time.sleep(0.3)
    assert stand.haproxy != first
    assert not (stand.folder / haproxy_follow.SUBSTITUTE_PID).exists()
    assert not_connected == []


def test_one_that_still_answers_after_a_reload_gets_no_substitute(stand: Stand) -> None:
    """The one that followed it is killed, and has its own."""
    first = stand.haproxy
    with socket.create_connection(("127.0.0.1", int(stand.url.rpartition(":")[2]))) as unfinished:
        unfinished.sendall(b"GET /healthz HTTP/1.1\r\n")
        time.sleep(0.2)
        stand.reload()
        until(lambda: haproxy_watch._pid_behind(str(stand.folder / "a")) == stand.haproxy)
        time.sleep(2 * haproxy_watch.POLL_S)
        assert psutil.pid_exists(first)
        os.kill(stand.haproxy, 9)
        until(lambda: (stand.folder / haproxy_follow.SUBSTITUTE_PID).exists())
        substitute = int((stand.folder / haproxy_follow.SUBSTITUTE_PID).read_text())
    until(lambda: [p.pid for p in processes_of(stand.folder, "haproxy")] == [substitute])
    time.sleep(haproxy_watch.POLL_S)
    assert [p.pid for p in processes_of(stand.folder, "haproxy")] == [substitute]
    assert status_of(stand.url) == 200


def reloaded(stand: Stand, servers: Sequence[int], *, application: bool) -> None:
    """Once HAProxy has followed itself, on a configuration of Ray's for these."""
    port = int(stand.url.rpartition(":")[2])
    rendered(stand.folder, port, servers, inter="1s", application=application)
    stand.reload()
    until(lambda: haproxy_watch._pid_behind(str(stand.folder / "a")) == stand.haproxy)
    until(lambda: [p.pid for p in processes_of(stand.folder, "haproxy")] == [stand.haproxy])


def test_routers_that_ray_has_lost_are_asked_as_long_as_they_answer(stand: Stand) -> None:
    """A new controller of Serve may announce the application before it has found its replicas."""
    with running_router(RouterConfig()) as router:
        reloaded(stand, [int(router.url.rpartition(":")[2])], application=True)
        until(lambda: status_of(stand.url) == 200)
        with probing(stand.url) as prober:
            for _ in range(2):
                reloaded(stand, [], application=True)
                time.sleep(0.2)
        assert {status for _, status in prober.seen} == {200}
    until(lambda: status_of(stand.url) == 503)


def test_an_application_that_has_ended_is_not_kept(stand: Stand, router_port: int) -> None:
    reloaded(stand, [], application=False)
    assert status_of(stand.url) == 503
    reloaded(stand, [], application=True)
    assert status_of(stand.url) == 503
    reloaded(stand, [router_port], application=True)
    until(lambda: status_of(stand.url) == 200)
