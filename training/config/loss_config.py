"""The training loss: its kind, negatives, corrections, masks, and named strategies.

Cheap to import: no torch here.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from shardline.training.config.section import Section

Strategy = Literal["in-batch", "batch-hard", "offline-mined", "mixed"]

# strategy -> the fields it sets; a field given beside it must not turn the strategy off
STRATEGIES: dict[str, dict[str, Any]] = {
    "in-batch": {},
    "batch-hard": {"batch_hard": 1, "in_batch": True},
    "offline-mined": {"hard_negatives": 10, "in_batch": False},
    "mixed": {"hard_negatives": 10, "random_negatives": 5, "in_batch": True},
}


class LossConfig(Section):
    """The loss of each row's own item against negatives, and where the negatives come from.

    Fields given beside a strategy override it, unless they contradict it.
    """

    strategy: Strategy = Field(
        default="in-batch",
        description="A named set of fields. batch-hard: only the hardest in-batch negative counts; "
        "offline-mined: 10 mined negatives per row alone; mixed: in-batch, 10 mined, 5 "
        "random ones per row.",
    )
    kind: Literal["infonce", "sigmoid", "bsl"] = Field(
        default="infonce",
        description="infonce: softmax over the negatives; sigmoid: each pair by itself (SigLIP); "
        "bsl: softmax over negatives and over a user's positives (arXiv 2312.12882).",
    )
    temperature: float = Field(
        default=0.05, gt=0, le=10, description="[factor] Divisor of the scores; initial value."
    )
    learn_temperature: bool = Field(default=True, description="Train the temperature too.")
    min_temperature: float = Field(
        default=0.01, gt=0, le=10, description="[factor] Lower limit; avoids very large logits."
    )
    max_temperature: float = Field(default=1.0, gt=0, le=10, description="[factor] Upper limit.")
    in_batch: bool = Field(
        default=True, description="Use the items of all other rows, on all ranks, as negatives."
    )
    uniform_negatives: int = Field(
        default=0,
        ge=0,
        le=1 << 20,
        description="[items] Uniformly drawn items per step, shared by all rows: a GLOBAL count, "
        "split evenly over the ranks.",
    )
    random_negatives: int = Field(
        default=0, ge=0, le=1024, description="[items] Random items per row, for that row alone."
    )
    hard_negatives: int = Field(
        default=0, ge=0, le=1024, description="[items] Mined items per row, of the row's user."
    )
    hard_share: float = Field(
        default=1.0, ge=0, le=1, description="[share] Share of the rows that get hard negatives."
    )
    hard_weight: float = Field(
        default=1.0, gt=0, le=1000, description="[factor] Weight of hard negatives in the sum."
    )
    hard_shared: bool = Field(
        default=False, description="Use every row's hard negatives as negatives of all rows."
    )
    batch_hard: int = Field(
        default=0, ge=0, le=1 << 20, description="[items] Hardest negatives per row, weighed more."
    )
    batch_hard_weight: float = Field(
        default=1.0, ge=0, le=1, description="[share] Share of the loss on batch_hard negatives."
    )
    logq: Literal["none", "standard", "expected_count"] = Field(
        default="standard",
        description="Correction for how often an item is drawn as a negative. standard: subtract "
        "the log of its share of all draws from every logit; expected_count: subtract "
        "the log of its expected count from the negatives' logits only.",
    )
    logq_strength: float = Field(
        default=1.0,
        ge=0,
        le=4,
        description="[factor] Multiplies the correction. 1 ranks items by the probability that the "
        "user takes them; a smaller value ranks less by popularity, a larger one more, "
        "which vectors of unit length understate.",
    )
    logq_source: Literal["counts", "streaming"] = Field(
        default="counts", description="Item frequencies: exact, or estimated while training."
    )
    streaming_rate: float = Field(
        default=0.01, gt=0, le=1, description="[share] Weight of the newest gap between draws."
    )
    mask_duplicates: bool = Field(
        default=True, description="Do not use copies of a row's own item as its negatives."
    )
    mask_same_user: bool = Field(
        default=False, description="Do not use items of other rows of the same user as negatives."
    )
    mask_known_positives: bool = Field(
        default=True, description="Do not use items that the user has in train as negatives."
    )
    memory_size: int = Field(
        default=0, ge=0, le=1 << 24, description="[items] Past item vectors kept as negatives."
    )
    memory_warmup_steps: int = Field(
        default=1000, ge=0, description="Steps before they are used; early vectors change fast."
    )
    symmetric: float = Field(
        default=0.0, ge=0, le=1, description="[share] Weight of the item-to-user loss."
    )
    bsl_negative_weight: float = Field(
        default=1.0, gt=0, le=10, description="[factor] Weight of the negatives' log-sum, bsl."
    )
    weight_exponent: float = Field(
        default=0.0,
        ge=0,
        le=4,
        description="[exponent] Each row's loss is multiplied by weight ** exponent of its "
        "interaction, divided by the mean over train; a weight that is not known counts as that "
        "mean. 0: all rows count alike. Needs weights (`data import --weight-column`).",
    )
    tile_mib: int = Field(
        default=64, ge=1, le=1 << 14, description="Memory for the logits held at a time."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_strategy(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        strategy = given.get("strategy", "in-batch")
        preset = STRATEGIES.get(strategy, {}) if isinstance(strategy, str) else {}
        for name, value in preset.items():
            # another count overrides the strategy's; zero would contradict its name
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
