"""A small store, `shardline serve` as a process of its own, and a check that nothing is left.

Each test starts what it needs with ``serving``, or with ``started`` and ``wait_for``, on a free
port and in an environment of its own. All commands share a temporary folder that is used by nobody
else, so that whatever a test leaves on the machine is found by it, whatever else runs there.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardline.cluster.serving.ray_session import free_port, port_is_free

ROOT = Path(__file__).parents[2]
READY = "serving generation"
START_S = 180.0  # for a busy machine; 10 s on an idle one
STOP_S = 20.0
# short, because Ray's sockets lie below it
TEMPORARY = Path(f"/tmp/m{os.getpid() & 0xFFFFF:x}")
PORTS: list[int] = []  # of every ``serving`` so far
ROWS = 2000
DIM = 16


@dataclass(eq=False)
class Served:
    """A running ``shardline`` command; ``lines`` are what it has written to standard error."""

    process: psutil.Popen
    lines: list[str] = field(default_factory=list)
    port: int = 0
    _news: threading.Condition = field(default_factory=threading.Condition)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def read(self) -> None:
        """Collects the lines until the command has closed its standard error."""
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
        with self._news:
            self.lines.append("")
            self._news.notify_all()

    def wait_for(self, text: str, within_s: float = START_S) -> str:
        """The first line that holds this; fails when the command ends without one."""

        def found() -> str | None:
            return next((line for line in self.lines if text in line), None)

        with self._news:
            self._news.wait_for(lambda: found() is not None or "" in self.lines, within_s)
        line = found()
        assert line is not None, f"no line {text!r} in {within_s:.0f} s:\n{self.text}"
        return line

    def wait(self, within_s: float = STOP_S) -> int:
        """The exit code; a negative one is the number of the signal that ended it."""
        try:
            return int(self.process.wait(timeout=within_s))
        except psutil.TimeoutExpired:
            raise AssertionError(f"not ended within {within_s:.0f} s:\n{self.text}") from None


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).parent / "shardline"), *arguments]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with this checkout's code, and without addresses and keys."""
    left_out = ("RAY_ADDRESS", "SHARDLINE_KEYS", "SHARDLINE_API_KEY", "SHARDLINE_CONFIG")
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(TEMPORARY)}
    return inherited | own | variables


def run(
    store: Path, *arguments: str, expect: int | None = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end; ``expect`` None: any exit code."""
    done = subprocess.run(
        command("--store", str(store), *arguments),
        capture_output=True,
        text=True,
        timeout=START_S,
        env=environment(**variables),
    )
    assert expect in (None, done.returncode), f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done


@contextlib.contextmanager
def started(store: Path | None, *arguments: str, **variables: str) -> Iterator[Served]:
    """A command in a process group of its own; ended at the end of the block if it still runs.

    store None: the command's own.
    """
    named = () if store is None else ("--store", str(store))
    process = psutil.Popen(
        command(*named, *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**variables),
        start_new_session=True,
    )
    served = Served(process)
    reader = threading.Thread(target=served.read)
    reader.start()
    try:
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(timeout=START_S)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(STOP_S)
        process.stderr.close()


@contextlib.contextmanager
def serving(
    store: Path, *options: str, port: int | None = None, **variables: str
) -> Iterator[Served]:
    """``shardline serve`` that answers; ``options`` are the command line's global ones."""
    port = port or free_port()
    PORTS.append(port)
    arguments = (*options, "serve", "--insecure", "--port", str(port))
    with started(store, *arguments, **variables) as served:
        served.port = port
        served.wait_for(READY)
        yield served


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose live generation has two shards and no query encoder."""
    root = tmp_path_factory.mktemp("machine")
    vectors = np.random.default_rng(5).standard_normal((ROWS, DIM)).astype(np.float32)
    ids = pa.array(np.arange(ROWS))
    listed = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)
    pq.write_table(pa.table({"id": ids, "emb": listed}), root / "items.parquet")
    shape = ("--set", "index.kind=flat", "--set", "cluster.shards=2")
    build = ("build", "--vectors", str(root / "items.parquet"), "--in-process")
    run(root / "store", *shape, *build)
    return root / "store"


@pytest.fixture(scope="session", autouse=True)
def temporary_folder() -> Iterator[None]:
    """The temporary folder of all commands started here, empty at the end."""
    TEMPORARY.mkdir()
    yield
    TEMPORARY.rmdir()


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No process, no open port, no session folder or other temporary file after a test."""
    yield
    deadline = time.monotonic() + STOP_S
    while (left := traces()) and time.monotonic() < deadline:
        time.sleep(0.2)  # a process that was killed takes a moment to be gone
    assert left == set()


def traces() -> set[str]:
    """What is in the temporary folder, processes that have it on their command line or a file in it
    open, and ports of ``serving`` that somebody listens on."""
    found = {str(path) for path in TEMPORARY.iterdir()}
    found |= {f"port {port}" for port in PORTS if not port_is_free(port)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            named = [*process.cmdline(), *(file.path for file in process.open_files())]
            if any(f"{TEMPORARY}/" in text for text in named):
                found.add(f"{process.name()} {process.pid}")
    return found
