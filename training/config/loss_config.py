"""What a training run minimises: the loss, its negatives, corrections and masks; the strategies.

Cheap to import: no torch here.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from shardline.training.config.section import Section

Strategy = Literal["in-batch", "batch-hard", "offline-mined", "mixed"]

# what a strategy sets; a field that is given too must not take away what the strategy stands for
STRATEGIES: dict[str, dict[str, Any]] = {
    "in-batch": {},
    "batch-hard": {"batch_hard": 1, "in_batch": True},
    "offline-mined": {"hard_negatives": 10, "in_batch": False},
    "mixed": {"hard_negatives": 10, "random_negatives": 5, "in_batch": True},
}


class LossConfig(Section):
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
