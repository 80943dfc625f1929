"""What writes have made of a shard's index: ``ShardHealth`` of its state, by a look that is cheap
enough to be taken every few seconds."""

import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.files import MANIFEST_NAME
from shardline.shards.core.messages import ShardHealth
from shardline.shards.core.schema import IdArray
from shardline.shards.index.main_index import MainIndex
from shardline.shards.live.state import ShardState
from shardline.shards.storage.generation import ITEM_IDS_NAME, read_generation

BLOCK_ROWS = 1 << 16  # ids looked up at a time: searches wait for the GIL some milliseconds


class HealthLook:
    """Of one shard of the generation in ``generation``; used by one thread."""

    def __init__(self, generation: Path, shard: int) -> None:
        self._generation, self._shard = generation, shard
        self._manifest: tuple[int, int, int] | None = None  # which file says where the ids are
        self._ids_path = generation
        # weak: a main index that has been replaced must not live on until the next look
        self._main: weakref.ref[MainIndex] | None = None
        self._unseen_bits: NDArray[np.uint8] = np.empty(0, np.uint8)  # of the rows of ``_main``

    def look(self, state: ShardState) -> ShardHealth:
        """unseen is counted from the ids that the generation lists: those that the shard was built
        with or, after an erasure, had then.

        Raises:
            CorruptFile, NotFound: of the manifest. OSError, ValueError: of the file with the ids,
                whose checksum has been verified.
        """
        # mapped for this look only: an erasure removes the file
        built = np.load(self._listed(), mmap_mode="r", allow_pickle=False)
        if self._main is None or self._main() is not state.main:
            unseen = ~are_in(built, state.ids_by_row[:-1])
            self._unseen_bits = np.packbits(unseen, bitorder="little")
            self._main = weakref.ref(state.main)
        bits = self._unseen_bits
        if state.selection is not None:
            bits = bits & state.selection.bits
        written = ~are_in(built, state.delta.ids)
        return ShardHealth(
            rows=state.rows,
            changed=state.delta.rows + state.hidden,
            unseen=int(np.bitwise_count(bits).sum()) + int(written.sum()),
            imbalance=state.main.imbalance,
        )

    def _listed(self) -> Path:
        """The ids of the shard's files in the manifest, which is read when it has changed."""
        found = (self._generation / MANIFEST_NAME).stat()
        manifest = (found.st_ino, found.st_mtime_ns, found.st_size)
        if manifest != self._manifest:
            entry = read_generation(self._generation).shard_entry(self._shard)
            self._ids_path = self._generation / entry.folder / ITEM_IDS_NAME
            self._manifest, self._main = manifest, None
        return self._ids_path


def are_in(known: IdArray, item_ids: IdArray) -> NDArray[np.bool_]:
    """(m,) bool: which of item_ids (m,) int64 are in known (n,) int64, ascending."""
    found = np.zeros(len(item_ids), np.bool_)
    if len(known):
        for start in range(0, len(item_ids), BLOCK_ROWS):
            part = item_ids[start : start + BLOCK_ROWS]
            at = np.minimum(np.searchsorted(known, part), len(known) - 1)
            found[start : start + BLOCK_ROWS] = known[at] == part
    return found
