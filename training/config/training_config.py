"""A training run's configuration: towers, loss, optimiser, validation, mining, and the run itself.

Every field declares its meaning, unit and range; unknown keys are refused by name. The
towers are declared in ``training.config.tower_config``, the loss in
``training.config.loss_config``. Cheap to import: no torch here.
"""

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from shardline.shards.core.schema import MAX_K
from shardline.training.config.loss_config import LossConfig
from shardline.training.config.section import Section
from shardline.training.config.tower_config import ITEM_KEY, USER_KEY, TowersConfig

# settings of TrainingConfig that leave the weights as they are: a resumed run may change them
PLACEMENT = {
    *("num_workers", "placement", "device"),
    *("log_every_steps", "checkpoint_every_steps", "max_failures"),
}

# what the loss is with metric dot, unless given: logits are the products themselves
DOT_LOSS: dict[str, Any] = {"temperature": 1.0, "learn_temperature": False}


class OptimiserConfig(Section):
    """AdamW with a linear warm-up. Embedding tables may have settings of their own."""

    learning_rate: float = Field(default=2e-3, gt=0, le=1, description="[per step] Peak rate.")
    embedding_learning_rate: float | None = Field(
        default=None, gt=0, le=1, description="[per step] Peak rate of embeddings; null: same."
    )
    weight_decay: float = Field(
        default=1e-4,
        ge=0,
        le=1,
        description="[per step] Weight decay of matrices, times the learning rate. With dense "
        "gradients it acts on all rows of a table in every step, also on unused ones.",
    )
    embedding_weight_decay: float | None = Field(
        default=None, ge=0, le=1, description="[per step] Decay of embeddings; null: weight_decay."
    )
    embedding_decay: Literal["decoupled", "l2"] = Field(
        default="decoupled",
        description="decoupled: shrinks rows beside Adam's step; l2: adds decay x row to the "
        "gradient. Of all rows with dense gradients; with sparse ones only of the rows "
        "that the step used, as matrix factorisation does.",
    )
    embedding_gradients: Literal["auto", "dense", "sparse"] = Field(
        default="dense",
        description="sparse: exchanges and updates only the rows that a step used, whose moments "
        "rest in between: much faster for large tables, but each row then learns at "
        "its own rate and the learning rate must be tuned again (an experiment on "
        "Gowalla: validation Recall@20 .14 after 4 epochs, dense .185 after 3). auto: "
        "sparse for tables with many more rows than a step reads.",
    )
    beta2: float = Field(
        default=0.98,
        ge=0,
        lt=1,
        description="[factor] Decay per step of Adam's second moment. 0.98 suits runs of about "
        "1,000 steps; rows of large tables that few steps use need 0.999.",
    )
    warmup_steps: int = Field(default=50, ge=0, description="Steps from rate 0 to the peak.")
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="Rate after the warm-up: half a cosine to 0, or constant."
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="[norm] Upper limit of the gradient's norm; null for none."
    )


class ValidationConfig(Section):
    """Exact Recall@k over the whole corpus on the val split picks the checkpoint to keep."""

    k: int = Field(default=100, ge=1, le=MAX_K, description="[results] The k of Recall@k.")
    max_users: int = Field(default=2000, ge=1, description="[users] Users in the fixed sample.")
    every_epochs: int = Field(default=1, ge=1, description="Epochs between two validations.")
    patience: int = Field(
        default=3, ge=1, description="[validations] Training stops after this many without a best."
    )


