"""Items that a search must not return: sorted ids per query, joined."""

from dataclasses import replace

import numpy as np

from shardline.router.query import ResolvedQuery
from shardline.shards.core.schema import IdArray


def with_excluded(query: ResolvedQuery, ids_for_all: IdArray) -> ResolvedQuery:
    """The query, with these ids excluded for each of its queries; sorted, each once."""
    if not ids_for_all.size:
        return query
    if not query.excluded:
        return replace(query, excluded=(ids_for_all,) * len(query.values))
    return replace(query, excluded=tuple(np.union1d(ids, ids_for_all) for ids in query.excluded))
