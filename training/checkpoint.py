"""Checkpoints of a run: complete or absent, checksummed, tied to their configuration.

    _manifest.json         configuration, fitted features, dataset; written when the run starts
    checkpoints/000003/    after epoch 3: model.safetensors, optimiser.safetensors, _manifest.json

The newest checkpoint is where a run resumes; its manifest names the best epoch so far, whose
checkpoint is kept too and is what evaluation and export load. No pickles.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards.errors import ConfigError, DataError, NotFound
from shards.files import (
    FileEntry,
    describe_tree,
    read_manifest,
    staged_folder,
    verify_files,
    write_manifest,
)
from training.config import TrainingConfig, differences
from training.features import FeatureSpace
from training.towers import TwoTower, build_model

RUN_KIND, CHECKPOINT_KIND = "training run", "checkpoint"
VERSION = 1
MODEL, OPTIMISER = "model.safetensors", "optimiser.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Where a run stands after ``epoch`` epochs and ``step`` optimiser steps.

    best_epoch is None until something was validated; stale counts validations since then.
    """

    epoch: int = 0
    step: int = 0
    best_epoch: int | None = None
    best_value: float | None = None
    stale: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run folder declares: how it was configured, and what its features look like."""

    config: TrainingConfig
    space: FeatureSpace


def start_run(folder: Path, run: Run, dataset: dict[str, Any]) -> None:
    """Declares a run. ``dataset`` is the ``Dataset.identity`` it was started with."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {
        "config": run.config.model_dump(mode="json"),
        "space": run.space.to_json(),
        "dataset": dataset,
    }
    write_manifest(folder, kind=RUN_KIND, version=VERSION, body=body)


def open_run(folder: Path) -> Run:
    """Raises NotFound, CorruptFile or NewerFormat as ``shards.files.read_manifest``."""
    manifest = read_manifest(folder, kind=RUN_KIND, version=VERSION)
    return Run(
        config=TrainingConfig.model_validate(manifest["config"]),
        space=FeatureSpace.from_json(manifest["space"]),
    )


def check_resumable(folder: Path, config: TrainingConfig, dataset: dict[str, Any]) -> None:
    """Refuses to go on with a run that was started with other settings or other data.

    Raises:
        ConfigError: names the settings that differ. DataError: the dataset is another one.
    """
    manifest = read_manifest(folder, kind=RUN_KIND, version=VERSION)
    before = TrainingConfig.model_validate(manifest["config"])
    changed = differences(config.identity(), before.identity())
    if changed:
        raise ConfigError(
            f"{folder}: the run was started with another configuration",
            got="; ".join(changed),
            hint="resume with the same settings, or train into another folder",
        )
    check_dataset(folder, dataset)


def check_dataset(folder: Path, dataset: dict[str, Any]) -> None:
    """Raises DataError where ``dataset`` is not the identity of what the run was started with."""
    before = read_manifest(folder, kind=RUN_KIND, version=VERSION)["dataset"]
    if before != dataset:
        raise DataError(
            f"{folder}: the run was started with another dataset",
            expected=_described(before),
            got=_described(dataset),
            hint="name the run's own dataset, or train a run on this one",
        )


def save_checkpoint(
    folder: Path, model: TwoTower, optimiser: torch.optim.Optimizer, state: TrainState
) -> None:
    """Writes checkpoints/<epoch>, then removes all but it and the best."""
    root = folder / "checkpoints"
    target = root / f"{state.epoch:06d}"
    with staged_folder(target) as staging:
        save_file(_portable(model.state_dict()), staging / MODEL)
        save_file(_optimiser_tensors(model, optimiser), staging / OPTIMISER)
        body = {
            "state": asdict(state),
            "files": [asdict(entry) for entry in describe_tree(staging)],
        }
        write_manifest(staging, kind=CHECKPOINT_KIND, version=VERSION, body=body)
    for epoch in _epochs(folder):
        if epoch not in (state.epoch, state.best_epoch):
            shutil.rmtree(root / f"{epoch:06d}")


def latest_state(folder: Path) -> TrainState | None:
    """How far the run got, None before its first checkpoint."""
    epochs = _epochs(folder)
    return _verified(folder, epochs[-1]) if epochs else None


def restore(folder: Path, epoch: int, model: TwoTower, optimiser: torch.optim.Optimizer) -> None:
    """Puts a checkpoint's weights and optimiser moments into freshly built ones."""
    _verified(folder, epoch)
    path = folder / "checkpoints" / f"{epoch:06d}"
    model.load_state_dict(load_file(path / MODEL))
    tensors = load_file(path / OPTIMISER)
    for name, parameter in model.named_parameters():
        state = {
            key.removeprefix(f"{name}/"): value.to(parameter.device) if value.ndim else value
            for key, value in tensors.items()
            if key.startswith(f"{name}/")
        }
        if state:
            optimiser.state[parameter] = state


def load_best(folder: Path) -> tuple[Run, TwoTower]:
    """The run and its best model, in evaluation mode, on the CPU.

    Raises:
        NotFound: no run there, or no checkpoint yet.
    """
    run = open_run(folder)
    state = latest_state(folder)
    if state is None:
        raise NotFound(f"{folder}: no checkpoint yet", hint="train first")
    epoch = state.epoch if state.best_epoch is None else state.best_epoch
    _verified(folder, epoch)
    model = build_model(run.config, run.space)
    model.load_state_dict(load_file(folder / "checkpoints" / f"{epoch:06d}" / MODEL))
    return run, model.eval()


def _described(dataset: dict[str, Any]) -> str:
    """The name, and digits that tell apart datasets of one name."""
    files = json.dumps(dataset["files"], sort_keys=True).encode()
    return f"{dataset['name']!r} ({hashlib.sha256(files).hexdigest()[:8]})"


def _epochs(folder: Path) -> list[int]:
    root = folder / "checkpoints"
    return sorted(int(path.name) for path in root.glob("[0-9]*")) if root.is_dir() else []


def _verified(folder: Path, epoch: int) -> TrainState:
    path = folder / "checkpoints" / f"{epoch:06d}"
    manifest = read_manifest(path, kind=CHECKPOINT_KIND, version=VERSION)
    verify_files(path, [FileEntry(**entry) for entry in manifest["files"]])
    return TrainState(**manifest["state"])


def _optimiser_tensors(model: TwoTower, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimiser.state.get(parameter, {}).items()
    }
    return _portable(tensors)


def _portable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
