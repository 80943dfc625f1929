"""Measures a candidate generation beside the live one, by the shards of both, as routers ask them.

``run_gate`` reads what is to be asked and judges what ``measure`` finds. Both generations
serve meanwhile: the live one its users, the candidate the writes that are mirrored to it. So
latencies are taken in turns, query by query, and recall by asking each query twice at once, as it
is and exactly.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from shardline.cluster.rollover.fanout_target import FanoutTarget
from shardline.cluster.rollover.gate import Figures, GateReport, judge
from shardline.cluster.rollover.gate_asking import TRIES, K, asked, patiently, took_ms
from shardline.cluster.rollover.gate_queries import sample_of
from shardline.cluster.rollover.held_out import HeldOut, held_out_recall, read_held_out
from shardline.cluster.rollover.publish_config import PublishConfig
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.router.fanout.fanout import Fanout
from shardline.router.query import Merged
from shardline.router.router_config import RouterConfig
from shardline.shards.core.encoder_files import QUERY_ENCODER_FOLDER
from shardline.shards.core.errors import DataError, Unavailable
from shardline.shards.core.messages import RoutingTable
from shardline.shards.core.recall import count_matches
from shardline.shards.core.schema import MAX_K, FloatArray, IdArray

logger = logging.getLogger(__name__)

BATCH = 16  # queries asked at once, where no latency is taken: few hold up users
# The p99 of so many queries, three times, and of each side the lowest: moments in which the host
# was busy only add to a round, on either side, and must not decide.
LATENCY_QUERIES = 300
LATENCY_ROUNDS = 3
LATENCY_LIMIT_S = 30.0  # of one round: slow indexes are asked fewer queries
WARM_UP = 8
TABLES_S = 60.0  # for both tables: a controller that restarts has them again within some seconds

# (generation, version, timeout in seconds) -> its table of a higher version; None: none in time
TableOf = Callable[[int, int, float], Awaitable[RoutingTable | None]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GateSide:
    """A generation whose table ``fanout`` has. queries (n, dim), held_out (m, dim) or None: float32
    vectors of its own model, ready for its shards."""

    fanout: Fanout
    queries: FloatArray
    held_out: FloatArray | None = None


async def gate_of_generations(
    candidate: int,
    live: int,
    table_of: TableOf,
    config: PublishConfig,
    *,
    secret: bytes,
    served: FloatArray | None = None,
    unreplayed: int = 0,
) -> GateReport:
    """``run_gate`` over connections of its own to the replicas of the newest tables. secret: of the
    cluster.

    Raises also:
        Unavailable: no table of one of them comes: it was ended meanwhile, say.
    """
    async with connected([candidate, live], table_of, secret) as sides:
        ours, theirs = (side.fanout for side in sides)
        return await run_gate(ours, theirs, config, served=served, unreplayed=unreplayed)


@asynccontextmanager
async def connected(
    generations: Sequence[int], table_of: TableOf, secret: bytes
) -> AsyncIterator[Sequence[FanoutTarget]]:
    """To the shards of each of them, by its newest table, for the length of the block. Raises
    Unavailable: no table of one of them comes."""
    sides = [
        FanoutTarget(generation, Fanout(secret, RouterConfig(), random.Random()))
        for generation in generations
    ]
    following = [
        asyncio.ensure_future(side.follow(partial(table_of, generation)))
        for side, generation in zip(sides, generations, strict=True)
    ]
    try:
        await _tables_of(sides)
        yield sides
    finally:
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        await asyncio.gather(*(side.close() for side in sides))


async def _tables_of(sides: Sequence[FanoutTarget]) -> None:
    """Once there is one of each."""
    try:
        async with asyncio.timeout(TABLES_S):
            await asyncio.gather(*(side.table() for side in sides))
    except TimeoutError as error:
        failures = [str(side.failure) for side in sides if side.failure is not None]
        raise Unavailable(
            "the gate has no routing table of each generation",
            expected=f"within {TABLES_S:g} s",
            got=failures[0] if failures else None,
        ) from error


async def run_gate(
    candidate: Fanout,
    live: Fanout,
    config: PublishConfig,
    *,
    served: FloatArray | None = None,
    unreplayed: int = 0,
    seed: int = 0,
) -> GateReport:
    """The report on ``candidate``; both fan-outs have a table, and connections to all shards.

    served (m, dim): vectors of queries that were served lately, of the live model; None: none.
    unreplayed: written rows that the candidate lacks.

    Raises:
        DataError, NotFound, CorruptFile: of what is to be asked: held_out, sample queries, encoder.
        DeadlineExceeded, Unavailable: shards of one of the two do not answer.
    """
    tables = table_of_fanout(candidate), table_of_fanout(live)
    is_same_model = tables[0].model_version == tables[1].model_version
    held_out = None
    if config.held_out is not None:
        held_out = await asyncio.to_thread(read_held_out, config.held_out, seed=seed)
    queries = await patiently(lambda: sample_of(candidate, tables[0], config.queries, seed=seed))
    ours = GateSide(
        fanout=candidate,
        queries=queries,
        held_out=await held_out_of(held_out, tables[0], is_same_model),
    )
    if is_same_model:  # the same queries, so that answers compare
        theirs = GateSide(fanout=live, queries=queries, held_out=ours.held_out)
    else:
        theirs = GateSide(
            fanout=live,
            queries=await patiently(lambda: sample_of(live, tables[1], config.queries, seed=seed)),
            held_out=await _held_out_of_live(held_out, tables[1]),
        )
    figures = await measure(
        ours,
        theirs,
        is_same_model=is_same_model,
        held_out=held_out,
        served=None if served is None or not is_same_model else served[-config.queries :],
        unreplayed=unreplayed,
        rng=random.Random(seed),
    )
    return judge(figures, config)


async def measure(
    candidate: GateSide,
    live: GateSide,
    *,
    is_same_model: bool,
    held_out: HeldOut | None = None,
    served: FloatArray | None = None,
    unreplayed: int = 0,
    rng: random.Random,
    clock: Callable[[], float] = time.perf_counter,
) -> Figures:
    """The figures of both. is_same_model: queries of the two sides are the same vectors.

    Raises:
        DeadlineExceeded, Unavailable: shards of one of the two do not answer.
    """
    p99_ms, live_p99_ms = await _latencies(candidate, live, rng, clock)
    recall, rows = await recall_of(candidate.fanout, candidate.queries)
    live_recall, live_rows = await recall_of(live.fanout, live.queries)
    served_recall = None
    if served is not None and len(served):
        served_recall, _ = await recall_of(candidate.fanout, served)
    found, live_found = [
        None if side.held_out is None else await _held_out_ids(side, held_out)
        for side in (candidate, live)
    ]
    return Figures(
        k=K,
        queries=len(candidate.queries),
        recall=recall,
        live_recall=live_recall,
        served=0 if served is None else len(served),
        served_recall=served_recall,
        held_out=0 if held_out is None else len(held_out.relevant),
        held_out_recall=relevant_found(found, held_out),
        live_held_out_recall=relevant_found(live_found, held_out),
        p99_ms=p99_ms,
        live_p99_ms=live_p99_ms,
        rows=rows,
        live_rows=live_rows,
        overlap=await _overlap(candidate, live, is_same_model, found, live_found),
        unreplayed=unreplayed,
    )


# What is asked


def table_of_fanout(fanout: Fanout) -> RoutingTable:
    with fanout.pin() as snapshot:
        return snapshot.table


async def held_out_of(
    held_out: HeldOut | None, table: RoutingTable, is_same_model: bool
) -> FloatArray | None:
    """The held-out queries for a generation; with two models by features alone, because vectors in
    the file are of one."""
    if held_out is None:
        return None

    def vectors() -> FloatArray:
        encoder = None
        if table.encoder_checksum is not None:
            folder = Path(table.generation_dir) / QUERY_ENCODER_FOLDER
            encoder = QueryEncoder.load(folder, table.encoder_checksum)
        return held_out.vectors(
            encoder, dim=table.dim, metric=table.metric, takes_vectors=is_same_model
        )

    return await asyncio.to_thread(vectors)


async def _held_out_of_live(held_out: HeldOut | None, table: RoutingTable) -> FloatArray | None:
    """As ``_held_out_of``, of another model than the candidate's. None, too, where its encoder
    cannot take the file, made for the candidate's: then the live generation has no such figure."""
    try:
        return await held_out_of(held_out, table, is_same_model=False)
    except DataError as error:
        logger.warning("the live generation is not asked the held-out queries: %s", error)
        return None


