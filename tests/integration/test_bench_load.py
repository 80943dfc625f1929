"""`bench load` on the session's cluster: figures, and faults that it does and undoes."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardline.bench.load.command import Where, run
from shardline.bench.load.scenarios import Scenario, find_scenario
from shardline.bench.load.schedule import Arrivals
from shardline.bench.load.step import Options
from shardline.bench.load.wrk import find_wrk
from shardline.cluster.console import StageProgress
from shardline.shards.core.errors import InvalidInput, NotFound, ShardlineError
from tests.integration.conftest import NUM_ITEMS, Cluster

RECOVERY_S = 60.0
SHORT = Options(rate=60.0, seconds=2.0, warm_up_s=0.3, k=10)


def bench(
    cluster: Cluster, scenario: str | Scenario, options: Options = SHORT, data: Path | None = None
) -> dict[str, Any]:
    where = Where(url=None, rows=None, dim=0)
    chosen = scenario if isinstance(scenario, Scenario) else find_scenario(scenario)
    with StageProgress() as progress:
        return run(cluster.config, chosen, where, options, data=data, progress=progress)


def wait_until_whole(cluster: Cluster) -> None:
    """Three whole answers, one after the other: the cluster is as it was."""
    deadline = time.monotonic() + RECOVERY_S
    whole = 0
    with cluster.endpoint.address.client() as client:
        while whole < 3:
            assert time.monotonic() < deadline, "the cluster did not become whole again"
            try:
                whole = whole + 1 if client.search(item_ids=[1], k=3).coverage.share == 1 else 0
            except ShardlineError:
                whole = 0


@pytest.mark.parametrize("name", ["mixed-k", "features"])
def test_a_load_reports_every_figure(cluster: Cluster, name: str) -> None:
    data = cluster.dataset.path if name == "features" else None
    report = bench(cluster, name, data=data)
    floor, step = report["steps"]
    found = step["figures"]
    assert found["failed"] == found["rejected"] == 0
    assert found["answered"] == found["sent"] > 60
    assert step["recall"] == pytest.approx(1, abs=0.001), "the index is exact"
    assert found["coverage_min"] == 1
    assert floor["step"]["ask"] == "empty" and floor["figures"]["answered"] > 60
    assert report["bare"][0]["calls"] > 1
    roles = {process["role"] for process in step["processes"]}
    assert {"router", "shard", "haproxy", "controller", "raylet", "gcs"} <= roles
    assert sum(process["role"] == "shard" for process in step["processes"]) == 3
    assert report["setup"]["rows"] == NUM_ITEMS


@pytest.mark.skipif(find_wrk() is None, reason="wrk is not installed")
def test_wrk_asks_queries_that_do_not_repeat(cluster: Cluster) -> None:
    options = Options(rate=60.0, seconds=1.0, warm_up_s=0.0, k=10)
    report = bench(cluster, "capacity", options)
    floor, *steps = report["steps"]
    assert floor["tool"] == "wrk" and floor["figures"]["answered"] > 60
    assert [step["step"]["connections"] for step in steps] == [1, 4, 16, 64]
    for step in steps:
        assert step["tool"] == "wrk" and step["figures"]["failed"] == 0
        assert step["figures"]["qps"] > 60 and step["repeats"] == 1
    if report["status_after"]["cache"] is not None:
        assert report["cache_hit_share"] == 0


def test_latency_is_measured_sequentially_and_at_each_rate(cluster: Cluster) -> None:
    options = Options(rate=60.0, seconds=1.0, warm_up_s=0.2, k=10, arrivals=Arrivals.CONSTANT)
    report = bench(cluster, replace(find_scenario("latency"), rates=(60.0,)), options)
    floors, searches = report["steps"][::2], report["steps"][1::2]
    assert [step["step"]["rate"] for step in searches] == [None, 60.0]
    for floor, search in zip(floors, searches, strict=True):
        assert 0 < floor["figures"]["p50_ms"] < search["figures"]["p50_ms"]
        assert search["figures"]["failed"] == 0
        assert search["recall"] == pytest.approx(1, abs=0.001)
    assert searches[0]["client"]["connections"] == 1
    assert searches[1]["figures"]["offered_rate"] == pytest.approx(60, rel=0.05)


def test_a_killed_shard_shows_in_coverage_and_comes_back(cluster: Cluster) -> None:
    options = Options(rate=60.0, seconds=4.0, warm_up_s=0.3, k=10, shard=1)
    try:
        _, step = bench(cluster, "kill-shard", options)["steps"]
    finally:
        wait_until_whole(cluster)
    assert [mark["label"] for mark in step["marks"]] == ["shard 1 killed"]
    (recovery,) = step["recoveries"]
    assert recovery["harmed"] > 0 and recovery["failed"] == 0
    assert 0.5 < step["figures"]["coverage_min"] < 1


def test_what_cannot_be_measured_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="--data"):
        bench(cluster, "features")
    with pytest.raises(InvalidInput, match="too short"):
        bench(cluster, "stall-shard", Options(rate=60.0, seconds=2.0, warm_up_s=0.0, k=10))
    empty = cluster.config.model_copy(update={"store": tmp_path})
    with StageProgress() as progress, pytest.raises(NotFound, match="no cluster is serving"):
        run(
            empty,
            find_scenario("rate"),
            Where(url=None, rows=None, dim=0),
            SHORT,
            data=None,
            progress=progress,
        )
