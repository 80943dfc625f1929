"""Items that queries exclude: put together from what a request brings, and split by shard.

Of each query the ids are ascending, each once. They travel beside the query's vector, so that
searches with and without them share frames; a shard gets those ids alone that it may hold.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shardline.router.query import ResolvedQuery
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.exclusions import Excluded
from shardline.shards.core.partition import Partition, Partitioning
from shardline.shards.core.schema import IdArray

MAX_EXCLUDED = 10_000  # ids of one query in a body, and the newest of its history
# Ids that are sorted or split in the event loop, about 2 ms; more go to a thread so that other
# requests are not held up.
IDS_IN_LOOP = 32_768
HISTORY = "history"  # the kind of feature that names past items


def ascending(ids: IdArray) -> IdArray:
    """ids (n,) in order, each once; a new array."""
    ordered = np.sort(ids)
    is_new = ordered[1:] != ordered[:-1]
    if is_new.all():
        return ordered
    return np.concatenate((ordered[:1], ordered[1:][is_new]))


def with_excluded(query: ResolvedQuery, ids_for_all: IdArray) -> ResolvedQuery:
    """The query with more ids that none of its queries wants; ids_for_all (m,) int64, in any order,
    repeated or not."""
    if not len(ids_for_all):
        return query
    more = ascending(ids_for_all)
    if not query.excluded:
        return replace(query, excluded=(more,) * len(query.values))
    return _with_each(query, [more] * len(query.values))


def with_history(query: ResolvedQuery, features: Any) -> ResolvedQuery:
    """The query without the items that its queries name as their history; features: those of the
    encoder that has taken its values.

    Raises:
        InvalidInput: none of them is a history.
    """
    names = history_names(features)
    histories = []
    for values in query.values:
        named = [np.array(values[name] or (), np.int64)[-MAX_EXCLUDED:] for name in names]
        ids = np.concatenate(named)
        histories.append(ascending(ids[ids >= 0]))
    return _with_each(query, histories)


def history_names(features: Any) -> list[str]:
    """The features of a query encoder that are histories.

    Raises:
        InvalidInput: there is none.
    """
    names = [each["name"] for each in features if each["kind"] == HISTORY]
    if not names:
        raise InvalidInput(
            "the query encoder takes no history",
            field="exclude_history",
            expected="a model that was trained with histories",
            hint="name the items in exclude",
        )
    return names


def _with_each(query: ResolvedQuery, more: Sequence[IdArray]) -> ResolvedQuery:
    """With the ids of ``more``, of each query its own, ascending."""
    if query.excluded:
        more = [ascending(np.concatenate(each)) for each in zip(query.excluded, more, strict=True)]
    return replace(query, excluded=tuple(more) if any(map(len, more)) else ())


def of_queries(excluded: Sequence[IdArray], queries: IdArray) -> tuple[IdArray, ...]:
    """Of some queries, by position; empty where these have none."""
    if not excluded:
        return ()
    own = tuple(excluded[query] for query in queries.tolist())
    return own if any(map(len, own)) else ()


def num_excluded(excluded: Sequence[IdArray]) -> int:
    """Ids of all queries together."""
    return sum(map(len, excluded))


async def off_loop(num_ids: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns; of many ids it runs in a thread."""
    if num_ids <= IDS_IN_LOOP:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)


def by_shard(excluded: Sequence[IdArray], partition: Partition) -> list[Excluded | None]:
    """Of each shard, by its number, what queries exclude of its items; None where that is nothing.
    excluded: of each query, ascending."""
    if len(excluded) == 1 and partition.partitioning is Partitioning.RANGE:  # nothing to sort
        (ids,) = excluded
        first_ids = partition.upper_keys.astype(np.int64)
        cuts = [0, *np.searchsorted(ids, first_ids).tolist(), len(ids)]
        return [
            Excluded(np.array([end - start], np.int32), ids[start:end]) if end > start else None
            for start, end in itertools.pairwise(cuts)
        ]
    lengths = [len(ids) for ids in excluded]
    ids = excluded[0] if len(excluded) == 1 else np.concatenate(excluded)
    homes = partition.shard_of(ids)
    order = np.argsort(homes, kind="stable")
    ids = ids[order]
    cuts = np.searchsorted(homes[order], np.arange(partition.num_shards + 1)).tolist()
    owners = np.repeat(np.arange(len(lengths)), lengths)[order]
    parts: list[Excluded | None] = []
    for start, end in itertools.pairwise(cuts):
        counts = np.bincount(owners[start:end], minlength=len(lengths)).astype(np.int32)
        parts.append(Excluded(counts, ids[start:end]) if end > start else None)
    return parts