class MiningConfig(Section):
    """Which of the items nearest to a user become hard negatives, and how many.

    Ranks are counted from 1, the best, after the user's known items have been dropped.
    """

    every_epochs: int = Field(
        default=0, ge=0, description="Epochs between two minings during training; 0 for never."
    )
    start_epoch: int = Field(
        default=1,
        ge=1,
        le=100_000,
        description="[epoch] First epoch with mined negatives; those before it train with the "
        "other negatives alone. 1: from the first step, mined with the initial weights.",
    )
    easy_ranks: int = Field(
        default=0,
        ge=0,
        le=MAX_K,
        description="[ranks] How much deeper range_min and range_max lie in start_epoch: easier "
        "negatives first. The shift falls linearly to 0 over ramp_epochs.",
    )
    ramp_epochs: int = Field(
        default=0,
        ge=0,
        le=100_000,
        description="[epochs] From start_epoch until range_min and range_max are used as they are; "
        "0 without easy_ranks.",
    )
    per_user: int = Field(
        default=10,
        ge=1,
        le=MAX_K,
        description="[items] Per user; one with fewer is starved.",
    )
    range_min: int = Field(
        default=1, ge=1, le=MAX_K, description="[rank] First rank; above 1 skips likely positives."
    )
    range_max: int = Field(default=100, ge=1, le=MAX_K, description="[rank] Last rank used.")
    margin: float = Field(
        default=0.05,
        ge=0,
        le=2,
        description="[share] A negative scores at most s - margin x |s|, where s is the score of "
        "the user's known items.",
    )
    reference: Literal["lowest", "mean", "highest"] = Field(
        default="mean", description="How s comes from several known items; lowest excludes most."
    )
    drop_val: bool = Field(
        default=False,
        description="Never mine validation items; validation then scores too high.",
    )

    @model_validator(mode="after")
    def _window_holds_the_sample(self) -> Self:
        if self.range_max - self.range_min + 1 < self.per_user:
            raise ValueError(
                f"range_min {self.range_min} to range_max {self.range_max} hold fewer than "
                f"per_user {self.per_user} items"
            )
        return self

    @model_validator(mode="after")
    def _ramp_is_whole(self) -> Self:
        if bool(self.easy_ranks) != bool(self.ramp_epochs):
            raise ValueError(
                f"easy_ranks {self.easy_ranks} and ramp_epochs {self.ramp_epochs}: each needs the "
                "other"
            )
        if self.easy_ranks and not self.every_epochs:
            raise ValueError("easy_ranks needs every_epochs: a mined table is not mined again")
        if self.range_max + self.easy_ranks > MAX_K:
            raise ValueError(
                f"range_max {self.range_max} and easy_ranks {self.easy_ranks} exceed rank {MAX_K}"
            )
        return self


