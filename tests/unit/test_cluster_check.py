"""`shardline cluster check`, with an `ssh` that runs its program here, once per pretended host."""

import ast
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from shardline.cluster.cli import main
from shardline.cluster.preflight import launch_hosts, launch_probe
from shardline.cluster.preflight.launch_file import read_launch_file
from shardline.shards.core.errors import ConfigError, NotFound

TOKEN = "0123456789abcdef" * 4
SSH = """#!/bin/sh
for each; do case $each in *@*) host=${each#*@};; esac; done
echo "$@" >> %(log)s
case $host in
10.0.0.7) echo "ssh: connect to host 10.0.0.7 port 22: No route to host" >&2; exit 255;;
10.0.0.8) echo "sh: 1: python3: not found" >&2; exit 127;;
10.0.0.9) echo "no JSON"; exit 0;;
10.0.1.*) # silent hosts, which give up once three of them are asked
    touch %(homes)s/asked-$host
    for each in $(seq 200); do
        test $(ls %(homes)s | grep -c asked-) -lt 3 || { echo "timed out" >&2; exit 255; }
        sleep 0.1
    done
    echo "asked alone" >&2; exit 255;;
esac
export HOME=%(homes)s/$host
exec %(python)s -S -c "
import sys
program = sys.stdin.read()
$(cat %(homes)s/$host/first 2> /dev/null)
exec(compile(program, 'probe', 'exec'))
"
"""


