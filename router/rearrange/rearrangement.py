"""What a search may ask for beyond the nearest items: caps, boosts and diversity. Plain data.

All of it is done to a pool of the best items (docs/RESULTS.md has the order of operations).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardline.shards.core.attribute_kinds import AttributeKind
from shardline.shards.core.errors import InvalidInput

MAX_CAPS = 8
MAX_BOOSTS = 8
MAX_NAME_CHARACTERS = 1024  # of a column, which every shard is sent
# Queries x pool of one request: a microsecond each in a shard for every column, and in the router
MAX_POOLED = 1 << 19
# What a pool has at least where the caller leaves it open, and for each of the k results: a cap of
# one item per value that refuses two items in three still leaves k
LEAST_POOL = 200
POOL_PER_RESULT = 4
POOL_PER_DIVERSE = 2  # where nothing but diversity is asked for
LEAST_CAPPED = 100  # where nothing but caps is: a longer one is asked for when that was too short

# Kinds of attributes that may be capped: those with few values that many items share, which
# filters can leave out by name
CAPPED = (
    *(AttributeKind.TEXT, AttributeKind.INTEGER, AttributeKind.BOOLEAN, AttributeKind.DATE),
    AttributeKind.NOTHING,
)
NUMERIC = (
    *(AttributeKind.INTEGER, AttributeKind.NUMBER, AttributeKind.BOOLEAN),
    AttributeKind.NOTHING,
)
DATED = (AttributeKind.DATE, AttributeKind.TIMESTAMP, AttributeKind.NOTHING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """At most ``most`` items of an answer have the same value of ``column``; items without a value
    are not counted. field: where the request has it."""

    column: str
    most: int
    field: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Boost:
    """What is added to scores: weight times the value of ``column``, or, with half_life_days,
    weight times 2^(-age / half-life) of a date. field: where the request has it."""

    column: str
    weight: float
    field: str
    half_life_days: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rearrangement:
    """What is done to a pool. relevance: lambda of maximal marginal relevance, 0 to 1; None: no
    diversity is asked for. named_pools: sizes that the caller gave, by field. pool: of each query,
    how many items are considered at first; 0: not known yet (``sized``).
    """

    caps: tuple[Cap, ...] = ()
    boosts: tuple[Boost, ...] = ()
    relevance: float | None = None
    named_pools: tuple[tuple[str, int], ...] = ()
    pool: int = 0

    @property
    def by_column(self) -> list[Cap | Boost]:
        """What needs an attribute."""
        return [*self.caps, *self.boosts]


def sized(asked: Rearrangement, k: int, max_k: int, queries: int) -> Rearrangement:
    """With its pool: the largest that was named, else enough for k.

    Raises:
        InvalidInput: a pool below k, or above what shards are asked for; too large a request.
    """
    for field, size in asked.named_pools:
        if not k <= size <= max_k:
            raise InvalidInput(
                "out of range", field=field, expected=f"k, which is {k}, to {max_k}", got=str(size)
            )
    pool = max((size for _, size in asked.named_pools), default=_default_pool(asked, k, max_k))
    if queries * pool > MAX_POOLED:
        raise InvalidInput(
            "too many items to consider",
            field=_first_field(asked),
            expected=f"queries x pool <= {MAX_POOLED}",
            got=f"{queries} x {pool}",
            hint="send the queries in several requests, or ask for fewer results",
        )
    return replace(asked, pool=pool)


def check_kinds(asked: Rearrangement, kinds: Mapping[str, AttributeKind]) -> None:
    """Raises InvalidInput for a column of a kind that it cannot be capped or boosted by."""
    for cap in asked.caps:
        if kinds[cap.column] not in CAPPED:
            raise _wrong_kind(cap.field, "texts, integers, booleans or dates", kinds[cap.column])
    for boost in asked.boosts:
        kind = kinds[boost.column]
        if boost.half_life_days is None and kind in (AttributeKind.DATE, AttributeKind.TIMESTAMP):
            raise InvalidInput(
                "half_life_days is missing",
                field=f"{boost.field}.half_life_days",
                expected="a number of days, because the column has dates",
            )
        if boost.half_life_days is None and kind not in NUMERIC:
            raise _wrong_kind(boost.field, "numbers or booleans", kind)
        if boost.half_life_days is not None and kind not in DATED:
            raise _wrong_kind(boost.field, "dates or timestamps, for half_life_days", kind)


def _default_pool(asked: Rearrangement, k: int, max_k: int) -> int:
    if asked.boosts or (asked.relevance is not None and asked.caps):
        size = max(POOL_PER_RESULT * k, LEAST_POOL)
    elif asked.relevance is not None:
        size = max(POOL_PER_DIVERSE * k, LEAST_POOL)
    else:
        size = max(POOL_PER_RESULT * k, LEAST_CAPPED)
    return min(size, max_k)


def _first_field(asked: Rearrangement) -> str:
    if asked.named_pools:
        return asked.named_pools[0][0]
    if asked.relevance is not None:
        return "diversify"
    return "boost" if asked.boosts else "cap"


def _wrong_kind(field: str, expected: str, kind: AttributeKind) -> InvalidInput:
    got = "lists, maps or bytes" if kind is AttributeKind.OTHER else f"a column of kind {kind}"
    return InvalidInput(
        "wrong kind of column", field=f"{field}.column", expected=f"a column of {expected}", got=got
    )
