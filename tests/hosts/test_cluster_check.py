"""`shardline cluster check` from the desk, by real ssh, on hosts where nothing is installed yet."""

import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml

from tests.hosts.launched import CHECKOUT, CONFIG, launcher_file
from tests.hosts.rig import STORE, Host, Rig, environment_folders, raised

CLI = "from shardline.cluster.cli import main; main()"
SOMETHING_WRONG = 3


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with raised(2, [*environment_folders(), CHECKOUT]) as rig:
        home = rig.desk.home
        (home / "key").write_bytes((rig.folder / "keys" / "user").read_bytes())
        (home / "key").chmod(0o600)
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
        (home / ".ray" / "auth_token").chmod(0o600)
        (home / "onprem.yaml").write_text(yaml.safe_dump(launcher_file(rig)))
        yield rig


def check(rig: Rig, *settings: str) -> subprocess.CompletedProcess[str]:
    options = " ".join(f"--set {shlex.quote(each)}" for each in settings)
    return rig.desk.run(
        f"cd {CHECKOUT} && PYTHONPATH={CHECKOUT} {sys.executable} -c {shlex.quote(CLI)} "
        f"-c {CONFIG} {options} cluster check ~/onprem.yaml",
        check=False,
    )


def failures(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert "internal error" not in done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("FAIL")]


# each host of the rig says that it has all cores of this machine
ROOM = "cluster.cpus_per_shard=0.1"


def test_bare_hosts_are_ready_or_say_which_step_they_lack(rig: Rig) -> None:
    done = check(rig, ROOM)
    lacking = failures(done)
    # the machine's own Python may be older than ours: then that is the one thing that is wrong
    assert all(": python3: " in line for line in lacking), done.stdout
    assert done.returncode == (SOMETHING_WRONG if lacking else 0), done.stdout
    for host in rig.hosts:
        assert any(line.startswith(f"│ {host.address}") for line in done.stdout.splitlines())
        # names of hosts are known to nobody here
        assert f"warn  host {host.address}: names: " in done.stdout
    assert list(rig.store.iterdir()) == [], "the probe is removed"


def test_a_host_that_is_cut_off_is_named(rig: Rig) -> None:
    lost = rig.hosts[1]
    lost.cut()
    try:
        done = check(rig, ROOM)
    finally:
        lost.mend()
    assert done.returncode == SOMETHING_WRONG
    assert any(line.startswith(f"FAIL  host {lost.address}: ssh: ") for line in failures(done))
    # the other host says so, too
    assert any(": network: " in line and lost.address in line for line in failures(done))


def test_a_store_that_one_host_does_not_mount_is_named(rig: Rig) -> None:
    other = rig.hosts[1]
    enter(other, f"mount -t tmpfs tmpfs {STORE}")
    try:
        done = check(rig, ROOM)
    finally:
        enter(other, f"umount {STORE}")
    assert any(f"host {other.address}: shared store: " in line for line in failures(done))


def test_a_store_that_one_host_mounts_read_only_is_named(rig: Rig) -> None:
    other = rig.hosts[1]
    enter(other, f"mount -o remount,ro,bind {STORE}")
    try:
        done = check(rig, ROOM)
    finally:
        enter(other, f"mount -o remount,rw,bind {STORE}")
    expected = f"host {other.address}: store: {STORE}: on a read-only file"
    assert any(expected in line for line in failures(done)), done.stdout


def test_a_port_that_is_taken_is_named_with_its_host(rig: Rig) -> None:
    head = rig.hosts[0]
    code = "import socket, time; s = socket.create_server(('', 6379)); print(flush=True); input()"
    taking = subprocess.Popen(
        head.entering(sys.executable, "-c", code),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert taking.stdout is not None
        taking.stdout.readline()
        done = check(rig, ROOM)
    finally:
        taking.communicate(b"\n")
    assert any(
        f"host {head.address}: ports: " in line and "6379" in line for line in failures(done)
    )


def test_too_few_cores_are_refused_with_the_sum(rig: Rig) -> None:
    done = check(rig, "cluster.cpus_per_shard=256")
    assert done.returncode == SOMETHING_WRONG
    assert any(
        line.startswith("FAIL  placement: ") and "256 CPUs" in line for line in failures(done)
    )


def enter(host: Host, command: str) -> None:
    subprocess.run(host.entering("sh", "-c", command), check=True)
