"""`shardline restart --rolling` follows what the controller says of it."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from shardline.cluster.cli import main
from shardline.cluster.commands import restart as module
from shardline.cluster.commands.restart import AWAY_S, follow, stopped_line
from shardline.shards.core.errors import Unavailable


def progress(
    done: int, *, number: int = 1, trouble: str | None = None, stopped: bool = False
) -> dict[str, Any]:
    told = None if trouble is None else {"code": "unavailable", "text": trouble}
    return {
        "number": number,
        "total": 3,
        "done": done,
        "trouble": told,
        "is_over": done == 3 or stopped,
        "is_stopped": stopped,
    }


class Told:
    """Gives or raises one thing of its plan after the other, the last one for ever."""

    def __init__(self, *plan: Any) -> None:
        self.plan = list(plan)
        self.now = 0.0
        self.seen: list[tuple[int, int]] = []
        self.notes: list[str] = []

    def ask(self) -> Any:
        outcome = self.plan.pop(0) if len(self.plan) > 1 else self.plan[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def follow(self, begun: dict[str, Any]) -> int:
        return follow(
            begun,
            self.ask,
            lambda stage, done, total: self.seen.append((done, total)),
            self.notes.append,
            clock=lambda: self.now,
            sleep=self.sleep,
        )


def test_it_ends_when_all_are_replaced() -> None:
    told = Told(progress(1), progress(1), progress(3))
    assert told.follow(progress(0)) == 3
    assert told.seen == [(0, 3), (1, 3), (1, 3), (3, 3)]


def test_one_that_is_over_already_ends_at_once() -> None:
    assert Told(AssertionError("asked")).follow(progress(3)) == 3


def test_trouble_is_told_once() -> None:
    told = Told(progress(1, trouble="no room"), progress(1, trouble="no room"), progress(3))
    told.follow(progress(0))
    assert told.notes == ["warning: no room"]


@pytest.mark.parametrize("found", [None, progress(1, number=2)])
def test_one_that_was_cut_short_is_an_error(found: dict[str, Any] | None) -> None:
    with pytest.raises(Unavailable, match=r"was cut short; .*run the command again"):
        Told(found).follow(progress(0))


def test_one_that_was_stopped_by_another_command_is_an_error() -> None:
    with pytest.raises(Unavailable, match=r"was stopped; got 1 of 3 replicas replaced"):
        Told(progress(1, stopped=True)).follow(progress(0))


def test_a_controller_that_is_away_for_a_while_is_waited_for() -> None:
    away = Unavailable("the controller does not answer")
    assert Told(away, away, progress(3)).follow(progress(0)) == 3


def test_a_controller_that_stays_away_is_an_error() -> None:
    told = Told(Unavailable("the controller does not answer"))
    with pytest.raises(Unavailable, match="does not answer"):
        told.follow(progress(0))
    assert AWAY_S < told.now < AWAY_S + 2


def test_a_private_ray_has_no_rolling_restart(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["restart", "--rolling"])
    assert ended.value.code == 2
    assert "for a launched cluster" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "got"), [((), "neither"), (("--rolling", "--stop"), "both")])
def test_one_thing_is_to_be_done(
    options: tuple[str, ...], got: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["restart", *options])
    assert ended.value.code == 2
    assert f"expected --rolling or --stop; got {got}" in capsys.readouterr().err


def test_a_restart_is_stopped_through_the_controller(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handle = SimpleNamespace(stop_restart=SimpleNamespace(remote=lambda: progress(1, stopped=True)))
    monkeypatch.setattr(module, "attached_ray", lambda *_, **__: nullcontext())
    monkeypatch.setattr(module, "controller", lambda: handle)
    monkeypatch.setattr(module, "asked", lambda reference, timeout_s: reference)
    with pytest.raises(SystemExit) as ended:
        main(["--set", "cluster.address=auto", "restart", "--stop"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "stopped: 1 of 3 replicas were replaced\n"
    assert stopped_line(None) == stopped_line(progress(3)) == "no restart is under way"
