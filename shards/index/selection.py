"""Which rows of a main index may come back: all but those that are excluded.

An immutable value, passed with every search. What faiss needs of it is made once, with the value,
so a search costs the same with a selection as without, and two selections used alternately do not
undo each other's preparations.
"""

from dataclasses import dataclass, field
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import IdArray


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """live (rows,) bool; num_excluded of it are False. ``selector`` is faiss's form of it.

    prepared: the faiss parameters of searches with this selection, by k and search parameters;
    filled by ``MainIndex``.
    """

    live: NDArray[np.bool_]
    num_excluded: int
    selector: Any
    prepared: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @classmethod
    def without(cls, excluded: IdArray, *, rows: int) -> "Selection | None":
        """All of ``rows`` local rows but ``excluded`` (m,) int64; None where nothing is excluded,
        which is searched without a selector."""
        if excluded.size == 0:
            return None
        live = np.ones(rows, dtype=np.bool_)
        live[excluded] = False
        selector = faiss.IDSelectorBitmap(np.packbits(live, bitorder="little"))
        return cls(live, rows - int(live.sum()), selector)
