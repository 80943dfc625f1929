"""The result cache: whole answers to queries asked before, least recently used out first.

Only complete answers are kept: an answer that missed a shard must not outlive the fault. The
generation is part of the key, so an answer never outlives its index either; nor the rows that it
was found in: ``freshness`` says which sequence numbers it must have to be given again.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from shardline.router.freshness import Seq
from shardline.router.query import Merged, ResolvedQuery
from shardline.shards.core.messages import SearchOptions, SearchParams
from shardline.shards.core.schema import FloatArray, Ranked

CacheKey: TypeAlias = tuple[int, int, SearchParams, SearchOptions, int, bytes]

ENTRY_BYTES = 1000  # an entry beside its arrays and its key: dictionary slot, objects, coverage
LARGEST_SHARE = 16  # an answer above this fraction of the cache would empty it for one query


def cache_key(generation: int, queries: FloatArray, k: int, query: ResolvedQuery) -> CacheKey:
    """queries (n, dim) float32 as they go to the shards: normalised, encoded; k as it is asked.
    query: ``excluded`` is of these queries."""
    asked = queries.tobytes()
    if query.excluded:
        counts = np.array([len(ids) for ids in query.excluded], np.int32)
        asked = b"".join((asked, counts.tobytes(), *(ids.tobytes() for ids in query.excluded)))
    return generation, k, query.params, query.options, len(queries), asked


@dataclass(slots=True)
class CacheStats:
    """Since the start, but for ``entries`` and ``bytes``, which are now."""

    hits: int = 0
    misses: int = 0
    evicted: int = 0
    entries: int = 0
    bytes: int = 0


class ResultCache:
    """At most ``max_bytes`` of answers; with 0 it keeps nothing. Used by one thread."""

    def __init__(self, max_bytes: int) -> None:
        self.stats = CacheStats()
        self._max_bytes = max_bytes
        self._found: OrderedDict[CacheKey, tuple[Merged, int]] = OrderedDict()

    @property
    def enabled(self) -> bool:
        return self._max_bytes > 0

    def get(self, key: CacheKey, seq: Seq | None) -> Merged | None:
        """The answer kept for the key, if it is of these sequence numbers; None: of no use are all.

        Its arrays are shared: nobody may write to them.
        """
        kept = self._found.get(key)
        if kept is None or seq is None or kept[0].seq != seq:
            self.stats.misses += 1
            return None
        self.stats.hits += 1
        self._found.move_to_end(key)
        return kept[0]

    def put(self, key: CacheKey, merged: Merged) -> None:
        """Keeps a complete answer, in arrays of its own; a partial or huge one it does not keep."""
        ids, scores = merged.ranked
        size = ids.nbytes + scores.nbytes + len(key[-1]) + len(key[3].filter) + ENTRY_BYTES
        if merged.coverage.degraded or size * LARGEST_SHARE > self._max_bytes:
            return
        # copied, because the rows of a shared frame are views that would keep all of it alive
        ids, scores = ids.copy(), scores.copy()
        ids.flags.writeable = scores.flags.writeable = False
        own = replace(merged, ranked=Ranked(ids, scores), search_ms=0.0)
        self._drop(key)
        self._found[key] = own, size
        self.stats.bytes += size
        while self.stats.bytes > self._max_bytes:
            self._drop(next(iter(self._found)))
            self.stats.evicted += 1
        self.stats.entries = len(self._found)

    def clear(self) -> None:
        """Forgets every answer, as when another generation goes live."""
        self._found.clear()
        self.stats.bytes = self.stats.entries = 0

    def _drop(self, key: CacheKey) -> None:
        kept = self._found.pop(key, None)
        if kept is not None:
            self.stats.bytes -= kept[1]
