"""Rows of an embedding set on their way to the shards: one file per shard, written in one pass.

    spill/00003.arrow   the rows of shard 3 in the order of the set, columns as in the set

So a corpus is read once however many shards there are and in whatever order its ids come, and the
job of a shard reads nothing but its own rows. The folder lies inside the staged generation, on the
store that all hosts share, and is removed before the generation is complete. Not fsynced: after a
crash the whole staging folder is waste.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shardline.shards.core.errors import CorruptFile
from shardline.shards.core.partition import Partition
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.shards.storage.embedding_set import EmbeddingBatch
from shardline.shards.storage.vector_files import item_batch, open_ipc, plain, vector_matrix

SPILL_FOLDER = "spill"
MAX_OFFSET = 2**31 - 1  # bytes of text that an array of Arrow's plain types addresses


@dataclass(frozen=True, slots=True)
class ShardRows:
    """A shard's rows: item_ids (n,), ascending; vectors (n, dim) float32; n rows of attributes."""

    item_ids: IdArray
    vectors: FloatArray
    attributes: pa.Table


class SpillWriter:
    """Routes batches to files; ``rows`` counts what each shard got. See ``spill_writer``."""

    def __init__(self, folder: Path, cut: Partition) -> None:
        self.rows = [0] * cut.num_shards
        self._folder = folder
        self._cut = cut
        self._files: dict[int, Any] = {}

    def append(self, batch: EmbeddingBatch) -> None:
        """Writes each row to its shard's file; no more than a copy of the batch is held."""
        shards = self._cut.shard_of(batch.item_ids)
        ids, vectors, attributes = batch.item_ids, batch.vectors, batch.attributes
        if (shards != shards[0]).any():
            order = np.argsort(shards, kind="stable")
            ids, vectors, shards = ids[order], vectors[order], shards[order]
            attributes = plain(attributes).take(pa.array(order))
        columns = item_batch(ids, vectors, attributes)
        found, starts = np.unique(shards, return_index=True)
        for shard, start, stop in zip(found, starts, [*starts[1:], len(ids)], strict=True):
            self._write(int(shard), columns.slice(start, stop - start))

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _write(self, shard: int, batch: pa.RecordBatch) -> None:
        if shard not in self._files:
            path = spill_file(self._folder, shard)
            self._files[shard] = pa.ipc.new_file(str(path), batch.schema)
        self._files[shard].write_batch(batch)
        self.rows[shard] += batch.num_rows


@contextmanager
def spill_writer(generation: Path, cut: Partition) -> Iterator[SpillWriter]:
    """A writer of spill files in a staged generation; they are closed when the block ends."""
    (generation / SPILL_FOLDER).mkdir()
    writer = SpillWriter(generation, cut)
    try:
        yield writer
    finally:
        writer.close()


def spill_file(generation: Path, shard: int) -> Path:
    """Where the rows of a shard wait for its job."""
    return generation / SPILL_FOLDER / f"{shard:05d}.arrow"


def read_spill(generation: Path, shard: int, *, rows: int, dim: int) -> ShardRows:
    """All rows of one shard, brought into the order of their ids; the vectors are copied once.

    Raises:
        CorruptFile: the file is missing, cut, or has another number of rows.
    """
    path = spill_file(generation, shard)
    table = open_ipc(path).read_all()
    if table.num_rows != rows:
        raise CorruptFile(f"{path}: wrong row count", expected=str(rows), got=str(table.num_rows))
    ids = table["item_id"].to_numpy()
    order = np.argsort(ids)
    target = np.empty_like(order)
    target[order] = np.arange(rows)
    vectors, start = np.empty((rows, dim), np.float32), 0
    for chunk in table["embedding"].chunks:
        stop = start + len(chunk)
        vectors[target[start:stop]] = vector_matrix(chunk, dim)
        start = stop
    attributes = table.drop_columns(["item_id", "embedding"])
    if attributes.num_columns and (order[1:] < order[:-1]).any():
        wide = _wide(attributes)
        if wide != attributes.schema:  # Arrow's cast fails for some types, even to themselves
            attributes = attributes.cast(wide)
        attributes = attributes.take(pa.array(order))
    return ShardRows(ids[order], vectors, attributes)


def _wide(table: pa.Table) -> pa.Schema:
    """Text beyond MAX_OFFSET gets 64-bit offsets: ``take`` makes one array of a column."""
    wide = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    return pa.schema(
        field.with_type(wide.get(field.type, field.type)) if column.nbytes > MAX_OFFSET else field
        for field, column in zip(table.schema, table.columns, strict=True)
    )
