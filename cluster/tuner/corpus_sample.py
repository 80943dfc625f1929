"""What configurations are measured with: a sample of a corpus, queries, and what users took.

The sample is in random order, so its first rows are a sample as well: every step of the halving
takes a longer beginning of it. Of a random share of the rows the best share of k results stands for
the best k of all: as many neighbours are lost by codes and by lists. So recall on a sample is an
unbiased estimate, if the sample is indexed with as many lists as the whole corpus.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shardline.shards.core.errors import DataError, InvalidInput
from shardline.shards.core.schema import FloatArray, IdArray, Metric, query_vectors
from shardline.shards.storage.column_types import Unusable, vector_column
from shardline.shards.storage.embedding_set import EmbeddingSet, as_data_error
from shardline.shards.storage.foreign_vectors import VECTOR_COLUMNS
from shardline.shards.storage.table_parts import Part, open_parts

LEAST_ROWS = 1000  # below, an exact scan takes microseconds
MOST_ROWS = 1_000_000  # read by default, and as many of one shard's
MOST_BYTES = 2 << 30  # of their vectors: finalists with copies of them are held beside
NUM_QUERIES = 512
HELD_OUT_SHARE = 10  # of rows for one that is held out as a query
ITEM_COLUMN = "item_id"

Progress = Callable[[str, int, int], None]  # (stage, done, total)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What users took that the model has not seen: query ``owners[i]`` took item ``items[i]``.

    queries (u, dim) float32; owners, items (p,) int64.
    """

    queries: FloatArray
    owners: IdArray
    items: IdArray


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSample:
    """vectors (m, dim) float32 and their ids (m,), at random and in random order.

    rows: of the whole corpus, which is cut into ``shards``. queries (n, dim), from
    ``query_source``; where users' items are held out, they are those of ``held_out``.
    """

    vectors: FloatArray
    ids: IdArray
    rows: int
    shards: int
    metric: Metric
    queries: FloatArray
    query_source: str
    held_out: HeldOut | None = None

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def shard_rows(self) -> int:
        return -(-self.rows // self.shards)


def draw(
    corpus: EmbeddingSet,
    *,
    shards: int,
    most_rows: int = MOST_ROWS,
    held_out: HeldOut | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> CorpusSample:
    """Reads as many rows as one shard has, ``most_rows`` at most, and the queries.

    Without ``held_out`` and without sample queries in the set, rows are held out as queries: they
    are not among ``vectors``.

    Raises:
        InvalidInput: too few rows, or more shards than rows.
    """
    if corpus.rows < LEAST_ROWS * shards:
        raise InvalidInput(
            "too few rows to tune for",
            field="--embeddings",
            expected=f">= {LEAST_ROWS * shards:,} for {shards} shards",
            got=f"{corpus.rows:,}",
            hint="index.kind flat scans so few exactly in microseconds",
        )
    asked, source = None, "users with held-out items"
    if held_out is not None:
        asked = held_out.queries
    elif corpus.queries_file is not None:
        asked, source = corpus.queries()[:NUM_QUERIES], "sample queries"
    reserved = min(NUM_QUERIES, corpus.rows // HELD_OUT_SHARE) if asked is None else 0
    most = min(most_rows, MOST_BYTES // (4 * corpus.dim), -(-corpus.rows // shards))
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(corpus.rows)[: min(most + reserved, corpus.rows)]
    vectors, ids = _read(corpus, chosen, progress)
    if asked is None:
        asked, source = vectors[:reserved], "item vectors held out"
        vectors, ids = vectors[reserved:], ids[reserved:]
    return CorpusSample(
        vectors=np.ascontiguousarray(vectors),
        ids=ids,
        rows=corpus.rows,
        shards=shards,
        metric=corpus.metric,
        queries=np.ascontiguousarray(asked),
        query_source=source,
        held_out=held_out,
    )


def _read(corpus: EmbeddingSet, chosen: IdArray, progress: Progress) -> tuple[FloatArray, IdArray]:
    """Vectors and ids of the rows ``chosen`` (m,), in their order."""
    order = np.argsort(chosen)
    ascending = chosen[order]
    vectors = np.empty((len(chosen), corpus.dim), np.float32)
    ids = np.empty(len(chosen), np.int64)
    start = 0
    for batch in corpus.batches():
        stop = start + len(batch.item_ids)
        first, last = np.searchsorted(ascending, (start, stop))
        rows = ascending[first:last] - start
        vectors[order[first:last]] = batch.vectors[rows]
        ids[order[first:last]] = batch.item_ids[rows]
        start = stop
        progress("rows", start, corpus.rows)
    return vectors, ids


def read_held_out(paths: Iterator[Path] | list[Path], *, dim: int, metric: Metric) -> HeldOut:
    """Held-out interactions of a table: a query vector per row, and the items taken after it.

    The vector column is one of VECTOR_COLUMNS; ``item_id`` holds an integer, or a list of them.

    Raises:
        NotFound, DataError: unreadable, a column is missing, vectors of another dimension, no rows.
    """
    queries, counts, items = [], [], []
    for part in open_parts(list(paths), option="--interactions"):
        if part.is_empty:
            continue
        name = _vector_name(part)
        for start, batch in part.batches([name, ITEM_COLUMN]):
            queries.append(_queries(batch.column(0), part, name, start, dim, metric))
            lengths, ids = _items(batch.column(1), part)
            counts.append(lengths)
            items.append(ids)
    if not queries or not sum(map(len, items)):
        raise DataError("no held-out interactions", field="--interactions", expected="one at least")
    of_query = np.concatenate(counts)
    return HeldOut(
        queries=np.concatenate(queries),
        owners=np.repeat(np.arange(len(of_query), dtype=np.int64), of_query),
        items=np.concatenate(items),
    )


def _vector_name(part: Part) -> str:
    names = part.schema.names
    found = [name for name in VECTOR_COLUMNS if name in names]
    if not found or ITEM_COLUMN not in names:
        raise DataError(
            "not a table of held-out interactions",
            field=f"--interactions {part.path}",
            expected=f"the columns {ITEM_COLUMN} and one of {', '.join(VECTOR_COLUMNS)}",
            got=", ".join(names),
            hint="for a data set of `shardline data`, give --data and --split instead",
        )
    return found[0]


def _queries(
    column: pa.Array, part: Part, name: str, start: int, dim: int, metric: Metric
) -> FloatArray:
    try:
        return query_vectors(vector_column(column, dim=dim), dim=dim, metric=metric, field=name)
    except Unusable as why:
        raise DataError(
            "not usable as vectors",
            field=f"{part.path}: {name}[{start + (why.row or 0)}]",
            expected=why.expected,
            got=why.what,
        ) from why
    except InvalidInput as error:
        raise as_data_error(error, part.path) from error


def _items(column: pa.Array, part: Part) -> tuple[IdArray, IdArray]:
    """How many items each row has, (n,), and all of them one after the other."""
    kind, is_list = (
        column.type,
        pa.types.is_list(column.type) or pa.types.is_large_list(column.type),
    )
    element = kind.value_type if is_list else kind
    if not pa.types.is_integer(element) or column.null_count:
        raise DataError(
            "not usable as item ids",
            field=f"{part.path}: {ITEM_COLUMN}",
            expected="integers, or lists of integers, without nulls",
            got=f"{kind}, {column.null_count} nulls",
        )
    if not is_list:
        ids = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
        return np.ones(len(ids), np.int64), ids
    flat = column.flatten()
    if flat.null_count:
        raise DataError(
            "not usable as item ids", field=f"{part.path}: {ITEM_COLUMN}", got="a null in a list"
        )
    lengths = pc.list_value_length(column).cast(pa.int64()).to_numpy(zero_copy_only=False)
    return lengths, flat.cast(pa.int64()).to_numpy(zero_copy_only=False)
