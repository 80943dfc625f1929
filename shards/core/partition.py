"""Which item goes to which shard: contiguous id ranges of equal row counts.

``range`` cuts the sorted ids; ``hash-range`` cuts the ids after a fixed mixing of their bits, for
corpora whose ids are clustered by topic or time. Either way a shard is a range of *keys*, and the
boundaries in the manifest say where an id lives without a look-up table.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import IdArray


class Partitioning(StrEnum):
    RANGE = "range"
    HASH_RANGE = "hash-range"


@dataclass(frozen=True, slots=True)
class Partition:
    """upper_keys (num_shards - 1,) uint64: shard s holds the keys in [upper[s-1], upper[s])."""

    partitioning: Partitioning
    upper_keys: NDArray[np.uint64]

    @property
    def num_shards(self) -> int:
        return len(self.upper_keys) + 1

    def shard_of(self, item_ids: IdArray) -> NDArray[np.int64]:
        """(n,) shard numbers of item ids, existing or not."""
        keys = partition_keys(item_ids, self.partitioning)
        return np.searchsorted(self.upper_keys, keys, side="right").astype(np.int64)


def partition(item_ids: IdArray, num_shards: int, partitioning: Partitioning) -> Partition:
    """Boundaries that give every shard the same number of rows, give or take one.

    Raises:
        InvalidInput: fewer items than shards.
    """
    if item_ids.size < num_shards:
        raise InvalidInput(
            "more shards than items",
            field="cluster.shards",
            expected=f"<= {item_ids.size}",
            got=str(num_shards),
        )
    keys = np.sort(partition_keys(item_ids, partitioning))
    first_rows = [item_ids.size * shard // num_shards for shard in range(1, num_shards)]
    return Partition(partitioning, keys[first_rows])


def check_no_shard_empty(cut: Partition, item_ids: IdArray) -> None:
    """Raises InvalidInput: one of the shards has no item of item_ids (n,) int64."""
    rows = np.bincount(cut.shard_of(item_ids), minlength=cut.num_shards)
    if not rows.all():
        raise InvalidInput(
            "a shard would have no item",
            expected=f"items in each of {cut.num_shards} shards",
            got=f"none in shard {int(rows.argmin())}",
        )


def partition_keys(item_ids: IdArray, partitioning: Partitioning) -> NDArray[np.uint64]:
    """(n,) uint64 sort keys of ids; different ids have different keys."""
    keys: NDArray[np.uint64] = item_ids.astype(np.uint64)
    return mix_bits(keys) if partitioning is Partitioning.HASH_RANGE else keys


def mix_bits(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014, figure 19): a bijection on 64 bits."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