# Figures


async def _latencies(
    candidate: GateSide, live: GateSide, rng: random.Random, clock: Callable[[], float]
) -> tuple[float, float]:
    """p99 in milliseconds of single queries, candidate and live: of each the lowest of
    LATENCY_ROUNDS."""
    for side in (candidate, live):
        for query in side.queries[:WARM_UP]:
            await asked(side.fanout, query[None])
    rounds = [await _latency_round(candidate, live, rng, clock) for _ in range(LATENCY_ROUNDS)]
    return min(ours for ours, _ in rounds), min(theirs for _, theirs in rounds)


async def _latency_round(
    candidate: GateSide, live: GateSide, rng: random.Random, clock: Callable[[], float]
) -> tuple[float, float]:
    """Both sides in turns, in an order that is drawn for each turn."""
    found: tuple[list[float], list[float]] = ([], [])
    ends_at = clock() + LATENCY_LIMIT_S
    for number in range(LATENCY_QUERIES):
        turns = [(candidate, found[0]), (live, found[1])]
        rng.shuffle(turns)
        for side, times in turns:
            query = side.queries[number % len(side.queries)]
            times.append(await took_ms(side.fanout, query, clock))
        if clock() > ends_at:
            break
    first, second = (float(np.percentile(times, 99)) for times in found)
    return first, second


