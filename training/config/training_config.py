"""A training run's configuration: towers, loss, optimiser, validation, mining, and the run itself.

Every field says its unit and range where it is declared; unknown keys are refused by name. The
towers are declared in ``training.config.tower_config``, the loss in
``training.config.loss_config``. Cheap to import: no torch here.
"""

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from shardline.shards.core.schema import MAX_K
from shardline.training.config.loss_config import LossConfig
from shardline.training.config.section import Section
from shardline.training.config.tower_config import TowersConfig

# settings of TrainingConfig that leave the weights as they are: a resumed run may change them
PLACEMENT = {"num_workers", "device", "log_every_steps", "checkpoint_every_steps", "max_failures"}


class OptimiserConfig(Section):
    """AdamW with a linear warm-up. Embedding tables may have settings of their own."""

    learning_rate: float = Field(default=2e-3, gt=0, le=1, description="Peak, after warm-up.")
    embedding_learning_rate: float | None = Field(
        default=None, gt=0, le=1, description="Peak for embedding tables; null for the same."
    )
    weight_decay: float = Field(
        default=1e-4,
        ge=0,
        le=1,
        description="Of matrices, a step, times the learning rate: of all rows of a table with "
        "dense gradients, also those that no example of the step used; see embedding_gradients.",
    )
    embedding_weight_decay: float | None = Field(
        default=None, ge=0, le=1, description="Of embedding tables; null for weight_decay."
    )
    embedding_decay: Literal["decoupled", "l2"] = Field(
        default="decoupled",
        description="decoupled shrinks rows beside Adam's step, l2 adds decay x row to the "
        "gradient; either of the rows that the step used with sparse gradients, as matrix "
        "factorisation does, of all rows with dense ones.",
    )
    embedding_gradients: Literal["auto", "dense", "sparse"] = Field(
        default="dense",
        description="sparse exchanges and updates only the rows a step used, whose moments stand "
        "still in between: much faster for large tables, but each row then learns at another "
        "rate and the learning rate wants tuning anew (an experiment on Gowalla: validation "
        "Recall@20 .14 after 4 epochs, where dense has .185 after 3). auto takes it for tables of "
        "many more rows than a step reads.",
    )
    beta2: float = Field(
        default=0.98,
        ge=0,
        lt=1,
        description="Decay a step of Adam's second moment: 0.98 suits runs of about 1000 steps; "
        "rows of large tables that few steps touch want 0.999.",
    )
    warmup_steps: int = Field(default=50, ge=0, description="Steps from 0 to the peak.")
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="After the warm-up: half a cosine to 0, or the peak."
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="Upper limit of the gradient's norm; null for none."
    )


class ValidationConfig(Section):
    """Exact Recall@k over the whole corpus on the val split picks the checkpoint to keep."""

    k: int = Field(default=100, ge=1, le=MAX_K, description="The k of Recall@k.")
    max_users: int = Field(default=2000, ge=1, description="Users sampled, the same every time.")
    every_epochs: int = Field(default=1, ge=1, description="Epochs between two validations.")
    patience: int = Field(
        default=3, ge=1, description="Validations without a new best before training stops."
    )


class MiningConfig(Section):
    """Which of the items nearest to a user become hard negatives, and how many.

    Ranks are counted from 1, the best, after the user's known items have been dropped.
    """

    every_epochs: int = Field(
        default=0, ge=0, description="Epochs between two minings during training; 0 for never."
    )
    per_user: int = Field(
        default=10, ge=1, le=MAX_K, description="Negatives wanted per user; fewer is starved."
    )
    range_min: int = Field(
        default=1, ge=1, le=MAX_K, description="First rank used; higher skips likely positives."
    )
    range_max: int = Field(default=100, ge=1, le=MAX_K, description="Last rank used.")
    margin: float = Field(
        default=0.05,
        ge=0,
        le=2,
        description="A negative scores at most s - margin x |s|, s the score of the user's known "
        "items; 0 only asks for no more than s.",
    )
    reference: Literal["lowest", "mean", "highest"] = Field(
        default="mean", description="Which score of several known items s is; lowest is strictest."
    )
    drop_val: bool = Field(
        default=False,
        description="Never mine validation items; lets the validation score see its answers.",
    )

    @model_validator(mode="after")
    def _window_holds_the_sample(self) -> Self:
        if self.range_max - self.range_min + 1 < self.per_user:
            raise ValueError(
                f"range_min {self.range_min} to range_max {self.range_max} hold fewer than "
                f"per_user {self.per_user} items"
            )
        return self


