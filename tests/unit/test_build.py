"""What a build says of itself: the seconds of its two parts."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from shardline.cluster.build import BuildPlan, build_checked, check_plan, run_here
from shardline.cluster.store import Store
from shardline.shards.core.partition import Partitioning
from shardline.shards.core.schema import Metric
from shardline.shards.index.spec import IndexSpec
from shardline.shards.storage.embedding_set import embedding_writer


def test_the_seconds_of_a_build_count_the_checks(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    with embedding_writer(
        tmp_path / "set",
        model_version="m",
        dim=4,
        metric=Metric.L2,
        normalised=False,
        created_at="2026-01-01T00:00:00+00:00",
    ) as writer:
        writer.append(np.arange(50), vectors)
    plan = BuildPlan(
        spec=IndexSpec(kind="flat"), num_shards=2, partitioning=Partitioning.RANGE, threads=1
    )
    checked = check_plan(tmp_path / "set", plan)
    assert 0 < checked.seconds < 60
    manifest = build_checked(
        Store(tmp_path / "store"),
        replace(checked, seconds=1000.0),
        run_jobs=run_here,
        progress=lambda stage, done, total: None,
    )
    assert 1000 < manifest.quality["build_seconds"] < 1060
    assert manifest.quality["train_seconds"] < 60
