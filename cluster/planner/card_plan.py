"""A plan on GPUs by memory and bandwidth alone. Nothing in it has been measured on a card.

A search reads its bytes once from the card's memory: the whole shard for flat, whatever the number
of queries in a batch, all centroids per batch and the lists of each query for the other kinds. What
waits while a batch runs is the next batch, so with queries that arrive at random a batch lasts
t = fixed / (1 - rate x bytes per query / bandwidth), and a query waits for the rest of one batch
and for its own: 1.5 t in the middle, 2 t at most. That is a lower bound: kernels' starts, selection
of the best k, matrix rate and copies to the host come on top.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from shardline.cluster.planner.front_latency import front_of
from shardline.cluster.planner.index_sizes import code_bytes, shard_size
from shardline.cluster.planner.measured_costs import MEASURED_SHARDS, ROUTER, ROUTER_SHARD
from shardline.cluster.planner.search_costs import Depth
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import Metric
from shardline.shards.index.resolve import GPU_KINDS
from shardline.shards.index.spec import ResolvedIndex

TEMPORARY_BYTES = 1536 << 20  # of faiss's resources object, per process on a card
CARD_SHARE = 0.9  # of a card's memory
MOST_BUSY = 0.6
MOST_CARDS = 4096
GIB = 1 << 30
NOT_MEASURED = "arithmetic of memory and bandwidth, not measured on any card"


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedCards:
    """card_bytes_per_s: of its memory. index, depth: what every shard searches."""

    rows: int
    dim: int
    qps: float
    p99_ms: float
    metric: Metric
    index: ResolvedIndex
    depth: Depth
    card_bytes: float
    card_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CardPlan:
    """shards: cards that hold the rows once. batch_ms: how long a batch lasts under this load."""

    shards: int
    replicas: int
    shard_bytes: int
    fixed_ms: float
    query_ms: float
    batch_ms: float
    p50_ms: float
    p99_ms: float
    router_us: float

    @property
    def cards(self) -> int:
        return self.shards * self.replicas


def card_plan(asked: AskedCards) -> CardPlan:
    """The fewest cards that hold the rows, the rate and the bound.

    Raises:
        InvalidInput: a kind that does not run on a card, or no number of cards holds it.
    """
    if asked.index.kind not in GPU_KINDS:
        raise InvalidInput(
            "does not run on a card",
            field="--kind",
            expected=f"one of {', '.join(sorted(GPU_KINDS))}",
            got=str(asked.index.kind),
        )
    usable = CARD_SHARE * asked.card_bytes - TEMPORARY_BYTES
    shards, found = 1, None
    while shards <= min(MOST_CARDS, asked.rows):
        size = shard_size(
            asked.index, rows=-(-asked.rows // shards), dim=asked.dim, metric=asked.metric
        )
        if size.file_bytes <= usable:
            for replicas in (1, 2, 4, 8, 16, 32, 64):
                found = _on_cards(asked, shards, replicas, size.file_bytes)
                if found is not None and found.p99_ms <= asked.p99_ms:
                    return found
        shards *= 2
    nearest = "" if found is None else f"; nearest p99 {found.p99_ms:.1f} ms"
    raise InvalidInput(
        "no number of cards that was tried holds it",
        field="--p99-ms",
        expected=f"a higher bound{nearest}, or more --card-memory",
        got=f"{asked.p99_ms:g} ms",
    )


def _on_cards(asked: AskedCards, shards: int, replicas: int, shard_bytes: int) -> CardPlan | None:
    """None: the rate is more than the cards' bandwidth."""
    rows = asked.rows / shards
    nlist = asked.index.nlist
    fixed, each = rows * code_bytes(asked.index, dim=asked.dim, metric=asked.metric), 0.0
    if nlist:
        each = fixed * min(1.0, (asked.depth.nprobe or 1) / nlist)
        fixed = float(nlist * asked.dim * 4)
    fixed_ms, query_ms = (size / asked.card_bytes_per_s * 1e3 for size in (fixed, each))
    busy = asked.qps / replicas * query_ms / 1e3
    if busy > MOST_BUSY:
        return None
    batch_ms = max(fixed_ms / (1 - busy), fixed_ms + query_ms)
    front = front_of(0.0)
    tail = front.p50_ms * front.spread.at(0.99)
    return CardPlan(
        shards=shards,
        replicas=replicas,
        shard_bytes=shard_bytes,
        fixed_ms=fixed_ms,
        query_ms=query_ms,
        batch_ms=batch_ms,
        p50_ms=front.p50_ms + 1.5 * batch_ms,
        p99_ms=tail + 2 * batch_ms,
        router_us=ROUTER.us + max(0, shards - MEASURED_SHARDS) * ROUTER_SHARD.us,
    )


def card_lines(asked: AskedCards, plan: CardPlan) -> Iterator[str]:
    """The result, then the arithmetic."""
    gbs = asked.card_bytes_per_s / 1e9
    yield f"NOT MEASURED: {NOT_MEASURED}"
    yield (
        f"{asked.rows:,} rows x {asked.dim}, {asked.qps:g} queries per second, "
        f"p99 <= {asked.p99_ms:g} ms, cards of {asked.card_bytes / GIB:.0f} GiB and {gbs:,.0f} GB/s"
    )
    nprobe = f", nprobe {asked.depth.nprobe}" if asked.index.nlist else ""
    yield f"  index      {asked.index.factory}{nprobe}"
    yield f"             {asked.index.reason}"
    yield (
        f"  cards      {plan.shards} shards x {plan.replicas} replicas = {plan.cards}; "
        f"{math.ceil(asked.rows / plan.shards):,} rows, {plan.shard_bytes / GIB:.1f} GiB each, "
        f"and {TEMPORARY_BYTES / GIB:.1f} GiB of temporary memory"
    )
    yield f"  pass       {plan.fixed_ms:.4f} ms per batch + {plan.query_ms:.4f} ms per query, read"
    yield (
        f"  batch      {plan.batch_ms:.4f} ms at {asked.qps / plan.replicas:g} queries per second "
        "and replica"
    )
    yield (
        f"  latency    p50 {plan.p50_ms:.1f} ms, p99 {plan.p99_ms:.1f} ms: front, 1.5 and 2 batches"
    )
    yield (
        f"  cost       {plan.router_us / 1e6:.6f} CPU seconds per query (router), "
        f"{plan.cards / asked.qps:.6f} card seconds"
    )


def cards_as_json(asked: AskedCards, plan: CardPlan) -> dict[str, Any]:
    return {
        "measured": False,
        "note": NOT_MEASURED,
        "index": asked.index.factory,
        "depth": asdict(asked.depth),
        "rows": asked.rows,
        "dim": asked.dim,
        "qps": asked.qps,
        "cards": plan.cards,
    } | asdict(plan)