class TrainingConfig(Section):
    """One training run."""

    dim: int = Field(default=128, ge=2, le=4096, description="[dimensions] Embedding width.")
    metric: Literal["cosine", "dot"] = Field(
        default="cosine",
        description="Score of a query and an item. cosine: vectors of length one; dot: vectors as "
        "the towers make them, so that lengths say something too, popularity for one. With dot "
        "loss.temperature is 1 unless given, and fixed: lengths do what it would learn.",
    )
    towers: TowersConfig = Field(default=TowersConfig(), description="The two encoders.")
    loss: LossConfig = Field(default=LossConfig(), description="What is minimised.")
    optimiser: OptimiserConfig = Field(default=OptimiserConfig(), description="How.")
    validation: ValidationConfig = Field(default=ValidationConfig(), description="When to stop.")
    mining: MiningConfig = Field(default=MiningConfig(), description="Hard negatives of a user.")
    epochs: int = Field(default=10, ge=1, le=100_000, description="Passes over the train split.")
    fit_splits: Literal["train", "train+val"] = Field(
        default="train", description="train+val fits the final model on both, without validation."
    )
    batch_size: int = Field(
        default=2048, ge=2, le=1 << 20, description="[examples] GLOBAL batch, split over the ranks."
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="[rows] Users, and items, that a rank encodes at a time, for towers too large "
        "for the batch: the gradient is the same, encoding runs twice. null: the batch "
        "at once. The items of one row, its own negatives among them, are not divided "
        "further.",
    )
    unknown_rate: float = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="[share] Share of training values that are hidden (category unknown, history "
        "empty), so that the model learns to do without them.",
    )
    id_start: Literal["random", "svd"] = Field(
        default="random",
        description="Where the vectors of `user_id` and `item_id` (kind id) begin. svd: at a "
        "truncated SVD of the normalised interactions, made once before the first step. With "
        "--from they begin where that run ended, and new ids at random.",
    )
    popularity_exponent: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="[exponent] After training an item's vector gets the length interactions ** "
        "exponent, so that popular items come first among equally similar ones; above "
        "0 the index scores by inner product. Choose it on validation: about 0.1.",
    )
    num_workers: int = Field(
        default=1, ge=1, le=4096, description="[ranks] Training processes; 1: this one, no Ray."
    )
    placement: Literal["spread", "pack"] = Field(
        default="spread",
        description="How ranks lie on hosts: spread evenly over as many as there are, or packed on "
        "as few as hold them, for GPUs that are joined within a host.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto takes one GPU per rank if there are enough."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="Precision of the towers' matrix products; the loss is fp32. auto: bf16 on a "
        "GPU that has it, else fp32.",
    )
    log_every_steps: int = Field(default=10, ge=1, description="Steps between two log lines.")
    checkpoint_every_steps: int | None = Field(
        default=None, ge=1, description="Steps between checkpoints; null: at epoch ends only."
    )
    max_failures: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="[restarts] How often ranks under Ray that died or failed are started again, "
        "from the newest checkpoint.",
    )
    seed: int = Field(default=0, ge=0, lt=1 << 31, description="[seed] Initial weights, shuffling.")

    @model_validator(mode="before")
    @classmethod
    def _dot_has_a_temperature_of_its_own(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("metric") != "dot":
            return given
        loss = given.get("loss", {})
        if isinstance(loss, LossConfig):
            loss = loss.model_dump(exclude_unset=True)
        return given | {"loss": DOT_LOSS | loss} if isinstance(loss, dict) else given

    @model_validator(mode="after")
    def _dot_learns_lengths(self) -> Self:
        if self.metric == "dot" and self.loss.learn_temperature:
            raise ValueError(
                "with metric dot the lengths of vectors are learned, and a temperature beside them "
                "is one factor too many: leave out loss.learn_temperature, or set it to false"
            )
        if self.metric == "dot" and self.popularity_exponent:
            raise ValueError(
                "popularity_exponent sets the lengths of vectors, which metric dot learns: it is "
                f"0 there, not {self.popularity_exponent}"
            )
        return self

    @model_validator(mode="after")
    def _batch_splits_evenly(self) -> Self:
        if self.batch_size % self.num_workers:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of num_workers {self.num_workers}"
            )
        return self

    @model_validator(mode="after")
    def _tied_scores_are_symmetric(self) -> Self:
        if self.towers.tied and self.popularity_exponent:
            raise ValueError(
                "popularity_exponent makes items longer than the same ones as queries: with "
                f"towers.tied it is 0, not {self.popularity_exponent}"
            )
        if self.towers.tied and not self.loss.mask_known_positives:
            raise ValueError(
                "towers.tied needs loss.mask_known_positives: else everybody is a negative of "
                "themselves, and the nearest one"
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

    @model_validator(mode="after")
    def _mined_negatives_start(self) -> Self:
        start, loss = self.mining.start_epoch, self.loss
        if start == 1:
            return self
        if not loss.hard_negatives:
            raise ValueError(f"mining.start_epoch {start} needs loss.hard_negatives")
        if start > self.epochs:
            raise ValueError(
                f"mining.start_epoch {start} is after the last of {self.epochs} epochs"
            )
        others = (loss.uniform_negatives, loss.random_negatives, loss.memory_size)
        if not (loss.in_batch or any(others)):
            raise ValueError(
                f"mining.start_epoch {start} leaves the epochs before it without negatives: "
                "loss.in_batch is off"
            )
        return self

    @model_validator(mode="after")
    def _ids_can_start(self) -> Self:
        named = self.towers.query.features is not None and self.towers.item.features is not None
        if self.id_start == "svd" and self.towers.tied:
            raise ValueError("id_start svd has vectors of users and of items: towers.tied has one")
        if self.id_start == "svd" and named and not self.has_id_tables():
            raise ValueError(
                f"id_start svd needs a feature of kind id, {USER_KEY} of the query tower or "
                f"{ITEM_KEY} of the item tower"
            )
        return self

    def has_id_tables(self) -> bool:
        """Whether users or items have vectors of their own, by the features that are named."""
        return self.towers.query.has_ids(USER_KEY) or self.towers.item.has_ids(ITEM_KEY)

    @property
    def fitted_splits(self) -> tuple[str, ...]:
        return tuple(self.fit_splits.split("+"))

    def identity(self) -> dict[str, Any]:
        """What decides the trained weights: everything but placement, log and checkpoints."""
        return self.model_dump(mode="json", exclude=PLACEMENT)


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Dotted names of settings that differ, with both values: ``loss.logq: True, was False``."""
    left, right = dict(flattened(ours)), dict(flattened(theirs))
    return [
        f"{name}: {left.get(name)}, was {right.get(name)}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]


def flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything in nested mappings; a list is one value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flattened(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
