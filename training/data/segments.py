"""Parts of a test set that a mean over all users hides: rare items, new items, new users.

Popularity is counted in the train split, whatever split is measured: that is what the model saw.

    head     the fewest items, most popular first, that hold a third of the train interactions;
             equally popular ones by lower row
    torso    the fewest next ones that complete two thirds
    tail     the others that occur in train at all
    cold     items without a train interaction
    new      users without a train interaction
    sparse   users with 1 to ``SPARSE_BELOW`` - 1 of them
    regular  users with more
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import IdArray
from shardline.training.data.csr import Csr

SPARSE_BELOW = 5  # train interactions; half of what the usual 10-core data sets keep at least

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A part of the relevant items: of some users, or of some items, by table row."""

    name: str
    users: Mask | None = None
    items: Mask | None = None

    def holds(self, users: IdArray, wanted: Csr) -> Mask:
        """Whether each entry of ``wanted`` belongs here; users (n,) are its owners' rows."""
        keep = np.ones(len(wanted.items), dtype=np.bool_)
        if self.users is not None:
            keep &= self.users[users][wanted.owners]
        if self.items is not None:
            keep &= self.items[wanted.items]
        return keep


def segments_of(train: Csr, num_items: int) -> tuple[Segment, ...]:
    """The segments of the module's docstring; train: item rows of every user."""
    counts = np.bincount(train.items, minlength=num_items)
    bands = popularity_bands(counts)
    items = ("head items", "torso items", "tail items", "cold items")
    seen = train.lengths
    return (
        *(Segment(name=name, items=bands == band) for band, name in enumerate(items)),
        Segment(name="new users", users=seen == 0),
        Segment(name="sparse users", users=(seen > 0) & (seen < SPARSE_BELOW)),
        Segment(name="regular users", users=seen >= SPARSE_BELOW),
    )


def popularity_bands(counts: IdArray) -> NDArray[np.int8]:
    """(m,) int8 for counts (m,) of train interactions: 0 head, 1 torso, 2 tail, 3 cold."""
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]  # interactions of all more popular items
    bands = np.empty(len(counts), dtype=np.int8)
    # in integers: a third of the total is no float that could be compared exactly
    bands[order] = np.minimum(3 * before // max(int(counts.sum()), 1), 2)
    bands[counts == 0] = 3
    return bands


def filtered(lists: Csr, keep: Mask) -> Csr:
    """The same users with the entries where ``keep`` (len(items),) holds, in order."""
    indptr = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)[lists.indptr]
    return Csr(indptr, lists.items[keep])
