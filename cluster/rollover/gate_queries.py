"""The queries that the gate asks a generation: its sample queries, else vectors of its items."""

import asyncio
from pathlib import Path

import numpy as np

from shardline.router.fanout.fanout import Fanout
from shardline.shards.core.errors import Unavailable
from shardline.shards.core.messages import RoutingTable
from shardline.shards.core.schema import FloatArray, IdArray, query_vectors
from shardline.shards.storage.generation import ITEM_IDS_NAME, read_generation, read_item_ids
from shardline.shards.storage.vector_files import QUERIES_NAME, read_queries

TIMEOUT_S = 60.0


async def sample_of(fanout: Fanout, table: RoutingTable, count: int, *, seed: int) -> FloatArray:
    """At most ``count`` (n, dim) float32 query vectors of the table's generation, drawn at random,
    the same with each seed.

    Raises:
        CorruptFile, NotFound: of the generation's files.
        Unavailable: there are no sample queries, and no items that shards still have.
    """
    folder = Path(table.generation_dir)
    queries = await asyncio.to_thread(_sample_queries, folder, table.dim)
    rng = np.random.default_rng(seed)
    if queries is None:
        ids = await asyncio.to_thread(_item_ids, folder, count, rng)
        queries = await _vectors_of(fanout, ids)
    drawn = np.sort(rng.choice(len(queries), min(count, len(queries)), replace=False))
    return query_vectors(queries[drawn], dim=table.dim, metric=table.metric, field=QUERIES_NAME)


def _sample_queries(folder: Path, dim: int) -> FloatArray | None:
    path = folder / QUERIES_NAME
    return read_queries(path, dim=dim) if path.is_file() else None


def _item_ids(folder: Path, count: int, rng: np.random.Generator) -> IdArray:
    """Twice as many as wanted of the items that the generation was built with: some may have been
    deleted."""
    manifest = read_generation(folder)
    shards = [entry for entry in manifest.shards if entry.rows]
    ids = []
    for entry in shards:
        of_shard = read_item_ids(folder / entry.folder / ITEM_IDS_NAME, rows=entry.rows)
        share = -(-2 * count * entry.rows // manifest.rows)
        ids.append(rng.choice(of_shard, min(share, len(of_shard)), replace=False))
    return np.sort(np.concatenate(ids))


async def _vectors_of(fanout: Fanout, item_ids: IdArray) -> FloatArray:
    with fanout.pin() as snapshot:
        deadline = fanout.clock.time() + TIMEOUT_S
        found = await fanout.fetch(snapshot, item_ids, deadline=deadline, min_coverage=1.0)
    if not len(found.item_ids):
        raise Unavailable(
            "nothing to ask",
            expected="sample queries, or an item that the generation was built with",
            hint="publish without the gate, or build with --queries",
        )
    return found.vectors[np.argsort(found.item_ids)]
