"""The live rows of one shard, from files alone: the newest main index and the log behind it.

Writes may go on meanwhile: what is read is the shard after one certain number of writes.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shardline.shards.core.errors import NotFound
from shardline.shards.core.schema import IdArray
from shardline.shards.index.spec import Device
from shardline.shards.live.attributes import with_written
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.loading import load_caught_up, with_newest_main
from shardline.shards.live.log_segments import segment_names
from shardline.shards.live.log_tail import read_settled
from shardline.shards.live.state import ShardState
from shardline.shards.storage.embedding_set import EmbeddingBatch
from shardline.shards.storage.generation import GenerationManifest, OwnIndex
from shardline.shards.storage.vector_files import ROWS_PER_BATCH


@dataclass(frozen=True, slots=True, eq=False)
class LiveRows:
    """The shard's rows after ``seq`` writes. item_ids (n,) int64, ascending.

    rows (n,): the row of each in the main index or, where in_main (n,) is False, in the delta.
    template, own: as of ``Loaded``.
    """

    state: ShardState
    item_ids: IdArray
    rows: IdArray
    in_main: NDArray[np.bool_]
    template: Path | None = None
    own: OwnIndex | None = None

    @property
    def seq(self) -> int:
        return self.state.seq

    def blocks(self, rows: int = ROWS_PER_BATCH) -> Iterator[EmbeddingBatch]:
        """All rows in the order of their ids, at most ``rows`` at a time.

        Vectors as ``ShardState.fetch``: exact where the index keeps exact copies.
        """
        for start in range(0, len(self.item_ids), rows):
            part = slice(start, start + rows)
            found, vectors = self.state.fetch(self.item_ids[part])
            assert len(found) == len(self.item_ids[part])
            yield EmbeddingBatch(found, vectors, self._attributes(part))

    def _attributes(self, part: slice) -> pa.RecordBatch:
        stored = self.state.attributes.table
        if stored is None:
            return pa.RecordBatch.from_arrays([], names=[])
        rows, in_main = self.rows[part], self.in_main[part]
        packed = [self.state.delta.attributes_of(row) for row in rows[~in_main].tolist()]
        kept = stored.take(pa.array(rows[in_main]))
        at = np.empty(len(rows), np.int64)
        at[in_main] = np.arange(kept.num_rows)
        at[~in_main] = kept.num_rows + np.arange(len(packed))
        (batch,) = with_written(kept, packed).take(pa.array(at)).combine_chunks().to_batches()
        return batch


def live_rows(state: ShardState) -> LiveRows:
    kept = np.arange(state.main.rows)
    if state.selection is not None:
        kept = np.flatnonzero(state.selection.live)
    item_ids = np.concatenate((state.ids_by_row[kept], state.delta.ids))
    rows = np.concatenate((kept, state.delta.rows_of_ids))
    in_main = np.arange(len(rows)) < len(kept)
    order = np.argsort(item_ids, kind="stable")
    return LiveRows(state, item_ids[order], rows[order], in_main[order])


def open_live_rows(
    generation: Path, manifest: GenerationManifest, shard: int, *, until: int | None = None
) -> LiveRows:
    """The rows of a shard after its newest write, or after write ``until``; all files verified.

    Holds the shard's main index and what the log has behind it in memory, as a replica does, on
    the CPU. All writes in it are durable on return.

    Raises:
        CorruptFile: of the shard's files or its log. OSError: of the disk.
        NotFound: a file is missing; or the files do not hold write ``until``, or hold later ones in
            their main index.
    """
    loaded = load_caught_up(generation, manifest, shard, device=Device.CPU, until=until)
    state = loaded.state
    if until is not None and state.seq != until:
        raise NotFound(
            f"{live_folder(generation, shard)}: the shard cannot be read as of write {until}",
            expected=f"a main index of at most {until} writes, and a log that goes on to that",
            got=f"{state.seq} writes, of which the main index has {loaded.main_seq}",
        )
    make_durable(live_folder(generation, shard))
    return replace(live_rows(state), template=loaded.template, own=loaded.own)


def newest_write(
    generation: Path,
    shard: int,
    *,
    is_written: Callable[[], bool] = lambda: True,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """How many writes a shard's log holds now, durable on return; no index is read or verified.
    is_written, sleep: as of ``read_settled``.

    Raises:
        CorruptFile: the log is damaged. NotFound, OSError: it cannot be read.
        Unavailable: as ``read_settled``.
    """
    live = live_folder(generation, shard)

    def end(seq: int) -> int:
        return seq + len(read_settled(live, seq, is_written=is_written, sleep=sleep))

    seq = with_newest_main(live, end)
    make_durable(live)
    return seq


def make_durable(live: Path) -> None:
    """What a reader of the log in ``live`` has seen is durable on return.

    It may see a group before its writer's fsync. Without this a power cut could void that group,
    and its number would be that of another write. Raises OSError.
    """
    with suppress(FileNotFoundError):  # no write yet; or trimmed, so durable before
        newest = segment_names(os.listdir(live))[-1:]  # noqa: PTH208, as LogFiles.names
        for name in newest:
            descriptor = os.open(live / str(name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
