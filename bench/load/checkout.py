"""A checkout of the project as something to measure: its own code in its own processes.

Checkouts of different age have other module names and other internals, so only what stays the
same is used: the command line (``build --vectors``, ``serve --port``, ``keys show``, ``down``),
HTTP, and the JSON that the fan-out benchmark prints.
"""

import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from shardline.cluster.serving.endpoint import Address
from shardline.shards.core.errors import NotFound, Unavailable

# (file, module without the prefix of the namespace) of the fan-out benchmark, newest first
FANOUT_MODULES = (
    ("bench/load/fanout_bench.py", "bench.load.fanout_bench"),
    ("bench/fanout.py", "bench.fanout"),
)
NAMESPACE = "shardline"
HOST = "127.0.0.1"
READY_S = 300.0
STOP_S = 90.0
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Checkout:
    """A folder with the project in some version; absolute."""

    folder: Path

    @property
    def prefix(self) -> str:
        """What its modules' names begin with: nothing in versions before the namespace."""
        return f"{NAMESPACE}." if (self.folder / NAMESPACE / "__init__.py").is_file() else ""

    @property
    def commit(self) -> str:
        """The commit it is at, "+" behind it where files differ from it; "" outside of git."""
        found = [
            subprocess.run(
                ["git", "-C", str(self.folder), *words], capture_output=True, text=True, check=False
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        ]
        return found[0][:12] + ("+" if found[0] and found[1] else "")

    def check(self) -> None:
        """Raises NotFound unless Python finds this folder's modules and no installed ones."""
        module = f"{self.prefix}cluster.cli"
        code = f"import {module} as m; print(m.__file__)"
        place = self._run([sys.executable, "-c", code]).stdout.strip()
        if not place.startswith(f"{self.folder}/"):
            raise NotFound(
                f"{self.folder}: not a checkout of the project", got=f"{module}: {place}"
            )

    def shardline(self, store: Path, settings: Sequence[str], *words: str) -> list[str]:
        """The command line of its ``shardline``; settings are KEY=VALUE."""
        overrides = [word for setting in settings for word in ("--set", setting)]
        code = f"from {self.prefix}cluster.cli import main; main()"
        return [sys.executable, "-c", code, "--store", str(store), *overrides, *words]

    def store_name(self, rows: int, dim: int, settings: Sequence[str]) -> str:
        """Another one for each commit, corpus and configuration: what it holds can be reused."""
        digest = zlib.crc32("\n".join([str(self.folder), *settings]).encode())
        return f"{self.commit or 'unversioned'}-{rows}x{dim}-{digest:08x}"

    def build(self, store: Path, vectors: Path, settings: Sequence[str]) -> bool:
        """Builds the live generation unless the store has one; whether it did."""
        if (store / "CURRENT").exists():
            return False
        self._run(self.shardline(store, settings, "build", "--vectors", str(vectors)))
        return True

    @contextmanager
    def serving(self, store: Path, settings: Sequence[str], port: int) -> Iterator[Address]:
        """Its server over the store's live generation; ended, by its pid, with the block.

        Raises:
            Unavailable: it did not become ready; carries the last line of its log.
        """
        log = store / "serve.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.shardline(store, settings, "serve", "--port", str(port)),
                cwd=self.folder,
                env=self._environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is ours to handle
            )
        try:
            _wait_ready(process, port, log)
            key = self._run(self.shardline(store, (), "keys", "show")).stdout.strip()
            yield Address(f"http://{HOST}:{port}", key)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self._run(self.shardline(store, (), "down"))  # ends what the killed one left

    def fan_out(self, *, count: int, rate: float) -> dict[str, float]:
        """p50 in ms of the router-to-shards round trip without index, by pace."""
        module = next((m for file, m in FANOUT_MODULES if (self.folder / file).is_file()), None)
        if module is None:
            raise NotFound(f"{self.folder}: no fan-out benchmark")
        words = ["-m", f"{self.prefix}{module}", "--count", str(count), "--rate", f"{rate:g}"]
        return fan_out_figures(self._run([sys.executable, *words]).stdout)

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            shown = " ".join(command[1:])
            raise Unavailable(f"{self.folder}: `python {shown}` failed", got=lines[-1])
        return done

    def _environment(self) -> dict[str, str]:
        """Ours, without what would point it to another store, configuration or code."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SHARDLINE_")}
        return kept | {"PYTHONPATH": str(self.folder)}


def fan_out_figures(output: str) -> dict[str, float]:
    """From what the benchmark prints: a table, then JSON. Older ones say "in_a_row"."""
    report: dict[str, Any] = json.loads(output[output.index("{") :])["fan_out_ms"]
    sequential = report.get("sequential") or report["in_a_row"]
    return {"sequential": sequential["p50"], "spaced": report["spaced"]["p50"]}


def _wait_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while not _is_ready(port):
        if process.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            raise Unavailable(f"the server did not start, see {log}", got=lines[-1])
        time.sleep(POLL_S)


def _is_ready(port: int) -> bool:
    connection = HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
