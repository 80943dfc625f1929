"""Generations that a load test makes live: which one, when, and what it says of a failure."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from shardline.bench.load import changes
from shardline.bench.load.changes import ChangeRunner, another_generation
from shardline.bench.load.scenarios import SCENARIOS, FaultKind
from shardline.cluster.store import Store
from shardline.shards.core.errors import DataError, NotFound

SWAP = SCENARIOS["swap"].faults
SAYS = "import sys; sys.exit({code} and 'gate: recall is 0.5')"


def run_out(runner: ChangeRunner, at_s: float) -> None:
    """Ticks at that time of the test until nothing runs."""
    deadline = time.monotonic() + 30
    marks = len(runner.marks)
    runner.tick(at_s)
    while len(runner.marks) < marks + 2 and time.monotonic() < deadline:
        runner.tick(at_s)


def runner_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> ChangeRunner:
    monkeypatch.setattr(changes, "COMMAND", SAYS.format(code=code))
    runner = ChangeRunner(store=tmp_path, generation=2)
    runner.arm(SWAP, seconds=10.0)
    return runner


def test_each_change_is_begun_in_its_time_and_marked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runner = runner_of(monkeypatch, tmp_path, code=0)
    runner.tick(1.9)
    assert runner.marks == []
    run_out(runner, 2.0)
    runner.tick(5.9)
    run_out(runner, 6.0)
    assert runner.marks == [
        (2.0, "publish begins"),
        (2.0, "publish done"),
        (6.0, "rollback begins"),
        (6.0, "rollback done"),
    ]


def test_one_that_fails_ends_the_run_with_what_it_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runner = runner_of(monkeypatch, tmp_path, code=1)
    with pytest.raises(DataError, match=r"`shardline publish` failed: gate: recall is 0.5"):
        run_out(runner, 3.0)
    runner.close()


def test_one_that_runs_on_is_ended_with_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runner = runner_of(monkeypatch, tmp_path, code=0)
    monkeypatch.setattr(changes, "COMMAND", "import time; time.sleep(600)")
    runner.tick(3.0)
    runner.close()
    assert runner.marks == [(3.0, "publish begins")]


def test_the_newest_like_the_live_one_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = {
        number: SimpleNamespace(generation=number, model_version=model, rows=rows)
        for number, (model, rows) in enumerate([("a", 5), ("a", 5), ("b", 5), ("a", 6)], start=1)
    }
    monkeypatch.setattr(Store, "generation_numbers", lambda _: sorted(known))
    monkeypatch.setattr(changes, "read_generation", lambda folder: known[int(folder.name)])
    assert another_generation(Store(tmp_path), known[1]) == 2  # type: ignore[arg-type]
    assert another_generation(Store(tmp_path), known[2]) == 1  # type: ignore[arg-type]
    with pytest.raises(NotFound, match="no other generation of b"):
        another_generation(Store(tmp_path), known[3])  # type: ignore[arg-type]
    assert {fault.kind for fault in SWAP} == {FaultKind.PUBLISH, FaultKind.ROLLBACK}
