"""Scenarios unfold into steps; the knee is found on curves whose knee is known."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from shardline.bench.load.command import Where, check, run
from shardline.bench.load.knee import PRECISION, Point, is_held, knee, next_rate
from shardline.bench.load.runner import queries_needed
from shardline.bench.load.scenarios import (
    SCENARIOS,
    Ask,
    FaultKind,
    Step,
    StepPlan,
    find_scenario,
    steps,
)
from shardline.bench.load.stats import Figures
from shardline.bench.load.step import Options
from shardline.cluster.commands.bench import bench
from shardline.cluster.commands.bench_load import LOAD_EXAMPLE, load
from shardline.cluster.config import load_config
from shardline.cluster.console import StageProgress
from shardline.shards.core.errors import InvalidInput

NOTHING = Figures(
    sent=0,
    answered=0,
    rejected=0,
    failed=0,
    failures={},
    offered_rate=0.0,
    goodput=0.0,
    qps=0.0,
    p50_ms=None,
    p90_ms=None,
    p99_ms=None,
    p99_9_ms=None,
    max_ms=None,
    coverage_min=None,
    coverage_mean=None,
    partial=0,
)


def queue(step: Step, capacity: float, service_ms: float = 2.0) -> Figures:
    """An endpoint like an M/M/1 queue; beyond its capacity it answers that much, very late."""
    if step.rate is None:
        return replace(NOTHING, sent=100, answered=100, goodput=capacity, p50_ms=service_ms)
    load = step.rate / capacity
    wait = service_ms / (1 - load) if load < 0.99 else 5000.0
    return replace(
        NOTHING,
        sent=int(step.rate * step.seconds),
        offered_rate=step.rate,
        goodput=min(step.rate, capacity),
        p50_ms=wait,
    )


def drive(plan: StepPlan, capacity: float) -> tuple[list[Step], float | None]:
    done = []
    try:
        step = next(plan)
        while True:
            done.append(step)
            step = plan.send(queue(step, capacity))
    except StopIteration as stop:
        return done, stop.value


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_every_scenario_unfolds_and_ends(name: str) -> None:
    done, _ = drive(steps(SCENARIOS[name], rate=50, seconds=10, k=100), capacity=900)
    assert done[0].ask is Ask.EMPTY and done[-1].ask is not Ask.EMPTY, "the floor comes first"
    assert SCENARIOS[name].summary.endswith(".")
    for step in done:
        assert step.batch >= 1 and step.seconds > 0
        assert (step.rate is None) == (step.connections is not None)
        assert sum(share for _, share in step.ks) == pytest.approx(1)


@pytest.mark.parametrize("capacity", [60.0, 437.0, 900.0, 12_345.0])
def test_a_sweep_finds_the_knee_and_measures_shares_of_it(capacity: float) -> None:
    done, found = drive(steps(SCENARIOS["sweep"], rate=10, seconds=30, k=100), capacity)
    # the queue's median is five times the unloaded one at a load of about .8
    unloaded = 1 - 10 / capacity
    expected = capacity * (1 - unloaded / 5)
    assert found is not None
    assert expected / PRECISION <= found <= expected * PRECISION
    assert [step.rate for step in done[-3:]] == pytest.approx(
        [0.5 * found, 0.7 * found, 0.9 * found]
    )
    assert [step.seconds for step in done[-3:]] == [30, 30, 30]
    assert all(step.seconds == 10 for step in done[:-3]), "a third for the search; the floor too"


def test_a_sweep_that_begins_beyond_the_capacity_has_no_knee() -> None:
    done, found = drive(steps(SCENARIOS["sweep"], rate=500, seconds=9, k=100), capacity=400)
    assert found is None
    assert len(done) == 2, "the floor and one rate"


def point(rate: float, sent: int = 100_000, **changes: float | None) -> Point:
    values = {"goodput": rate, "lost_share": 0.0, "p50_ms": 2.0} | changes
    return Point(rate=rate, sent=sent, offered=rate, **values)


def test_what_it_means_that_a_rate_is_held() -> None:
    unloaded = point(10)
    assert is_held(point(100, p50_ms=9.9), unloaded)
    assert not is_held(point(100, p50_ms=10.1), unloaded)
    assert not is_held(point(100, goodput=96), unloaded)
    assert is_held(point(100, sent=50, goodput=80), unloaded), "of 50 requests 10 may be chance"
    assert not is_held(point(100, sent=5000, goodput=90), unloaded)
    assert not is_held(point(100, lost_share=0.02), unloaded)
    assert not is_held(point(100, p50_ms=None), unloaded)


def test_the_knee_lies_below_the_first_rate_that_is_not_held() -> None:
    lucky = [point(10), point(20), point(40, lost_share=0.5), point(80)]
    assert knee(lucky) == 20, "that 80 was held once does not undo 40"
    assert knee([]) is None
    assert knee([point(10, goodput=5)]) is None


def test_rates_double_and_then_close_in() -> None:
    assert next_rate([], 25) == 25
    assert next_rate([point(25)], 25) == 50
    bracket = [point(25), point(50), point(100, goodput=60)]
    assert next_rate(bracket, 25) == pytest.approx(np.sqrt(50 * 100))
    assert next_rate([*bracket[:2], point(54, goodput=10)], 25) is None, "known well enough"


def test_batches_are_measured_at_their_peak_and_at_half_of_it() -> None:
    done, _ = drive(steps(SCENARIOS["batch"], rate=50, seconds=10, k=100), capacity=80)
    assert [step.batch for step in done] == [1, 1, 1, 8, 8, 64, 64, 512, 512]
    assert [step.rate for step in done] == [None, *[None, 40.0] * 4]
    assert done[0].connections == 1


def test_latency_is_sequential_and_at_each_rate_each_behind_its_own_floor() -> None:
    done, _ = drive(steps(SCENARIOS["latency"], rate=50, seconds=30, k=100), capacity=900)
    ways = [(None, 1), (100.0, None), (20.0, None)]
    assert [(step.rate, step.connections) for step in done] == [way for way in ways for _ in "fs"]
    assert [step.ask for step in done] == [Ask.EMPTY, Ask.VECTORS] * 3
    assert {step.seconds for step in done} == {30}
    assert done[0].label == "empty request (floor), sequential"


def test_capacity_goes_up_to_64_connections() -> None:
    done, _ = drive(steps(SCENARIOS["capacity"], rate=50, seconds=30, k=100), capacity=900)
    assert [step.connections for step in done] == [1, 1, 4, 16, 64]
    assert all(step.rate is None for step in done)
    options = Options(rate=50, seconds=10, warm_up_s=3, k=100)
    assert queries_needed(SCENARIOS["capacity"], options) >= 4 * 13 * 2_500


@pytest.mark.parametrize(
    ("name", "rows", "changes", "complaint"),
    [
        ("latency", 10, {"k": 11}, r"^-k: no answer is that long; expected <= 10; got 11"),
        ("latency", 10, {"seconds": 0.04}, "too short for one request; expected >= 0.05; got 0.04"),
        ("rate", None, {"rate": 0.5, "seconds": 1.0}, "too short for one request; expected >= 2"),
    ],
)
def test_what_would_end_without_a_figure_is_refused_before_anything_is_built(
    name: str, rows: int | None, changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    options = replace(Options(rate=50.0, seconds=2.0, warm_up_s=0.0, k=1), **changes)
    config = load_config(None, [f"store={tmp_path / 'store'}"])
    where = Where(url=None, rows=rows, dim=4)
    with pytest.raises(InvalidInput, match=complaint):
        run(config, SCENARIOS[name], where, options, data=None, progress=StageProgress())
    assert not (tmp_path / "store").exists()
    check(SCENARIOS["capacity"], where, replace(options, rate=0.01, k=1))


def test_faults_and_mixes_come_as_their_scenario_says() -> None:
    (_, kill), _ = drive(steps(SCENARIOS["kill-shard"], rate=50, seconds=20, k=10), 900)
    assert [(fault.kind, fault.at_share) for fault in kill.faults] == [(FaultKind.KILL_SHARD, 0.25)]
    assert kill.ks == ((10, 1.0),)
    (floor, mixed), _ = drive(steps(SCENARIOS["mixed-k"], rate=50, seconds=20, k=10), 900)
    assert [k for k, _ in mixed.ks] == [10, 100, 1000]
    assert floor.seconds == 10 < mixed.seconds and not floor.faults


def test_an_unknown_scenario_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(InvalidInput, match=r"sweep.*got swep"):
        find_scenario("swep")


def test_the_help_explains_every_scenario_and_its_example_is_a_command() -> None:
    shown = CliRunner().invoke(bench, ["load", "--help"], terminal_width=100)
    text = " ".join(shown.output.split())
    for scenario in SCENARIOS.values():
        assert f"{scenario.name} {scenario.summary}" in text
    words = " ".join(LOAD_EXAMPLE).replace("\\", "").split()
    assert words[:3] == ["shardline", "bench", "load"]
    with click.Context(load) as context:
        load.parse_args(context, words[3:])
    assert context.params["scenario"] in SCENARIOS
    assert context.params["rows"] == 100_000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["load", "--rate", "0"], "'--rate': 0.0 is not in the range x>0"),
        (["load", "--shard", "-1"], "'--shard': -1 is not in the range x>=0"),
        (["latency", "--rate", "0"], "'--rate': 0.0 is not in the range x>0"),
        (["latency", "--seconds", "0"], "'--seconds': 0.0 is not in the range x>0"),
        (["index", "--rows", "0"], "'--rows': 0 is not in the range x>=1"),
        (["load", "--json", "away/x.json"], "'--json': there is no folder away; make it first"),
        (["load", "--plot", "away/x.png"], "'--plot': there is no folder away; make it first"),
    ],
)
def test_what_cannot_be_measured_or_written_is_refused_at_once(
    arguments: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(bench, arguments)
    assert shown.exit_code == 2
    assert complaint in shown.output
