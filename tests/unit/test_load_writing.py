"""The writer beside a load: what it writes is looked for, and undone at the end."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shardline.bench.load import faults, writing
from shardline.bench.load.publish_bench import built_share
from shardline.bench.load.report import remarks
from shardline.bench.load.scenarios import find_scenario, steps
from shardline.bench.load.writing import ITEMS_PER_WRITE, Writing, acknowledged_per_s
from shardline.bench.plots import plot_changes
from shardline.cluster.serving.endpoint import Address
from shardline.router.contract import Forbidden
from shardline.shards.core.errors import DataError, NotPrimary
from tests.fake_items import FakeItems
from tests.unit.test_load_report import report, step


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def items(monkeypatch: pytest.MonkeyPatch) -> FakeItems:
    fake = FakeItems()
    monkeypatch.setattr(Writing, "_client", lambda self, retry: fake)
    monkeypatch.setattr(writing, "PAUSE_S", 0.001)
    monkeypatch.setattr(writing, "LOOK_PAUSE_S", 0.0)
    return fake


def a_writing(rows_per_s: float = 800.0) -> Writing:
    address = Address("http://nowhere:1")
    return Writing(address=address, dim=4, model_version="m1", rows_per_s=rows_per_s)


def test_all_that_was_acknowledged_is_looked_for_and_deleted(items: FakeItems) -> None:
    writer = a_writing()
    writer.check()
    items.fails = [(NotPrimary("no"), False)] * 3
    writer.begin(0.0)
    writer.begin(0.1)
    until(lambda: writer.journal.writes > 20)
    writer.look_beside("publish done")
    until(lambda: len(writer.looks) == 1)
    writer.end()
    assert not items.items
    found = writer.report()
    assert found["refused"] == {"not_primary": 3}
    assert found["violations"] == []
    assert (found["lost"], found["returned"]) == (0, 0)
    assert [look["after"] for look in found["looks"]] == ["publish done", "the end"]
    assert found["looks"][0]["items"] > 10 * ITEMS_PER_WRITE
    assert found["acknowledged_rows"] == sum(
        each.rows for each in writer.attempts if each.code == "ok"
    )
    at, rows = found["timeline"]
    assert len(at) == len(rows) > 0
    assert sum(rows) == found["acknowledged_rows"]


def test_what_a_change_loses_is_counted(items: FakeItems) -> None:
    writer = a_writing()
    writer.begin(0.0)
    until(lambda: writer.journal.writes > 20)
    writer.stop()
    lost = sorted(items.items)[:3]
    deleted = [item for item in writer._items if item not in items.items]
    back = {deleted[0]: items.items[lost[0]]}
    for item in lost:
        del items.items[item]
    items.items |= back
    writer.look("publish")
    found = writer.report()
    assert (found["lost"], found["returned"]) == (3, 1)
    assert sorted(found["looks"][0]["lost_items"]) == lost


def test_items_that_come_back_after_the_end_are_an_error(items: FakeItems) -> None:
    writer = a_writing()
    writer.begin(0.0)
    until(lambda: writer.journal.writes > 2)
    writer.stop()
    delete, kept = items.delete, dict(items.items)

    def forgetful(*args, **fields):
        found = delete(*args, **fields)
        items.items |= kept
        return found

    items.delete = forgetful
    with pytest.raises(DataError, match="came back"):
        writer.end()


def test_a_key_that_may_not_write_is_refused_before_the_load(items: FakeItems) -> None:
    items.fails = [(Forbidden("a key for searches"), False)]
    with pytest.raises(Forbidden):
        a_writing().check()


def test_rows_per_second_are_of_their_acknowledgement(items: FakeItems) -> None:
    done = writing.Attempt(at_s=0.9, took_ms=200.0, rows=10, code="ok")
    late = writing.Attempt(at_s=2.1, took_ms=1.0, rows=4, code="ok")
    refused = writing.Attempt(at_s=0.1, took_ms=1.0, rows=10, code="not_primary")
    assert acknowledged_per_s([refused, done, late], 1.0) == ([0.0, 1.0, 2.0], [0.0, 10.0, 4.0])
    assert acknowledged_per_s([refused], 1.0) == ([], [])


def test_a_swap_writes_beside_its_searches_and_not_beside_its_floor() -> None:
    plan = steps(find_scenario("swap"), rate=10, seconds=5, k=10)
    floor = next(plan)
    assert floor.write_rows_per_s == 0
    assert plan.send(None).write_rows_per_s == 50
    assert faults.DONE == "done"


def test_a_report_says_what_was_written_and_lost(items: FakeItems) -> None:
    writer = a_writing()
    writer.begin(0.0)
    until(lambda: writer.journal.writes > 2)
    writer.stop()
    items.items.clear()
    writer.look("rollback done")
    writer.journal.refused("internal")
    lines = "\n".join(remarks(report("swap", step("10/s", 10.0, writes=writer.report()))))
    assert "items asked for: after rollback done" in lines
    assert "WRITES: a write ended with internal" in lines


def test_answers_are_of_a_generation_whatever_the_writer_adds_to_them() -> None:
    new = writing.FIRST_ITEM + 7
    expected = np.array([1, 2, 3, 4])
    assert built_share(np.array([new, 1, 2, 3]), expected) == 1.0
    assert built_share(np.array([new, 1, 9, -1]), expected) == 0.5
    assert built_share(np.array([new, -1, -1, -1]), expected) == 0.0


def test_writes_are_drawn_beside_answers(tmp_path: Path) -> None:
    seen = [(at / 10, 2.0, 1) for at in range(40)]
    changes = [("publish", 1.0, 2.0)]
    plot_changes(seen, changes, "without", tmp_path / "a.png")
    plot_changes(seen, changes, "with", tmp_path / "b.png", writes=([0.0, 1.0], [5, 6], "rows"))
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
