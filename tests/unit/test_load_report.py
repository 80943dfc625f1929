"""A report becomes tables, remarks and plots that hide nothing."""

from pathlib import Path
from typing import Any

import pytest

from shardline.bench.load.command import show
from shardline.bench.load.report import process_rows, remarks, step_rows, title_of
from shardline.bench.load.runner import hit_share


def figures(rate: float, **changes: Any) -> dict[str, Any]:
    return {
        "sent": 100,
        "answered": 100,
        "rejected": 0,
        "failed": 0,
        "failures": {},
        "offered_rate": rate,
        "goodput": rate,
        "qps": rate,
        "p50_ms": 2.0,
        "p90_ms": 3.0,
        "p99_ms": 4.0,
        "p99_9_ms": None,
        "max_ms": 9.0,
        "coverage_min": 1.0,
        "coverage_mean": 1.0,
        "partial": 0,
    } | changes


def client(bottleneck: str | None = None) -> dict[str, Any]:
    return {
        "processes": 1,
        "connections": 3,
        "lag_p50_ms": 0.1,
        "lag_p99_ms": 0.5,
        "cpu_share_max": 0.2,
        "bottleneck": bottleneck,
    }


def step(label: str, rate: float | None, **changes: Any) -> dict[str, Any]:
    seconds = [
        {
            "at_s": float(at),
            "sent": 10,
            "answered": 10,
            "completed": 10 + at,
            "rejected": 0,
            "failed": 0,
            "p50_ms": None if at == 2 else 2.0,
            "p99_ms": None if at == 2 else 3.0,
            "max_ms": None if at == 2 else 4.0,
            "coverage_min": 1.0,
            "coverage_mean": 1.0,
        }
        for at in range(4)
    ]
    process = {"pid": 7, "cores": 0.5, "memory_mib": 10.0, "memory_max_mib": 12.0}
    return {
        "step": {
            "label": label,
            "rate": rate,
            "ask": "vectors",
            "seconds": 4.0,
            "batch": 1,
            "surges": (),
        },
        "tool": "own client",
        "figures": figures(rate or 10.0),
        "recall": 0.99,
        "repeats": 1.0,
        "client": client(),
        "processes": [
            process | {"role": "router"},
            process | {"role": "idle", "cores": 0.0},
        ],
        "timeline": seconds,
        "marks": [],
        "recoveries": [],
        "writes": None,
    } | changes


def floor() -> dict[str, Any]:
    found = figures(50.0, coverage_min=None, coverage_mean=None)
    made = step("empty request (floor), 50/s", 50.0, figures=found, recall=None)
    made["step"]["ask"] = "empty"
    return made


def report(scenario: str, *steps: dict[str, Any], knee: float | None = None) -> dict[str, Any]:
    bare = {"batch": 1, "k": 10, "threads": 1, "p50_ms": 0.5, "p99_ms": 0.9, "qps": 1800.0}
    return {
        "scenario": scenario,
        "setup": {
            "rows": 1000,
            "dim": 8,
            "shards": 2,
            "index": "Flat",
            "params": {"nprobe": None, "ef_search": 64},
            "k": 10,
            "cores": 2,
            "arrivals": "poisson",
            "queries": "test",
        },
        "bare": [bare],
        "knee": knee,
        "steps": [floor(), *steps],
        "cache_hit_share": 0.0123,
        "status_after": {"cache": {"hits": 1, "misses": 80}},
    }


def test_the_table_has_the_floor_then_every_step_then_the_bare_index() -> None:
    rows = step_rows(report("rate", step("50/s", 50.0)))
    assert rows[1][:9] == (
        "50/s",
        "50.0",
        "50.0",
        "2.00",
        "3.00",
        "4.00",
        "-",
        "9.00",
        "0.9900",
    )
    assert rows[1][9:] == ("1.000 / 1.0000", "0", "0")
    assert rows[0][0] == "empty request (floor), 50/s" and rows[0][8:10] == ("-", "-")
    assert rows[2][0].startswith("bare index") and rows[2][2] == "1,800"
    assert len({len(row) for row in rows}) == 1
    assert [row[0] for row in process_rows(step("x", 1.0))] == ["router"], "idle ones are left out"


def test_remarks_name_what_the_table_cannot() -> None:
    harmed = {
        "at_s": 1.0,
        "label": "shard 0 killed",
        "harmed": 5,
        "failed": 2,
        "first_harm_s": 0.1,
        "last_harm_s": 2.0,
    }
    bad = step(
        "50/s",
        50.0,
        figures=figures(50.0, failures={"timeout": 2}, failed=2, partial=3),
        client=client("the client sent late"),
        repeats=2.5,
        recoveries=[harmed, harmed | {"first_harm_s": None}],
    )
    text = "\n".join(remarks(report("rate", bad)))
    for part in (
        "CLIENT-BOUND: the client sent late",
        "each query was asked 2.5 times",
        "failed: 2 x timeout",
        "3 partial answers of 100",
        "5 requests harmed, 2 of them failed, the first 0.100 s after it, the last 2.000 s",
        "no request was harmed",
    ):
        assert part in text
    assert remarks(report("rate", step("50/s", 50.0))) == []
    assert "knee: 400" in remarks(report("sweep", step("1", 1.0), knee=400.0))[0]
    assert "no rate was held" in remarks(report("sweep", step("1", 1.0)))[0]
    assert "wrk is not installed" in remarks(report("capacity", step("closed", None)))[0]


def test_the_line_above_the_table_says_what_the_cache_answered() -> None:
    made = report("capacity", step("x", None))
    assert "Flat, ef_search 64, k = 10, 2 cores" in title_of(made), "the knob that the index has"
    assert title_of(made).endswith("1.2% of the searches answered from the result cache")
    made["cache_hit_share"] = None
    assert title_of(made).endswith(
        "an unknown share of the searches answered from the result cache"
    )
    made["status_after"]["cache"] = None
    assert title_of(made).endswith("; result cache off")


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [((5, 5), (8, 14), 0.25), ((5, 5), (5, 5), 0.0), ((5, 5), (0, 9), None)],
)
def test_the_hit_share_is_of_the_look_ups_between_two_states(
    before: tuple[int, int], after: tuple[int, int], share: float | None
) -> None:
    states = [dict(zip(("hits", "misses"), state, strict=True)) for state in (before, after)]
    assert hit_share(states[0], states[1]) == share
    assert hit_share(None, states[1]) is None and hit_share(states[0], None) is None


def test_a_surge_is_told_by_its_answers_a_second() -> None:
    surged = step("50/s", 50.0)
    surged["step"]["surges"] = ((0.25, 0.75, 3.0),)
    (line,) = remarks(report("overload", surged))
    # bins complete 10, 11, 12, 13 requests
    assert line == "answers/s: 10 before, 12 at 3 times the rate, 13 after"


@pytest.mark.parametrize(
    "steps",
    [
        [step("50/s", 50.0)],
        [step("50/s", 50.0), step("100/s", 100.0), step("200/s", 200.0)],
        [step("50/s", 50.0, marks=[{"at_s": 1.0, "label": "shard 0 killed"}])],
        [step("closed", None), step("closed more", None)],
    ],
)
def test_every_kind_of_report_is_printed_and_drawn(
    steps: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = show(report("sweep", *steps, knee=80.0), tmp_path / "r.json", tmp_path / "r.png")
    assert lines[0].startswith("client: 1 processes")
    assert "bare index" in capsys.readouterr().out
    assert (tmp_path / "r.json").read_text().startswith("{")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
