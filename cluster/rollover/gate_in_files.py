"""Measures a candidate generation from its files, where there is no room to load it: one shard is
in memory at a time, in the process of the gate. What was written since its data were read is left
out. Latency is not measured, because nobody serves it; everything else is, as in ``gate_run``.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from shardline.cluster.rollover.fanout_target import FanoutTarget
from shardline.cluster.rollover.gate import Figures, GateReport, judge
from shardline.cluster.rollover.gate_asking import K, patiently
from shardline.cluster.rollover.gate_queries import sample_of
from shardline.cluster.rollover.gate_run import (
    TableOf,
    connected,
    held_out_of,
    ids_of,
    overlap_of,
    recall_of,
    relevant_found,
    table_of_fanout,
)
from shardline.cluster.rollover.held_out import read_held_out
from shardline.cluster.rollover.publish_config import PublishConfig
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.recall import count_matches
from shardline.shards.core.schema import (
    MAX_K,
    FloatArray,
    Ranked,
)
from shardline.shards.index.knn_merge import merge_sorted
from shardline.shards.index.main_index import set_search_threads
from shardline.shards.index.spec import Device
from shardline.shards.live.loading import load_built
from shardline.shards.live.state import ShardState
from shardline.shards.storage.generation import GenerationManifest, read_generation

# queries (n, dim), None for none; k; whether they are to be answered exactly too
Part = tuple[FloatArray | None, int, bool]
BATCH = 64  # queries at a time: what is allocated for exact scores stays small


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """Of some queries: the k best as the index finds them and, where asked for, exactly."""

    found: Ranked
    exact: Ranked | None


async def gate_of_files(
    candidate: Path,
    live: int,
    table_of: TableOf,
    config: PublishConfig,
    *,
    secret: bytes,
    served: FloatArray | None = None,
    seed: int = 0,
) -> GateReport:
    """The report on the generation in the folder ``candidate``, which has the same model as the
    ``live`` one. Else as ``gate_of_generations``."""
    async with connected([live], table_of, secret) as (side,):
        return await _judged(candidate, side, config, served=served, seed=seed)


async def _judged(
    candidate: Path,
    side: FanoutTarget,
    config: PublishConfig,
    *,
    served: FloatArray | None,
    seed: int,
) -> GateReport:
    live = side.fanout
    table = table_of_fanout(live)
    held_out, held_queries, held_k = None, None, K
    if config.held_out is not None:
        held_out = await asyncio.to_thread(read_held_out, config.held_out, seed=seed)
        held_queries = await held_out_of(held_out, table, is_same_model=True)
        held_k = min(MAX_K, K + max((len(each) for each in held_out.known), default=0))
    # its own sample queries, or vectors of its items, which the live generation has
    drawn_from = replace(table, generation_dir=str(candidate))
    queries = await patiently(lambda: sample_of(live, drawn_from, config.queries, seed=seed))
    recent = None if served is None else served[-config.queries :]
    rows = read_generation(candidate).rows
    parts: list[Part] = [
        (queries, K, True),
        (recent, K, True),
        (held_queries, held_k, False),
    ]
    asked = partial(asked_in_files, candidate, parts, threads=1)
    ours, recently, held = await asyncio.to_thread(asked)
    assert ours is not None
    live_recall, live_rows = await recall_of(live, queries)
    live_held = None if held_queries is None else await ids_of(live, held_queries, held_k)
    return judge(
        Figures(
            k=K,
            queries=len(queries),
            recall=_recall(ours),
            live_recall=live_recall,
            served=0 if recent is None else len(recent),
            served_recall=None if recently is None else _recall(recently),
            held_out=0 if held_out is None else len(held_out.relevant),
            held_out_recall=relevant_found(None if held is None else held.found.ids, held_out),
            live_held_out_recall=relevant_found(live_held, held_out),
            p99_ms=None,
            live_p99_ms=None,
            rows=rows,
            live_rows=live_rows,
            overlap=overlap_of(ours.found.ids, await ids_of(live, queries, K)),
        ),
        config,
    )


def asked_in_files(folder: Path, parts: list[Part], *, threads: int) -> list[Asked | None]:
    """Of each part what all shards of the generation in ``folder`` have, as they were built.

    Raises:
        CorruptFile, NotFound: of its files.
    """
    set_search_threads(threads)
    manifest = read_generation(folder)
    answers: list[Asked | None] = [None] * len(parts)
    for entry in manifest.shards:
        _ask_shard(folder, manifest, entry.shard, parts, answers)
    return answers


def _ask_shard(
    folder: Path,
    manifest: GenerationManifest,
    shard: int,
    parts: list[Part],
    answers: list[Asked | None],
) -> None:
    """Merges what it has into ``answers``; it is in memory no longer than this."""
    state = load_built(folder, manifest, shard, device=Device.CPU).state
    for place, (queries, k, is_exact) in enumerate(parts):
        if queries is None or not len(queries):
            continue
        found = _asked(queries, k, partial(_by_default, state))
        exact = _asked(queries, k, partial(_exactly, state)) if is_exact else None
        answers[place] = _merged(answers[place], Asked(found=found, exact=exact))


def _by_default(state: ShardState, queries: FloatArray, k: int) -> Ranked:
    return state.search(queries, k, SearchParams())


def _exactly(state: ShardState, queries: FloatArray, k: int) -> Ranked:
    return state.search_exactly(queries, k, lambda: None)


def _asked(queries: FloatArray, k: int, ask: Callable[[FloatArray, int], Ranked]) -> Ranked:
    found = [ask(queries[start : start + BATCH], k) for start in range(0, len(queries), BATCH)]
    return Ranked(*map(np.concatenate, zip(*found, strict=True)))


def _merged(before: Asked | None, more: Asked) -> Asked:
    if before is None:
        return more
    exact = None
    if before.exact is not None and more.exact is not None:
        exact = _both(before.exact, more.exact)
    return Asked(found=_both(before.found, more.found), exact=exact)


def _both(one: Ranked, other: Ranked) -> Ranked:
    return merge_sorted(np.stack((one.ids, other.ids)), np.stack((one.scores, other.scores)))


def _recall(asked: Asked) -> float | None:
    assert asked.exact is not None
    hits, wanted = count_matches(asked.found, asked.exact)
    return hits / wanted if wanted else None
