"""One pass over a corpus: each row to the file of its shard, and the samples a build works with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardline.shards.core.partition import Partition
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.shards.storage.embedding_set import EmbeddingBatch, EmbeddingSet
from shardline.shards.storage.spill import spill_writer

# Asked of every shard with every parameter, and exactly: 20 ms per query and million rows.
# So many, and fewer for a small corpus, that measuring stays a small part of a build; 64 queries
# know recall@100 to half a percent.
SWEEP_QUERIES = (64, 128)
ROWS_PER_SWEEP_QUERY = 4_000
SAMPLE_QUERIES = "sample queries"  # those of the embedding set

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What one pass over the corpus leaves: shard files of so many ``rows``, and two samples.

    sample (m, dim): what the template is trained on. queries (n, dim): what recall is measured
    with, from ``query_source``.
    """

    rows: list[int]
    sample: FloatArray
    queries: FloatArray
    query_source: str


def spread_rows(
    corpus: EmbeddingSet,
    cut: Partition,
    staging: Path,
    train_rows: int,
    seed: int,
    progress: Progress,
) -> Spread:
    """Writes the spill files of all shards and draws the samples, at random but for the seed."""
    rng = np.random.default_rng(seed)
    fewest, most = SWEEP_QUERIES
    num_queries = min(most, max(fewest, corpus.rows // ROWS_PER_SWEEP_QUERY))
    drawn = rng.choice(corpus.rows, min(corpus.rows, train_rows + num_queries), replace=False)
    # from both ends: where the corpus is large enough the queries are not among those trained on
    trained, asked = drawn[:train_rows], drawn[-num_queries:]
    is_held_out = len(trained) + len(asked) <= len(drawn)
    with spill_writer(staging, cut) as spill:
        sample, items = _read_once(corpus, spill.append, (trained, asked), progress)
    if corpus.queries_file is None:
        source = "item vectors held out of training" if is_held_out else "item vectors"
        return Spread(rows=spill.rows, sample=sample, queries=items, query_source=source)
    queries = corpus.queries()
    chosen = rng.choice(len(queries), min(num_queries, len(queries)), replace=False)
    return Spread(
        rows=spill.rows, sample=sample, queries=queries[chosen], query_source=SAMPLE_QUERIES
    )


def _read_once(
    corpus: EmbeddingSet,
    take: Callable[[EmbeddingBatch], None],
    picks: Sequence[IdArray],
    progress: Progress,
) -> list[FloatArray]:
    """Hands every batch to ``take``; the vectors at each of ``picks``, row numbers in any order."""
    wanted = [np.sort(rows) for rows in picks]
    parts: list[list[FloatArray]] = [[] for _ in picks]
    start = 0
    for batch in corpus.batches():
        take(batch)
        stop = start + len(batch.item_ids)
        for rows, part in zip(wanted, parts, strict=True):
            chosen = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
            part.append(batch.vectors[chosen - start])
        start = stop
        progress("rows", start, corpus.rows)
    return [np.concatenate(part) for part in parts]
