"""Click sessions as pairs of items, as listing embeddings are trained (Grbovic & Cheng, KDD 2018).

A session is a sentence of clicked items, and items within a window of each other are pairs, in both
directions. The item that was booked at last is global context: a pair with every other item of its
session, however far away. Sessions held out, the latest ones, ask a different question: which item
is clicked next. Pure: arrays in, arrays out.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import FloatArray, IdArray
from shardline.training.data.splits import SplitCodes

TRAIN, VAL, TEST = range(3)  # places in table_checks.SPLITS


@dataclass(frozen=True, slots=True, kw_only=True)
class Clicks:
    """n clicks, session after session, each in the order of time.

    sessions (n,) int64: 0, 1, ... in the order of the sessions' last clicks. items (n,) int64 ids,
    times (n,) int64, booked (n,) bool.
    """

    sessions: IdArray
    items: IdArray
    times: IdArray
    booked: NDArray[np.bool_]

    @classmethod
    def of(
        cls, sessions: IdArray, items: IdArray, times: IdArray, booked: NDArray[np.bool_]
    ) -> "Clicks":
        """From clicks in any order; at one time the order in which they come counts."""
        ids, session = np.unique(sessions, return_inverse=True)
        last = np.full(len(ids), np.iinfo(np.int64).min)
        np.maximum.at(last, session, times)
        place = np.empty(len(ids), np.int64)
        place[np.lexsort((ids, last))] = np.arange(len(ids))
        session = place[session]
        order = np.lexsort((times, session))
        return cls(
            sessions=session[order], items=items[order], times=times[order], booked=booked[order]
        )

    @property
    def number(self) -> int:
        """Of sessions."""
        return int(self.sessions[-1]) + 1 if len(self.sessions) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Different pairs of a split: items asked for, items to find, latest time, and how often."""

    asked: IdArray
    found: IdArray
    times: IdArray
    counts: FloatArray
    codes: SplitCodes


def session_splits(clicks: Clicks, *, val_share: float, test_share: float) -> SplitCodes:
    """(n,) the split of each click: the latest sessions are test, those before them val."""
    sessions = clicks.number
    test = sessions - round(test_share * sessions)
    val = test - round(val_share * sessions)
    return ((clicks.sessions >= val).astype(np.int8) + (clicks.sessions >= test)).astype(np.int8)


def session_pairs(clicks: Clicks, codes: SplitCodes, *, window: int) -> Pairs:
    """Pairs within ``window`` clicks, and with booked items, of train; next clicks of val and test.

    No item is paired with itself. codes (n,): the split of each click, one for a session.
    """
    train = np.flatnonzero(codes == TRAIN)
    near, far = _within(clicks.sessions, train, window)
    global_near, global_far = _with_booked(clicks, train, window)
    lefts = [near, far, global_near, global_far]
    rights = [far, near, global_far, global_near]
    for code in (VAL, TEST):
        first, following = _within(clicks.sessions, np.flatnonzero(codes == code), 1)
        lefts.append(first)
        rights.append(following)
    left, right = np.concatenate(lefts), np.concatenate(rights)
    differ = clicks.items[left] != clicks.items[right]
    return _counted(clicks, codes, left[differ], right[differ])


def _within(sessions: IdArray, clicks: IdArray, window: int) -> tuple[IdArray, IdArray]:
    """Pairs of the clicks (ascending places) at most ``window`` apart in one session: the earlier
    ones, and the later ones."""
    earlier, later = [clicks[:0]], [clicks[:0]]
    for distance in range(1, window + 1):
        first, second = clicks[:-distance], clicks[distance:]
        same = sessions[first] == sessions[second]
        earlier.append(first[same])
        later.append(second[same])
    return np.concatenate(earlier), np.concatenate(later)


def _with_booked(clicks: Clicks, train: IdArray, window: int) -> tuple[IdArray, IdArray]:
    """Clicks, and the last booked one of their session, where more than ``window`` lie between."""
    booked = train[clicks.booked[train]]
    last = np.full(clicks.number, -1)
    last[clicks.sessions[booked]] = booked  # the last one written stays, and places ascend
    partners = last[clicks.sessions[train]]
    far = (partners >= 0) & (np.abs(partners - train) > window)
    return train[far], partners[far]


def _counted(clicks: Clicks, codes: SplitCodes, left: IdArray, right: IdArray) -> Pairs:
    keys = np.stack([codes[left].astype(np.int64), clicks.items[left], clicks.items[right]])
    different, which, counts = np.unique(keys, axis=1, return_inverse=True, return_counts=True)
    times = np.full(different.shape[1], np.iinfo(np.int64).min)
    np.maximum.at(times, which.ravel(), np.maximum(clicks.times[left], clicks.times[right]))
    return Pairs(
        asked=different[1],
        found=different[2],
        times=times,
        counts=counts.astype(np.float32),
        codes=different[0].astype(np.int8),
    )
