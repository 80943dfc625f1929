"""What a search has tried so far, on disk: a killed search goes on from it.

    <run>/search/state.json         settings, brackets, trials; replaced after each step
    <run>/search/trials/<number>/   a training run each; of those that are out the log is left

The file is complete or absent; decisions are made from it alone, so that a search that goes on
makes those that it would have made.
"""

import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from shardline.shards.core.errors import ConfigError, CorruptFile, NewerFormat, NotFound
from shardline.shards.core.files import write_json
from shardline.shards.core.small_files import read_small
from shardline.training.config.training_config import TrainingConfig, differences
from shardline.training.data.tables import check_identity
from shardline.training.search.ladder import rungs

SEARCH = "search"  # inside the run folder
STATE = "state.json"
VERSION = 1
MAX_STATE_BYTES = 1 << 26

Stage = Literal["search", "fit", "done"]


class Record(BaseModel):
    """A part of the file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class Trial(Record):
    """A configuration that is tried.

    changes: setting -> label, against the base. values: epochs of a rung -> best validation recall
    up to there. epochs: trained so far; ended: no more will be. refused: why it cannot be trained.
    """

    number: int
    changes: dict[str, str]
    epochs: int = 0
    value: float | None = None
    best_epoch: int | None = None
    values: dict[int, float] = {}
    seconds: float = 0.0
    ended: bool = False
    refused: str | None = None


class Bracket(Record):
    """Trials that compete, and the epochs of their rungs."""

    trials: tuple[int, ...]
    rungs: tuple[int, ...]


class SearchState(Record):
    """All of a search. epochs: of the base, maybe fewer than its configuration's for want of time.

    base: the base's configuration as it was asked for. least_rung: epochs that the first comparison
    comes after, at least. measured: what an epoch takes is known. spent_s: wall-clock so far.
    val_users: users that a trial's recall is the mean of.
    """

    version: int = VERSION
    base: dict[str, Any]
    dataset: dict[str, Any]
    sizes: bool
    minutes: float
    val_users: int
    epochs: int
    least_rung: int = 1
    measured: bool = False
    stage: Stage = "search"
    spent_s: float = 0.0
    brackets: list[Bracket] = []
    trials: list[Trial] = []

    @property
    def base_config(self) -> TrainingConfig:
        """The configuration that trials change."""
        return TrainingConfig.model_validate({**self.base, "epochs": self.epochs})

    @property
    def ladder(self) -> tuple[int, ...]:
        """Epochs of the rungs, ascending; the last is a trial's own end."""
        return rungs(self.epochs, self.least_rung)

    def best(self) -> Trial:
        """The trial with the highest recall on validation; of equal ones the lower number."""
        tried = [trial for trial in self.trials if trial.value is not None and not trial.refused]
        return max(tried, key=lambda trial: (trial.value or 0.0, -trial.number))


def state_path(run_folder: Path) -> Path:
    return run_folder / SEARCH / STATE


def trial_folder(run_folder: Path, trial: Trial) -> Path:
    return run_folder / SEARCH / "trials" / f"{trial.number:03d}"


def save_state(run_folder: Path, state: SearchState) -> None:
    """Replaces the file, durably."""
    write_json(state_path(run_folder), state.model_dump(mode="json"))


def load_state(run_folder: Path) -> SearchState:
    """Raises NotFound: no search there. CorruptFile, NewerFormat: not as this version writes it."""
    path = state_path(run_folder)
    try:
        content = read_small(path, MAX_STATE_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{path}: no search", hint="train --tune begins one") from error
    try:
        state = SearchState.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptFile(
            f"{path}: not the state of a search",
            field=".".join(map(str, first["loc"])),
            got=first["msg"],
            hint="begin another search: --run names another folder",
        ) from error
    if state.version > VERSION:
        raise NewerFormat(
            f"{path}: written by a newer version",
            expected=f"version {VERSION}",
            got=str(state.version),
        )
    return state


def check_same_search(
    run_folder: Path, state: SearchState, base: TrainingConfig, dataset: dict[str, Any], sizes: bool
) -> None:
    """Refuses to go on with a search of other settings or data.

    Raises:
        ConfigError: names what differs. DataError: the dataset is another one.
    """
    hint = "repeat the same command to go on; --run names another folder"
    where = run_folder / SEARCH
    before = TrainingConfig.model_validate(state.base)
    changed = differences(base.identity(), before.identity())
    if changed:
        raise ConfigError(
            f"{where}: the search was begun with another configuration",
            got="; ".join(changed),
            hint=hint,
        )
    if state.sizes != sizes:
        raise ConfigError(
            f"{where}: the search was begun {'with' if state.sizes else 'without'} --tune-size",
            hint=hint,
        )
    check_identity(
        f"{where}: the search was begun with another dataset",
        expected=state.dataset,
        got=dataset,
        hint="--data names the search's own data set, --run another folder",
    )


def drop_files(folder: Path) -> None:
    """Removes the checkpoints and prepared data of a trial that is out; its log stays."""
    for part in ("checkpoints", "cache"):
        shutil.rmtree(folder / part, ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Removes a trial, at once: what a killed removal leaves is never taken for a trial."""
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)
