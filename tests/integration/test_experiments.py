"""Experiments on the cluster of the session: arms, events from HTTP to the store, reports."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from shardline.bench.ab.event_table import EventTable, load_events
from shardline.cluster.cli import cli
from shardline.router.client.sync_client import Client
from shardline.router.experiments.assignment import Experiments
from shardline.router.http.api_keys import Scope
from tests.batch_store import write_queries
from tests.integration.conftest import EXPERIMENTS, Cluster

KEYS = 60
STORED_S = 30.0  # in which what was answered must be on the disk
K = 20


def arm_of(cluster: Cluster, key: str) -> str:
    return dict(Experiments(cluster.config.router.experiments).arms_of(key))["probes"]


def run(cluster: Cluster, *arguments: str) -> Any:
    options = ("--store", str(cluster.store.root), "--set", f"router.experiments={EXPERIMENTS}")
    return CliRunner().invoke(cli, [*options, *arguments], catch_exceptions=False)


def stored(cluster: Cluster, kind: str, count: int) -> EventTable:
    """Once the store has so many events of a kind."""
    deadline = time.monotonic() + STORED_S
    while (table := load_events(cluster.store.events)).kinds().tolist().count(kind) < count:
        assert time.monotonic() < deadline, f"{count} events of kind {kind} were not stored"
        time.sleep(0.1)
    return table


def test_arms_from_the_search_to_the_report(cluster: Cluster, client: Client) -> None:
    keys = [f"user-{number}" for number in range(KEYS)]
    for key in keys:
        answer = client.search(item_ids=[7], k=K, experiment_key=key)
        assert answer.arms == {"probes": arm_of(cluster, key)}
    clicked = [key for key in keys if arm_of(cluster, key) == "few"]
    assert 15 < len(clicked) < 45
    with cluster.endpoint.address_for(Scope.WRITE).client() as writer:
        sent = [{"key": key, "event": "click", "item_id": 7, "value": 2.0} for key in clicked]
        assert writer.send_events(sent) == len(clicked)
        found = load_events(cluster.store.events)
        assert found.kinds().tolist().count("click") == len(clicked), "acknowledged, so stored"
    stored(cluster, "search", KEYS)
    result = run(cluster, "ab", "report", "--experiment", "probes", "--json")
    assert result.exit_code == 0, result.output
    (report,) = json.loads(result.stdout)
    control, few = report["arms"]
    assert (few["keys"], control["keys"]) == (len(clicked), KEYS - len(clicked))
    assert few["p50_ms"]["value"] > 0
    assert few["outcomes"][0]["converted"]["value"] == 1
    assert control["outcomes"][0]["converted"]["value"] == 0
    assert few["outcomes"][0]["value_difference"]["low"] == 2
    assert "outcomes, 95 % intervals" in run(cluster, "ab", "report").output


def test_recall_of_each_arm_is_watched(cluster: Cluster, client: Client) -> None:
    keys = [f"watched-{number}" for number in range(200)]
    few = next(key for key in keys if arm_of(cluster, key) == "few")
    control = next(key for key in keys if arm_of(cluster, key) == "control")
    deadline = time.monotonic() + STORED_S
    qualities: dict[str, Any] = {}
    while len(qualities) < 2:
        assert time.monotonic() < deadline, f"only {list(qualities)} was watched"
        for number, key in enumerate((few, control)):
            vectors = np.random.default_rng(number).normal(size=(1, 128)).astype(np.float32)
            vectors = vectors[:, : client.status()["dim"]]
            client.search(vectors=vectors, k=K, experiment_key=key)
        found = client.status()["experiments"]
        qualities = {each["arm"]: each["quality"] for each in found if each["quality"]}
    assert qualities["control"]["recall"] == pytest.approx(1, abs=0.001), "the index is exact"
    assert qualities["few"]["recall"] < 1
    table = stored(cluster, "recall", 2)
    is_recall = table.kinds() == "recall"
    assert set(table.arms("probes")[is_recall]) <= {"few", "control"}


def test_two_settings_on_one_query_set(cluster: Cluster, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    status = json.loads(run(cluster, "status", "--json").stdout)
    vectors = rng.normal(size=(40, status["dim"])).astype(np.float32)
    path = tmp_path / "queries.parquet"
    write_queries(path, vectors)
    result = run(
        cluster,
        *("bench", "ab", "--queries", str(path), "-k", str(K), "--exact", "20"),
        *("--b", '{"params": {"nprobe": 1, "rerank_factor": 1}}'),
        *("--json", str(tmp_path / "ab.json")),
    )
    assert result.exit_code == 0, result.output
    assert "b less a" in result.output
    found = json.loads((tmp_path / "ab.json").read_text())
    assert (found["queries"], found["judged"], found["failures"]) == (40, 20, {})
    assert found["a"]["recall"]["value"] == pytest.approx(1, abs=0.001)
    assert found["recall_difference"]["high"] < 0
    assert 0 < found["overlap"]["value"] < 1
    assert found["median_difference_ms"]["low"] <= found["median_difference_ms"]["high"]


@pytest.mark.parametrize("given", ["{", '{"nprobe": 1}', '{"params": {"nprobe": 0}}'])
def test_settings_that_are_none_are_refused(cluster: Cluster, tmp_path: Path, given: str) -> None:
    path = tmp_path / "queries.parquet"
    dim = json.loads(run(cluster, "status", "--json").stdout)["dim"]
    write_queries(path, np.ones((2, dim), np.float32))
    options = ("--store", str(cluster.store.root))
    arguments = [*options, "bench", "ab", "--queries", str(path), "--b", given]
    assert CliRunner().invoke(cli, arguments).exit_code != 0
