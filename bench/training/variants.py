"""Runs that differ in one setting: which there are, and how each is trained and measured.

Shared by the benchmarks that compare settings of training (``mining_bench``, ``recall_tables``).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardline.training.config.loss_config import LossConfig
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.tables import Dataset
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.loop.launch import train

KS = (10, 100)
BASELINE = "in-batch"
# name -> what it changes in the loss
STRATEGIES: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "batch-hard": {"strategy": "batch-hard"},
    "batch-hard, half of the loss": {"strategy": "batch-hard", "batch_hard_weight": 0.5},
    "offline-mined": {"strategy": "offline-mined"},
    "mixed": {"strategy": "mixed"},
    "in-batch + 1 mined": {"hard_negatives": 1},
    "in-batch + 5 random": {"random_negatives": 5},
}


def variant(training: TrainingConfig, changes: dict[str, Any], seed: int) -> TrainingConfig:
    """Another loss and seed, and no early stop, which would end the runs at unequal steps."""
    loss = LossConfig.model_validate(training.loss.model_dump(exclude_unset=True) | changes)
    patient = training.validation.model_copy(update={"patience": training.epochs + 1})
    return training.model_copy(update={"loss": loss, "seed": seed, "validation": patient})


def trained(
    settings: TrainingConfig,
    dataset: Dataset,
    folder: Path,
    table: Path | None,
    *,
    split: str = "test",
    ks: Sequence[int] = KS,
) -> dict[str, Any]:
    """Trains one run and measures its best checkpoint: recall@k, seconds, steps, best_epoch.

    table: mined negatives, for a loss that uses them. seconds are those of training.
    """
    hard = table if settings.loss.hard_negatives else None
    started = time.perf_counter()
    result = train(settings, dataset.path, folder, hard=hard)
    seconds = time.perf_counter() - started
    means = evaluate_exact(folder, dataset, split=split, ks=ks).means
    chosen = {f"recall@{k}": means[f"recall@{k}"] for k in ks}
    return chosen | {"seconds": seconds, "steps": result.steps, "best_epoch": result.best_epoch}
