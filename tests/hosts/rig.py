"""Simulated hosts on this machine: namespaces of their own for network, processes, mounts and name.

A host has its own address, sshd, /tmp, /dev/shm, /run and home folder, and sees this machine's
other folders; /mnt/shardline is shared by all of them, as a mounted store would be. They share the
machine's memory and clock, and compete for its cores by niceness alone. One more, the desk, is the
machine of whoever operates the cluster: commands that a user would run there leave nothing on this
one.

            desk .200      host 1 .1      host 2 .2      host 3 .3
                |              |              |              |
                +--------------+--- bridge ---+--------------+      this machine .254

Rigs do not collide: each holds the lock of a number, which is in the names of its devices and in
its addresses, 10.78.NUMBER.x. The kernel gives the lock back when the rig's process ends in
whatever way, and its hosts end with it; the next rig of that number removes what is left.
"""

import contextlib
import fcntl
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

NUMBERS = range(64)
DESK = 200
OUTSIDE = 254
# a hardware address that nobody has: what is sent there is lost without a word
NOBODY = "02:00:00:00:00:99"
STORE = Path("/mnt/shardline")
AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")
STAGE = "/run/rig"
STARTS_WITHIN_S = 20.0
ENDS_WITHIN_S = 10.0
POLL_S = 0.05
TOOLS = ("ip", "unshare", "setpriv", "nsenter", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")
SSH = (
    *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
    *("-o", "LogLevel=ERROR", "-o", "ConnectTimeout=5", "-o", "BatchMode=yes"),
)
SSHD = f"""
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
MaxStartups 100
Subsystem sftp internal-sftp
HostKey {STAGE}/keys/host
AuthorizedKeysFile {STAGE}/keys/authorized
"""


class CannotRaise(Exception):
    """This machine does not allow, or lacks, what simulated hosts need; says what."""


def why_not() -> str | None:
    """Why there can be no rig on this machine; None: there can."""
    if os.geteuid() != 0:
        return "not root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)}: install openssh-server, rsync, iproute2, util-linux"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "mount", "-t", "tmpfs", "-o",
         "size=4k", "tmpfs", "/mnt"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return None if tried.returncode == 0 else tried.stderr.strip() or "unshare failed"


@dataclass(slots=True)
class Host:
    """One simulated host; ``number`` is the last part of its address."""

    rig: "Rig"
    number: int
    name: str
    _outer: subprocess.Popen[bytes] | None = None
    _init: int = 0  # the pid, on this machine, of the host's process 1

    @property
    def address(self) -> str:
        return self.rig.address(self.number)

    @property
    def is_up(self) -> bool:
        return self._outer is not None and self._outer.poll() is None

    @property
    def home(self) -> Path:
        """Its home folder as seen from this machine; it survives the host's end."""
        return self.rig.folder / "home" / self.name

    @property
    def namespace(self) -> str:
        return f"{self.rig.name}h{self.number}"

    @property
    def device(self) -> str:
        return f"{self.rig.name}v{self.number}"

    def ssh(self, command: str) -> list[str]:
        """The command line that runs ``command`` there in a login shell, as a user's would."""
        key = str(self.rig.folder / "keys" / "user")
        quoted = "'" + command.replace("'", "'\\''") + "'"
        return ["ssh", *SSH, "-i", key, f"root@{self.address}", f"bash --login -c {quoted}"]

    def run(
        self, command: str, *, timeout_s: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs a shell command there, by ssh.

        Raises:
            AssertionError: it failed, unless ``check`` is False; carries what it printed.
            subprocess.TimeoutExpired: it did not end.
        """
        done = subprocess.run(
            self.ssh(command), capture_output=True, text=True, timeout=timeout_s, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(
                f"{self.name}: `{command}` ended with {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def entering(self, *words: str) -> list[str]:
        """A command line that runs ``words`` there without ssh: also where no packet arrives."""
        return ["nsenter", "-t", str(self._init), "-m", "-u", "-n", "-p", "--", *words]

    def processes(self) -> dict[int, list[str]]:
        """Command lines by pid on this machine; without sshd, and the host's process 1."""
        found = {}
        space = _namespace_of(self._init)
        for entry in Path("/proc").iterdir() if space else ():
            if entry.name.isdigit() and _namespace_of(int(entry.name)) == space:
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    # a process that has ended and is not waited for has no command line
                    if words != [""] and "sshd" not in words[0]:
                        found[int(entry.name)] = words[:-1]
        found.pop(self._init, None)
        return found

    def start(self) -> None:
        """Raises CannotRaise: it did not start, or its sshd does not answer."""
        self.home.mkdir(parents=True, exist_ok=True)
        # each ends with the one before: nothing outlives the process that this code runs in
        words = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.namespace]
        words += ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--mount-proc"]
        log = self.rig.folder / f"{self.name}.log"
        with log.open("ab") as output:
            self._outer = subprocess.Popen(
                [*words, "bash", "-euc", _boot_script(self)], stdout=output, stderr=output,
                stdin=subprocess.DEVNULL, cwd="/",
            )  # fmt: skip
        deadline = time.monotonic() + STARTS_WITHIN_S
        while self.run("true", check=False, timeout_s=STARTS_WITHIN_S).returncode:
            if not self.is_up or time.monotonic() > deadline:
                raise CannotRaise(f"{self.name} did not start: {log.read_text()}")
            time.sleep(POLL_S)
        self._init = int(_children(self._outer.pid)[0])

    def kill(self) -> None:
        """Ends every process of the host at once; its kernel goes on to refuse connections."""
        self.begin_to_end()
        if self._outer is not None:
            self._outer.wait(ENDS_WITHIN_S)
        deadline = time.monotonic() + ENDS_WITHIN_S
        while self._init and _namespace_of(self._init):
            assert time.monotonic() < deadline, f"{self.name} has not ended"
            time.sleep(POLL_S)
        self._init = 0

    def begin_to_end(self) -> None:
        if self._outer is not None:
            self._outer.kill()

    def power_off(self) -> None:
        """As a host without power: silent from now on, and nothing runs there any more."""
        self.cut()
        self.kill()

    def power_on(self) -> None:
        """Brings a host back that was killed or powered off: with its disk, without its /tmp."""
        self.mend()
        self.start()

    def cut(self) -> None:
        """Loses every packet to and from it silently, until ``mend``."""
        for number in self.rig.numbers:
            if number != self.number:
                self.rig.part(self.number, number)

    def mend(self) -> None:
        for number in self.rig.numbers:
            if number != self.number:
                self.rig.join(self.number, number)


class Rig:
    """Hosts 1 to ``count`` and the desk, raised as a context manager.

    ``lent`` are this machine's folders below the home folder or /tmp that hosts are to see: the
    Python environment, say.

    Raises:
        CannotRaise: on entering.
    """

    def __init__(self, count: int, lent: Sequence[Path] = ()) -> None:
        self.hosts = [Host(self, number, f"host{number}") for number in range(1, count + 1)]
        self.desk = Host(self, DESK, "desk")
        self.lent = [path.absolute() for path in lent]
        self.numbers = [OUTSIDE, DESK, *(host.number for host in self.hosts)]
        self._stack = contextlib.ExitStack()

    @property
    def name(self) -> str:
        return f"slr{self._number}"

    @property
    def bridge(self) -> str:
        return f"{self.name}b"

    @property
    def store(self) -> Path:
        """The shared store as seen from this machine; hosts see it as ``STORE``."""
        return self.folder / "store"

    def address(self, number: int) -> str:
        return f"10.78.{self._number}.{number}"

    def __enter__(self) -> "Rig":
        reason = why_not()
        if reason is not None:
            raise CannotRaise(reason)
        with contextlib.ExitStack() as stack:
            self._number = stack.enter_context(_free_number())
            stack.enter_context(_niceness_counts())
            self.folder = Path(tempfile.mkdtemp(prefix="shardline-rig-"))
            stack.callback(shutil.rmtree, self.folder)
            self._remove_devices()  # of a rig that was killed
            stack.callback(self._remove_devices)
            stack.callback(self._end_hosts)
            self._make_keys()
            self.store.mkdir()
            self._make_network()
            for host in (*self.hosts, self.desk):
                host.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def part(self, one: int, other: int) -> None:
        """Loses every packet between these two silently, both ways."""
        for here, there in ((one, other), (other, one)):
            _ip(*self._at(here), "neigh", "replace", self.address(there), "lladdr", NOBODY,
                "dev", self._device_of(here), "nud", "permanent")  # fmt: skip

    def join(self, one: int, other: int) -> None:
        """Undoes ``part``."""
        for here, there in ((one, other), (other, one)):
            _ip(*self._at(here), "neigh", "del", self.address(there), "dev",
                self._device_of(here), check=False)  # fmt: skip

    def _at(self, number: int) -> tuple[str, ...]:
        return () if number == OUTSIDE else ("-n", f"{self.name}h{number}")

    def _device_of(self, number: int) -> str:
        return self.bridge if number == OUTSIDE else "e0"

    def _make_keys(self) -> None:
        keys = self.folder / "keys"
        keys.mkdir(mode=0o700)
        for name in ("user", "host"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)]
            subprocess.run(words, check=True)
        shutil.copy(keys / "user.pub", keys / "authorized")
        (keys / "sshd_config").write_text(SSHD)

    def _make_network(self) -> None:
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("addr", "add", f"{self.address(OUTSIDE)}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        for host in (*self.hosts, self.desk):
            _ip("netns", "add", host.namespace)
            there = ("-n", host.namespace)
            peer = ("peer", "name", "e0", "netns", host.namespace)
            _ip("link", "add", host.device, "type", "veth", *peer)
            _ip("link", "set", host.device, "master", self.bridge, "up")
            _ip(*there, "addr", "add", f"{host.address}/24", "dev", "e0")
            for device in ("lo", "e0"):
                _ip(*there, "link", "set", device, "up")
            _ip(*there, "route", "add", "default", "via", self.address(OUTSIDE))

    def _end_hosts(self) -> None:
        every = (*self.hosts, self.desk)
        for host in every:
            host.begin_to_end()
        for host in every:
            host.kill()

    def _remove_devices(self) -> None:
        for line in _ip("netns", "list").splitlines():
            if (name := line.split()[0]).startswith(f"{self.name}h"):
                _ip("netns", "del", name)
        for path in Path("/sys/class/net").iterdir():
            if path.name == self.bridge or path.name.startswith(f"{self.name}v"):
                # with its namespace gone, a veth goes by itself, a moment later
                _ip("link", "del", path.name, check=False)


@contextlib.contextmanager
def raised(count: int, lent: Sequence[Path] = ()) -> Iterator[Rig]:
    """A rig for a test, which is skipped where the machine does not allow one."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no namespaces: {reason}")
    with Rig(count, lent) as rig:
        yield rig


def environment_folders() -> list[Path]:
    """The Python environment of this process: what hosts must be lent to run with it."""
    return [Path(sys.prefix), Path(sys.base_prefix).resolve()]


@contextlib.contextmanager
def _niceness_counts() -> Iterator[None]:
    """The kernel gives every session the same share of the processors, however nice its processes
    are, so one host's would take from another's what they leave to their own. Off meanwhile; where
    there is no such setting, or it may not be changed, it stays as it is."""
    try:
        before = AUTOGROUP.read_text()
        AUTOGROUP.write_text("0")
    except OSError:
        yield
        return
    try:
        yield
    finally:
        AUTOGROUP.write_text(before)


@contextlib.contextmanager
def _free_number() -> Iterator[int]:
    for number in NUMBERS:
        path = Path(tempfile.gettempdir()) / f"shardline-rig-{number}.lock"
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            try:
                yield number
            finally:
                path.unlink(missing_ok=True)
            return
    raise CannotRaise(f"{len(NUMBERS)} rigs stand already")


def _boot_script(host: Host) -> str:
    """What the host's process 1 runs; mounts are seen by the host alone."""
    home = pwd.getpwuid(os.geteuid()).pw_dir
    folder = host.rig.folder
    staged = {"home": host.home, "store": host.rig.store, "keys": folder / "keys"}
    staged |= {f"lent{i}": path for i, path in enumerate(host.rig.lent) if _is_hidden(path, home)}
    lines = [f"hostname {host.name}", "mount -t tmpfs tmpfs /run", "mkdir /run/sshd"]
    for name, path in staged.items():
        lines += [f"mkdir -p {STAGE}/{name}", f"mount --rbind '{path}' {STAGE}/{name}"]
    lines += [
        "mount -t tmpfs -o mode=1777 tmpfs /tmp",
        "mount -t tmpfs tmpfs /dev/shm",
        "mount -t tmpfs tmpfs /mnt",
        f"mount --rbind {STAGE}/home '{home}'",
        # names that nobody knows are refused at once, and not after a silent server's time-out
        "test ! -e /etc/resolv.conf || mount --bind /dev/null /etc/resolv.conf",
        f"mkdir {STORE}",
        f"mount --rbind {STAGE}/store {STORE}",
    ]
    for name in (name for name in staged if name.startswith("lent")):
        path = staged[name]
        lines += [f"mkdir -p '{path}'", f"mount --rbind {STAGE}/{name} '{path}'"]
    options = f"-D -e -f {STAGE}/keys/sshd_config -o ListenAddress={host.address}"
    return "\n".join([*lines, "cd /", f"exec /usr/sbin/sshd {options}"])


def _is_hidden(path: Path, home: str) -> bool:
    return any(path.is_relative_to(above) for above in (home, "/tmp", "/run", "/mnt"))


def _ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise CannotRaise(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _namespace_of(pid: int) -> str:
    """Of processes; empty where there is no such process."""
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""
