"""What a host has before anything of ours is installed there: a program that is sent to it by ssh.

It runs under whatever ``python3`` the host has, 3.7 or newer, so it imports nothing but the
standard library. ``cluster.preflight.launch_hosts`` sends its text with a question, a JSON object:

    {"store", "probe", "writes": whether to leave the probe file there, "removes": whether to do
    nothing but remove it, "ports": [[host, port]], "reach": [[host, port]]}

and reads one line of JSON, the answer that ``answer_to`` describes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

INSTALLED = "~/shardline/.venv/bin/python"
TOKEN = "~/.ray/auth_token"
RUNNING = ("raylet", "gcs_server", "haproxy")
CONNECT_TIMEOUT_S = 3.0
VERSION_TIMEOUT_S = 20.0


def answer_to(question: dict[str, Any]) -> dict[str, Any]:
    """name, what the name resolves to (or None), python, venv (whether it can make environments),
    rsync (path or None), ray (version in our environment or None), token ({mode, digest} or None),
    ports and reach ({"HOST:PORT": why not, or None}), rays (names of Ray's processes), store (as
    ``_store``), cores, memory and swap (free bytes), clock (seconds since 1970)."""
    store, probe = Path(question["store"]).expanduser(), question["probe"]
    if question["removes"]:
        _remove(store / probe)
        return {}
    memory = _memory()
    return {
        "name": socket.gethostname(),
        "resolved": _resolved(),
        "python": platform.python_version(),
        "venv": bool(importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")),
        "rsync": shutil.which("rsync"),
        "ray": _ray_version(),
        "token": _token(),
        "ports": {f"{host}:{port}": _port_error(host, port) for host, port in question["ports"]},
        "reach": {f"{host}:{port}": _reach_error(host, port) for host, port in question["reach"]},
        "rays": _running(),
        "store": _store(store, probe, writes=question["writes"]),
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory.get("MemAvailable", 0),
        "swap": memory.get("SwapFree", 0),
        "clock": time.time(),
    }


def _resolved() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _ray_version() -> str | None:
    python = str(Path(INSTALLED).expanduser())
    code = "import importlib.metadata as m; print(m.version('ray'))"
    try:
        told = subprocess.check_output(
            [python, "-c", code], stderr=subprocess.DEVNULL, timeout=VERSION_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return told.decode().strip()


def _token() -> dict[str, str] | None:
    path = Path(TOKEN).expanduser()
    try:
        content, mode = path.read_bytes().strip(), path.stat().st_mode & 0o777
    except OSError:
        return None
    return {"mode": f"{mode:o}", "digest": hashlib.sha256(content).hexdigest()[:16]}


def _port_error(host: str, port: int) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return "taken" if error.errno == errno.EADDRINUSE else str(error)
    return None


def _reach_error(host: str, port: int) -> str | None:
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return str(error)
    return None


def _running() -> list[str]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            found.add((folder / "comm").read_text().strip())
    return sorted(found & set(RUNNING))


def _store(store: Path, probe: str, *, writes: bool) -> dict[str, Any]:
    """exists: False where it certainly does not; errno and text of a refused look or file, else
    None; free bytes; sees: whether the probe is there; shards: bytes that each shard of the live
    generation loads, None where there is none."""
    answer: dict[str, Any] = {
        "exists": True,
        "errno": None,
        "text": None,
        "free": 0,
        "sees": False,
        "shards": None,
    }
    own = store / (probe if writes else f"{probe}-{os.getpid()}")
    try:
        answer["exists"] = store.is_dir()
        if not answer["exists"]:
            return answer
        answer["sees"] = (store / probe).exists()
        answer["free"] = shutil.disk_usage(str(store)).free
        with own.open("w") as file:
            file.write("whether every host sees the same store\n")
            file.flush()
            os.fsync(file.fileno())
        answer["shards"] = _shards(store)
    except OSError as error:
        answer["errno"], answer["text"] = error.errno, error.strerror
    if not writes or answer["errno"] is not None:
        _remove(own)
    return answer


def _shards(store: Path) -> list[int] | None:
    """Attributes are mapped, not loaded."""
    try:
        live = int((store / "CURRENT").read_text())
        numbered = (store / "generations").glob("[0-9]*")
        folder = next(each for each in numbered if int(each.name) == live)
        folders = sorted(folder.glob("shard-*"))
    except (OSError, ValueError, StopIteration):  # no generation, or one to be repaired first
        return None
    return [
        sum(file.stat().st_size for file in folder.iterdir() if file.name != "attributes.arrow")
        for folder in folders
    ]


def _memory() -> dict[str, int]:
    rows = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3}


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def main(text: str) -> None:
    """Answers the question on standard output."""
    sys.stdout.write(json.dumps(answer_to(json.loads(text))) + "\n")
