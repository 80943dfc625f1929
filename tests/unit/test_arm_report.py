"""Reports of events that were made up with a known difference; and events as interactions."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from shardline.bench.ab.arm_report import ArmFigures, report
from shardline.bench.ab.event_table import load_events, owned
from shardline.cluster.cli import cli
from shardline.router.experiments.event_files import SCHEMA, table_of, write_events
from shardline.router.experiments.stored_event import Event

AT = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
SHARES = {"control": 0.5, "few": 0.5}
KEYS = 4000  # per arm
CONVERTED = {"control": 0.10, "few": 0.14}
MEDIAN_MS = {"control": 3.0, "few": 2.0}
RECALL = {"control": 0.99, "few": 0.95}


def search(key: str | None, arm: str, at: float = AT, **fields: Any) -> Event:
    given = {"request_id": f"r-{key}-{at}", "took_ms": 1.0, "k": 10, "queries": 1, "results": 10}
    return Event(event="search", at=at, key=key, arms={"probes": arm}, **{**given, **fields})


def click(key: str | None, at: float = AT + 5, **fields: Any) -> Event:
    return Event(event="click", at=at, key=key, **{"item_id": 5, "value": 1.0, **fields})


def made_up(seed: int = 0) -> list[Event]:
    rng = np.random.default_rng(seed)
    events = []
    for arm in SHARES:
        for number in range(KEYS):
            key = f"{arm}-{number}"
            for turn in range(int(rng.integers(1, 4))):
                took = MEDIAN_MS[arm] * float(rng.lognormal(0, 0.3))
                events.append(search(key, arm, AT + turn, took_ms=took))
            if rng.random() < CONVERTED[arm]:
                events += [click(key, value=20.0)] * int(rng.integers(1, 3))
        events += [
            Event(
                event="recall",
                at=AT,
                key=f"{arm}-0",
                arms={"probes": arm},
                value=float(rng.binomial(100, RECALL[arm]) / 100),
            )
            for _ in range(200)
        ]
    return events


def figures(events: list[Event], shares: dict[str, float] | None = SHARES) -> dict[str, ArmFigures]:
    return {arm.arm: arm for arm in report(owned(table_of(events)), "probes", shares).arms}


def test_arms_that_callers_invent_are_in_no_report() -> None:
    invented = [
        click("few-0", arms={"probes": "best"}),
        click("few-0", arms={"nonsense": "best"}),
    ]
    table = owned(table_of([*made_up(), *invented]))
    assert table.experiments() == ["probes"]
    assert {arm.arm for arm in report(table, "probes", None).arms} == set(SHARES)


def test_a_known_difference_is_found() -> None:
    control, few = figures(made_up()).values()
    assert (control.keys, few.keys) == (KEYS, KEYS)
    for arm in (control, few):
        p50 = MEDIAN_MS[arm.arm]
        assert arm.p50_ms.low < p50 < arm.p50_ms.high
        assert arm.recall.low < RECALL[arm.arm] < arm.recall.high
        assert arm.recall_samples == 200
        (outcome,) = arm.outcomes
        assert outcome.event == "click"
        assert outcome.converted.low < CONVERTED[arm.arm] < outcome.converted.high
        assert outcome.events.value == pytest.approx(1.5 * CONVERTED[arm.arm], rel=0.15)
        assert outcome.value.value == pytest.approx(20 * outcome.events.value)
        assert arm.filled == 1.0
    assert few.p50_difference_ms.low < -1 < few.p50_difference_ms.high
    assert few.p50_difference_ms.high < -0.9
    assert few.p99_difference_ms.tells and np.isnan(control.p99_difference_ms.value)
    assert few.recall_difference.low < -0.04 < few.recall_difference.high
    assert few.recall_difference.tells
    (outcome,) = few.outcomes
    assert outcome.converted_difference.low < 0.04 < outcome.converted_difference.high
    assert outcome.converted_difference.tells and outcome.value_difference.tells
    assert np.isnan(control.recall_difference.value)


def test_two_arms_that_do_the_same_differ_as_often_as_intervals_say() -> None:
    told = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        events = []
        for number in range(400):
            key = f"u{number}"
            events.append(search(key, "control" if number % 2 else "few"))
            if rng.random() < 0.2:
                events.append(click(key))
        (outcome,) = figures(events)["few"].outcomes
        told += outcome.converted_difference.tells
    assert 0 <= told <= 12, "five of a hundred, by chance"


def test_events_count_in_the_arm_of_their_key_or_request() -> None:
    events = [
        search("a", "control"),
        search("b", "few"),
        search(None, "few", request_id="bare"),
        click("a"),
        click(None, request_id=f"r-b-{AT}"),
        click(None, request_id="bare"),
        click(None, request_id="unknown"),
        click("stranger"),
    ]
    found = report(owned(table_of(events)), "probes", SHARES)
    control, few = found.arms
    assert (control.keys, few.keys) == (1, 2)
    assert (control.outcomes[0].converted.value, few.outcomes[0].converted.value) == (1, 1)
    assert found.unowned == 2


def test_keys_in_several_arms_and_events_before_the_first_search_are_left_out() -> None:
    events = [
        search("a", "control"),
        search("a", "few", AT + 1),
        click("a"),
        search("b", "few"),
        click("b", at=AT - 2),
        click("b", at=AT - 0.5),  # a time cut to seconds
    ]
    found = report(owned(table_of(events)), "probes", SHARES)
    assert (found.mixed, found.unowned) == (1, 2)
    assert [arm.keys for arm in found.arms] == [0, 1]
    assert [arm.searches for arm in found.arms] == [1, 2], "latencies are of all searches"
    assert found.arms[1].outcomes[0].events.value == 1


def test_arms_are_in_the_order_of_the_configuration_or_by_name() -> None:
    events = [search("a", "few"), search("b", "control"), search("c", "gone")]
    assert list(figures(events)) == ["control", "few", "gone"]
    assert list(figures(events, {"few": 0.5, "control": 0.5})) == ["few", "control", "gone"]
    assert list(figures(events, None)) == ["control", "few", "gone"]
    assert report(owned(table_of(events)), "probes", SHARES).mismatch is None


def test_keys_that_were_not_dealt_out_as_configured_are_seen() -> None:
    events = [search(f"u{n}", "few" if n % 3 else "control") for n in range(600)]
    assert report(owned(table_of(events)), "probes", SHARES).mismatch < 1e-9
    events = [search(f"u{n}", "few" if n % 2 else "control") for n in range(600)]
    assert report(owned(table_of(events)), "probes", SHARES).mismatch > 0.5


def test_a_report_of_nothing_is_empty() -> None:
    found = report(owned(SCHEMA.empty_table()), "probes", SHARES)
    assert [arm.searches for arm in found.arms] == [0, 0]


def test_other_experiments_of_the_same_events_are_apart() -> None:
    both = {"depth": "ten", "probes": "few"}
    events = [Event(**{**_fields(search("a", "few")), "arms": both}), search("b", "control")]
    table = owned(table_of(events))
    assert table.experiments() == ["depth", "probes"]
    assert table.arms("depth").tolist() == ["ten", None]
    assert table.arms("probes").tolist() == ["few", "control"]


def _fields(event: Event) -> dict[str, Any]:
    return {name: getattr(event, name) for name in Event.__slots__}


# Files and commands


def store(root: Path, *files: list[Event]) -> Path:
    for number, events in enumerate(files, start=1):
        write_events(root / "events", "h-1", number, events, AT)
    return root


def test_repeats_count_once_and_damaged_files_are_named(tmp_path: Path) -> None:
    once = click("a", event_id="x")
    store(tmp_path, [search("a", "few"), once], [once, click("a"), click("a")])
    bad = write_events(tmp_path / "events", "h-1", 3, [click("a")], AT)
    bad.write_bytes(bad.read_bytes()[:-9])
    table = load_events(tmp_path / "events")
    assert (table.kinds() == "click").sum() == 3
    assert len(table.damaged) == 1 and bad.name in table.damaged[0]


def test_since_goes_by_the_time_of_an_event(tmp_path: Path) -> None:
    store(tmp_path, [search("a", "few", AT - 10), search("a", "few", AT + 10)])
    since = datetime.fromtimestamp(AT, UTC)
    assert load_events(tmp_path / "events", since).rows.num_rows == 1
    assert load_events(tmp_path / "nothing").rows.num_rows == 0


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments))


CONFIG = """
router:
  experiments:
    - name: probes
      arms: [{name: control, share: 0.5}, {name: few, share: 0.5}]
