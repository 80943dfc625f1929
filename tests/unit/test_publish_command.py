"""``publish`` and ``rollback``: what the commands refuse, show, and make of the controller's
answers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shardline.cluster.cli import main
from shardline.cluster.commands import publish as module
from shardline.cluster.commands.publish_text import age_of, publish_line
from shardline.cluster.control.publish_state import (
    Noted,
    PublishOptions,
    PublishProgress,
    PublishStage,
)
from shardline.cluster.serving.join_note import JoinNote, leave_join_note, read_join_note
from shardline.cluster.serving.leftovers import SESSION_PREFIX
from shardline.cluster.store import Store
from shardline.shards.core.errors import Unavailable
from shardline.shards.core.messages import Absence
from tests.engine import build_generation

FIGURES = (
    {"figure": "recall", "value": 0.91234, "bound": 0.95, "ok": False},
    {"figure": "rows_ratio", "value": 1.0, "bound": "0.8 to 2", "ok": True},
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Generations 1 and 2, of which 1 is live."""
    store = Store(tmp_path / "store")
    vectors = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    for number in (1, 2):
        store.generation(number).mkdir(parents=True)
        build_generation(store.generation(number), vectors, np.arange(20), 2, kind="flat")
    store.set_current(1)
    return store


def progress(**changes: Any) -> dict[str, Any]:
    options = PublishOptions(generation=2, skip_gate=changes.pop("skip_gate", None))
    return PublishProgress(number=4, options=options, source=1, **changes).as_json()


