"""Two replicas of each shard on a real Ray of several logical hosts, which die and come back."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.many_hosts import REPLICAS, SHARDS

ROOT = Path(__file__).parents[2]
LIMIT_S = 240
NOT_RAYS = {
    "RAY_AUTH_MODE": "disabled",  # of a Ray that nobody but its own processes is told of
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


@pytest.fixture(scope="module")
def seen() -> Iterator[list[dict[str, Any]]]:
    """What the scenario tells, in order. Nothing of it is left behind."""
    folder = Path(tempfile.mkdtemp(prefix="mh-"))  # short: Ray's sockets are below it
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    here = {"TMPDIR": str(folder), "RAY_TMPDIR": str(folder)}
    command = [sys.executable, "-m", "tests.integration.many_hosts", str(folder)]
    try:
        with (folder / "output").open("wb") as output:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=inherited | NOT_RAYS | here,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=LIMIT_S,
                check=False,
            )
        told = (folder / "output").read_text(errors="replace")[-3000:]
        assert done.returncode == 0, told
        yield [json.loads(line) for line in (folder / "seen").read_text().splitlines()]
        assert [process.cmdline() for process in processes_of(folder)] == []
    finally:
        for process in processes_of(folder):
            process.kill()
        shutil.rmtree(folder)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those whose command line names the folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if any(str(folder) in part for part in process.cmdline()):
                found.append(process)
    return found


def of(seen: list[dict[str, Any]], event: str, phase: str) -> list[dict[str, Any]]:
    return [each for each in seen if each["event"] == event and each["phase"] == phase]


CALM = (
    "two hosts",
    "host added",
    "rolling restart",
    "third host",
    "head away",
    "controller killed",
)


@pytest.mark.parametrize("phase", [*CALM, "primary killed", "host killed"])
def test_no_answer_is_partial_whatever_befalls_one_host(
    seen: list[dict[str, Any]], phase: str
) -> None:
    (counts,) = of(seen, "phase", phase)
    assert counts["full"] > 20
    assert (counts["partial"], counts["failed"]) == (0, 0)


@pytest.mark.parametrize("phase", CALM)
def test_no_write_is_refused_while_replicas_come_and_go(
    seen: list[dict[str, Any]], phase: str
) -> None:
    """A leader that leaves hands over first, and a controller that is away changes nothing."""
    (counts,) = of(seen, "phase", phase)
    assert of(seen, "refused", phase) == []
    assert counts["written"] > 10


@pytest.mark.parametrize("phase", ["primary killed", "primary stopped", "host killed"])
def test_another_replica_takes_writes_within_seconds(
    seen: list[dict[str, Any]], phase: str
) -> None:
    (counts,) = of(seen, "phase", phase)
    assert counts["written"] > 0
    assert counts["pause_s"] < 25


def test_no_table_is_without_an_address_of_a_shard(seen: list[dict[str, Any]]) -> None:
    tables = [each["answering"] for each in seen if each["event"] == "table"]
    assert len(tables) > 15
    assert all(len(table) == SHARDS and min(table) >= 1 for table in tables)


@pytest.mark.parametrize("phase", ["rolling restart", "third host", "controller killed"])
def test_nothing_that_we_do_takes_a_replica_before_another_serves(
    seen: list[dict[str, Any]], phase: str
) -> None:
    tables = [each["answering"] for each in of(seen, "table", phase)]
    assert tables
    assert {count for table in tables for count in table} <= {REPLICAS, REPLICAS + 1}


def test_a_killed_host_is_out_of_the_table_in_seconds(seen: list[dict[str, Any]]) -> None:
    (counts,) = of(seen, "phase", "host killed")
    assert counts["seconds"] < 20
    (told,) = of(seen, "report", "host killed")
    assert [host["alive"] for host in told["report"]["hosts"]] in ([True], [True, False])
    assert "1 instead of 2 replicas of shards 0, 1" in told["report"]["notes"][0]["text"]


def test_while_rays_head_is_away_nothing_is_placed_or_ended(seen: list[dict[str, Any]]) -> None:
    (told,) = of(seen, "head", "head away")
    assert told["moved"] == 0
    assert [host["alive"] for host in told["hosts"]].count(True) == 3


def test_replicas_of_a_shard_are_on_different_hosts(seen: list[dict[str, Any]]) -> None:
    (told,) = of(seen, "report", "two hosts")
    report = told["report"]
    spots = {(each["shard"], each["node_id"]) for each in report["replicas"]}
    assert len(spots) == SHARDS * REPLICAS
    assert [len(host["replicas"]) for host in report["hosts"]] == [SHARDS, SHARDS]
    assert any(host["router"] for host in report["hosts"])
    assert report["routers"][0]["host"] == "10.9.9.9"


def test_a_rolling_restart_replaces_all(seen: list[dict[str, Any]]) -> None:
    (told,) = of(seen, "restarted", "rolling restart")
    count = SHARDS * REPLICAS
    assert (told["begun"]["total"], told["begun"]["done"]) == (count, 0)
    assert (told["over"]["done"], told["over"]["is_over"], told["kept"]) == (count, True, 0)
