"""What the towers are made of: the kinds of feature and their options, the layers after them.

A tower whose ``features`` are left out gets them from the dataset's columns
(``training.features.infer``). Cheap to import: no torch here.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shardline.training.config.section import Section

MIN_COUNT = "Values of fewer train interactions share the vector of the unknown."
INIT_NORM = (
    "Length of a fresh vector. Adam's steps do not depend on it, so a shorter one is learned in "
    "fewer; without a projection about 0.15 trains far faster than 1."
)
NgramSize = Annotated[int, Field(ge=1, le=16)]
NgramRange = tuple[NgramSize, NgramSize]


class IdFeature(Section):
    """One learned vector per id that occurs in the training interactions; others share one."""

    kind: Literal["id"] = "id"
    column: str = Field(description="Integer or string column that identifies the row.")
    dim: int = Field(default=64, ge=1, le=4096, description="Width of the embedding.")
    min_count: int = Field(default=1, ge=1, description=MIN_COUNT)
    init_norm: float = Field(default=1.0, gt=0, le=10, description=INIT_NORM)


class CategoricalFeature(Section):
    """One learned vector per value of the column; values unseen in training share one."""

    kind: Literal["categorical"] = "categorical"
    column: str = Field(description="String, integer or boolean column with few values.")
    dim: int = Field(default=8, ge=1, le=4096, description="Width of the embedding.")
    min_count: int = Field(default=1, ge=1, description=MIN_COUNT)
    init_norm: float = Field(default=1.0, gt=0, le=10, description=INIT_NORM)


class MultiValuedFeature(Section):
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


class TextFeature(Section):
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


class NumericFeature(Section):
    """A number, or a fixed-size vector of them, shifted and scaled to mean 0 and deviation 1."""

    kind: Literal["numeric"] = "numeric"
    column: str = Field(description="Number column, or fixed-size list of numbers.")
    log: bool = Field(
        default=False, description="Take log(1 + x) first, for skewed values >= 0 such as prices."
    )


class HistoryFeature(Section):
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


class TowerConfig(Section):
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


class TowersConfig(Section):
    query: TowerConfig = Field(default=TowerConfig(), description="Encodes users, or queries.")
    item: TowerConfig = Field(default=TowerConfig(), description="Encodes the catalogue.")

    @model_validator(mode="after")
    def _history_is_for_queries(self) -> Self:
        if any(feature.kind == "history" for feature in self.item.features or ()):
            raise ValueError("towers.item: history is a feature of the query tower only")
        return self
