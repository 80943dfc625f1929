"""The largest bodies that a router takes: memory and processor time as docs/SECURITY.md says."""

import json
import subprocess
import sys

from shardline.bench.load.request_costs import DEFAULT_MIB, KINDS

FACTOR = 10
MOST_SECONDS = 1.0  # of a processor; the costliest takes 0.9
PROBE_SECONDS = 0.0035  # of the machine that figure is of


def test_no_large_body_costs_more_than_ten_times_its_size_or_a_second() -> None:
    command = [sys.executable, "-m", "shardline.bench.load.request_costs", "--json"]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == len(KINDS)
    assert max(row["size"] for row in rows) > (DEFAULT_MIB - 1) * (1 << 20)
    small = 8 << 20  # kinds whose own limits end sooner: tests/unit/test_request_costs.py
    costly = [row for row in rows if row["size"] >= small and row["bytes"] > FACTOR * row["size"]]
    assert not costly
    seconds = [row["seconds"] * PROBE_SECONDS / row["probe_seconds"] for row in rows]
    assert max(seconds) <= MOST_SECONDS
