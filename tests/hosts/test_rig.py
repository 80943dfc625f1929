"""The rig itself: hosts are apart, faults do what they say, nothing is left."""

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.rig import STORE, Rig, raised, why_not


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with raised(2) as rig:
        yield rig


def reaches(rig: Rig, number: int) -> bool:
    """Whether this machine gets a connection to the host's sshd."""
    try:
        socket.create_connection((rig.address(number), 22), timeout=1).close()
    except TimeoutError:
        return False
    return True


def test_hosts_have_their_own_name_home_and_tmp_and_share_the_store(rig: Rig) -> None:
    one, two = rig.hosts
    home = Path("~").expanduser()
    one.run(f"echo 1 > ~/mine && echo 1 > /tmp/mine && echo 1 > {STORE}/ours")
    assert two.run("hostname").stdout == "host2\n"
    seen = two.run(f"cat {STORE}/ours; ls ~/mine /tmp/mine", check=False)
    assert seen.stdout == "1\n"
    assert f"{home}/mine" in seen.stderr
    assert "/tmp/mine" in seen.stderr
    assert (one.home / "mine").read_text() == "1\n"
    assert not Path("/tmp/mine").exists()
    assert not STORE.exists()


def test_a_host_sees_and_counts_its_own_processes_alone(rig: Rig) -> None:
    one, two = rig.hosts
    one.run("setsid sleep 1000 > /dev/null 2>&1 < /dev/null & sleep .3")
    assert ["sleep", "1000"] in one.processes().values()
    assert two.processes() == {}
    assert "sleep 1000" not in two.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout


def test_a_cut_host_is_silent_until_it_is_mended(rig: Rig) -> None:
    one, two = rig.hosts
    one.cut()
    assert not reaches(rig, one.number)
    assert reaches(rig, two.number)
    one.mend()
    assert reaches(rig, one.number)


def test_two_hosts_can_be_parted_from_each_other_alone(rig: Rig) -> None:
    one, two = rig.hosts
    ask = f"timeout 1 bash -c '< /dev/tcp/{two.address}/22'"
    rig.part(one.number, two.number)
    assert one.run(ask, check=False).returncode == 124
    assert one.run(f"timeout 1 bash -c '< /dev/tcp/{rig.desk.address}/22'").returncode == 0
    rig.join(one.number, two.number)
    assert one.run(ask).returncode == 0


def test_a_host_without_power_comes_back_with_its_disk(rig: Rig) -> None:
    one = rig.hosts[0]
    one.run("echo kept > ~/kept; echo lost > /tmp/lost")
    one.power_off()
    assert not one.is_up
    assert not reaches(rig, one.number)
    one.power_on()
    assert one.run("cat ~/kept; ls /tmp/lost", check=False).stdout == "kept\n"


@pytest.mark.skipif(why_not() is not None, reason="no namespaces")
def test_nothing_is_left() -> None:
    with Rig(1) as rig:
        folder, bridge, name = rig.folder, rig.bridge, rig.hosts[0].namespace
        rig.hosts[0].run("setsid sleep 1001 > /dev/null 2>&1 < /dev/null & sleep .3")
        assert Path(f"/sys/class/net/{bridge}").exists()
    assert not folder.exists()
    assert not Path(f"/sys/class/net/{bridge}").exists()
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert name not in names.stdout
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert b"sleep\x001001\x00" not in lines
