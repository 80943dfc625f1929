"""The towers: the kinds of feature and their options, and the layers after them.

A tower whose ``features`` are left out gets them from the dataset's columns
(``training.features.infer``). Cheap to import: no torch here.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from shardline.training.config.section import Section

MIN_COUNT = "[interactions] Values with fewer train interactions share the unknown vector."
INIT_NORM = (
    "[length] Length of an initial vector. Adam's steps do not depend on it, so a shorter one "
    "changes faster; with projection identity about 0.15 trains much faster than 1."
)
ITEM_KEY, USER_KEY = "item_id", "user_id"  # what the two tables call their ids
NgramSize = Annotated[int, Field(ge=1, le=16)]
NgramRange = tuple[NgramSize, NgramSize]


class IdFeature(Section):
    """One learned vector per id that occurs in the training interactions; others share one."""

    kind: Literal["id"] = "id"
    column: str = Field(description="Integer or string column that identifies the row.")
    dim: int = Field(default=64, ge=1, le=4096, description="[dimensions] Width of the embedding.")
    min_count: int = Field(default=1, ge=1, description=MIN_COUNT)
    init_norm: float = Field(default=1.0, gt=0, le=10, description=INIT_NORM)


class CategoricalFeature(Section):
    """One learned vector per value of the column; values unseen in training share one."""

    kind: Literal["categorical"] = "categorical"
    column: str = Field(description="String, integer or boolean column with few values.")
    dim: int = Field(default=8, ge=1, le=4096, description="[dimensions] Width of the embedding.")
    min_count: int = Field(default=1, ge=1, description=MIN_COUNT)
    init_norm: float = Field(default=1.0, gt=0, le=10, description=INIT_NORM)


class MultiValuedFeature(Section):
    """The mean of one learned vector per known value of a list, such as genres or tags.

    A list without a known value has the vector of the unknown.
    """

    kind: Literal["multi_valued"] = "multi_valued"
    column: str = Field(description="List column of strings or integers.")
    dim: int = Field(default=16, ge=1, le=4096, description="[dimensions] Width of the embedding.")
    max_length: int = Field(
        default=32, ge=1, le=1000, description="[values] The first known values per list are used."
    )
    min_count: int = Field(default=1, ge=1, description=MIN_COUNT)
    init_norm: float = Field(default=1.0, gt=0, le=10, description=INIT_NORM)


class TextFeature(Section):
    """The mean of the vectors of a text's hashed n-grams; no vocabulary, so any text has one."""

    kind: Literal["text"] = "text"
    column: str = Field(description="String column, such as a title or a search phrase.")
    dim: int = Field(default=32, ge=1, le=4096, description="[dimensions] Width of the embedding.")
    buckets: int = Field(
        default=1 << 14, ge=1, le=1 << 24, description="[rows] Table rows for hashed n-grams."
    )
    words: NgramRange | None = Field(
        default=(1, 2), description="[words] Shortest and longest word n-gram; null for none."
    )
    chars: NgramRange | None = Field(
        default=None,
        description="[letters] Shortest and longest letter n-gram of a word; null for none.",
    )
    max_ngrams: int = Field(
        default=256, ge=1, le=4096, description="[n-grams] The first n-grams per text are used."
    )
    # n-grams that training never meets keep their initial vector, which is noise: keep it short
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
    cycles: tuple[Literal["day", "week", "year"], ...] = Field(
        default=(),
        description="Of a time column, beside its age: where in the day, week or year it lies, "
        "as sine and cosine.",
    )


class HistoryFeature(Section):
    """The query's past items, each as the item tower's input row, pooled. Query tower only."""

    kind: Literal["history"] = "history"
    column: str = Field(default="history", description="Name of the feature in a query.")
    max_length: int = Field(
        default=50, ge=1, le=10_000, description="[items] Newest items per history that are used."
    )
    pooling: Literal["mean", "sqrtn", "attention"] = Field(
        default="mean",
        description="mean; sqrtn: sum divided by the square root of the number of items; "
        "attention: weights learned from the item and from how many came after it.",
    )
    keep_target: bool = Field(
        default=False,
        description="Leave the item that a training row asks for in the row's own history. The row "
        "then reads what serving will read, but a tower that can tell items apart "
        "copies the answer: only for plain sums of ids with strong weight decay.",
    )

    @model_validator(mode="after")
    def _attention_would_copy(self) -> Self:
        if self.keep_target and self.pooling == "attention":
            raise ValueError("keep_target needs pooling mean or sqrtn: attention finds the answer")
        return self


