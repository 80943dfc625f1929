"""Checkpoints of a run: complete or absent, checksummed, tied to their configuration.

    _manifest.json           configuration, fitted features, dataset, checksums of what is in cache;
                             written when the run starts
    cache/                   the prepared data; mined lists and weights that the run starts with
    checkpoints/00000300/    after step 300: <part>.safetensors, _manifest.json

Parts are the model, the optimiser's moments, the loss's state and what was mined. There is no
random state: every draw is a function of the seed and the step. The newest checkpoint is where a
run resumes, within an epoch too; its manifest names the best step so far, whose checkpoint is kept
as well and is what evaluation and export load. No pickles.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardline.shards.core.errors import ConfigError, CorruptFile, DataError, NotFound, Unavailable
from shardline.shards.core.files import (
    FileEntry,
    describe_tree,
    number_of,
    read_manifest,
    staged_folder,
    verify_files,
    write_manifest,
)
from shardline.shards.core.small_files import MAX_VOCABULARY_BYTES
from shardline.training.config.training_config import TrainingConfig, differences
from shardline.training.data.tables import check_identity
from shardline.training.features.fitted import FeatureSpace
from shardline.training.features.prepared import TrainingData
from shardline.training.model.precision import Precision
from shardline.training.model.towers import TwoTower, build_model

RUN_KIND, CHECKPOINT_KIND = "training run", "checkpoint"
VERSION = 2  # 1 had no checksums of the prepared data
CHECKPOINT_VERSION = 2  # 1 was numbered by epochs
MODEL = "model"  # the part that evaluation and export load
CACHE = "cache"  # inside the run folder
TRAIN_AGAIN = "train into another folder: --run names it"
GO_ON = "repeat its `shardline train` command with --resume to go on"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Where a run stands after ``step`` optimiser steps, of which ``epoch`` epochs are complete.

    An epoch is complete once it was validated and mined after. best_* are None until something
    was validated; stale counts validations since then. world: the ranks of the last step.
    precision: what the run computes in, whatever "auto" would mean now; None before its first step.
    """

    epoch: int = 0
    step: int = 0
    best_epoch: int | None = None
    best_step: int | None = None
    best_value: float | None = None
    stale: int = 0
    world: int = 1
    precision: Precision | None = None

    def has_ended(self, config: TrainingConfig) -> bool:
        """Whether training is over: all epochs, or as many validations without a new best."""
        return self.epoch >= config.epochs or self.stale >= config.validation.patience


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run folder declares: how it was configured, and what its features look like.

    cut_off: its model is of a training that has not ended, as ``load_best`` was asked to allow.
    origin: the run that its first weights are of (``training.model.warm_start``), None for none.
    """

    config: TrainingConfig
    space: FeatureSpace
    cut_off: bool = False
    origin: dict[str, Any] | None = None


def start_run(folder: Path, run: Run, dataset: dict[str, Any]) -> None:
    """Declares a run, with what its cache holds by then; ``dataset``: the ``Dataset.identity``."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {
        "config": run.config.model_dump(mode="json"),
        "space": run.space.to_json(),
        "dataset": dataset,
        "files": [asdict(entry) for entry in describe_tree(folder / CACHE)],
    }
    if run.origin is not None:
        body["from"] = run.origin
    write_manifest(folder, kind=RUN_KIND, version=VERSION, body=body)


def place_run(folder: Path, config: TrainingConfig) -> None:
    """Gives a run that ``check_resumable`` has passed the placement of ``config``."""
    manifest = _declared(folder)
    version = manifest.pop("format_version")
    del manifest["kind"]
    body = manifest | {"config": config.model_dump(mode="json")}
    write_manifest(folder, kind=RUN_KIND, version=version, body=body)


def open_run(folder: Path) -> Run:
    """What a run was declared with.

    Raises:
        NotFound, CorruptFile, NewerFormat: as ``shards.core.files.read_manifest``.
        ConfigError: it has a setting that is refused by now.
    """
    manifest = _declared(folder)
    try:
        config = TrainingConfig.model_validate(manifest["config"])
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{folder}: a setting of this run is refused by now",
            field=".".join(map(str, first["loc"])),
            got=first["msg"],
            hint=TRAIN_AGAIN,
        ) from error
    space = FeatureSpace.from_json(manifest["space"])
    return Run(config=config, space=space, origin=manifest.get("from"))


def open_data(folder: Path) -> TrainingData:
    """The run's prepared data, mapped.

    Raises:
        NotFound: no run there. CorruptFile: a file is not as it was when the run was declared, or
            that was before there were checksums.
    """
    manifest = _declared(folder)
    refuse_older(folder, manifest, VERSION, TRAIN_AGAIN)
    verify_files(folder / CACHE, [FileEntry(**entry) for entry in manifest["files"]])
    return TrainingData.open(folder / CACHE)


def check_resumable(folder: Path, config: TrainingConfig, dataset: dict[str, Any]) -> None:
    """Refuses to go on with a run that was started with other settings or other data.

    Raises:
        ConfigError: names the settings that differ. DataError: the dataset is another one.
    """
    manifest = _declared(folder)
    before = TrainingConfig.model_validate(manifest["config"])
    changed = differences(config.identity(), before.identity())
    if changed:
        raise ConfigError(
            f"{folder}: the run was started with another configuration",
            got="; ".join(changed),
            hint="--resume wants the same options and configuration; --run names another folder",
        )
    check_dataset(folder, dataset)


