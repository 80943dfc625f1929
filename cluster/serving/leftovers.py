"""The processes and the folder of a private Ray: found, ended and removed, whoever started it.

A session is a folder below the temporary one, whose name holds the pid of the process that owns it.
Every process of the session, HAProxy included, has that folder on its command line or a file in it
open. No other process is touched.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from shardline.cluster.preflight.folders import temporary_root
from shardline.cluster.serving.endpoint import is_alive

SESSION_PREFIX = "shardline-"
STOP_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 5.0  # what is killed is gone in a moment, unless it waits for a disk
KILL_POLL_S = 0.05


def reap_orphans() -> list[int]:
    """Ends processes left by sessions whose owner was killed; removes their folders; their pids.

    Another user's sessions are left alone.
    """
    reaped: list[int] = []
    for folder in temporary_root().glob(f"{SESSION_PREFIX}*-*"):
        owner = folder.name.removeprefix(SESSION_PREFIX).split("-")[0]
        if owner.isdigit() and _may_end(folder) and not _owns(int(owner), folder):
            reaped += end_session(folder, wait_s=0)  # nobody is left whom an orderly end would help
    return reaped


def end_session(session: Path, *, wait_s: float = STOP_TIMEOUT_S) -> list[int]:
    """Ends every process of a session and removes its folder; their pids.

    They are asked to end and given ``wait_s`` for it; what is still there then is killed, again and
    again until nothing appears any more: some of them start others.
    """
    found = _processes_of(session)
    ended = {process.pid for process in found}
    if wait_s:
        _each(found, psutil.Process.terminate)
        psutil.wait_procs(found, timeout=wait_s)
        found = _processes_of(session)
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while found and time.monotonic() < deadline:
        ended |= {process.pid for process in found}
        _each(found, psutil.Process.kill)
        psutil.wait_procs(found, timeout=KILL_POLL_S)
        found = _processes_of(session)
    shutil.rmtree(session, ignore_errors=True)
    return sorted(ended)


def _each(processes: list[psutil.Process], do: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            do(process)


def _processes_of(session: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _belongs_to(process, session)]


def _belongs_to(process: psutil.Process, session: Path) -> bool:
    """By command line, or by the log files it holds open: Ray's workers rename themselves.

    Not what has a terminal: somebody looks at the session's files there, whereas its own processes
    have none.
    """
    if process.pid == os.getpid():
        return False
    try:
        if _has_terminal(process):
            return False
        traces = [*process.cmdline(), *(file.path for file in process.open_files())]
        return any(str(session) in trace for trace in traces)
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


def _has_terminal(process: psutil.Process) -> bool:
    """psutil knows only those terminals that there were when it was first asked."""
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text()
    except FileNotFoundError:  # it has ended, or this is not Linux
        return process.terminal() is not None
    return stat.rpartition(")")[2].split()[4] != "0"  # tty_nr, proc(5)


def _may_end(folder: Path) -> bool:
    """Whether the session is this user's; root may end everybody's."""
    try:
        return os.geteuid() in (0, folder.lstat().st_uid)
    except FileNotFoundError:  # another command is ending it
        return False


def _owns(pid: int, folder: Path) -> bool:
    """Whether the session's owner still runs; a younger process may carry its pid by now."""
    try:
        return is_alive(pid) and psutil.Process(pid).create_time() <= folder.stat().st_ctime + 1
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
