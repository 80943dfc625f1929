"""When a run mines and how deep; a run that mines later resumes exactly, and begins as if plain."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardline.shards.core.errors import ConfigError
from shardline.training.config.training_config import MiningConfig, TrainingConfig
from shardline.training.data.csr import Csr
from shardline.training.features.fitted import fit
from shardline.training.features.prepared import TrainingData, prepare
from shardline.training.loop.batches import Sampler
from shardline.training.loop.launch import train
from shardline.training.loop.runlog import Event, read_log
from shardline.training.mining.candidates import Mined
from shardline.training.mining.curriculum import mines_after, window
from shardline.training.mining.hard_negatives import Origin, write_negatives
from shardline.training.model.checkpoint import latest_state, load_parts
from tests.tiny import NUM_ITEMS, NUM_USERS, tiny_config, tiny_dataset


@pytest.mark.parametrize(
    ("every", "start", "table", "mined"),
    [
        (0, 1, True, []),
        (0, 4, True, []),
        (1, 1, False, [0, 1, 2, 3, 4, 5, 6]),
        (2, 1, False, [0, 2, 4, 6]),
        (3, 1, True, [3, 6]),
        (2, 4, False, [3, 5]),
        (2, 4, True, [5]),
    ],
)
def test_epochs_that_are_mined_after(every: int, start: int, table: bool, mined: list[int]) -> None:
    config = MiningConfig(every_epochs=every, start_epoch=start)
    has_lists, found = table, []
    for epoch in range(7):
        if mines_after(config, epoch, has_lists=has_lists):
            found.append(epoch)
            has_lists = True
    assert found == mined


def test_the_window_moves_from_deep_ranks_to_the_configured_ones() -> None:
    config = MiningConfig(
        per_user=5, range_min=3, range_max=20, every_epochs=1,
        start_epoch=2, easy_ranks=10, ramp_epochs=4,
    )  # fmt: skip
    ranks = [(w.range_min, w.range_max) for w in (window(config, epoch) for epoch in range(8))]
    assert ranks == [
        *((13, 30), (13, 30), (10, 27), (8, 25)),  # 10, 10, 7.5 and 5 ranks deeper
        *((5, 22), (3, 20), (3, 20), (3, 20)),
    ]
    plain = MiningConfig(per_user=5, range_min=3, range_max=20, every_epochs=1)
    assert window(plain, 0) is plain


def config_of(**mining: Any) -> TrainingConfig:
    return tiny_config(
        epochs=4,
        loss={"hard_negatives": 2},
        mining={"every_epochs": 1, "per_user": 4, "range_max": 20} | mining,
        validation={"k": 10, "patience": 9},
        log_every_steps=1,
    )


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in read_log(run / "log.jsonl") if event["event"] == "step"]


@pytest.mark.parametrize("shared", [False, True])
def test_epochs_before_the_start_are_those_of_a_run_without_mined_negatives(
    tmp_path: Path, shared: bool
) -> None:
    data = tiny_dataset(tmp_path / "data").path
    config = config_of(start_epoch=3)
    loss = config.loss.model_copy(update={"hard_shared": shared})
    train(config.model_copy(update={"loss": loss}), data, tmp_path / "later")
    plain = config_of().model_copy(update={"loss": tiny_config().loss, "mining": MiningConfig()})
    train(plain, data, tmp_path / "plain")
    ours, theirs = losses(tmp_path / "later"), losses(tmp_path / "plain")
    assert ours[:20] == theirs[:20]
    assert all(a != b for a, b in zip(ours[20:], theirs[20:], strict=True))
    events = read_log(tmp_path / "later" / "log.jsonl")
    assert [event["epoch"] for event in events if event["event"] == "mining"] == [2, 3]


def test_mining_logs_the_ranks_that_it_used(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "data").path
    config = config_of(start_epoch=2, easy_ranks=6, ramp_epochs=2)
    train(config, data, tmp_path / "run")
    events = [e for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "mining"]
    assert [(e["epoch"], e["ranks"]) for e in events] == [(1, [7, 26]), (2, [4, 23]), (3, [1, 20])]
    hard = config_of(start_epoch=2)
    train(hard, data, tmp_path / "hard")
    assert losses(tmp_path / "hard")[10:] != losses(tmp_path / "run")[10:], "they were easier"


@pytest.mark.parametrize("cut", [7, 17, 26, 37])
def test_a_run_that_mines_later_resumes_exactly(tmp_path: Path, cut: int) -> None:
    data = tiny_dataset(tmp_path / "data").path
    config = config_of(start_epoch=3, easy_ranks=5, ramp_epochs=2, every_epochs=1)
    config = config.model_copy(update={"checkpoint_every_steps": 4})
    train(config, data, tmp_path / "whole")

    def interrupt(event: Event) -> None:
        if event["event"] == "step" and event["step"] == cut:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, data, tmp_path / "cut", on_event=interrupt)
    state = latest_state(tmp_path / "cut")
    assert state is not None and state.step < cut
    assert ("mined" in load_parts(tmp_path / "cut", state.step)) == (state.epoch >= 2)
    train(config, data, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for part, tensors in load_parts(tmp_path / "whole", 40).items():
        resumed = load_parts(tmp_path / "cut", 40)[part]
        assert all(torch.equal(value, resumed[name]) for name, value in tensors.items()), part


def test_a_table_waits_for_the_start(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    rng = np.random.default_rng(0)
    mined = Mined(
        users=np.arange(NUM_USERS),
        items=rng.permuted(np.tile(np.arange(NUM_ITEMS), (NUM_USERS, 1)), axis=1)[:, :4],
        scores=np.tile(np.float32([4, 3, 2, 1]), (NUM_USERS, 1)),
    )
    origin = Origin(
        model_version="m", fit_splits="train", generation=None,
        config=MiningConfig(per_user=4), seed=0, created_at="2026-01-01",
    )  # fmt: skip
    write_negatives(tmp_path / "hard", mined, dataset, origin)
    runs = {"at-once": config_of(every_epochs=0), "later": config_of(every_epochs=0, start_epoch=3)}
    plain = config_of().model_copy(update={"loss": tiny_config().loss, "mining": MiningConfig()})
    for name, config in runs.items():
        train(config, dataset.path, tmp_path / name, hard=tmp_path / "hard")
    train(plain, dataset.path, tmp_path / "plain")
    at_once, later, without = (losses(tmp_path / n) for n in ("at-once", "later", "plain"))
    assert later[:20] == without[:20] != at_once[:20]
    assert later[20] != without[20]
    with pytest.raises(ConfigError, match="hard negatives need a mined list per user"):
        train(runs["later"], dataset.path, tmp_path / "none")
    assert not (tmp_path / "none").exists()


# of the version before start_epoch: what a run without it draws stays the same
BATCHES = "776385c3c0423e36"


def test_batches_without_the_new_settings_are_those_of_before(tmp_path: Path) -> None:
    config = tiny_config(loss={"hard_negatives": 2, "random_negatives": 1, "uniform_negatives": 3})
    dataset = tiny_dataset(tmp_path / "data")
    space = fit(config, dataset)
    prepare(dataset, space, tmp_path / "cache")
    data = TrainingData.open(tmp_path / "cache")
    lists = np.random.default_rng(1).integers(0, NUM_ITEMS, NUM_USERS * 3)
    sampler = Sampler(
        data=data, batch_size=24, rank=0, world=1, seed=9, unknown_rate=0.1, history_length=4,
        loss=config.loss, hard=Csr.of(np.full(NUM_USERS, 3), lists),
    )  # fmt: skip
    digest = hashlib.sha256()
    for epoch in (0, 1):
        for batch in sampler.epoch(epoch):
            drawn = batch.negatives
            blocks = (batch.users, batch.items, batch.history)
            for array in (
                *(batch.user_rows, batch.item_rows, batch.history_lengths),
                *(batch.known_rows, batch.known_items, drawn.uniform, drawn.hard, drawn.random),
                *(block.categorical for block in blocks),
            ):
                digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    assert digest.hexdigest()[:16] == BATCHES
