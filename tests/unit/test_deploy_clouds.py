"""deploy/ray/aws.yaml and gcp.yaml: what Ray accepts, what their commands do on a new machine."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from shardline.cluster.config import load_config

ROOT = Path(__file__).parents[2]
RAY = ROOT / "deploy" / "ray"
CLOUDS = ("aws", "gcp")
EDITED = [
    *(RAY / f"{name}.yaml" for name in CLOUDS),
    *sorted((ROOT / "deploy" / "kuberay").glob("*.yaml")),
]
ALSO_ON_YOUR_OWN_HOSTS = (
    "file_mounts",
    "rsync_exclude",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
# what stands for something of the user's: names and numbers of the cloud, the store, machine types
PLACEHOLDER = re.compile(
    r"0123456789abcdef|your-|REGISTRY/|\b10\.0\.0\.\d|\b(?:eu|europe)-\w+\d|\bm7i\.|\bn2-|\{CPU: "
    r"|(?:min_|max_)workers: |[rR]eplicas: |\bhosts: \d|cpus_per_shard: "
    r"|storageClassName: |storage: 100"
)
# programs of a new machine: each notes how it was called; the real ones work on files of a user
FAKES = {
    "dpkg": "test -e $HOME/installed",
    "sudo": '"$@"',
    "cloud-init": "exit 2",  # as after a start with warnings
    "sleep": "true",
    "apt-get": 'case "$*" in *install*) touch "$HOME/installed";; esac',
    "mountpoint": "test -e $HOME/mounted",
    "mount": "touch $HOME/mounted",
    "chown": "true",
    "mkdir": "true",
    "tee": 'cat >> "$HOME/fstab"',
    "grep": 'exec /usr/bin/env -i PATH=/usr/bin:/bin grep "${@/#\\/etc\\/fstab/$HOME/fstab}"',
    "python3": "true",
    "pip": "true",
}


def launcher_file(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((RAY / f"{name}.yaml").read_text())
    return content


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_up_accepts_the_launcher_file(name: str) -> None:
    """Against Ray's own schema, with what it fills in for the cloud."""
    prepared = prepare_config(launcher_file(name))
    validate_config(prepared)
    workers = prepared["available_node_types"]["worker"]
    assert workers["min_workers"] == workers["max_workers"] == prepared["max_workers"]
    assert prepared["available_node_types"]["head"]["max_workers"] == 0  # Ray fills it in


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("key", ALSO_ON_YOUR_OWN_HOSTS)
def test_ray_is_started_as_on_your_own_hosts(name: str, key: str) -> None:
    """Which tests/unit/test_deploy.py compares with the table of variables."""
    assert launcher_file(name)[key] == launcher_file("onprem")[key]


@pytest.mark.parametrize("name", CLOUDS)
def test_the_code_is_installed_as_on_your_own_hosts(name: str) -> None:
    assert launcher_file(name)["setup_commands"][4:] == launcher_file("onprem")["setup_commands"]


@pytest.mark.parametrize("name", CLOUDS)
def test_head_and_workers_are_alike_and_nothing_is_shared_between_them(name: str) -> None:
    """Ray adds the role that may start machines to the head's part, in place."""
    types = launcher_file(name)["available_node_types"]
    head, worker = types["head"]["node_config"], types["worker"]["node_config"]
    assert head == worker
    assert head is not worker
    assert "&" not in (RAY / f"{name}.yaml").read_text().replace("&&", "").replace(">&1", "")


