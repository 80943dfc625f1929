"""Watches over HAProxy: puts a substitute in its place when it dies, ends it when Ray has ended.

Ray asks its HAProxyManager a few times before it believes that HAProxy is gone, then replaces the
manager, which starts HAProxy anew: seconds, in which nobody would be answered. So each HAProxy has
a watcher, a process that does nothing until

- HAProxy dies, by itself, by a signal, or because its manager has died: then the watcher starts
  HAProxy again, with the same configuration but another admin socket. Ray's own check goes on
  failing, the manager is replaced, and the next HAProxy takes over from the substitute. The watcher
  holds copies of HAProxy's listening sockets (``haproxy_sockets``): nobody is refused meanwhile,
  new connections wait for the substitute.
- the raylet dies, and with it everything that could answer: then HAProxy ends as well.

HAProxy itself ends with its manager, and a substitute with its watcher (PR_SET_PDEATHSIG), so
neither stays when everything else is killed. One HAProxy that follows another on a reload has a
watcher of its own; the first one's then has nothing to do.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardline.router.serve.haproxy import has_servers
from shardline.router.serve.haproxy_follow import (
    NEWEST_PID,
    SERVING_PID,
    SUBSTITUTE_CONFIG,
    SUBSTITUTE_PID,
    SUBSTITUTE_SOCKET,
    admin_socket,
    note_pid,
    noted_pid,
    with_admin_socket,
)
from shardline.router.serve.haproxy_sockets import ListeningSockets, offering

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PF_EXITING = 0x4  # linux/sched.h
OWNER = "raylet"
# A manager that ends so soon after HAProxy has been told to stop it in order; one that notices
# HAProxy's death is ended after three checks, a second apart.
ORDERLY_S = 1.5
# how long a substitute waits for the next manager's HAProxy
REPLACED_WITHIN_S = 60.0
STARTS_WITHIN_S = 30.0  # as long as Ray gives HAProxy
POLL_S = 0.1
ANSWERS_WITHIN_S = 5.0  # as long as Ray waits for an answer from the admin socket
RESTART_S = 0.2  # between two substitutes, should they end too
HANDED_OVER_SOCKET = "l"  # as short as those of haproxy_follow


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A HAProxy to be; the numbers are descriptors of processes (pidfd_open), readable once they
    have ended."""

    pid: int
    process: int
    manager: int
    owner: int
    manager_pid: int
    binary: str
    config: Path
    text: str

    @classmethod
    def this_process(cls, binary: str, config: Path, text: str) -> "Watched":
        pid, manager = os.getpid(), os.getppid()
        return cls(
            pid=pid,
            process=os.pidfd_open(pid),
            manager=os.pidfd_open(manager),
            owner=os.pidfd_open(_owner_of(manager)),
            manager_pid=manager,
            binary=binary,
            config=config,
            text=text,
        )

    def leave_watcher(self) -> None:
        """Makes this process end with its manager, and watched by another one, a child of it.

        Raises:
            OSError: the manager has ended already.
        """
        note_pid(self.config.parent / NEWEST_PID, self.pid)
        if os.fork() == 0:
            os.setsid()  # out of reach of signals to Ray's process groups
            try:
                self.watch()
            except BaseException:  # noqa: BLE001  a copy of another process: must not go on
                traceback.print_exc()  # to where Ray has HAProxy write
                os._exit(1)
            os._exit(0)
        _end_with_parent(signal.SIGTERM, self.manager_pid)

    def watch(self) -> None:
        """Returns when there is nothing left to watch over."""
        if not self._serves():
            return  # whoever started it is told why by HAProxy itself
        note_pid(self.config.parent / SERVING_PID, self.pid)
        sockets = self._listening_sockets()
        ended = _wait(self.process, self.owner)
        if self.owner in ended:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.process, signal.SIGKILL)
        elif not self._is_followed() and has_servers(self.text):
            self._replace(sockets)

    def _serves(self) -> bool:
        """Waits until HAProxy answers on its admin socket; False if it ends before.

        One that has lived so long as it may take to start has started.
        """
        deadline = time.monotonic() + STARTS_WITHIN_S
        while not _wait(self.process, self.owner, for_s=POLL_S):
            if _pid_behind(admin_socket(self.text)) == self.pid or time.monotonic() > deadline:
                return True
        return False

    def _listening_sockets(self) -> ListeningSockets:
        """Copies of HAProxy's; none if it does not give them: a substitute then opens its own."""
        try:
            return ListeningSockets.of(admin_socket(self.text))
        except OSError as error:
            _report("connections will be refused while HAProxy is replaced", error)
            return ListeningSockets()

    def _is_followed(self) -> bool:
        """Whether another HAProxy has served since, or has been started and lives.

        Should that one die, it has a watcher of its own.
        """
        folder = self.config.parent
        newest = noted_pid(folder / NEWEST_PID, self.config)
        has_served = int((folder / SERVING_PID).read_text()) != self.pid
        return has_served or newest not in (None, self.pid)

    def _replace(self, sockets: ListeningSockets) -> None:
        """Runs substitutes until HAProxy is there again, or is wanted no more."""
        since = time.monotonic()
        manager_lived = not (_wait(self.manager, for_s=0) or _is_ending(self.manager_pid))
        note = self.config.parent / SUBSTITUTE_PID
        while (left_s := since + REPLACED_WITHIN_S - time.monotonic()) > 0:
            with self._substitute(sockets) as (pid, process):
                note_pid(note, pid)
                watched = [process, self.owner]
                if manager_lived:
                    ended = _wait(*watched, self.manager, for_s=ORDERLY_S)
                    if self.manager in ended:
                        return
                    manager_lived = False  # of no interest any more
                    if not ended:
                        ended = _wait(*watched, for_s=left_s)
                else:
                    ended = _wait(*watched, for_s=left_s)
                if process not in ended or self._is_followed():
                    return
            _wait(self.owner, for_s=RESTART_S)

    @contextlib.contextmanager
    def _substitute(self, sockets: ListeningSockets) -> Iterator[tuple[int, int]]:
        """HAProxy as a child; (pid, descriptor). Ended at the end, softly if it was followed."""
        folder = self.config.parent
        config = folder / SUBSTITUTE_CONFIG
        config.write_text(with_admin_socket(self.text, str(folder / SUBSTITUTE_SOCKET)))
        path = folder / HANDED_OVER_SOCKET
        with offering(path) as offer:
            pid = self._start("-db", "-dR", "-f", str(config), "-x", str(path))
            process = os.pidfd_open(pid)
            try:
                sockets.hand_over(offer, process)
            except OSError as error:  # then HAProxy ends, and the next one is started
                _report("the substitute of HAProxy got no sockets", error)
        try:
            yield pid, process
        finally:
            (folder / SUBSTITUTE_PID).unlink(missing_ok=True)
            if not _wait(process, for_s=0):
                os.kill(pid, signal.SIGTERM)
            os.close(process)
            os.waitpid(pid, 0)

    def _start(self, *arguments: str) -> int:
        """HAProxy as a child that ends with this process; its pid."""
        watcher = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                _end_with_parent(signal.SIGKILL, watcher)
                os.execv(self.binary, ["haproxy", *arguments])
            finally:
                os._exit(1)
        return pid