class Rig:
    """Hosts that share this machine's files and ports, each with a home folder of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.homes = folder, folder / "homes"
        self.store, self.log = folder / "store", folder / "ssh.log"
        self.store.mkdir()
        self.homes.mkdir()
        tools = folder / "tools"
        tools.mkdir()
        ssh = SSH % {"homes": self.homes, "python": sys.executable, "log": self.log}
        for name, text in {"ssh": ssh, "rsync": "#!/bin/sh\n"}.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o700)
        monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        self.own = self.homes / "own"
        self.token(self.own)
        monkeypatch.setenv("HOME", str(self.own))

    def token(self, home: Path, text: str = TOKEN, mode: int = 0o600) -> None:
        (home / ".ray").mkdir(parents=True, exist_ok=True)
        path = home / ".ray" / "auth_token"
        path.write_text(text)
        path.chmod(mode)

    def host(self, address: str, first: str = "") -> Path:
        """first: Python that changes the program before it runs there."""
        home = self.homes / address
        home.mkdir(exist_ok=True)
        (home / "first").write_text(f"{PRETEND}{first}")
        return home

    def launch_file(self, *hosts: str, **changes: object) -> Path:
        content: dict[str, object] = {
            "provider": {"type": "local", "head_ip": hosts[0], "worker_ips": list(hosts[1:])},
            "auth": {"ssh_user": "me", "ssh_private_key": "~/key"},
            "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"},
            "head_start_ray_commands": ["ray start --head --port=16379"],
        }
        path = self.folder / "launch.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path


PRETEND = """
program = program.replace(
    'socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()', 'pass'
).replace(
    'probe.bind((host, port))', 'pass'
).replace(
    'return sorted(found & set(RUNNING))', 'return []'
)
"""


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


@pytest.fixture
def check(rig: Rig, capsys: pytest.CaptureFixture[str]):
    def run(path: Path, *settings: str) -> tuple[int, str]:
        given = [
            *("cluster.address=auto", "cluster.http_host=0.0.0.0", "cluster.shard_host=node"),
            f"store={rig.store}",
        ]
        options = [word for each in (*given, *settings) for word in ("--set", each)]
        with pytest.raises(SystemExit) as ended:
            main([*options, "cluster", "check", str(path)])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out + err

    return run


def test_hosts_that_have_everything_are_ready(rig: Rig, check) -> None:
    rig.host("10.0.0.1")
    rig.token(rig.host("10.0.0.2"))
    code, out = check(rig.launch_file("10.0.0.1", "10.0.0.2"))
    assert code == 0, out
    assert "FAIL" not in out
    assert "2 hosts are ready for `ray up" in out
    assert list(rig.store.iterdir()) == [], "the probe is removed"
    asked = [line.split() for line in rig.log.read_text().splitlines()]
    words = next(line for line in asked if line[-3] == "me@10.0.0.1")
    assert words[-2:] == ["python3", "-"]
    assert words[words.index("-i") + 1] == str(rig.own / "key")
    assert "StrictHostKeyChecking=no" in words
    assert "BatchMode=yes" in words


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("10.0.0.7", "host 10.0.0.7: ssh: .*ssh does not work; got ssh: connect .*No route"),
        ("10.0.0.8", "host 10.0.0.8: python3: .*does not work; got not installed"),
        ("10.0.0.9", "host 10.0.0.9: python3: .*got no JSON"),
    ],
)
def test_the_host_and_the_step_that_fail_are_named(
    rig: Rig, check, address: str, said: str
) -> None:
    rig.host("10.0.0.1")
    code, out = check(rig.launch_file("10.0.0.1", address))
    assert code == 3
    assert re_found(f"FAIL +{said}", out), out
    assert not re_found("FAIL +host 10.0.0.1", out)


def test_silent_hosts_are_asked_together_and_nothing_is_concluded_from_the_others(
    rig: Rig, check
) -> None:
    rig.host("10.0.0.1", "program = program.replace('len(os.sched_getaffinity(0))', '1')")
    silent = [f"10.0.1.{number}" for number in range(1, 4)]
    code, out = check(rig.launch_file(*silent, "10.0.0.1"), "cluster.cpus_per_shard=2")
    assert code == 3
    for address in silent:
        assert re_found(f"FAIL +host {address}: ssh: ssh does not work; got timed out", out), out
    assert re_found("warn +placement: .*3 of 4 hosts did not answer", out), out
    assert not re_found("FAIL +(placement|host 10.0.0.1)", out), out


def raising(number: int, text: str) -> str:
    """An expression for the program that raises this OSError."""
    return f'(_ for _ in ()).throw(OSError({number}, "{text}"))'


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("program = program.replace('platform.python_version()', repr('3.9.2'))",
         r"FAIL +host 10.0.0.2: python3: .*expected 3.11 or newer; got 3.9.2"),
        ("program = program.replace('find_spec(\"venv\")', 'find_spec(\"no_such\")')",
         r"FAIL +host 10.0.0.2: python3: .*cannot make environments.*python3-venv"),
        ("program = program.replace('shutil.which(\"rsync\")', 'None')",
         r"FAIL +host 10.0.0.2: rsync: .*no rsync"),
        ("program = program.replace('time.time(),', 'time.time() + 7200,')",
         r"warn +host 10.0.0.2: clock: 2.0 h ahead"),
        ("program = program.replace('time.time(),', 'time.time() - 30,')",
         r"warn +host 10.0.0.2: clock: 30 s behind"),
        ("program = program.replace('_resolved(),', '\"127.0.1.1\",')",
         r"warn +host 10.0.0.2: names: .* resolves to 127.0.1.1"),
        ("program = program.replace('_resolved(),', 'None,')",
         r"warn +host 10.0.0.2: names: .* resolves to nothing"),
        ("program = program.replace('store / probe).exists()', 'store / \"none\").exists()')",
         r"FAIL +host 10.0.0.2: shared store: .*another folder than on the first host"),
        ("program = program.replace('store.is_dir()', 'False')",
         r"FAIL +host 10.0.0.2: store: .*no such folder.*mount the shared file system"),
        (f"program = program.replace('store.is_dir()', '{raising(116, 'Stale file handle')}')",
         r"FAIL +host 10.0.0.2: store: .*Stale file handle"),
        ("program = program.replace('(store / probe).exists()', "
         f"'{raising(13, 'Permission denied')}')",
         r"FAIL +host 10.0.0.2: store: .*Permission denied"),
        ("program = program.replace('with own.open(\"w\")', "
         "'raise OSError(30, \"read-only\")\\n        with own.open(\"w\")')",
         r"FAIL +host 10.0.0.2: store: .*on a read-only file system"),
        ("program = program.replace('_port_error(host, port)', '\"taken\"')",
         r"FAIL +host 10.0.0.2: ports: .*0.0.0.0:8000 taken.*end what listens there"),
        ("program = program.replace('_port_error(host, port)', '\"taken\"')"
         ".replace('_running(),', '[\"haproxy\"],')",
         r"FAIL +host 10.0.0.2: ports: .*HAProxy runs there, and outlives"),
        ("program = program.replace('_port_error(host, port)', '\"taken\"')"
         ".replace('_running(),', '[\"raylet\"],')",
         r"warn +host 10.0.0.2: ports: .*`ray up` restarts it"),
        ("program = program.replace('_reach_error(host, port)', '\"no route\"')",
         r"FAIL +host 10.0.0.2: network: .*got 10.0.0.1:22: no route"),
    ],
)  # fmt: skip
def test_what_a_host_lacks_is_named(rig: Rig, check, first: str, said: str) -> None:
    rig.host("10.0.0.1")
    rig.host("10.0.0.2", first)
    code, out = check(rig.launch_file("10.0.0.1", "10.0.0.2"))
    assert re_found(said, out), out
    assert code == (3 if said.startswith("FAIL") else 0)
    assert list(rig.store.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "text", "mounts", "said"),
    [
        (0o644, TOKEN, True, r"FAIL +host 10.0.0.2: token: .*expected mode 600; got mode 644"),
        (0o600, "other", True, r"warn +host 10.0.0.2: token: another one.*replaces it"),
        (0o600, "other", False, r"FAIL +host 10.0.0.2: token: .*another token than here"),
        (None, "", False, r"FAIL +host 10.0.0.2: token: .*no token for Ray"),
    ],
)
def test_tokens(rig: Rig, check, mode: int | None, text: str, mounts: bool, said: str) -> None:
    rig.token(rig.host("10.0.0.1"))
    home = rig.host("10.0.0.2")
    if mode is not None:
        rig.token(home, text, mode)
    mounted = {"~/.ray/auth_token": "~/.ray/auth_token"} if mounts else {}
    code, out = check(rig.launch_file("10.0.0.1", "10.0.0.2", file_mounts=mounted))
    assert re_found(said, out), out
    assert code == (3 if said.startswith("FAIL") else 0)


def test_without_a_token_here_ray_up_cannot_bring_one(rig: Rig, check) -> None:
    rig.host("10.0.0.1")
    shutil.rmtree(rig.own / ".ray")
    code, out = check(rig.launch_file("10.0.0.1"))
    assert code == 3
    assert re_found("FAIL +token here: .*no token.*umask 077; ray get-auth-token --generate", out)


def test_cores_and_replicas_are_compared_with_the_hosts(rig: Rig, check) -> None:
    two = "program = program.replace('len(os.sched_getaffinity(0))', '2')"
    for address in ("10.0.0.1", "10.0.0.2"):
        rig.host(address, two)
    path = rig.launch_file("10.0.0.1", "10.0.0.2")
    code, out = check(path, "cluster.shards=4", "cluster.cpus_per_shard=1")
    assert code == 0, out
    code, out = check(path, "cluster.shards=4", "cluster.cpus_per_shard=4")
    assert code == 3
    small = "reserves 4 CPUs; CPUs of the others: 10.0.0.1 2, 10.0.0.2 2"
    assert re_found(f"FAIL +placement: .*each of which {small}", out), out
    code, out = check(path, "cluster.replicas=3")
    assert code == 3
    assert re_found("FAIL +placement: .*3 replicas.*2 of 2 hosts", out), out


def test_shards_that_other_hosts_cannot_reach_are_refused(rig: Rig, check) -> None:
    for address in ("10.0.0.1", "10.0.0.2"):
        rig.host(address)
    code, out = check(rig.launch_file("10.0.0.1", "10.0.0.2"), "cluster.shard_host=127.0.0.1")
    assert code == 3
    assert re_found(r"FAIL +shard address: cluster.shard_host: .*expected \"node\"", out), out


def test_a_generation_too_large_for_a_host_is_refused_with_the_sum(rig: Rig, check) -> None:
    little = "program = program.replace('memory.get(\"MemAvailable\", 0)', '100 << 20')"
    rig.host("10.0.0.1", f"{little}.replace('memory.get(\"SwapFree\", 0)', '0')")
    (rig.store / "CURRENT").write_text("1\n")
    for shard in range(2):
        folder = rig.store / "generations" / "000001" / f"shard-{shard:05}"
        folder.mkdir(parents=True)
        with (folder / "index.faiss").open("wb") as file:
            file.truncate(60 << 20)
        with (folder / "attributes.arrow").open("wb") as file:
            file.truncate(500 << 20)
    code, out = check(rig.launch_file("10.0.0.1"))
    assert code == 3
    expected = "expected at least 2 shards = 120 MiB; got 100 MiB free by the host"
    assert re_found(f"FAIL +host 10.0.0.1: memory: .*{expected}", out), out


def test_the_probe_is_plain_python_without_anything_of_ours() -> None:
    source = Path(launch_probe.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 7))
    names = {
        name
        for node in ast.walk(tree)
        for name in (
            [each.name for each in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_the_probe_finds_ports_and_hosts(tmp_path: Path, taken: int) -> None:
    question = {
        "store": str(tmp_path),
        "probe": "p",
        "writes": True,
        "removes": False,
        "ports": [["127.0.0.1", taken], ["127.0.0.1", 0]],
        "reach": [["127.0.0.1", taken], ["127.0.0.1", 1]],
    }
    answer = launch_probe.answer_to(question)
    json.dumps(answer)
    assert answer["ports"] == {f"127.0.0.1:{taken}": "taken", "127.0.0.1:0": None}
    assert answer["reach"][f"127.0.0.1:{taken}"] is None
    assert "refused" in answer["reach"]["127.0.0.1:1"]
    assert (tmp_path / "p").exists()
    assert launch_probe.answer_to(question | {"removes": True}) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"provider": {"type": "aws"}}, r"provider.type: .*nothing to check; .*got 'aws'"),
        ({"provider": {"type": "local"}}, r"provider: .*not an address of a host; got None"),
        ({"provider": {"type": "local", "head_ip": "-oProxy"}}, "not an address"),
        ({"provider": {"type": "local", "head_ip": "h", "worker_ips": ["h"]}}, "a host twice"),
        ({"auth": {"ssh_user": "-l"}}, "auth.ssh_user: .*missing or not text"),
        ({"auth": None}, "auth is no mapping"),
    ],
)
def test_what_is_no_launcher_file_is_refused(
    rig: Rig, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        read_launch_file(rig.launch_file("10.0.0.1", **changes))


def test_the_launcher_file_of_the_repository_is_read() -> None:
    launch = read_launch_file(Path(__file__).parents[2] / "deploy" / "ray" / "onprem.yaml")
    assert launch.hosts == ("10.0.0.1", "10.0.0.2", "10.0.0.3")
    assert (launch.ray_port, launch.brings_token) == (6379, True)
    assert launch.key is not None
    assert launch.key.is_absolute()


def test_a_missing_file_or_text_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such launcher file"):
        read_launch_file(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        read_launch_file(tmp_path / "bad.yaml")


def test_a_host_that_says_nothing_is_given_up(
    rig: Rig, check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_hosts, "ANSWER_TIMEOUT_S", 1.0)
    rig.host("10.0.0.1", "import time; time.sleep(20)")
    code, out = check(rig.launch_file("10.0.0.1"))
    assert code == 3
    assert re_found("FAIL +host 10.0.0.1: ssh: .*got nothing within 1 s", out), out


def re_found(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None
