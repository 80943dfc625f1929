"""The files in deploy/ are what Ray and our own configuration accept."""

import json
import re
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from shardline.cluster.config import load_config
from shardline.cluster.serving.ray_session import SERVING_ENVIRONMENT
from shardline.shards.core.metrics import METRICS

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("ray/onprem*.yaml")), ids=lambda p: p.name)
def test_ray_up_accepts_the_launcher_file(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(config))
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    for line in (line for line in starts if "ray start" in line):
        missing = [f"{k}={v}" for k, v in SERVING_ENVIRONMENT.items() if f"{k}={v}" not in line]
        assert missing == []


def test_our_configuration_accepts_the_cluster_file() -> None:
    config = load_config(DEPLOY / "ray" / "cluster-config.yaml")
    assert config.cluster.address == "auto"
    assert config.cluster.shard_host == "node"


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    text = (DEPLOY / "grafana" / "shardline.json").read_text()
    dashboard = json.loads(text)
    used = set(re.findall(r"ray_(shardline_\w+?)(?:_bucket|_count|_total)?\b", text))
    assert used == {metric.name for metric in METRICS}
    labels = {name for metric in METRICS for name in metric.labels}
    assert set(re.findall(r"\{\{(\w+)\}\}", text)) <= labels
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
