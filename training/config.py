"""What a training run is made of: features, towers, loss, optimiser, validation.

Every field says its unit and range where it is declared; unknown keys are refused by name. A tower
whose ``features`` are left out gets them from the dataset's columns (``training.infer``).
Cheap to import: no torch here.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shards.schema import MAX_K

# settings of TrainingConfig that leave the weights as they are: a resumed run may change them
PLACEMENT = {"num_workers", "device", "log_every_steps", "checkpoint_every_steps", "max_failures"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


MIN_COUNT = "Values of fewer train interactions share the vector of the unknown."


INIT_NORM = (
    "Length of a fresh vector. Adam's steps do not depend on it, so a shorter one is learned in "
    "fewer; without a projection about 0.15 trains far faster than 1."
)
NgramSize = Annotated[int, Field(ge=1, le=16)]
NgramRange = tuple[NgramSize, NgramSize]


class IdFeature(_Strict):
    """One learned vector per id that occurs in the training interactions; others share one."""

    kind: Literal["id"] = "id"
    column: str = Field(description="Integer or string column that identifies the row.")
    dim: int = Field(default=64, ge=1, le=4096, description="Width of the embedding.")
    min_count: int = Field(default=1, ge=1, description=MIN_COUNT)
    init_norm: float = Field(default=1.0, gt=0, le=10, description=INIT_NORM)


class CategoricalFeature(_Strict):
    """One learned vector per value of the column; values unseen in training share one."""

    kind: Literal["categorical"] = "categorical"
    column: str = Field(description="String, integer or boolean column with few values.")
    dim: int = Field(default=8, ge=1, le=4096, description="Width of the embedding.")
    min_count: int = Field(default=1, ge=1, description=MIN_COUNT)
    init_norm: float = Field(default=1.0, gt=0, le=10, description=INIT_NORM)


class MultiValuedFeature(_Strict):
    """The mean of one learned vector per known value of a list, such as genres or tags.

    A list without a known value has the vector of the unknown.
    """

    kind: Literal["multi_valued"] = "multi_valued"
    column: str = Field(description="List column of strings or integers.")
    dim: int = Field(default=16, ge=1, le=4096, description="Width of the embedding.")
    max_length: int = Field(
        default=32, ge=1, le=1000, description="Known values of a list that count; first ones win."
    )
    min_count: int = Field(default=1, ge=1, description=MIN_COUNT)
    init_norm: float = Field(default=1.0, gt=0, le=10, description=INIT_NORM)


class TextFeature(_Strict):
    """The mean of the vectors of a text's hashed n-grams; no vocabulary, so any text has one."""

    kind: Literal["text"] = "text"
    column: str = Field(description="String column, such as a title or a search phrase.")
    dim: int = Field(default=32, ge=1, le=4096, description="Width of the embedding.")
    buckets: int = Field(
        default=1 << 14, ge=1, le=1 << 24, description="Rows of the table that n-grams hash to."
    )
    words: NgramRange | None = Field(
        default=(1, 2), description="Shortest and longest run of words; null for none."
    )
    chars: NgramRange | None = Field(
        default=None, description="Shortest and longest run of letters in a <word>; null for none."
    )
    max_ngrams: int = Field(
        default=256, ge=1, le=4096, description="N-grams of a text that count; first ones win."
    )
    # n-grams that training never meets keep their fresh vector: noise in a text that has some
    init_norm: float = Field(default=0.1, gt=0, le=10, description=INIT_NORM)

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        if self.words is None and self.chars is None:
            raise ValueError("words and chars are both null, so no text would say anything")
        for low, high in filter(None, (self.words, self.chars)):
            if low > high:
                raise ValueError(f"the n-gram range [{low}, {high}] is empty")
        return self


class NumericFeature(_Strict):
    """A number, or a fixed-size vector of them, shifted and scaled to mean 0 and deviation 1."""

    kind: Literal["numeric"] = "numeric"
    column: str = Field(description="Number column, or fixed-size list of numbers.")
    log: bool = Field(
        default=False, description="Take log(1 + x) first, for skewed values >= 0 such as prices."
    )


