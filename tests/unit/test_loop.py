"""The loop on a tiny dataset: it learns, resumes exactly, stops early and keeps the best."""

import errno
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file

from shardline.shards.core.errors import ConfigError, CorruptFile, DataError, NotFound, Unavailable
from shardline.shards.core.files import read_manifest, write_manifest
from shardline.training import gather
from shardline.training.config.training_config import OptimiserConfig, TrainingConfig
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import open_dataset
from shardline.training.features.prepared import TrainingData
from shardline.training.loop import trainer
from shardline.training.loop.batches import Sampler
from shardline.training.loop.launch import train
from shardline.training.loop.optimiser import learning_rate
from shardline.training.loop.run_rank import train_rank
from shardline.training.loop.runlog import read_log
from shardline.training.loop.train_step import Step
from shardline.training.loop.validation import validation_recall
from shardline.training.loss.losses import LossTerms
from shardline.training.model import checkpoint
from shardline.training.model.checkpoint import (
    RUN_KIND,
    TrainState,
    check_resumable,
    latest_state,
    load_best,
    open_data,
)
from shardline.training.model.encoding import encode_items, encode_queries
from shardline.training.model.precision import resolve
from tests.tiny import ITEM_IDS, USER_IDS, declared_run, tiny_config, tiny_dataset

CPU = torch.device("cpu")


