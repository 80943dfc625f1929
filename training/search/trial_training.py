"""One trial trained up to an epoch, wherever that happens: what it needs, and what came of it."""

import time
from dataclasses import dataclass
from pathlib import Path

from shardline.shards.core.errors import ConfigError
from shardline.shards.core.files import MANIFEST_NAME
from shardline.training.config.training_config import TrainingConfig
from shardline.training.loop.launch import train
from shardline.training.loop.runlog import OnEvent
from shardline.training.model.checkpoint import latest_state


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialJob:
    """Trial ``number``, in the run of ``folder``, to be trained up to ``until`` epochs.

    may_be_refused: a configuration that cannot be trained is an outcome, not an error.
    """

    number: int
    config: TrainingConfig
    data_folder: Path
    folder: Path
    until: int
    may_be_refused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a trial has reached: ``SearchState``'s fields of it. seconds: what this took."""

    epochs: int
    value: float | None
    best_epoch: int | None
    ended: bool
    refused: str | None = None
    seconds: float = 0.0


def train_trial(job: TrialJob, on_event: OnEvent | None = None) -> Trained:
    """Trains a trial from its newest checkpoint, or from the start.

    Raises: as ``train``; ConfigError only if it may not be refused.
    """
    began = time.monotonic()
    try:
        train(
            job.config,
            job.data_folder,
            job.folder,
            on_event=on_event,
            resume=(job.folder / MANIFEST_NAME).exists(),
            until_epoch=job.until,
        )
    except ConfigError as error:  # it diverged, or has lists of negatives that are too short
        if not job.may_be_refused:
            raise
        seconds = time.monotonic() - began
        return Trained(
            epochs=0, value=None, best_epoch=None, ended=True, refused=str(error), seconds=seconds
        )
    reached = latest_state(job.folder)
    assert reached is not None, "a trial has a checkpoint after an epoch"
    return Trained(
        epochs=reached.epoch,
        value=reached.best_value,
        best_epoch=reached.best_epoch,
        ended=reached.has_ended(job.config),
        seconds=time.monotonic() - began,
    )
