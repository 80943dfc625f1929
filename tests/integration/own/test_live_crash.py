"""Processes of a written shard are killed at points and at any moment; nothing is lost.

The long form is ``python -m shardline.bench.crash``; what it reports of each kind is in its report.
"""

import secrets
import time
from pathlib import Path

from shardline.bench.crash.points import POINTS
from shardline.bench.crash.run import Options, build, run
from shardline.bench.crash.shard_cluster import Cluster
from shardline.bench.crash.trapped_replica import SHARD
from shardline.shards.live.epoch_file import raise_epoch
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.log_files import FILES

KILLS = 20


def test_kills_lose_nothing(tmp_path: Path) -> None:
    seed = secrets.randbelow(1 << 31)
    print(f"seed {seed}")
    report = run(tmp_path, Options(kills=KILLS, seed=seed, check_every=10), print)
    assert report["violations"] == [], report
    assert report["kills"] >= KILLS
    assert report["acknowledged"] > KILLS
    assert len(report["kills_by_point"].keys() & set(POINTS)) > KILLS // 3, report


def test_a_primary_whose_epoch_was_taken_is_replaced(tmp_path: Path) -> None:
    """As the controller does: a successor that took the epoch, and then failed, leads nothing."""
    generation = build(tmp_path, rows=80, seed=0)
    cluster = Cluster(generation, replicas=2, min_rows=150)
    with cluster.running():
        first = cluster.elect([0])
        assert cluster.leader() is first
        raise_epoch(live_folder(generation, SHARD), cluster.next_epoch(), FILES)
        until = time.monotonic() + 10.0
        while (leader := cluster.leader()) is first and time.monotonic() < until:
            time.sleep(0.05)
        assert leader.ask("state")["leads"] == cluster.epoch
        assert cluster.primary is not None
        assert cluster.primary.number == leader.number == 1