def _wait(*processes: int, for_s: float | None = None) -> list[int]:
    """Those of the descriptors whose process has ended; returns once there is one, or in time."""
    ended, _, _ = select.select(processes, [], [], for_s)
    return ended


def _report(what: str, error: OSError) -> None:
    """To where Ray has HAProxy write."""
    sys.stderr.write(f"{what}: {error}\n")


def _is_ending(pid: int) -> bool:
    """Whether a process has been killed: its threads and memory go one by one, and the kernel tells
    HAProxy when the first is gone, half a second before the process counts as ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        flags = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6])
    except OSError:
        return True
    pending = int(status.split("\nSigPnd:")[1].split("\n")[0], 16)
    return bool(flags & PF_EXITING or pending >> (signal.SIGKILL - 1) & 1)


def _end_with_parent(how: signal.Signals, parent: int) -> None:
    """The kernel sends ``how`` to this process when its parent ends; it holds beyond an exec.

    Raises:
        OSError: the kernel does not, or the parent is not this one any more.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(how), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise ProcessLookupError("whoever started HAProxy has ended")


def _owner_of(pid: int) -> int:
    """The raylet above a process; its parent where there is no raylet, as in tests."""
    parent = above = _parent(pid)
    while above > 1:
        if Path(f"/proc/{above}/comm").read_text().strip() == OWNER:
            return above
        above = _parent(above)
    return parent


def _parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("\nPPid:")[1].split("\n")[0])


def _pid_behind(path: str) -> int | None:
    """The process that answers on HAProxy's admin socket; None where none does."""
    with socket.socket(socket.AF_UNIX) as opened:
        opened.settimeout(ANSWERS_WITHIN_S)
        try:
            opened.connect(path)
            opened.sendall(b"show info\n")
            answer = b""
            while part := opened.recv(1 << 16):
                answer += part
        except OSError:
            return None
    for line in answer.decode("latin-1").splitlines():
        if line.startswith("Pid: "):
            return int(line.removeprefix("Pid: "))
    return None
