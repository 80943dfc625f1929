"""Launching without Ray: what is checked before it, and what becomes of the errors of ranks."""

import json
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from shardline.shards.core.errors import (
    ConfigError,
    CorruptFile,
    InvalidInput,
    NotFound,
    Unavailable,
)
from shardline.training.config.training_config import MiningConfig
from shardline.training.data.tables import open_dataset
from shardline.training.evaluation.baselines import Baseline, evaluate_baseline
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.export import export
from shardline.training.loop import ray_ranks
from shardline.training.loop.launch import check_folders, train
from shardline.training.loop.ray_ranks import _cause, train_under_ray
from shardline.training.loop.runlog import _line_start, followed
from shardline.training.mining.candidates import Mined
from shardline.training.mining.hard_negatives import Origin, write_negatives
from tests.tiny import count_reads, declared_run, tiny_config, tiny_dataset


def test_trains_in_this_process_and_resumes_a_finished_run(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    events: list[dict] = []
    result = train(tiny_config(), dataset.path, tmp_path / "run", on_event=events.append)
    assert (result.epochs, result.steps) == (2, 20)
    assert [event["event"] for event in events] == ["start", *["step", "validation"] * 2, "end"]
    assert (events[-1]["early"], events[-1]["epoch"]) == (False, 2)
    assert events[-1]["kept_epoch"] == result.best_epoch
    assert 0 < (result.best_value or 0) <= 1
    with pytest.raises(ConfigError, match=r"holds a run already; --resume .* --run names another"):
        train(tiny_config(), dataset.path, tmp_path / "run")
    again = train(tiny_config(), dataset.path, tmp_path / "run", resume=True)
    assert again == result
    with pytest.raises(ConfigError, match="dim: 8, was 16"):
        train(tiny_config(dim=8), dataset.path, tmp_path / "run", resume=True)


def test_train_evaluate_and_export_read_each_table_at_most_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to verify it, and once more at the most."""
    data, run = tiny_dataset(tmp_path / "data").path, tmp_path / "run"
    reads = count_reads(monkeypatch)
    config = tiny_config(towers={}, popularity_exponent=0.1)  # features read off the columns
    train(config, data, run)
    assert reads == {"users.parquet": 1, "items.parquet": 1, "interactions.parquet": 2}
    reads.clear()
    dataset = open_dataset(data)
    evaluate_exact(run, dataset, ks=(5,))
    for kind in Baseline:
        evaluate_baseline(kind, dataset, ks=(5,))
    assert reads == {"users.parquet": 2, "items.parquet": 2, "interactions.parquet": 2}
    reads.clear()
    export(run, data, tmp_path / "store", created_at="2026-01-01T00:00:00Z")
    assert reads == {"users.parquet": 1, "items.parquet": 1, "interactions.parquet": 2}


def test_a_refused_batch_size_leaves_the_folder_free(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"batch_size: .*; expected <= 240; got 241"):
        train(tiny_config(batch_size=241), dataset.path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(tiny_config(batch_size=240), dataset.path, tmp_path / "run").steps == 2


def test_a_memory_that_the_run_is_too_short_for_is_refused(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    loss = {"memory_size": 48, "memory_warmup_steps": 20}
    with pytest.raises(ConfigError, match=r"memory_warmup_steps: .*; expected < 20, .*; got 20"):
        train(tiny_config(loss=loss), dataset.path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    result = train(tiny_config(loss=loss, epochs=3), dataset.path, tmp_path / "run")
    assert result.steps == 30


def test_a_resumed_run_logs_every_line_once(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    config = tiny_config(epochs=3, batch_size=12, validation={"k": 10, "patience": 9})

    def interrupt(event: dict) -> None:
        if event.get("step") == 30:  # in the middle of the second epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, dataset.path, tmp_path / "run", on_event=interrupt)
    log = tmp_path / "run" / "log.jsonl"
    with log.open("a") as file:
        file.write('{"event": "st')
    train(config, dataset.path, tmp_path / "run", resume=True)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [*range(10, 61, 10)]
    assert [event["epoch"] for event in events if event["event"] == "validation"] == [1, 2, 3]


def test_resume_takes_the_mined_table_that_the_run_was_started_with(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    tables = {
        name: Mined(
            users=np.array([2, 9]),
            items=np.array([[59, 0], [4, last]]),
            scores=np.array([[0.9, 0.8], [0.5, 0.25]], np.float32),
        )
        for name, last in (("first", 1), ("other", 7))
    }
    origin = Origin(
        model_version="abc123",
        fit_splits="train",
        generation=7,
        config=MiningConfig(per_user=2),
        seed=5,
        created_at="2026-01-01T00:00:00+00:00",
    )
    for name, table in tables.items():
        write_negatives(tmp_path / name, table, dataset, origin)
    config = tiny_config(loss={"hard_negatives": 2}, epochs=1)
    run = tmp_path / "run"
    result = train(config, dataset.path, run, hard=tmp_path / "first")
    assert train(config, dataset.path, run, resume=True, hard=tmp_path / "first") == result
    assert train(config, dataset.path, run, resume=True) == result
    other = r"other: the run was not started with these .*leave out --hard"
    with pytest.raises(ConfigError, match=other):
        train(config, dataset.path, run, resume=True, hard=tmp_path / "other")
    plain = tmp_path / "plain"
    train(tiny_config(epochs=1), dataset.path, plain)
    with pytest.raises(ConfigError, match="was not started with these mined lists"):
        train(tiny_config(epochs=1), dataset.path, plain, resume=True, hard=tmp_path / "first")
    cached = run / "cache" / "hard.safetensors"
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(CorruptFile, match=r"hard\.safetensors"):
        train(config, dataset.path, run, resume=True, hard=tmp_path / "first")


def test_features_are_inferred_where_none_are_named(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    config = tiny_config(towers={"query": {"hidden": [8]}, "item": {"hidden": [8]}}, epochs=1)
    assert train(config, dataset.path, tmp_path / "run").steps == 10


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no complete dataset"):
        train(tiny_config(), tmp_path / "nowhere", tmp_path / "run")
    dataset = tiny_dataset(tmp_path / "data")
    with pytest.raises(NotFound, match="no complete training run"):
        train(tiny_config(), dataset.path, tmp_path / "run", resume=True)
    with pytest.raises(Unavailable, match="num_workers: several workers train under Ray"):
        train(tiny_config(num_workers=2), dataset.path, tmp_path / "run")
    with pytest.raises(Unavailable, match="device: not enough GPUs; expected 1, one per worker"):
        train(tiny_config(device="cuda"), dataset.path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def failed_ranks(*errors: Exception) -> WorkerGroupError:
    failures = {
        rank: UserExceptionWithTraceback(error, f"Traceback ...\n{error}")
        for rank, error in enumerate(errors)
    }
    return WorkerGroupError("ranks failed", failures)


def test_an_error_of_a_rank_comes_back_as_itself() -> None:
    ours = ConfigError("too large", field="batch_size")
    assert _cause(failed_ranks(RuntimeError("connection closed by peer"), ours)) is ours


def test_other_errors_become_one_line() -> None:
    error = _cause(failed_ranks(RuntimeError("first\nlast line")))
    assert isinstance(error, Unavailable)
    assert str(error).startswith("training failed; got last line; --resume goes on")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, KeyboardInterrupt),
        (None, KeyboardInterrupt),
        (1, KeyboardInterrupt),
        (int(signal.SIGTERM), SystemExit),
    ],
)
def test_the_exit_that_ray_train_makes_of_ctrl_c_is_an_interrupt(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int | None,
    expected: type[BaseException],
) -> None:
    class Interrupted:
        def __init__(self, *arguments: object, **settings: object) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

        def fit(self) -> None:
            sys.exit(code)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(ray_ranks, "TorchTrainer", Interrupted)
    try:
        with pytest.raises(expected):
            train_under_ray(tiny_config(num_workers=2), False, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def test_folders_are_checked_without_a_cluster(tmp_path: Path) -> None:
    dataset, run = tiny_dataset(tmp_path / "data"), tmp_path / "run"
    with pytest.raises(NotFound, match="no complete dataset"):
        check_folders(tmp_path / "nowhere", run, resume=False)
    with pytest.raises(NotFound, match="no complete training run"):
        check_folders(dataset.path, run, resume=True)
    check_folders(dataset.path, run, resume=False)
    declared_run(run, tiny_config(), dataset)
    check_folders(dataset.path, run, resume=True)
    with pytest.raises(ConfigError, match="holds a run already"):
        check_folders(dataset.path, run, resume=False)


def test_the_log_is_followed_line_by_line(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"event": "of an earlier run"}\n')
    events: list[dict] = []
    seen = threading.Event()

    def on_event(event: dict) -> None:
        events.append(event)
        seen.set()

    with followed(log, on_event), log.open("a") as file:
        file.write('{"event": 1}\n{"eve')
        file.flush()
        assert seen.wait(30)
        file.write('nt": 2}\n')
    assert events == [{"event": 1}, {"event": 2}]


@pytest.mark.parametrize(
    ("place", "expected"), [(0, 0), (3, 3), (6, 6), (1, 3), (4, 6), (5, 6), (7, 8), (8, 8), (9, 8)]
)
def test_a_log_that_was_cut_meanwhile_is_read_on_at_a_whole_line(
    tmp_path: Path, place: int, expected: int
) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"ab\ncd\ne\n")
    with path.open("rb") as file:
        assert _line_start(file, place) == expected


def test_an_item_tower_of_numbers_alone_trains(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    towers = {
        "query": {"features": [{"kind": "id", "column": "user_id", "dim": 4}]},
        "item": {"features": [{"kind": "numeric", "column": "attribute_vector"}]},
    }
    loss = {"uniform_negatives": 8}
    for number, changes in enumerate([{}, {"loss": loss}]):
        config = tiny_config(towers=towers, epochs=1, **changes)
        assert train(config, dataset.path, tmp_path / f"run-{number}").steps == 10


def test_a_run_is_not_measured_on_what_it_was_fitted_on(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    run = tmp_path / "run"
    train(tiny_config(epochs=1, fit_splits="train+val"), dataset.path, run)
    with pytest.raises(InvalidInput, match="fitted on this split"):
        evaluate_exact(run, dataset, split="val", ks=(5,))
    assert evaluate_exact(run, dataset, split="test", ks=(5,)).users == 40