class TrainingConfig(Section):
    dim: int = Field(default=128, ge=2, le=4096, description="Width of the embeddings.")
    towers: TowersConfig = Field(default=TowersConfig(), description="The two encoders.")
    loss: LossConfig = Field(default=LossConfig(), description="What is minimised.")
    optimiser: OptimiserConfig = Field(default=OptimiserConfig(), description="How.")
    validation: ValidationConfig = Field(default=ValidationConfig(), description="When to stop.")
    mining: MiningConfig = Field(default=MiningConfig(), description="Hard negatives of a user.")
    epochs: int = Field(default=10, ge=1, le=100_000, description="Passes over the train split.")
    fit_splits: Literal["train", "train+val"] = Field(
        default="train",
        description="train+val fits the final model on both, for all epochs: nothing validates it.",
    )
    batch_size: int = Field(
        default=2048, ge=2, le=1 << 20, description="GLOBAL batch, split evenly over the ranks."
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Users, and items, of a rank encoded at a time, for towers too big for the "
        "batch: it is encoded twice and gives the same gradient; null encodes it at once. The "
        "items of one row, its own negatives among them, are not divided further.",
    )
    unknown_rate: float = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="Share of training values hidden (category unknown, history empty), so that "
        "the model learns what to do without them.",
    )
    popularity_exponent: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="An item's vector gets the length interactions ** this after training, so that "
        "popular items come first among equally similar ones; above 0 the index scores by inner "
        "product. Choose it on validation: about 0.1.",
    )
    num_workers: int = Field(
        default=1, ge=1, le=4096, description="Ranks; 1 trains in this process without Ray."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto takes one GPU a rank where there are enough."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="Of the towers' matrix products; the loss is fp32. auto: bf16 on a GPU that "
        "has it, else fp32.",
    )
    log_every_steps: int = Field(default=10, ge=1, description="Steps between two log lines.")
    checkpoint_every_steps: int | None = Field(
        default=None, ge=1, description="Checkpoints within an epoch; null for its end only."
    )
    max_failures: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="How often ranks under Ray that died or failed are started again, from the "
        "newest checkpoint.",
    )
    seed: int = Field(default=0, ge=0, lt=1 << 31, description="Initial weights and shuffling.")

    @model_validator(mode="after")
    def _batch_splits_evenly(self) -> Self:
        if self.batch_size % self.num_workers:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of num_workers {self.num_workers}"
            )
        return self

    @model_validator(mode="after")
    def _negatives_split_evenly(self) -> Self:
        if self.loss.uniform_negatives % self.num_workers:
            raise ValueError(
                f"loss.uniform_negatives {self.loss.uniform_negatives} is not a multiple of "
                f"num_workers {self.num_workers}"
            )
        return self

    @property
    def fitted_splits(self) -> tuple[str, ...]:
        return tuple(self.fit_splits.split("+"))

    def identity(self) -> dict[str, Any]:
        """What decides the trained weights: everything but placement, log and checkpoints."""
        return self.model_dump(mode="json", exclude=PLACEMENT)


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Dotted names of settings that differ, with both values: ``loss.logq: True, was False``."""
    left, right = dict(_flatten(ours)), dict(_flatten(theirs))
    return [
        f"{name}: {left.get(name)}, was {right.get(name)}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
