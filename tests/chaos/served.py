"""A cluster as a user has it: ``shardline serve`` in a process of its own, and what runs below."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from shardline.bench.load.processes import shard_process, tree
from shardline.cluster.serving.endpoint import Address, find_endpoint
from shardline.cluster.serving.ray_session import SESSION_PREFIX
from shardline.cluster.store import Store
from shardline.router.client.retries import Retry
from shardline.router.client.sync_client import Client
from shardline.router.http.api_keys import Scope
from shardline.shards.core.errors import NotFound, ShardlineError

START_S = 180.0
STOP_S = 60.0
POLL_S = 0.2
STATUS_TIMEOUT_S = 3.0
SETTINGS = ("live.compact_min_rows=300",)  # so that shards are compacted several times in a run
# roles of bench.load.processes that a whole cluster has, each as often as at the start
WATCHED = (
    *("shard", "router", "controller", "serve controller"),
    *("haproxy manager", "serve proxy", "haproxy", "raylet", "gcs"),
)


class DidNotStart(Exception):
    """``serve`` ended, or was not ready in time; with what it printed."""


@dataclass(slots=True)
class Served:
    """The cluster that serves ``store`` at ``port``; started again and again, logs to ``log``."""

    store: Store
    port: int
    log: Path
    address: Address = field(init=False)
    write_address: Address = field(init=False)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> float:
        """Seconds until it said that it serves. Raises DidNotStart."""
        started = time.monotonic()
        with self.log.open("ab") as log:
            place = log.tell()
            self._process = subprocess.Popen(
                self._command("serve", "--port", str(self.port), settings=SETTINGS),
                stdout=log,
                stderr=log,
            )
        while b"serving generation" not in (said := self.log.read_bytes()[place:]):
            if self._process.poll() is not None or time.monotonic() > started + START_S:
                raise DidNotStart(said.decode(errors="replace"))
            time.sleep(POLL_S)
        endpoint = find_endpoint(self.store)
        self.address = endpoint.address
        self.write_address = endpoint.address_for(Scope.WRITE)
        return time.monotonic() - started

    def ended(self, within_s: float) -> int | None:
        """The exit code of ``serve``, once it has ended; None: it has not in that time."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(within_s)
        return None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def down(self) -> None:
        """``shardline down``: whatever is left is ended."""
        subprocess.run(self._command("down"), capture_output=True, timeout=2 * STOP_S, check=False)
        if self._process is not None and self.ended(STOP_S) is None:
            self._process.kill()
            self._process.wait()

    def _command(self, *arguments: str, settings: Sequence[str] = ()) -> list[str]:
        script = Path(sys.executable).parent / "shardline"
        chosen = [word for setting in settings for word in ("--set", setting)]
        return [str(script), "--store", str(self.store.root), *chosen, *arguments]

    # What runs

    def processes(self, role: str) -> list[psutil.Process]:
        """Those of a role, by the pid; HAProxy also where its manager is gone."""
        found = {process.pid: process for each, process in tree(self.pid) if each == role}
        if role == "haproxy":
            found |= {process.pid: process for process in self._haproxies()}
        return [found[pid] for pid in sorted(found)]

    def census(self) -> Counter[str]:
        """How many processes of each watched role run; none once ``serve`` is gone."""
        with suppress(NotFound):
            roles = Counter(role for role, _ in tree(self.pid) if role in WATCHED)
            roles["haproxy"] = len(self.processes("haproxy"))
            return roles
        return Counter()

    def shard(self, number: int) -> psutil.Process:
        """The process of a shard; NotFound: none listens where status says."""
        addresses = {each["shard"]: each["address"] for each in self.status()["shards"]}
        return shard_process(self.pid, addresses, number)

    def status(self) -> dict[str, Any]:
        """Raises ShardlineError: nobody answers."""
        with self._client() as client:
            return client.status()

    def is_connected(self) -> bool:
        """Whether the router is ready, and connected to every shard."""
        try:
            with self._client() as client:
                return client.ready() and all(s["connected"] for s in client.status()["shards"])
        except ShardlineError:
            return False

    def is_ready(self) -> bool:
        """What ``/readyz`` says; not, where nobody answers."""
        try:
            with self._client() as client:
                return client.ready()
        except ShardlineError:
            return False

    def _client(self) -> Client:
        once = Retry(attempts=1)
        return Client(self.address.url, STATUS_TIMEOUT_S, key=self.address.key, retry=once)

    def _haproxies(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["name"]):
            if process.info["name"] == "haproxy":
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if any(_session_of(self.pid) in part for part in process.cmdline()):
                        found.append(process)
        return found


def traces_of(pid: int) -> list[str]:
    """What names a session of the ``serve`` that had this pid: folders, processes."""
    prefix = _session_of(pid)
    found = [str(path) for path in Path(tempfile.gettempdir()).glob(f"{SESSION_PREFIX}{pid}-*")]
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            named = [*process.cmdline(), *(file.path for file in process.open_files())]
            if any(prefix in name for name in named):
                found.append(f"{process.name()} {process.pid}")
    return found


def _session_of(pid: int) -> str:
    return f"/{SESSION_PREFIX}{pid}-"