class HistoryFeature(_Strict):
    """The query's past items, each as the item tower's input row, pooled. Query tower only."""

    kind: Literal["history"] = "history"
    column: str = Field(default="history", description="Name of the feature in a query.")
    max_length: int = Field(
        default=50, ge=1, le=10_000, description="Newest items kept; older ones are not read."
    )
    pooling: Literal["mean", "sqrtn", "attention"] = Field(
        default="mean",
        description="sqrtn: sum over the root of their number. attention: weights by what an item "
        "is and by how many came after it.",
    )
    keep_target: bool = Field(
        default=False,
        description="Leave the item that a training row asks for in its own history. The row then "
        "reads what serving will read, but towers that can single an item out copy the answer: for "
        "plain sums of ids with strong weight decay only, where it helps.",
    )

    @model_validator(mode="after")
    def _attention_would_copy(self) -> Self:
        if self.keep_target and self.pooling == "attention":
            raise ValueError("keep_target needs pooling mean or sqrtn: attention finds the answer")
        return self


EmbeddedFeature = IdFeature | CategoricalFeature | MultiValuedFeature | TextFeature
FeatureConfig = Annotated[
    EmbeddedFeature | NumericFeature | HistoryFeature, Field(discriminator="kind")
]


class TowerConfig(_Strict):
    """Input features, then an MLP with a linear path around it; or their plain sum."""

    features: tuple[FeatureConfig, ...] | None = Field(
        default=None, description="Inputs in order; left out, they are read off the dataset."
    )
    hidden: tuple[Annotated[int, Field(ge=1, le=8192)], ...] = Field(
        default=(256, 128), description="Widths of the hidden layers; empty for a linear tower."
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of hidden activations dropped in training."
    )
    projection: Literal["linear", "identity"] = Field(
        default="linear",
        description="identity: no weights at all; the inputs, all as wide as the output, are "
        "added up, as in matrix factorisation. Needs hidden: [].",
    )

    @model_validator(mode="after")
    def _identity_is_bare(self) -> Self:
        if self.projection == "identity":
            if self.hidden:
                raise ValueError(f"projection identity needs hidden [], not {list(self.hidden)}")
            numeric = [f.column for f in self.features or () if isinstance(f, NumericFeature)]
            if numeric:
                raise ValueError(f"projection identity cannot add up numbers: {numeric}")
        if self.dropout and not self.hidden:
            raise ValueError("dropout needs a hidden layer")
        return self

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


Strategy = Literal["in-batch", "batch-hard", "offline-mined", "mixed"]

# what a strategy sets; a field that is given too must not take away what the strategy stands for
STRATEGIES: dict[str, dict[str, Any]] = {
    "in-batch": {},
    "batch-hard": {"batch_hard": 1, "in_batch": True},
    "offline-mined": {"hard_negatives": 10, "in_batch": False},
    "mixed": {"hard_negatives": 10, "random_negatives": 5, "in_batch": True},
}