@pytest.mark.parametrize("name", CLOUDS)
def test_a_new_machine_gets_the_store_once(name: str, tmp_path: Path) -> None:
    first = machine_after(launcher_file(name)["setup_commands"][:4], tmp_path)
    assert first[0] == "cloud-init status --wait"
    assert [line for line in first if line.startswith("apt-get")] == [
        "apt-get update -qq",
        "apt-get -o DPkg::Lock::Timeout=300 install -y -qq nfs-common python3-venv",
    ]
    store = str(load_config(RAY / "cluster-config.yaml").store)
    assert f"mkdir -p {store}" in first
    assert f"mount {store}" in first
    assert f"chown {os.getuid()} {store}" in first
    (line,) = (tmp_path / "fstab").read_text().splitlines()
    source, mounted_at, kind, options, dump, check = line.split()
    assert source.endswith((":/", ":/shardline"))
    assert (mounted_at, dump, check) == (store, "0", "0")
    assert kind in ("nfs", "nfs4")
    assert "_netdev" in options.split(",")  # else the machine does not boot without the server
    assert "soft" not in options.split(",")

    again = machine_after(launcher_file(name)["setup_commands"][:4], tmp_path)
    assert not [line for line in again if line.startswith(("apt-get", "sudo"))]
    assert (tmp_path / "fstab").read_text().splitlines() == [line]


@pytest.mark.parametrize("name", CLOUDS)
def test_a_machine_that_cannot_mount_the_store_does_not_start(name: str, tmp_path: Path) -> None:
    """Its shards would find an empty folder; `ray up` stops at the first command that fails."""
    mounting = launcher_file(name)["setup_commands"][3]
    with pytest.raises(subprocess.CalledProcessError):
        machine_after([mounting], tmp_path, FAKES | {"mount": "exit 32"})


@pytest.mark.parametrize("name", CLOUDS)
def test_updates_that_the_machine_makes_by_itself_are_waited_for(name: str, tmp_path: Path) -> None:
    """They hold the lock of the lists, for which `apt-get update` does not wait."""
    busy = 'test "$1" != update || test "$(/usr/bin/grep -c "^apt-get update" "$HOME/calls")" = 3'
    installing = launcher_file(name)["setup_commands"][1]
    calls = machine_after([installing], tmp_path, FAKES | {"apt-get": busy})
    names = [line.split()[0] for line in calls if not line.startswith(("sudo", "dpkg"))]
    assert names == ["apt-get", "sleep", "apt-get", "sleep", "apt-get", "apt-get"]
    with pytest.raises(subprocess.CalledProcessError):
        machine_after([installing], tmp_path, FAKES | {"apt-get": "exit 100"})


@pytest.mark.parametrize("name", CLOUDS)
def test_a_machine_without_cloud_init_waits_for_nothing(name: str, tmp_path: Path) -> None:
    fakes = {program: does for program, does in FAKES.items() if program != "cloud-init"}
    assert machine_after(launcher_file(name)["setup_commands"][:1], tmp_path, fakes) == []


@pytest.mark.parametrize("path", EDITED, ids=lambda path: path.name)
def test_every_line_to_be_edited_is_marked(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    stand_ins = [line for line in lines if PLACEHOLDER.search(line)]
    assert stand_ins
    assert [line for line in stand_ins if "# yours" not in line] == []


def test_the_page_names_every_line_to_be_edited() -> None:
    page = (ROOT / "docs" / "DEPLOY.md").read_text()
    for path in EDITED:
        marked = [line for line in path.read_text().splitlines() if "# yours" in line]
        names = {re.split(r"[:=]", line.lstrip(" -"))[0] for line in marked}
        assert {name for name in names if f"`{name}" not in page} == set(), path.name


def machine_after(commands: list[str], home: Path, fakes: dict[str, str] = FAKES) -> list[str]:
    """How programs were called when each command ran in a shell of its own, as `ray up` has it."""
    programs, calls = home / "bin", home / "calls"
    programs.mkdir(exist_ok=True)
    calls.write_text("")
    for program, does in fakes.items():
        path = programs / program
        path.write_text(f'#!/bin/bash\necho "{program} $*" >> {calls}\n{does}\n')
        path.chmod(0o700)
    environ = {"HOME": str(home), "PATH": f"{programs}:/usr/bin:/bin"}
    for command in commands:
        subprocess.run(
            ["bash", "-c", command], env=environ, check=True, capture_output=True, timeout=30
        )
    return calls.read_text().splitlines()
