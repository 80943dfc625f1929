"""The files in deploy/ are what Ray and our own configuration accept."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from shardline.cluster.config import load_config
from shardline.router.serve.environment import limits_of, serving_environment
from shardline.router.serve.haproxy import Limits
from shardline.shards.core.metrics import METRICS, Kind

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("ray/onprem*.yaml")), ids=lambda p: p.name)
def test_ray_up_accepts_the_launcher_file(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(config))
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    for line in (line for line in starts if "ray start" in line):
        wanted = [f"{name}={value}" for name, value in serving_environment().items()]
        assert [each for each in wanted if each not in line] == []


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
