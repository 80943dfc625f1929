"""Processes of a written shard are killed at points and at any moment; nothing is lost.

The long form is ``python -m shardline.bench.crash``; what it reports of each kind is in its report.
"""

import secrets
from pathlib import Path

from shardline.bench.crash.points import POINTS
from shardline.bench.crash.run import Options, run

KILLS = 20


def test_kills_lose_nothing(tmp_path: Path) -> None:
    seed = secrets.randbelow(1 << 31)
    print(f"seed {seed}")
    report = run(tmp_path, Options(kills=KILLS, seed=seed, check_every=10), print)
    assert report["violations"] == [], report
    assert report["kills"] >= KILLS
    assert report["acknowledged"] > KILLS
    assert len(report["kills_by_point"].keys() & set(POINTS)) > KILLS // 3, report