class Cluster:
    """A controller whose publish passes through ``stages``; asked: the options it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store, *stages: Any) -> None:
        self.stages = list(stages)
        self.asked: list[Any] = []
        handle = SimpleNamespace(
            publish=SimpleNamespace(remote=self._begin),
            roll_back=SimpleNamespace(remote=lambda: self._begin(None)),
            publish_progress=SimpleNamespace(remote=self._next),
            finish_publish=SimpleNamespace(remote=lambda: 1),
            stop_publish=SimpleNamespace(remote=self._next),
        )

        @contextmanager
        def reached(config: Any, *, verbose: bool) -> Iterator[dict[str, Any]]:
            yield {"generation": 1, "store": str(store.root)}

        monkeypatch.setattr(module, "reached", reached)
        monkeypatch.setattr(module, "controller", lambda: handle)
        monkeypatch.setattr(module, "asked", lambda reference, timeout_s: reference)
        monkeypatch.setattr(module, "check_beside", lambda config, number: [])
        monkeypatch.setattr(module, "POLL_S", (0.0, 0.0))

    def _begin(self, options: Any) -> dict[str, Any]:
        self.asked.append(options)
        return progress()

    def _next(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.stages.pop(0)
        return found


def run(store: Store, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["--store", str(store.root), *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_without_a_cluster_the_generation_is_live_for_the_next_one(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(store, "publish") == 0
    assert store.current() == 2, "the newest"
    assert "generation 2 is live; no cluster serves this store" in capsys.readouterr().out
    assert run(store, "publish", "1") == 0
    assert store.current() == 1
    assert run(store, "publish", "7") == 3
    assert "no generation 7; expected one of 1, 2" in capsys.readouterr().err
    assert store.current() == 1
    assert run(store, "rollback") == 3
    assert run(store, "publish", "--finish") == 0
    assert "no generation is kept" in capsys.readouterr().out


def test_a_publish_is_followed_to_its_end(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster(
        monkeypatch,
        store,
        progress(stage=PublishStage.LOADING, text="loading its shards", done=1, total=2),
        progress(stage=PublishStage.LIVE, figures=FIGURES[1:]),
    )
    assert run(store, "publish", "2", "--without-writes") == 0
    assert cluster.asked == [PublishOptions(generation=2, with_writes=False)]
    said = capsys.readouterr()
    assert "loading: loading its shards: 1/2" in said.err
    assert "rows_ratio" in said.out
    assert "publish of generation 2: live since" in said.out


def test_bounds_of_the_command_line_go_to_the_controller_or_are_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--set", "publish.min_recall=0.5", "--set", "publish.held_out=held.parquet")
    cluster = Cluster(monkeypatch, store, progress(stage=PublishStage.LIVE))
    assert run(store, *given, "--set", "index.nlist=8", "publish", "2") == 0
    (options,) = cluster.asked
    assert options.bounds == {"min_recall": 0.5, "held_out": str(Path("held.parquet").absolute())}
    capsys.readouterr()
    for arguments in (("--skip-gate", "an emergency"), ("--finish",), ("--stop",)):
        assert run(store, *given, "publish", *arguments) == 2
        said = capsys.readouterr().err
        assert "publish.min_recall, publish.held_out" in said or "publish.held_out" in said
        assert "nothing is measured" in said
    assert run(store, "--set", "publish.keep_s=1", "publish", "2") == 2
    assert "publish.keep_s" in capsys.readouterr().err
    assert run(store, "--set", "publish.min_recal=1", "publish", "2") == 2
    assert len(cluster.asked) == 1


def test_without_a_cluster_bounds_are_of_no_use(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(store, "--set", "publish.min_recall=0.5", "publish", "2") == 2
    assert "no cluster serves this store" in capsys.readouterr().err
    assert store.current() == 1


def test_a_gate_that_fails_is_told_by_its_figure_and_an_exit_code_of_its_own(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = Absence("gate_failed", "generation 2 did not pass the gate: recall is 0.91")
    failed = progress(stage=PublishStage.FAILED, reason=reason, figures=FIGURES)
    Cluster(monkeypatch, store, failed)
    assert run(store, "publish", "2", "--json") == 5
    said = capsys.readouterr()
    assert json.loads(said.out)["figures"][0] == FIGURES[0]
    assert "recall is 0.91" in said.err
    Cluster(monkeypatch, store, failed)
    assert run(store, "publish", "2") == 5
    assert "0.9123" in capsys.readouterr().out


def test_a_publish_is_stopped_or_what_is_kept_is_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = Absence("unavailable", "somebody stopped it")
    Cluster(monkeypatch, store, progress(stage=PublishStage.FAILED, reason=reason), None)
    assert run(store, "publish", "--stop") == 0
    assert "ago: somebody stopped it" in capsys.readouterr().out
    assert run(store, "publish", "--stop") == 0
    assert "no publish is known of" in capsys.readouterr().out
    assert run(store, "publish", "--finish") == 0
    assert "generation 1 ends as soon as" in capsys.readouterr().out


def test_another_publish_in_its_place_ends_the_wait(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Cluster(monkeypatch, store, progress() | {"number": 5})
    assert run(store, "rollback") == 4
    assert "nothing is known of this publish any more" in capsys.readouterr().err


def test_a_controller_that_stays_away_is_an_error() -> None:
    now = [0.0]

    def ask() -> None:
        raise Unavailable("the controller does not answer")

    with pytest.raises(Unavailable, match="does not answer"):
        module.follow(
            progress(),
            ask,
            lambda stage, done, total: None,
            clock=lambda: now[0],
            sleep=lambda seconds: now.__setitem__(0, now[0] + 10),
        )
    assert now[0] > module.AWAY_S


def test_a_gate_is_skipped_only_with_a_reason(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(store, "publish", "2", "--skip-gate", " ") == 2
    assert "--skip-gate: no reason given" in capsys.readouterr().err
    assert store.current() == 1


def test_what_is_noted_is_read_as_it_was() -> None:
    full = PublishProgress(
        number=4,
        options=PublishOptions(generation=2, skip_gate="an emergency"),
        source=1,
        stage=PublishStage.FAILED,
        since_s=12.5,
        text="x",
        unreplayed=3,
        examples=(7, 8),
        figures=FIGURES,
        reason=Absence("unavailable", "why"),
    )
    assert PublishProgress.from_json(json.loads(json.dumps(full.as_json()))) == full
    with pytest.raises(KeyError):
        PublishProgress.from_json({})
    assert Noted(live=1).beside is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"stage": PublishStage.GATE, "text": "measuring"}, "gate since 2 min: measuring"),
        ({"stage": PublishStage.LIVE}, "live since 2 min, 1 before"),
        (
            {"stage": PublishStage.LIVE, "unreplayed": 1200, "examples": (7,)},
            "live since 2 min, 1 before, without 1,200 items that it cannot take (7)",
        ),
        (
            {"stage": PublishStage.FAILED, "reason": Absence("unavailable", "no room")},
            "failed 2 min ago: no room",
        ),
    ],
)
def test_a_publish_in_one_line(changes: dict[str, Any], line: str) -> None:
    said = publish_line(progress(since_s=1000.0, **changes), 1120.0)
    assert said.removeprefix("publish of generation 2").lstrip(": ") == line
    assert [age_of(each) for each in (-1, 59, 7300, 200_000)] == ["0 s", "59 s", "2 h", "2 d"]


def test_the_private_ray_of_a_process_is_joined_by_a_file_that_others_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(Unavailable, match="process 41 cannot be joined from here"):
        read_join_note(41)
    session = tmp_path / f"{SESSION_PREFIX}41-abc"
    session.mkdir()
    note = JoinNote("127.0.0.1:6379", "a token")
    leave_join_note(session, note)
    assert read_join_note(41) == note
    (path,) = session.iterdir()
    assert path.stat().st_mode & 0o077 == 0
    assert "a token" not in repr(note)
    path.write_text("{")
    with pytest.raises(Unavailable, match="damaged"):
        read_join_note(41)