def is_dataset_of(folder: Path, dataset: dict[str, Any]) -> bool:
    """Whether ``dataset`` is the identity of what the run was started with."""
    started: dict[str, Any] = _declared(folder)["dataset"]
    return started == dataset


def check_dataset(folder: Path, dataset: dict[str, Any]) -> None:
    """Raises DataError where ``dataset`` is not the identity of what the run was started with."""
    check_identity(
        f"{folder}: the run was started with another dataset",
        expected=_declared(folder)["dataset"],
        got=dataset,
        hint="--data names the run's own data set, --run another run",
    )


def save_checkpoint(
    folder: Path, state: TrainState, parts: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Writes checkpoints/<step>, the tensors of each part, then removes all but it and the best.

    Raises:
        Unavailable: it could not be written, a full disk say; those before it are as they were.
    """
    root = folder / "checkpoints"
    try:
        with staged_folder(root / _name(state.step)) as staging:
            for name, part in parts.items():
                save_file(_portable(part), _file(staging, name))
            body = {
                "state": asdict(state),
                "files": [asdict(entry) for entry in describe_tree(staging)],
            }
            write_manifest(staging, kind=CHECKPOINT_KIND, version=CHECKPOINT_VERSION, body=body)
    except (OSError, SafetensorError) as error:
        before = _steps(folder)
        raise Unavailable(
            f"{root}: the checkpoint of step {state.step} could not be written",
            got=str(error),
            hint=f"that of step {before[-1]} is complete: make room, then train with --resume"
            if before
            else "there is none before it",
        ) from error
    for step in _steps(folder):
        if step not in (state.step, state.best_step):
            shutil.rmtree(root / _name(step))


def remove_unfinished(folder: Path) -> None:
    """Removes what a process that was killed while it wrote a checkpoint has left."""
    for path in (folder / "checkpoints").glob(".*.tmp"):
        shutil.rmtree(path)


def latest_state(folder: Path) -> TrainState | None:
    """How far the run got, None before its first checkpoint."""
    steps = _steps(folder)
    return _verified(folder, steps[-1]) if steps else None


def load_parts(folder: Path, step: int) -> dict[str, dict[str, Tensor]]:
    """All parts of a checkpoint, on the CPU.

    Raises:
        NotFound, CorruptFile: it is not there, or not as it was written.
    """
    _verified(folder, step)
    checkpoint = folder / "checkpoints" / _name(step)
    return {path.stem: load_file(path) for path in sorted(checkpoint.glob("*.safetensors"))}


def load_best(folder: Path, *, unfinished: bool = False) -> tuple[Run, TwoTower]:
    """The run and its best model, in evaluation mode, on the CPU.

    unfinished: also of a training that has not ended: the best model so far, or where nothing was
    validated yet the newest.

    Raises:
        NotFound: no run there, or no checkpoint yet.
        DataError: the training has not ended, and ``unfinished`` is not set.
    """
    run = open_run(folder)
    state = latest_state(folder)
    if state is None:
        raise NotFound(f"{folder}: no checkpoint yet", hint=GO_ON)
    cut_off = not state.has_ended(run.config)
    if cut_off and not unfinished:
        raise DataError(
            f"{folder}: training has not ended",
            expected=f"{run.config.epochs} epochs, or an early stop",
            got=f"{state.epoch} epochs, {state.step} steps",
            hint=f"{GO_ON}; --unfinished takes the best checkpoint so far",
        )
    step = state.step if state.best_step is None else state.best_step
    model = build_model(run.config, run.space)
    _verified(folder, step)
    model.load_state_dict(load_file(_file(folder / "checkpoints" / _name(step), MODEL)))
    return replace(run, cut_off=cut_off), model.eval()


def _declared(folder: Path) -> dict[str, Any]:
    """The manifest of a run, which holds every value of its features."""
    return read_manifest(folder, kind=RUN_KIND, version=VERSION, limit=MAX_VOCABULARY_BYTES)


def _name(step: int) -> str:
    return f"{step:08d}"


def _file(checkpoint: Path, part: str) -> Path:
    return checkpoint / f"{part}.safetensors"


def _steps(folder: Path) -> list[int]:
    root = folder / "checkpoints"
    numbers = [number_of(path.name) for path in root.glob("[0-9]*")] if root.is_dir() else []
    return sorted(number for number in numbers if number is not None)


def _verified(folder: Path, step: int) -> TrainState:
    path = folder / "checkpoints" / _name(step)
    manifest = read_manifest(path, kind=CHECKPOINT_KIND, version=CHECKPOINT_VERSION)
    refuse_older(path, manifest, CHECKPOINT_VERSION, TRAIN_AGAIN)
    verify_files(path, [FileEntry(**entry) for entry in manifest["files"]])
    state = TrainState(**manifest["state"])
    if state.step != step:
        raise CorruptFile(
            f"{path}: another checkpoint's folder",
            expected=f"the manifest of step {step}",
            got=f"that of step {state.step}",
            hint="give the folder the step of its manifest as its name again, or train anew",
        )
    return state


def refuse_older(folder: Path, manifest: Mapping[str, Any], version: int, hint: str) -> None:
    """Raises CorruptFile where a folder was written before ``version``."""
    if manifest["format_version"] < version:
        raise CorruptFile(
            f"{folder}: written by an older version of this program",
            expected=f"format_version {version}",
            got=str(manifest["format_version"]),
            hint=hint,
        )


def _portable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
