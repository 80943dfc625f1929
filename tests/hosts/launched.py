"""Shardline on the hosts of a rig, launched from the desk with deploy/ray/onprem.yaml.

What differs from the file: addresses, user and key; the size of the object store; and instead of
installing with pip, for which hosts without internet have no packages, each host gets a virtual
environment of its own that borrows the packages of the one that the tests run in. The code is what
was brought to the host.
"""

import json
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.hosts.rig import Host, Rig

CHECKOUT = Path(__file__).parents[2]
ONPREM = CHECKOUT / "deploy" / "ray" / "onprem.yaml"
CONFIG = "deploy/ray/cluster-config.yaml"
OBJECT_STORE = "--object-store-memory=536870912"
SMALL_OBJECT_STORE = "--object-store-memory=100000000"
AUTOSCALER = "--autoscaling-config=~/ray_bootstrap_config.yaml"
DASHBOARD = "--include-dashboard=true"
HTTP_PORT = 8000
# each host of the rig says that it has all cores of this machine
SETTINGS = ("cluster.threads_per_shard=1", "cluster.cpus_per_shard=0.1")
POLL_S = 0.2
BORROW = (
    "cd ~/shardline",
    f"{sys.prefix}/bin/python -m venv --without-pip .venv",
    f"printf '%s\\n' ~/shardline {sysconfig.get_path('purelib')}"
    f" > .venv/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages/lent.pth",
    "for name in ray serve shardline; do"
    ' sed "1s|.*|#!$HOME/shardline/.venv/bin/python|"'
    f" {sys.prefix}/bin/$name > .venv/bin/$name && chmod +x .venv/bin/$name; done",
)


def launcher_file(rig: Rig) -> dict[str, Any]:
    """deploy/ray/onprem.yaml for this rig; host 1 is the head."""
    head, *workers = rig.hosts
    config: dict[str, Any] = yaml.safe_load(ONPREM.read_text())
    config["provider"] |= {"head_ip": head.address, "worker_ips": [w.address for w in workers]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": "~/key"}
    *_, profile = config["setup_commands"]
    config["setup_commands"] = [" && ".join(BORROW), profile]
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        lines = config[name]
        assert OBJECT_STORE in lines[-1]
        config[name] = [line.replace(OBJECT_STORE, SMALL_OBJECT_STORE) for line in lines]
    return config


class Launched:
    """A launched cluster; ``config`` is its launcher file."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.config = launcher_file(rig)

    @property
    def head(self) -> Host:
        return self.rig.hosts[0]

    def prepare_desk(self) -> None:
        """What a user has: the checkout (lent to the rig), a key, a token, the edited file."""
        home = self.rig.desk.home
        (home / "onprem.yaml").write_text(yaml.safe_dump(self.config))
        (home / "key").write_bytes((self.rig.folder / "keys" / "user").read_bytes())
        (home / "key").chmod(0o600)
        self.rig.desk.run(f"umask 077; {self._ray('get-auth-token --generate > /dev/null')}")

    def up(self, *options: str, timeout_s: float = 300) -> str:
        """``ray up``; what it printed."""
        command = self._ray(f"up ~/onprem.yaml --yes --no-config-cache {' '.join(options)} 2>&1")
        return self.rig.desk.run(command, timeout_s=timeout_s).stdout

    def up_by_ssh(self) -> None:
        """The same steps without ``ray up``, which takes half a minute: code, setup, start; without
        autoscaler and job server."""
        self.set_up_by_ssh()
        self.start_head()
        for host in self.rig.hosts[1:]:
            self.join(host)

    def set_up_by_ssh(self) -> None:
        """Code and environment to every host; starts nothing."""
        self.prepare_desk()
        token = self.rig.desk.home / ".ray" / "auth_token"
        for host in self.rig.hosts:
            for there, here in self.config["file_mounts"].items():
                source = token if here.startswith("~") else CHECKOUT / here
                target = host.home / there.removeprefix("~/")
                target.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(
                    ["rsync", "-a", "--exclude", "__pycache__", _rsync_name(source), str(target)],
                    check=True,
                )
            for command in self.config["setup_commands"]:
                host.run(command)

    def start_head(self) -> None:
        self.head.run(self._start_command(head=True))

    def join(self, host: Host) -> None:
        """Ray on a worker."""
        host.run(f"export RAY_HEAD_IP={self.head.address}; {self._start_command(head=False)}")

    def report(self, host: Host) -> dict[str, Any]:
        """What the controller tells `shardline status` there."""
        told: dict[str, Any] = json.loads(self.shardline(host, "status --json").stdout)["cluster"]
        return told

    def is_whole(self, host: Host) -> bool:
        """Whether every host lives and has a router, every shard as many replicas that answer as
        are wanted, on different hosts, and hosts are evenly loaded; asked on that host."""
        done = self.shardline(host, "status --json", check=False)
        if done.returncode:
            return False
        told = json.loads(done.stdout)["cluster"]
        on = Counter((r["shard"], r["host"]) for r in told["replicas"] if r["answers"])
        per_shard = Counter(shard for shard, _ in on)
        per_host = Counter(host for _, host in on)
        hosts = [each["host"] for each in told["hosts"] if each["alive"] and each["router"]]
        wanted = told["replicas_wanted"]
        return (
            len(hosts) == len(self.rig.hosts)
            and set(on.values()) == {1}
            and len(told["replicas"]) == sum(per_shard.values())
            and set(per_shard.values()) == {wanted}
            and max(per_host.values()) - min(per_host[host] for host in hosts) <= 1
        )

    def shardline(
        self, host: Host, words: str, *, timeout_s: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A command of Shardline on a host, with the cluster's configuration."""
        settings = " ".join(f"--set {setting}" for setting in SETTINGS)
        command = f"cd ~/shardline && shardline -c {CONFIG} {settings} {words}"
        return host.run(command, timeout_s=timeout_s, check=check)

    def _start_command(self, *, head: bool) -> str:
        name = "head_start_ray_commands" if head else "worker_start_ray_commands"
        line: str = self.config[name][-1]
        for option, instead in ((AUTOSCALER, ""), (DASHBOARD, "--include-dashboard=false")):
            assert option in line or not head
            line = line.replace(option, instead)
        return line

    @staticmethod
    def _ray(words: str) -> str:
        return f"cd {CHECKOUT} && {Path(sys.prefix)}/bin/ray {words}"


def wait_until(is_so: Callable[[], bool], *, within_s: float, what: str) -> float:
    """Seconds until it was so. Raises AssertionError: it did not become so."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() < began + within_s, f"not within {within_s:g} s: {what}"
        time.sleep(POLL_S)
    return time.monotonic() - began


def _rsync_name(path: Path) -> str:
    return f"{path}/" if path.is_dir() else str(path)