class AudienceFeature(Section):
    """An item's users, each as its vector of the query tower's ``id`` feature, pooled. Item tower
    only. Counted when a model is exported too; an item without users has zeros, as an empty history
    has.
    """

    kind: Literal["audience"] = "audience"
    max_length: int = Field(
        default=50, ge=1, le=10_000, description="[users] Newest users per item that are used."
    )
    pooling: Literal["mean", "sqrtn", "attention"] = Field(
        default="mean",
        description="mean; sqrtn: sum divided by the square root of the number of users; "
        "attention: weights learned from the user and from how many came after it.",
    )
    keep_target: bool = Field(
        default=False,
        description="Leave the user of a training row in the audience of the row's own item, as "
        "`keep_target` of a history leaves the item in: only for plain sums of ids with "
        "strong weight decay.",
    )

    @model_validator(mode="after")
    def _attention_would_copy(self) -> Self:
        if self.keep_target and self.pooling == "attention":
            raise ValueError("keep_target needs pooling mean or sqrtn: attention finds the answer")
        return self


EmbeddedFeature = IdFeature | CategoricalFeature | MultiValuedFeature | TextFeature
FeatureConfig = Annotated[
    EmbeddedFeature | NumericFeature | HistoryFeature | AudienceFeature,
    Field(discriminator="kind"),
]


class TowerConfig(Section):
    """Input features, then an MLP with a linear path beside it; or the sum of the features."""

    features: tuple[FeatureConfig, ...] | None = Field(
        default=None, description="Inputs in order; null: chosen from the data set's columns."
    )
    hidden: tuple[Annotated[int, Field(ge=1, le=8192)], ...] = Field(
        default=(256, 128), description="[units] Widths of hidden layers; empty for a linear tower."
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="[share] Hidden activations dropped in training."
    )
    projection: Literal["linear", "identity"] = Field(
        default="linear",
        description="identity: no weights; the inputs, all as wide as the output, are added up, as "
        "in matrix factorisation. Needs hidden: [].",
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
        given = self.features or ()
        columns = [each.column for each in given if not isinstance(each, AudienceFeature)]
        if self.features is not None and not columns:
            raise ValueError("a tower needs at least one feature, and not an audience alone")
        if len(set(columns)) != len(columns):
            raise ValueError(f"a column is listed twice: {columns}")
        if sum(feature.kind == "history" for feature in self.features or ()) > 1:
            raise ValueError("at most one history feature")
        if sum(feature.kind == "audience" for feature in self.features or ()) > 1:
            raise ValueError("at most one audience feature")
        return self

    @property
    def audience(self) -> AudienceFeature | None:
        return next((f for f in self.features or () if isinstance(f, AudienceFeature)), None)

    def has_ids(self, column: str) -> bool:
        """Whether a vector per id of the column is among the named features."""
        return any(isinstance(f, IdFeature) and f.column == column for f in self.features or ())


class TowersConfig(Section):
    """One tower for queries (users) and one for items; both end in vectors of ``training.dim``."""

    query: TowerConfig = Field(default=TowerConfig(), description="Encodes users, or queries.")
    item: TowerConfig = Field(default=TowerConfig(), description="Encodes the catalogue.")
    tied: bool = Field(
        default=False,
        description="One tower for both sides, for users who are items too (people you may know, "
        "item to item): score(a, b) = score(b, a). It is given under item; query is left out, or "
        "says the same, with user_id in place of item_id. Both tables have its columns.",
    )

    @model_validator(mode="before")
    @classmethod
    def _query_mirrors_item(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("tied") is True and "query" not in given:
            return given | {"query": _mirrored(given.get("item", {}))}
        return given

    @model_validator(mode="after")
    def _both_say_the_same(self) -> Self:
        if self.tied:
            query = self.query.model_dump()
            wanted = TowerConfig.model_validate(_mirrored(self.item)).model_dump()
            differ = [name for name in query if query[name] != wanted[name]]
            if differ:
                raise ValueError(
                    f"tied towers are one tower, and query differs from item in {differ}: leave "
                    "out towers.query, or set towers.tied to false"
                )
        return self

    @model_validator(mode="after")
    def _history_is_for_queries(self) -> Self:
        if any(feature.kind == "history" for feature in self.item.features or ()):
            raise ValueError("towers.item: history is a feature of the query tower only")
        return self

    @model_validator(mode="after")
    def _audience_is_for_items(self) -> Self:
        if self.tied and self.item.audience is not None:
            raise ValueError("tied towers have no vectors of users apart, so no audience")
        if self.query.audience is not None:
            raise ValueError("towers.query: audience is a feature of the item tower only")
        named = self.query.features is not None
        if self.item.audience is not None and named and not self.query.has_ids(USER_KEY):
            raise ValueError(
                "towers.item: audience pools the query tower's vectors of users, and "
                f"towers.query has no feature {{kind: id, column: {USER_KEY}}}"
            )
        return self


def mirrored_column(column: str) -> str:
    """What the users table calls a column of the items table."""
    return USER_KEY if column == ITEM_KEY else column


def _mirrored(item: Any) -> Any:
    """The query tower tied to an item tower, as plain data; what is no tower stays as it is."""
    plain = item.model_dump() if isinstance(item, TowerConfig) else item
    features = plain.get("features") if isinstance(plain, dict) else None
    if not isinstance(features, list | tuple):
        return plain
    return plain | {
        "features": [
            each | {"column": mirrored_column(each["column"])}
            if isinstance(each, dict) and isinstance(each.get("column"), str)
            else each
            for each in features
        ]
    }
