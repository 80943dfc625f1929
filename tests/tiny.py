"""A dataset small enough to check by hand, and a configuration that trains on it in seconds."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.csr import Csr
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import Dataset, vector_column
from shardline.training.features.fitted import fit
from shardline.training.features.prepared import prepare
from shardline.training.loop.run_rank import HARD
from shardline.training.loop.svd_start import write_svd_start
from shardline.training.loop.trainer import lists_to_tensors
from shardline.training.model.checkpoint import (
    CACHE,
    MODEL,
    Run,
    TrainState,
    save_checkpoint,
    start_run,
)
from shardline.training.model.towers import build_model

NUM_USERS, NUM_ITEMS, PER_USER = 40, 60, 8
ITEM_IDS = np.arange(NUM_ITEMS) * 3 + 100  # ids are not rows
USER_IDS = np.arange(NUM_USERS) * 2 + 1


def tiny_dataset(folder: Path, seed: int = 0) -> Dataset:
    """Users like items whose attributes point their way; 6 of train, 1 of val, 1 of test each."""
    rng = np.random.default_rng(seed)
    interests = rng.standard_normal((NUM_USERS, 4))
    attributes = rng.standard_normal((NUM_ITEMS, 4)).astype(np.float32)
    users = pa.table(
        {
            "user_id": USER_IDS,
            "age": rng.integers(18, 70, NUM_USERS),
            "country": [["CA", "UK", "US"][i] for i in rng.integers(0, 3, NUM_USERS)],
            "member": rng.random(NUM_USERS) < 0.5,
        }
    )
    items = pa.table(
        {
            "item_id": ITEM_IDS,
            "category": rng.integers(0, 5, NUM_ITEMS),
            "price": rng.exponential(30, NUM_ITEMS),
            "attribute_vector": vector_column(attributes),
        }
    )
    gumbel = rng.gumbel(size=(NUM_USERS, NUM_ITEMS))
    picked = np.argsort(-(2 * interests @ attributes.T + gumbel), axis=1)[:, :PER_USER]
    split = ["train"] * (PER_USER - 2) + ["val", "test"]
    interactions = pa.table(
        {
            "user_id": np.repeat(USER_IDS, PER_USER),
            "item_id": ITEM_IDS[picked.ravel()],
            "timestamp": np.tile(np.arange(PER_USER), NUM_USERS),
            "split": pa.array(split * NUM_USERS).dictionary_encode(),
        }
    )
    return write_dataset(folder, users, items, interactions, name="tiny")


def with_weights(dataset: Dataset, folder: Path) -> Dataset:
    """The same with a weight of 0 to 5 for each interaction; some are not known."""
    rows = dataset.interactions()
    weights = np.random.default_rng(7).integers(0, 6, len(rows)).astype(np.float32)
    mask = np.arange(len(rows)) % 7 == 3
    column = pa.array(weights, pa.float32(), mask=mask)
    return write_dataset(
        folder,
        dataset.users(),
        dataset.items(),
        rows.append_column("weight", column),
        name="weighted",
    )


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each table is read from now on, whole or a column of it, by file name."""
    reads: Counter[str] = Counter()
    read = pq.read_table

    def counted(path: Path, **options: Any) -> pa.Table:
        reads[Path(path).name] += 1
        return read(path, **options)

    monkeypatch.setattr(pq, "read_table", counted)
    return reads


def tiny_config(**changes: Any) -> TrainingConfig:
    """Two epochs of ten steps; every feature kind in use."""
    base: dict[str, Any] = {
        "dim": 16,
        "towers": {
            "query": {
                "features": [
                    {"kind": "id", "column": "user_id", "dim": 4},
                    {"kind": "categorical", "column": "country", "dim": 3},
                    {"kind": "categorical", "column": "member", "dim": 2},
                    {"kind": "numeric", "column": "age"},
                    {"kind": "history", "max_length": 4},
                ],
                "hidden": [24, 12],
            },
            "item": {
                "features": [
                    {"kind": "id", "column": "item_id", "dim": 4},
                    {"kind": "categorical", "column": "category", "dim": 3},
                    {"kind": "numeric", "column": "price", "log": True},
                    {"kind": "numeric", "column": "attribute_vector"},
                ],
                "hidden": [24],
            },
        },
        "validation": {"k": 10},
        "optimiser": {"warmup_steps": 5, "learning_rate": 0.01},
        "batch_size": 24,
        "epochs": 2,
        "seed": 3,
    }
    return TrainingConfig.model_validate(base | changes)


def declared_run(
    folder: Path, config: TrainingConfig, dataset: Dataset, *, hard: Csr | None = None
) -> Path:
    """A run folder as its ranks find it; the folder. hard: mined lists to start with."""
    space = fit(config, dataset)
    prepare(dataset, space, folder / CACHE, config.fitted_splits, tied=config.towers.tied)
    write_svd_start(config, dataset, space, folder / CACHE)
    if hard is not None:
        save_file(lists_to_tensors(hard), folder / CACHE / HARD)
    start_run(folder, Run(config=config, space=space), dataset.identity)
    return folder


def untrained_run(folder: Path, config: TrainingConfig, dataset: Dataset) -> Path:
    """A run folder with a model of random weights, none of them zero; the folder.

    What compares towers needs no training, which takes a hundred times as long.
    """
    run = Run(config=config, space=fit(config, dataset))
    start_run(folder, run, dataset.identity)
    model = build_model(config, run.space)
    noise = torch.Generator().manual_seed(config.seed)
    for tensor in model.state_dict().values():
        tensor += 0.2 * torch.randn(tensor.shape, generator=noise)
    state = TrainState(epoch=config.epochs, step=1, best_epoch=1, best_step=1, best_value=0.0)
    save_checkpoint(folder, state, {MODEL: model.state_dict()})
    return folder