async def recall_of(fanout: Fanout, queries: FloatArray) -> tuple[float | None, int]:
    """recall@K against exact answers, and the rows that were searched; None where the generation
    has no rows."""
    hits = wanted = rows = 0
    for start in range(0, len(queries), BATCH):
        found, exact = await _with_exact(fanout, queries[start : start + BATCH])
        of_these, most = count_matches(found.ranked, exact.ranked)
        hits, wanted = hits + of_these, wanted + most
        rows = found.coverage.rows_answered
    return (hits / wanted if wanted else None), rows


async def _with_exact(fanout: Fanout, queries: FloatArray) -> tuple[Merged, Merged]:
    """The answer and the exact one, of the same writes if TRIES bring that; else of the
    last try: rows that were written in between can only lower the recall."""
    for _ in range(TRIES - 1):
        found, exact = await _both(fanout, queries)
        if found.seq == exact.seq:
            return found, exact
    return await _both(fanout, queries)


async def _both(fanout: Fanout, queries: FloatArray) -> tuple[Merged, Merged]:
    """Asked at once. Raises: as ``asked``, when both have come to their end."""
    asking = [
        asyncio.ensure_future(asked(fanout, queries, exact=is_exact)) for is_exact in (False, True)
    ]
    await asyncio.wait(asking)
    found, exact = (each.result() for each in asking)
    return found, exact


async def _held_out_ids(side: GateSide, held_out: HeldOut | None) -> IdArray:
    """(m, k) int64: results of the held-out queries, enough for K without the known items."""
    assert held_out is not None
    assert side.held_out is not None
    longest = max((len(each) for each in held_out.known), default=0)
    return await ids_of(side.fanout, side.held_out, min(MAX_K, K + longest))


async def ids_of(fanout: Fanout, queries: FloatArray, k: int) -> IdArray:
    parts = [
        (await asked(fanout, queries[start : start + BATCH], k)).ranked.ids
        for start in range(0, len(queries), BATCH)
    ]
    return np.concatenate(parts)


def relevant_found(found: IdArray | None, held_out: HeldOut | None) -> float | None:
    return None if found is None or held_out is None else held_out_recall(found, held_out, K)


async def _overlap(
    candidate: GateSide,
    live: GateSide,
    is_same_model: bool,
    found: IdArray | None,
    live_found: IdArray | None,
) -> float | None:
    """By the sample queries where the model is the same, else by the held-out ones; None: neither
    was asked of both."""
    if is_same_model:
        found = await ids_of(candidate.fanout, candidate.queries, K)
        live_found = await ids_of(live.fanout, live.queries, K)
    if found is None or live_found is None:
        return None
    return overlap_of(found[:, :K], live_found[:, :K])


def overlap_of(found: IdArray, live: IdArray) -> float:
    """Share of the items in ``live`` (n, k) that are in the same row of ``found`` (n, m); -1 is an
    empty slot. 1 where live has none."""
    kept = sum(
        int(np.isin(theirs[theirs >= 0], mine).sum())
        for mine, theirs in zip(found, live, strict=True)
    )
    most = int((live >= 0).sum())
    return kept / most if most else 1.0
