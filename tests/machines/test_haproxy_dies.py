"""HAProxy, its manager or everything else killed on a real cluster; a router that stops."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from shardline.cluster.serving.deployment import shard_reports
from shardline.cluster.serving.ray_session import free_port, reap_orphans
from shardline.router.serve.haproxy import CHECK_TIMEOUT_S
from tests.integration.conftest import Cluster, cluster, job, nothing_is_left_behind  # noqa: F401
from tests.prober import probing, status_of

ANSWERED_AGAIN_S = 2.0
FOLLOWED_WITHIN_S = 60.0
START_S = 120.0


def processes(title: str) -> list[psutil.Process]:
    """Ray's processes below this one, by how their command line begins."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    return found


def haproxy_of(manager: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child for child in manager.children() if child.name() == "haproxy"]
    return []


def haproxys_below(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() == "haproxy":
                found.append(child)
    return found


def until(condition: Callable[[], object], within_s: float = FOLLOWED_WITHIN_S) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < within_s, f"not within {within_s} s"
        time.sleep(0.05)
    return time.monotonic() - started


def one(title: str) -> psutil.Process:
    (found,) = processes(title)
    return found


def test_a_killed_haproxy_or_manager_is_away_for_less_than_two_seconds(
    cluster: Cluster,  # noqa: F811
) -> None:
    url = cluster.endpoint.url
    for victim in ("haproxy", "manager", "haproxy"):
        manager = one("ray::HAProxyManager")
        (haproxy,) = haproxy_of(manager)
        with probing(url) as prober:
            time.sleep(1)
            (manager if victim == "manager" else haproxy).kill()
            replaced_s = until(
                lambda: any(
                    haproxy_of(each)
                    for each in processes("ray::HAProxyManager")
                    if each.pid != manager.pid  # noqa: B023
                )
            )
            time.sleep(5)
        statuses = [status for _, status in prober.seen]
        print(
            f"{victim} killed: {prober.away_s() * 1e3:.0f} ms without an answer, "
            f"{statuses.count(0)} broken, others {set(statuses)}, new manager {replaced_s:.1f} s"
        )
        assert prober.away_s() < ANSWERED_AGAIN_S, prober.changes()
        assert set(statuses) <= {200, 0, 503}
        # what was inside HAProxy, and nothing refused: the prober has one request at a time
        assert statuses.count(0) <= 1
    # and the next manager follows the routers: one that is killed is replaced
    one("ray::ServeReplica").kill()
    until(lambda: status_of(url) != 200, 10)
    until(lambda: status_of(url) == 200)
    until(lambda: httpx.get(f"{url}/readyz").json().get("shards_connected") == 3)


@pytest.fixture
def stopped_router(cluster: Cluster) -> Iterator[psutil.Process]:  # noqa: F811
    router = one("ray::ServeReplica")
    router.suspend()
    yield router
    with contextlib.suppress(psutil.NoSuchProcess):
        router.resume()
    until(lambda: status_of(cluster.endpoint.url) == 200)
    until(lambda: httpx.get(f"{cluster.endpoint.url}/readyz").status_code == 200)


def test_a_stopped_router_holds_nobody_for_long(
    cluster: Cluster,  # noqa: F811
    stopped_router: psutil.Process,
) -> None:
    started = time.monotonic()
    status = status_of(cluster.endpoint.url)
    held_s = time.monotonic() - started
    print(f"held for {held_s:.1f} s, then {status}")
    # HAProxy closes without an answer where the connection to the router had been used before
    assert status in (0, 502, 503)
    assert held_s < 3 * (CHECK_TIMEOUT_S + 1) + 2
    started = time.monotonic()
    assert httpx.get(f"{cluster.endpoint.url}/healthz", timeout=60).status_code == 503
    assert time.monotonic() - started < 1, "at once"


def test_not_ready_while_every_shard_is_stopped(cluster: Cluster) -> None:  # noqa: F811
    url = cluster.endpoint.url
    until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
    pids = [report["pid"] for report in shard_reports()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        took_s = until(lambda: httpx.get(f"{url}/readyz").status_code == 503, 10)
        print(f"not ready after {took_s:.1f} s")
        time.sleep(3)
        assert httpx.get(f"{url}/readyz").status_code == 503
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    until(lambda: httpx.get(f"{url}/readyz").status_code == 200, 20)


@contextlib.contextmanager
def serving_process(store: Path, log: Path) -> Iterator[psutil.Process]:
    """``shardline serve`` on a copy of the store; what it leaves behind is ended at the end."""
    port = free_port()
    main = "from shardline.cluster.cli import main; main()"
    command = [sys.executable, "-c", main, "--store", str(store)]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "serve", "--port", str(port)], stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: server.poll() is not None or status_of(url, "/readyz") == 200, START_S)
        assert server.poll() is None, log.read_text()
        yield psutil.Process(server.pid)
    finally:
        server.kill()
        server.wait(10)
        reap_orphans()


def test_haproxy_does_not_outlive_everything_else(
    cluster: Cluster,  # noqa: F811
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    shutil.copytree(cluster.store.root, store, ignore=shutil.ignore_patterns("serving.json"))
    with serving_process(store, tmp_path / "log") as serve:
        # that of before the last reload answers what it was asked, and ends
        until(lambda: len(haproxys_below(serve)) == 1, 5)
        tree = [serve, *serve.children(recursive=True)]
        (haproxy,) = haproxys_below(serve)
        for process in tree:
            if process != haproxy:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        took_s = until(lambda: not haproxy.is_running(), 5)
        print(f"HAProxy gone {took_s * 1e3:.0f} ms after everything else")
        assert took_s < 2
