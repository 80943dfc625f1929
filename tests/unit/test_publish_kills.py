"""Kills during a publish hit what they name, while it is under way; what stays broken is told."""

import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from shardline.bench.crash import publish_kills
from shardline.bench.crash.publish_kills import Kills

CHANGE = "import time, sys; time.sleep({seconds}); sys.exit({code} and 'no longer in the log')"


class FakeKills(Kills):
    def _live(self) -> int:
        return 1


@pytest.fixture
def victim():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture
def kills(victim, monkeypatch: pytest.MonkeyPatch) -> Kills:
    found = psutil.Process(victim.pid)
    monkeypatch.setattr(publish_kills, "tree", lambda pid: [("mirror", found)])
    return FakeKills(
        store=Path("nowhere"),
        endpoint=SimpleNamespace(),
        pid=0,
        other=2,
        writing=SimpleNamespace(journal=SimpleNamespace(writes=0)),
        rng=random.Random(1),
    )


def change(monkeypatch: pytest.MonkeyPatch, seconds: float, code: int = 0) -> None:
    monkeypatch.setattr(publish_kills, "COMMAND", CHANGE.format(seconds=seconds, code=code))


def test_a_process_of_the_role_is_killed_during_the_change(
    kills: Kills, victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, 0.5, code=1)
    kills._round("mirror", kills._words())
    assert victim.wait(10) == -9
    (made,) = kills.rounds
    assert (made.what, made.killed, made.live) == ("publish", "mirror", 1)
    assert made.said == "no longer in the log"


@pytest.mark.parametrize("role", ["", "controller"])
def test_no_other_process_is(
    kills: Kills, victim, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    change(monkeypatch, 0.2)
    kills._round(role, kills._words())
    assert victim.poll() is None
    assert kills.rounds[0].killed == ""


def test_a_change_without_an_end_and_a_cluster_that_stays_broken_are_told(
    kills: Kills, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, 60)
    monkeypatch.setattr(publish_kills, "ENDED_WITHIN_S", 0.2)
    kills._round("", kills._words())
    assert kills.violations == ["publish did not end within 0.2 s"]


def test_the_other_generation_is_published_and_then_rolled_back(
    kills: Kills, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kills._words()[:2] == ("publish", "2")
    kills.other = 1
    assert kills._words() == ("rollback",)


def test_it_goes_on_until_so_many_were_killed(
    kills: Kills, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two undisturbed rounds first; a change that was over before the kill counts as none."""
    hits = iter([True, False, True])
    looks: list[str] = []
    change(monkeypatch, 0.0)
    monkeypatch.setattr(FakeKills, "_wait_until_whole", lambda self: None)
    monkeypatch.setattr(FakeKills, "_kill", lambda self, role, at, process: next(hits))
    kills.writing.look = looks.append
    kills.run(2, lambda line: None)
    assert [each.killed for each in kills.rounds] == ["", "", "controller", "", "shard"]
    assert looks == [f"{each.killed or 'nobody'} was killed" for each in kills.rounds]
    assert kills.violations == []