"""


def test_the_command_prints_tables_and_json(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    store(tmp_path, made_up())
    settings = ("-c", str(tmp_path / "c.yaml"), "--store", str(tmp_path), "ab", "report")
    text = run(*settings).output
    assert "experiment probes" in text and "differences to arm control" in text
    (found,) = json.loads(run(*settings, "--json", "--experiment", "probes").output)
    assert found["mismatch"] > 0.5
    assert [arm["arm"] for arm in found["arms"]] == ["control", "few"]
    assert found["arms"][0]["recall_difference"]["value"] is None
    assert run(*settings, "--since", "2026-03-02").exit_code != 0
    assert run(*settings, "--since", "2026-03-01T00:00").exit_code == 0


@pytest.mark.parametrize(
    "arguments", [("report", "--experiment", "none"), ("report", "--since", "soon"), ("report",)]
)
def test_what_is_not_there_is_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    if arguments != ("report",):
        store(tmp_path, [search("a", "few")])
    result = CliRunner().invoke(cli, ["--store", str(tmp_path), "ab", *arguments])
    assert result.exit_code != 0


def test_events_become_a_data_set(tmp_path: Path) -> None:
    """The two commands of docs/EXPERIMENTS.md."""
    searches = [search(f"u{n}", "few") for n in range(20)]
    clicks = [click(f"u{n}", AT + n, item_id=n + i) for n in range(20) for i in range(8)]
    others = [
        click(None, request_id=f"r-u3-{AT}", item_id=77),
        click(None, request_id="unknown"),
        click("u1", item_id=None),
        Event(event="view", at=AT, key="u1", item_id=99),
    ]
    store(tmp_path, searches, clicks, others)
    out = tmp_path / "clicks.parquet"
    given = ("--store", str(tmp_path), "ab", "interactions", "--event", "click")
    result = run(*given, "--out", str(out))
    assert "161 interactions of 20 users" in result.output
    assert "left out: 2 events" in result.output
    table = pq.read_table(out)
    assert table.column_names == ["user_id", "item_id", "timestamp"]
    assert table["timestamp"].to_pylist() == sorted(table["timestamp"].to_pylist())
    assert ("u3", 77) in zip(
        table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True
    )
    imported = run(
        *("--store", str(tmp_path), "data", "import", "--source", str(out)),
        *("--out", str(tmp_path / "data"), "--json"),
    )
    assert imported.exit_code == 0, imported.output
    found = json.loads(imported.stdout)
    assert found["users"] == 20
    assert sum(found["interactions"].values()) == 161
    none = CliRunner().invoke(cli, [*given[:-1], "nothing", "--out", str(out)])
    assert none.exit_code != 0