def start(folder: Path, config: TrainingConfig) -> Path:
    dataset = tiny_dataset(folder.parent / f"{folder.name}-data")
    return declared_run(folder, config, dataset)


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"{step:08d}" / "model.safetensors")


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]


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
    assert all(0 < event["gradient_norm"] < 100 for event in steps)
    assert steps[1]["learning_rate"] < 0.01
    assert (events[0]["event"], events[0]["world"], events[0]["step"]) == ("start", 1, 0)
    assert (events[0]["precision"], events[0]["fit_splits"]) == ("fp32", "train")
    lines = (run / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == events
    recalls = [event["recall@10"] for event in events if event["event"] == "validation"]
    assert state.best_value == max(recalls)
    assert state.best_epoch == int(np.argmax(recalls)) + 1


def test_speed_and_bytes_are_of_the_steps_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step takes a second and gathers 100 bytes, what is around them takes much longer."""
    now = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    traffic = gather.Traffic()
    monkeypatch.setattr(gather, "TRAFFIC", traffic)

    def costing(honest: Any, seconds: float, received: int) -> Any:
        def costly(*given: Any, **named: Any) -> Any:
            now[0] += seconds
            traffic.received += received
            return honest(*given, **named)

        return costly

    monkeypatch.setattr(Step, "run", costing(Step.run, 1.0, 100))
    for name, received in (("save_checkpoint", 0), ("validation_recall", 9000), ("mined_lists", 9)):
        monkeypatch.setattr(trainer, name, costing(getattr(trainer, name), 1000.0, received))
    config = tiny_config(
        epochs=3,
        log_every_steps=5,
        checkpoint_every_steps=2,
        loss={"hard_negatives": 2},
        mining={"every_epochs": 1, "per_user": 4, "range_max": 20},
    )
    events: list[dict] = []
    reading = costing(events.append, 1000.0, 0)
    train_rank(start(tmp_path / "run", config), CPU, reading)
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) == 6
    for event in steps:
        assert (event["examples_per_s"], event["gathered_bytes"]) == (24.0, 100)


@pytest.mark.parametrize("gradients", ["dense", "sparse"])
@pytest.mark.parametrize(("every", "kept"), [(None, 20), (4, 28), (10, 20)])
def test_resumed_run_equals_uninterrupted_one(
    tmp_path: Path, every: int | None, kept: int, gradients: str
) -> None:
    towers = tiny_config().towers
    query = towers.query.model_copy(update={"dropout": 0.3})
    config = tiny_config(
        epochs=4,
        towers=towers.model_copy(update={"query": query}),
        validation={"k": 10, "patience": 9},
        optimiser={"warmup_steps": 5, "learning_rate": 0.01, "embedding_gradients": gradients},
        log_every_steps=1,
    )
    whole = start(tmp_path / "whole", config)
    train_rank(whole, CPU)

    # how often it writes does not change what it computes
    cut = start(tmp_path / "cut", config.model_copy(update={"checkpoint_every_steps": every}))

    def interrupt(event: dict) -> None:
        if event["event"] == "step" and event["step"] == 30:  # the end of the third epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_rank(cut, CPU, interrupt)
    state = latest_state(cut)
    assert state is not None
    assert (state.step, state.epoch) == (kept, 2)
    train_rank(cut, CPU)
    assert latest_state(cut) == latest_state(whole)
    assert losses(cut) == losses(whole)
    expected = weights(whole, 40)
    for name, value in weights(cut, 40).items():
        assert torch.equal(value, expected[name]), name


def test_same_seed_same_weights_and_other_seed_others(tmp_path: Path) -> None:
    runs = [
        start(tmp_path / name, tiny_config(epochs=1, seed=seed))
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    first, again, other = (train_rank(run, CPU) and weights(run, 10) for run in runs)
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
    assert kept == [state.best_step, state.step]
    assert state.best_step == state.best_epoch * 10
    _, model = load_best(run)
    expected = weights(run, state.best_step)
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
        data=data, batch_size=24, rank=0, world=1, seed=0, unknown_rate=0, history_length=4,
        loss=run.config.loss,
    )  # fmt: skip
    assert validation_recall(model, sampler, run.config) == pytest.approx(np.mean(hits))


def test_temperature_stays_in_its_range(tmp_path: Path) -> None:
    loss = {"temperature": 0.2, "min_temperature": 0.19, "max_temperature": 0.21}
    run = start(tmp_path / "run", tiny_config(epochs=2, loss=loss))
    train_rank(run, CPU)
    _, model = load_best(run)
    assert 0.19 - 1e-6 <= model.temperature().item() <= 0.21 + 1e-6
    assert model.temperature().item() != pytest.approx(0.2)


@pytest.mark.parametrize("every", [1, 7])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    run = start(tmp_path / "run", tiny_config(log_every_steps=every, checkpoint_every_steps=4))
    honest = Step.run

    def run_to_nan(self: Step, wrapped: Any, batch: Any, generator: Any) -> LossTerms:
        terms = honest(self, wrapped, batch, generator)
        seen.append(batch)
        return replace(terms, loss=terms.loss * float("nan")) if len(seen) >= 6 else terms

    seen: list[Any] = []
    monkeypatch.setattr(Step, "run", run_to_nan)
    words = r"learning_rate: .* no finite number.*got step 6, in epoch 1; .*checkpoint of step 4 is"
    with pytest.raises(ConfigError, match=words):
        train_rank(run, CPU)
    state = latest_state(run)
    assert state is not None and state.step == 4
    assert all(step < 6 for step, _ in losses(run))


def test_a_full_disk_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tmp_path / "run", tiny_config(checkpoint_every_steps=4))
    whole = start(tmp_path / "whole", tiny_config())
    train_rank(whole, CPU)
    honest, calls = checkpoint.save_file, []

    def save_file(tensors: dict, path: Path) -> None:
        calls.append(path)
        if len(calls) == 5:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(Unavailable, match=r"step 8 could not.*No space left.*step 4 is complete"):
        train_rank(run, CPU)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000004"]
    train_rank(run, CPU)
    expected = weights(whole, 20)
    assert all(torch.equal(value, expected[name]) for name, value in weights(run, 20).items())


def test_bf16_towers_learn_and_the_loss_is_fp32(tmp_path: Path) -> None:
    run = start(tmp_path / "run", tiny_config(precision="bf16", epochs=4, log_every_steps=1))
    full = start(tmp_path / "full", tiny_config(epochs=4, log_every_steps=1))
    train_rank(run, CPU)
    train_rank(full, CPU)
    expected = dict(losses(full))
    found = dict(losses(run))
    assert found[1] != expected[1]  # it did compute in bf16
    assert found[1] == pytest.approx(expected[1], rel=0.02)
    assert found[40] == pytest.approx(expected[40], rel=0.1)
    assert all(value.dtype == torch.float32 for value in weights(run, 40).values())
    first = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert first["precision"] == "bf16"


def test_a_resumed_run_keeps_the_precision_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = start(tmp_path / "whole", tiny_config(precision="bf16"))
    train_rank(whole, CPU)
    cut = start(tmp_path / "cut", tiny_config())

    def interrupt(event: dict) -> None:
        if event["step"] == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "resolve", lambda precision, device: "bf16")  # as a GPU has it
        train_rank(cut, CPU, interrupt)
    state = train_rank(cut, CPU)
    assert state.precision == "bf16"
    starts = [line for line in read_log(cut / "log.jsonl") if line["event"] == "start"]
    assert [(line["step"], line["precision"]) for line in starts] == [(0, "bf16"), (10, "bf16")]
    expected = weights(whole, 20)
    assert all(torch.equal(value, expected[name]) for name, value in weights(cut, 20).items())


def test_precision_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for has_it in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_it, **named: has)
        assert resolve("auto", gpu) == ("bf16" if has_it else "fp32")
    assert (resolve("auto", CPU), resolve("bf16", CPU)) == ("fp32", "bf16")
    with pytest.raises(ConfigError, match=r"precision: this GPU .*resumed keeps the precision"):
        resolve("bf16", gpu)


def test_prepared_data_that_was_altered_is_refused(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    run = tmp_path / "run"
    train(tiny_config(epochs=1), dataset.path, run)
    path = run / "cache" / "train.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for _ in range(2):  # and a refused resume does not make it good
        with pytest.raises(CorruptFile, match=r"train\.arrow: wrong checksum"):
            train(tiny_config(epochs=1, log_every_steps=3), dataset.path, run, resume=True)
    path.unlink()
    with pytest.raises(CorruptFile, match=r"train\.arrow: missing"):
        open_data(run)


def test_prepared_data_without_checksums_is_refused(tmp_path: Path) -> None:
    run = start(tmp_path / "run", tiny_config())
    body = read_manifest(run, kind=RUN_KIND, version=2)
    for name in ("kind", "format_version", "files"):
        del body[name]
    write_manifest(run, kind=RUN_KIND, version=1, body=body)
    with pytest.raises(CorruptFile, match="older version"):
        train_rank(run, CPU)


def test_fitting_train_and_val_takes_both_and_validates_nothing(tmp_path: Path) -> None:
    config = tiny_config(fit_splits="train+val", validation={"k": 10, "patience": 1})
    dataset = tiny_dataset(tmp_path / "data")
    result = train(config, dataset.path, tmp_path / "run")
    assert result.steps == 2 * ((6 + 1) * 40 // 24)  # val gives one more item a user
    assert (result.epochs, result.best_epoch, result.best_value) == (2, None, None)
    data = TrainingData.open(tmp_path / "run" / "cache")
    assert (len(data.train.items), len(data.val.items)) == (280, 0)
    events = read_log(tmp_path / "run" / "log.jsonl")
    assert events[0]["fit_splits"] == "train+val"
    assert all(event["event"] != "validation" for event in events)
    with pytest.raises(ConfigError, match=r"fit_splits: train, was train\+val"):
        train(tiny_config(validation={"k": 10, "patience": 1}), dataset.path, tmp_path / "run",
              resume=True)  # fmt: skip


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
    with pytest.raises(ConfigError, match=r"batch_size: 12, was 24; loss.logq: none, was standard"):
        check_resumable(run, tiny_config(batch_size=12, loss={"logq": "none"}), identity)
    with pytest.raises(DataError, match=r"another dataset; expected 'tiny' \(.*; got 'other' \("):
        check_resumable(run, tiny_config(), identity | {"name": "other"})


def test_altered_or_missing_checkpoints_are_refused(tmp_path: Path) -> None:
    run = start(tmp_path / "run", tiny_config(epochs=1))
    with pytest.raises(NotFound, match="no checkpoint"):
        load_best(run)
    train_rank(run, CPU)
    path = run / "checkpoints" / "00000010" / "model.safetensors"
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
    state = TrainState(epoch=2, step=20, world=1, precision="fp32")
    from shardline.training.loop import run_rank as loop

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


def test_users_without_interactions_and_items_never_taken_take_part(tmp_path: Path) -> None:
    whole = tiny_dataset(tmp_path / "whole")
    table = whole.interactions()
    taken = pc.and_(
        pc.not_equal(table["user_id"], int(USER_IDS[0])),
        pc.not_equal(table["item_id"], int(ITEM_IDS[0])),
    )
    dataset = write_dataset(
        tmp_path / "data", whole.users(), whole.items(), table.filter(taken), name="gaps"
    )
    result = train(tiny_config(), dataset.path, tmp_path / "run")
    assert result.steps > 10
    assert result.best_value is not None
    data = TrainingData.open(tmp_path / "run" / "cache")
    assert data.train.lengths[0] == 0
    assert data.item_counts()[0] == 0
    _, model = load_best(tmp_path / "run")
    queries = encode_queries(model, data.users, data.train, data.items)
    for vectors in (queries, encode_items(model, data.items)):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
