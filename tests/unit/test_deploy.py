"""The files in deploy/ are what Ray and our own configuration accept."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from shardline.cluster.config import load_config
from shardline.router.serve.environment import launched_environment, limits_of
from shardline.router.serve.haproxy import Limits
from shardline.shards.core.metrics import METRICS, Kind

DEPLOY = Path(__file__).parents[2] / "deploy"


ROOT = DEPLOY.parent
RAY = DEPLOY / "ray"


def test_ray_up_accepts_the_launcher_file() -> None:
    validate_config(prepare_config(launcher_file()))


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_every_host_of_the_list_is_started(workers: int) -> None:
    """Ray counts them where nothing else is said, and leaves hosts out where less is."""
    content = launcher_file()
    content["provider"]["worker_ips"] = [f"10.0.1.{number}" for number in range(workers)]
    prepared = prepare_config(content)
    validate_config(prepared)
    (kind,) = prepared["available_node_types"].values()
    assert (kind["min_workers"], kind["max_workers"], prepared["max_workers"]) == (workers,) * 3


def test_the_launcher_file_brings_all_the_code_and_no_more() -> None:
    mounts = launcher_file()["file_mounts"]
    assert all(host == f"~/shardline/{here}" for host, here in mounts.items() if here[0] != "~")
    brought = {here for here in mounts.values() if here[0] != "~"}
    assert all((ROOT / here).exists() for here in brought)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    needed = {package.split(".")[1] for package in packages if "." in package}
    assert needed <= brought
    assert not brought & {".", ".venv", ".git", "tests", "docs", "shardline-store"}


@pytest.mark.parametrize("head", [True, False])
def test_ray_starts_with_the_environment_of_the_table(head: bool, tmp_path: Path) -> None:
    options, *found = ray_calls(tmp_path, head=head, is_running=False)
    assert options.startswith("start --head" if head else "start --address=10.0.0.1:6379")
    assert ("--dashboard-host=127.0.0.1" in options) == head
    set_there = dict(each.split("=", 1) for each in found if each.startswith("RAY_"))
    assert set_there.pop("RAY_HEAD_IP") == "10.0.0.1"
    assert set_there == launched_environment(str(tmp_path), head=head)


def test_ray_is_left_alone_on_a_worker_where_it_runs(tmp_path: Path) -> None:
    """The autoscaler of a head that was lost starts the workers anew, which serve meanwhile."""
    assert ray_calls(tmp_path, head=False, is_running=True) == []


def ray_calls(home: Path, *, head: bool, is_running: bool) -> list[str]:
    """What the last start command prints, run by bash with a ``ray`` that prints how it was called
    and its environment, but for ``ray stop``."""
    shutil.copytree(RAY, home / "shardline" / "deploy" / "ray")
    programs = home / "shardline" / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "ray").write_text('#!/bin/sh\ntest "$1" = stop || { echo "$@"; env; }\n')
    (programs / "pgrep").write_text(f"#!/bin/sh\nexit {0 if is_running else 1}\n")
    for path in programs.iterdir():
        path.chmod(0o700)
    line = launcher_file()["head_start_ray_commands" if head else "worker_start_ray_commands"][-1]
    environ = {
        "HOME": str(home),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RAY_HEAD_IP": "10.0.0.1",
    }
    done = subprocess.run(
        ["bash", "-c", line], env=environ, capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.splitlines()


AT_RAY = "/home/u/shardline/.venv/lib/python3.11/site-packages/ray"
PYTHON = "/home/u/shardline/.venv/bin/python"
OF_DASHBOARD = (
    f"{PYTHON} {AT_RAY}/dashboard/dashboard.py --host=127.0.0.1",
    f"{PYTHON} -u {AT_RAY}/dashboard/agent.py --node-id=1",
    f'ray-dashboard-NodeHead-0 ({PYTHON} -Wignore -c "from multiprocessing.forkserver")',
    "ray::DashboardAgent",
)
OTHERS = (
    f"{AT_RAY}/core/src/ray/raylet/raylet --x=1 --dashboard_agent_command={PYTHON} -u "
    f"{AT_RAY}/dashboard/agent.py",
    f"{PYTHON} {AT_RAY}/_private/workers/setup_worker.py",
    "ray::ShardActor",
    "ray::RuntimeEnvAgent",
)


def test_only_processes_of_the_dashboard_get_less_processor_time() -> None:
    script = (RAY / "dashboard-last.sh").read_text()
    (theirs,) = re.findall(r"^theirs='(.*)'$", script, re.MULTILINE)
    assert all(re.search(theirs, command) for command in OF_DASHBOARD)
    assert not any(re.search(theirs, command) for command in OTHERS)


@pytest.mark.parametrize("login_file", [".bash_profile", ".bash_login", ".profile"])
def test_a_login_shell_of_a_host_finds_the_commands(login_file: str, tmp_path: Path) -> None:
    shutil.copytree(RAY, tmp_path / "shardline" / "deploy" / "ray")
    if login_file != ".profile":
        (tmp_path / login_file).touch()
    environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    for _ in range(2):
        subprocess.run(
            ["bash", "-c", launcher_file()["setup_commands"][-1]], env=environ, check=True
        )
    assert (tmp_path / login_file).read_text().count("profile.sh") == 1
    command = ["bash", "--login", "-c", "echo $PATH $RAY_AUTH_MODE"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path}/shardline/.venv/bin:")
    assert done.stdout.endswith(" token\n")


def launcher_file() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((RAY / "onprem.yaml").read_text())
    return content


def test_our_configuration_accepts_the_cluster_file() -> None:
    config = load_config(DEPLOY / "ray" / "cluster-config.yaml")
    assert config.cluster.address == "auto"
    assert config.cluster.shard_host == "node"


def test_haproxy_gets_the_figures_of_the_cluster_file(tmp_path: Path) -> None:
    """The script of a launched cluster cannot read them there: HAProxy starts before `serve`."""
    root = tmp_path / "shardline"
    (root / ".venv" / "bin").mkdir(parents=True)
    python = root / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o700)
    shutil.copytree(DEPLOY / "ray", root / "deploy" / "ray")
    script = root / "deploy" / "ray" / "haproxy.sh"
    done = subprocess.run(
        [script, "-db", "-f", "a b"], capture_output=True, text=True, check=True, timeout=30
    )
    config = load_config(DEPLOY / "ray" / "cluster-config.yaml")
    begin, limits, end = re.split(r"(?<=py) (?=\{)|(?<=\}) (?=-)", done.stdout)
    assert begin == f"-I {root}/shardline/router/serve/haproxy_start.py"
    assert Limits.of_json(limits) == limits_of(config.router, insecure=config.cluster.insecure)
    assert end == "-db -f a b\n"


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    text = (DEPLOY / "grafana" / "shardline.json").read_text()
    dashboard = json.loads(text)
    used = set(re.findall(r"ray_(shardline_\w+?)(?:_bucket|_count|_total)?\b", text))
    assert used == {metric.name for metric in METRICS}
    labels = {name for metric in METRICS for name in metric.labels}
    assert set(re.findall(r"\{\{(\w+)\}\}", text)) <= labels
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_a_counter_that_never_counted_is_drawn_as_zero() -> None:
    """A labelled counter appears in Prometheus with its first count; until then its panel would say
    "No data"."""
    dashboard = json.loads((DEPLOY / "grafana" / "shardline.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    counters = [metric.name for metric in METRICS if metric.kind is Kind.COUNTER]
    for expression in expressions:
        shown = sum(expression.count(f"ray_{name}_total[") for name in counters)
        assert expression.count("or vector(0)") + expression.count("or on() vector(0)") >= shown
        if " by (" in expression and shown:
            assert expression.endswith(" or on() vector(0)"), "else it would be drawn beside them"
