"""What a training run is made of: features, towers, loss, optimiser, validation.

Every field says its unit and range where it is declared; unknown keys are refused by name. A tower
whose ``features`` are left out gets them from the dataset's columns (``training.features.infer``).
Cheap to import: no torch here.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shards.schema import MAX_K


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class IdFeature(_Strict):
    """One learned vector per id that occurs in the training interactions; others share one."""

    kind: Literal["id"] = "id"
    column: str = Field(description="Integer or string column that identifies the row.")
    dim: int = Field(default=64, ge=1, le=1024, description="Width of the embedding.")


class CategoricalFeature(_Strict):
    """One learned vector per value of the column; values unseen in training share one."""

    kind: Literal["categorical"] = "categorical"
    column: str = Field(description="String, integer or boolean column with few values.")
    dim: int = Field(default=8, ge=1, le=1024, description="Width of the embedding.")


class NumericFeature(_Strict):
    """A number, or a fixed-size vector of them, shifted and scaled to mean 0 and deviation 1."""

    kind: Literal["numeric"] = "numeric"
    column: str = Field(description="Number column, or fixed-size list of numbers.")
    log: bool = Field(
        default=False, description="Take log(1 + x) first, for skewed values >= 0 such as prices."
    )


class HistoryFeature(_Strict):
    """The query's past items, each as the item tower's input row, averaged. Query tower only."""

    kind: Literal["history"] = "history"
    column: str = Field(default="history", description="Name of the feature in a query.")
    max_length: int = Field(
        default=50, ge=1, le=1000, description="Newest items kept; older ones are not read."
    )


FeatureConfig = Annotated[
    IdFeature | CategoricalFeature | NumericFeature | HistoryFeature, Field(discriminator="kind")
]


class TowerConfig(_Strict):
    """Input features, then an MLP with a linear path around it."""

    features: tuple[FeatureConfig, ...] | None = Field(
        default=None, description="Inputs in order; left out, they are read off the dataset."
    )
    hidden: tuple[Annotated[int, Field(ge=1, le=8192)], ...] = Field(
        default=(256, 128), description="Widths of the hidden layers; empty for a linear tower."
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of hidden activations dropped in training."
    )

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        columns = [feature.column for feature in self.features or ()]
        if self.features is not None and not columns:
            raise ValueError("a tower needs at least one feature")
        if len(set(columns)) != len(columns):
            raise ValueError(f"a column is listed twice: {columns}")
        if sum(feature.kind == "history" for feature in self.features or ()) > 1:
            raise ValueError("at most one history feature")
        return self


class TowersConfig(_Strict):
    query: TowerConfig = Field(default=TowerConfig(), description="Encodes users, or queries.")
    item: TowerConfig = Field(default=TowerConfig(), description="Encodes the catalogue.")

    @model_validator(mode="after")
    def _history_is_for_queries(self) -> Self:
        if any(feature.kind == "history" for feature in self.item.features or ()):
            raise ValueError("towers.item: history is a feature of the query tower only")
        return self


class LossConfig(_Strict):
    """InfoNCE over in-batch negatives gathered from every rank."""

    temperature: float = Field(
        default=0.05, gt=0, le=10, description="Divides the cosines; the value it starts from."
    )
    learn_temperature: bool = Field(default=True, description="Train the temperature too.")
    min_temperature: float = Field(
        default=0.01, gt=0, le=10, description="Lower clamp, against logits that blow up."
    )
    max_temperature: float = Field(default=1.0, gt=0, le=10, description="Upper clamp.")
    logq: bool = Field(
        default=True,
        description="Correct for popular items being negatives more often, by train counts.",
    )
    mask_duplicates: bool = Field(
        default=True, description="Copies of a row's own item are not its negatives."
    )
    mask_known_positives: bool = Field(
        default=True, description="Items the user has in train are not its negatives."
    )

    @model_validator(mode="after")
    def _temperature_in_range(self) -> Self:
        if not self.min_temperature <= self.temperature <= self.max_temperature:
            raise ValueError(
                f"temperature {self.temperature} is outside "
                f"[{self.min_temperature}, {self.max_temperature}]"
            )
        return self


class OptimiserConfig(_Strict):
    """AdamW, linear warm-up, cosine decay to zero at the last step."""

    learning_rate: float = Field(default=2e-3, gt=0, le=1, description="Peak, after warm-up.")
    weight_decay: float = Field(default=1e-4, ge=0, le=1, description="Matrices only.")
    warmup_steps: int = Field(default=50, ge=0, description="Steps from 0 to the peak.")


class ValidationConfig(_Strict):
    """Exact Recall@k over the whole corpus on the val split picks the checkpoint to keep."""

    k: int = Field(default=100, ge=1, le=MAX_K, description="The k of Recall@k.")
    max_users: int = Field(default=2000, ge=1, description="Users sampled, the same every time.")
    every_epochs: int = Field(default=1, ge=1, description="Epochs between two validations.")
    patience: int = Field(
        default=3, ge=1, description="Validations without a new best before training stops."
    )


class TrainingConfig(_Strict):
    dim: int = Field(default=128, ge=2, le=4096, description="Width of the embeddings.")
    towers: TowersConfig = Field(default=TowersConfig(), description="The two encoders.")
    loss: LossConfig = Field(default=LossConfig(), description="What is minimised.")
    optimiser: OptimiserConfig = Field(default=OptimiserConfig(), description="How.")
    validation: ValidationConfig = Field(default=ValidationConfig(), description="When to stop.")
    epochs: int = Field(default=10, ge=1, le=100_000, description="Passes over the train split.")
    batch_size: int = Field(
        default=2048, ge=2, le=1 << 20, description="GLOBAL batch, split evenly over the ranks."
    )
    unknown_rate: float = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="Share of training values hidden (category unknown, history empty), so that "
        "the model learns what to do without them.",
    )
    num_workers: int = Field(
        default=1, ge=1, le=4096, description="Ranks; 1 trains in this process without Ray."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto takes one GPU a rank where there are enough."
    )
    seed: int = Field(default=0, ge=0, lt=1 << 31, description="Initial weights and shuffling.")

    @model_validator(mode="after")
    def _batch_splits_evenly(self) -> Self:
        if self.batch_size % self.num_workers:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of num_workers {self.num_workers}"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What decides the trained weights: everything but where the run was placed."""
        return self.model_dump(mode="json", exclude={"num_workers", "device"})


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
