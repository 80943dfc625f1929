"""The loop on a tiny dataset: it learns, resumes exactly, stops early and keeps the best."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shards.errors import ConfigError, CorruptFile, DataError, NotFound
from tests.tiny import tiny_config, tiny_dataset
from training.batches import Sampler, TrainingData, prepare
from training.checkpoint import (
    Run,
    TrainState,
    check_resumable,
    latest_state,
    load_best,
    start_run,
)
from training.config import OptimiserConfig, TrainingConfig
from training.encoding import encode_items, encode_queries
from training.features import fit
from training.loop import _Log, learning_rate, train_rank, validation_recall
from training.tables import open_dataset

CPU = torch.device("cpu")


def start(folder: Path, config: TrainingConfig) -> Path:
    dataset = tiny_dataset(folder.parent / f"{folder.name}-data")
    space = fit(config, dataset)
    prepare(dataset, space, folder / "cache")
    start_run(folder, Run(config=config, space=space), dataset.identity)
    return folder


def weights(folder: Path, epoch: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"{epoch:06d}" / "model.safetensors")


def test_training_lowers_the_loss_and_logs_every_line(tmp_path: Path) -> None:
    run = start(tmp_path / "run", tiny_config(epochs=8))
    events: list[dict] = []
    state = train_rank(run, CPU, events.append)
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(10, 81, 10))[: len(steps)]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert 0 < steps[-1]["in_batch_accuracy"] <= 1
    assert 0 < steps[-1]["masked_share"] < 0.5
    assert steps[1]["examples_per_s"] > 0
    lines = (run / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == events
    recalls = [event["recall@10"] for event in events if event["event"] == "validation"]
    assert state.best_value == max(recalls)
    assert state.best_epoch == int(np.argmax(recalls)) + 1


def test_speed_counts_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    events: list[dict] = []
    log = _Log(tmp_path / "log.jsonl", events.append, 24)
    for step, seconds, pause in ((10, 2.0, 1000.0), (20, 4.0, 0.0)):
        log.start(step - 10)
        now[0] += seconds
        log.step(step, epoch=1)
        now[0] += pause  # validation
    assert [event["examples_per_s"] for event in events] == [120.0, 60.0]


def test_every_epoch_starts_the_clock_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(_Log, "start", lambda self, step: started.append(step))
    train_rank(start(tmp_path / "run", tiny_config(epochs=3)), CPU)
    assert started == [0, 10, 20]


def test_resumed_run_equals_uninterrupted_one(tmp_path: Path) -> None:
    towers = tiny_config().towers
    query = towers.query.model_copy(update={"dropout": 0.3})
    config = tiny_config(
        epochs=4,
        towers=towers.model_copy(update={"query": query}),
        validation={"k": 10, "patience": 9},
    )
    whole = start(tmp_path / "whole", config)
    train_rank(whole, CPU)

    cut = start(tmp_path / "cut", config)
    stop_after = 2

    def interrupt(event: dict) -> None:
        if event["event"] == "step" and event["epoch"] > stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_rank(cut, CPU, interrupt)
    state = latest_state(cut)
    assert state is not None and state.epoch == stop_after
    train_rank(cut, CPU)
    assert latest_state(cut) == latest_state(whole)
    expected = weights(whole, 4)
    for name, value in weights(cut, 4).items():
        assert torch.equal(value, expected[name]), name


def test_same_seed_same_weights_and_other_seed_others(tmp_path: Path) -> None:
    runs = [
        start(tmp_path / name, tiny_config(epochs=1, seed=seed))
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    first, again, other = (train_rank(run, CPU) and weights(run, 1) for run in runs)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["item_tower.output.weight"], other["item_tower.output.weight"])


def test_torch_random_state_is_left_alone(tmp_path: Path) -> None:
    run = start(tmp_path / "run", tiny_config(epochs=1))
    before = torch.random.get_rng_state()
    train_rank(run, CPU)
    assert torch.equal(before, torch.random.get_rng_state())


def test_early_stop_keeps_best_and_last(tmp_path: Path) -> None:
    config = tiny_config(
        epochs=60,
        validation={"k": 10, "patience": 2},
        optimiser={"warmup_steps": 0, "learning_rate": 0.05},
    )
    run = start(tmp_path / "run", config)
    state = train_rank(run, CPU)
    assert state.stale == 2
    assert state.epoch < 60
    assert state.best_epoch == state.epoch - 2
    kept = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert kept == [state.best_epoch, state.epoch]
    _, model = load_best(run)
    expected = weights(run, state.best_epoch)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert train_rank(run, CPU) == state  # a finished run has nothing left to do


def test_validation_recall_against_plain_loops(tmp_path: Path) -> None:
    run_folder = start(tmp_path / "run", tiny_config(epochs=1))
    train_rank(run_folder, CPU)
    run, model = load_best(run_folder)
    data = TrainingData.open(run_folder / "cache")
    every = np.arange(len(data.users))
    queries = encode_queries(model, data.users.take(every), data.train, data.items)
    scores = queries @ encode_items(model, data.items).T
    hits = []
    for user in every:
        seen = set(data.train.items[data.train.indptr[user] : data.train.indptr[user + 1]])
        wanted = data.val.items[data.val.indptr[user] : data.val.indptr[user + 1]]
        ranked = [i for i in np.argsort(-scores[user], kind="stable") if i not in seen][:10]
        hits.append(np.mean([item in ranked for item in wanted]))
    sampler = Sampler(
        data=data, batch_size=24, rank=0, world=1, seed=0, unknown_rate=0, history_length=4
    )
    assert validation_recall(model, sampler, run.config) == pytest.approx(np.mean(hits))


def test_temperature_stays_in_its_range(tmp_path: Path) -> None:
    loss = {"temperature": 0.2, "min_temperature": 0.19, "max_temperature": 0.21}
    run = start(tmp_path / "run", tiny_config(epochs=2, loss=loss))
    train_rank(run, CPU)
    _, model = load_best(run)
    assert 0.19 - 1e-6 <= model.temperature().item() <= 0.21 + 1e-6
    assert model.temperature().item() != pytest.approx(0.2)


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    config = OptimiserConfig(learning_rate=0.1, warmup_steps=10)
    assert learning_rate(config, 0, 110) == pytest.approx(0.01)
    assert learning_rate(config, 9, 110) == pytest.approx(0.1)
    assert learning_rate(config, 60, 110) == pytest.approx(0.05)
    assert learning_rate(config, 110, 110) == pytest.approx(0, abs=1e-12)


def test_batch_larger_than_train_is_refused(tmp_path: Path) -> None:
    run = start(tmp_path / "run", tiny_config(batch_size=1000))
    with pytest.raises(ConfigError, match=r"batch_size.*<= 240.*1000"):
        train_rank(run, CPU)


def test_resuming_with_other_settings_names_them(tmp_path: Path) -> None:
    run = start(tmp_path / "run", tiny_config())
    identity = open_dataset(tmp_path / "run-data").identity
    check_resumable(run, tiny_config(num_workers=2), identity)  # ranks may change
    with pytest.raises(ConfigError, match=r"batch_size: 12, was 24; loss.logq: False, was True"):
        check_resumable(run, tiny_config(batch_size=12, loss={"logq": False}), identity)
    with pytest.raises(DataError, match=r"another dataset; expected 'tiny' \(.*; got 'other' \("):
        check_resumable(run, tiny_config(), identity | {"name": "other"})


def test_altered_or_missing_checkpoints_are_refused(tmp_path: Path) -> None:
    run = start(tmp_path / "run", tiny_config(epochs=1))
    with pytest.raises(NotFound, match="no checkpoint"):
        load_best(run)
    train_rank(run, CPU)
    path = run / "checkpoints" / "000001" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match=r"model\.safetensors: wrong checksum"):
        load_best(run)
    shutil.rmtree(run)
    with pytest.raises(NotFound):
        load_best(run)


def test_training_without_validation_runs_all_epochs(tmp_path: Path) -> None:
    config = tiny_config(epochs=2)
    run = start(tmp_path / "run", config)
    assert latest_state(run) is None
    # the same data with an empty val split
    data = TrainingData.open(run / "cache")
    assert len(data.val.items) == 40
    state = TrainState(epoch=2, step=20)
    from training import loop

    def no_val(folder: Path) -> TrainingData:
        empty = type(data.val)(np.zeros_like(data.val.indptr), data.val.items[:0])
        return TrainingData(
            items=data.items, users=data.users, train=data.train,
            train_users=data.train_users, val=empty,
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.TrainingData, "open", no_val)
        assert train_rank(run, CPU) == state
    load_best(run)