class LossConfig(_Strict):
    """Each row's own item against negatives: the kind of loss, and where its negatives come from.

    A strategy is a named set of fields; fields given beside it win, unless they contradict it.
    """

    strategy: Strategy = Field(
        default="in-batch",
        description="batch-hard: only the hardest in-batch negative counts; offline-mined: 10 "
        "mined negatives a row and no others; mixed: in-batch, 10 mined and 5 random ones a row.",
    )
    kind: Literal["infonce", "sigmoid", "bsl"] = Field(
        default="infonce",
        description="infonce: softmax over the negatives; sigmoid: each pair by itself (SigLIP); "
        "bsl: softmax over negatives and over a user's positives (arXiv 2312.12882).",
    )
    temperature: float = Field(
        default=0.05, gt=0, le=10, description="Divides the cosines; the value it starts from."
    )
    learn_temperature: bool = Field(default=True, description="Train the temperature too.")
    min_temperature: float = Field(
        default=0.01, gt=0, le=10, description="Lower clamp, against logits that blow up."
    )
    max_temperature: float = Field(default=1.0, gt=0, le=10, description="Upper clamp.")
    in_batch: bool = Field(
        default=True, description="The items of all other rows, on all ranks, are negatives."
    )
    uniform_negatives: int = Field(
        default=0,
        ge=0,
        le=1 << 20,
        description="Items drawn uniformly a step, shared by all rows: a GLOBAL count, split "
        "evenly over the ranks.",
    )
    random_negatives: int = Field(
        default=0, ge=0, le=1024, description="Items drawn uniformly for each row alone."
    )
    hard_negatives: int = Field(
        default=0, ge=0, le=1024, description="Items a row from the mined list of its user."
    )
    hard_share: float = Field(
        default=1.0, ge=0, le=1, description="Share of rows that get their hard negatives."
    )
    hard_weight: float = Field(
        default=1.0, gt=0, le=1000, description="How many times a hard negative counts in the sum."
    )
    hard_shared: bool = Field(
        default=False, description="Every row's hard negatives are negatives of all rows."
    )
    batch_hard: int = Field(
        default=0, ge=0, le=1 << 20, description="Hardest negatives a row that get more weight."
    )
    batch_hard_weight: float = Field(
        default=1.0, ge=0, le=1, description="Share of the loss that sees those alone."
    )
    logq: Literal["none", "standard", "expected_count"] = Field(
        default="standard",
        description="Correction for how often an item is drawn as a negative. standard: its log "
        "share of all draws off every logit; expected_count: the log of its expected count off "
        "the negatives' logits.",
    )
    logq_strength: float = Field(
        default=1.0,
        ge=0,
        le=4,
        description="Multiplies the correction. 1 ranks by what a user takes; less asks how much "
        "more than others he takes it and more leans further to popular items, which vectors of "
        "length one understate.",
    )
    logq_source: Literal["counts", "streaming"] = Field(
        default="counts", description="Frequencies from all of train, or estimated on the way."
    )
    streaming_rate: float = Field(
        default=0.01, gt=0, le=1, description="Weight of an item's newest gap in its estimate."
    )
    mask_duplicates: bool = Field(
        default=True, description="Copies of a row's own item are not its negatives."
    )
    mask_same_user: bool = Field(
        default=False, description="Items of other rows of the same user are not negatives."
    )
    mask_known_positives: bool = Field(
        default=True, description="Items the user has in train are not its negatives."
    )
    memory_size: int = Field(
        default=0, ge=0, le=1 << 24, description="Item vectors of past steps kept as negatives."
    )
    memory_warmup_steps: int = Field(
        default=1000, ge=0, description="Steps before they count: early vectors move too fast."
    )
    symmetric: float = Field(
        default=0.0, ge=0, le=1, description="Weight of the item-to-user loss; 1 is that alone."
    )
    bsl_negative_weight: float = Field(
        default=1.0, gt=0, le=10, description="Weight of the negatives' log-sum under bsl."
    )
    tile_mib: int = Field(
        default=64, ge=1, le=1 << 14, description="Memory of the logits held at a time, in MiB."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_strategy(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        strategy = given.get("strategy", "in-batch")
        preset = STRATEGIES.get(strategy, {}) if isinstance(strategy, str) else {}
        for name, value in preset.items():
            # another count is a choice; none at all is not what the strategy is named after
            if name in given and bool(given[name]) != bool(value):
                raise ValueError(f"strategy {strategy} contradicts {name}: {given[name]}")
        return preset | given

    @model_validator(mode="after")
    def _temperature_in_range(self) -> Self:
        if not self.min_temperature <= self.temperature <= self.max_temperature:
            raise ValueError(
                f"temperature {self.temperature} is outside "
                f"[{self.min_temperature}, {self.max_temperature}]"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        hard = self.hard_negatives * self.hard_share
        sources = (self.uniform_negatives, self.random_negatives, hard)
        if not (self.in_batch or any(sources) or self.memory_size):
            raise ValueError("in_batch is off and nothing else gives negatives")
        if self.hard_shared and not self.hard_negatives:
            raise ValueError("hard_shared needs hard_negatives")
        if self.hard_negatives and not self.hard_share:
            raise ValueError("hard_share 0 leaves no row its hard_negatives")
        if self.logq == "none" and self.logq_strength != 1:
            raise ValueError("logq_strength multiplies a correction, and logq is none")
        for name in ("batch_hard", "symmetric"):
            if self.kind != "infonce" and getattr(self, name):
                raise ValueError(f"{name} is a part of kind infonce, not {self.kind}")
        if self.kind == "sigmoid" and self.hard_weight != 1:
            raise ValueError("hard_weight counts in a sum of negatives, which kind sigmoid has not")
        return self


class OptimiserConfig(_Strict):
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


class ValidationConfig(_Strict):
    """Exact Recall@k over the whole corpus on the val split picks the checkpoint to keep."""

    k: int = Field(default=100, ge=1, le=MAX_K, description="The k of Recall@k.")
    max_users: int = Field(default=2000, ge=1, description="Users sampled, the same every time.")
    every_epochs: int = Field(default=1, ge=1, description="Epochs between two validations.")
    patience: int = Field(
        default=3, ge=1, description="Validations without a new best before training stops."
    )


class MiningConfig(_Strict):
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


class TrainingConfig(_Strict):
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
