"""What waits for the search thread: searches of callers who wait, and background ones behind them.

Everything that waits is taken as one batch. A background search (``SearchOptions.background``) is
searched in pieces of about PIECE_MS, each while nothing else waits: so another search waits for one
piece at most. Where there is always something else, it gets a piece every STARVED_S all the same.
"""

import math
import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from shardline.shards.core.messages import SearchReply
from shardline.shards.core.schema import Ranked
from shardline.shards.server.handlers import Work

PIECE_MS = 1.0
STARVED_S = 0.1


@dataclass(slots=True)
class BackgroundSearch:
    """A background search and the replies to its first ``done`` queries. ms_per_row: what a query
    is estimated to take, of one with a filter; infinite before the first piece."""

    work: Work
    done: int = 0
    replies: list[SearchReply] = field(default_factory=list)
    ms_per_row: float = math.inf

    def reply(self, others_share: float) -> SearchReply:
        """Of all pieces. seq: of the first one, because later ones may have had more writes.
        matched: the fewest of any, so that none is short without a reason."""
        first = self.replies[0]
        excluded = None
        if self.work.request.excluded is not None:
            parts = [
                np.zeros(len(each.ranked.ids), np.int32) if each.excluded is None else each.excluded
                for each in self.replies
            ]
            excluded = np.concatenate(parts)
        return SearchReply(
            ranked=Ranked(
                np.concatenate([each.ranked.ids for each in self.replies]),
                np.concatenate([each.ranked.scores for each in self.replies]),
            ),
            rows=self.replies[-1].rows,
            matched=min(each.matched for each in self.replies),
            generation=first.generation,
            seq=first.seq,
            search_ms=sum(each.search_ms for each in self.replies),
            others_share=others_share,
            excluded=excluded,
        )


class SearchQueue:
    """``put`` and ``stop`` may be called by any thread, ``next`` and ``put_back`` by one.

    max_rows: of one batch, which a single request may exceed.
    """

    def __init__(self, max_rows: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_rows = max_rows
        self._clock = clock
        self._arrived: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._background: deque[BackgroundSearch] = deque()
        self._piece_at = 0.0
        self._is_open = True

    def put(self, work: Work) -> None:
        self._arrived.put(work)

    def stop(self) -> None:
        """``next`` returns None once it has returned what others than background ones wait for."""
        self._arrived.put(None)

    def put_back(self, search: BackgroundSearch) -> None:
        """A background search of which there is more to do."""
        self._background.appendleft(search)

    def next(self) -> list[Work] | BackgroundSearch | None:
        """A batch, or a background search that a piece is to be searched of; waits for one. None:
        there will be none."""
        while self._is_open:
            if self._background and self._clock() >= self._starved_at:
                return self._piece()
            batch = self._batch()
            if batch:
                return batch
            if self._background and self._is_open:
                return self._piece()
        return None

    @property
    def _starved_at(self) -> float:
        return max(self._piece_at, self._background[0].work.arrived_at) + STARVED_S

    def _piece(self) -> BackgroundSearch:
        self._piece_at = self._clock()
        return self._background.popleft()

    def _batch(self) -> list[Work]:
        """What waits now, background searches set aside; waits where there is nothing at all."""
        batch: list[Work] = []
        rows = 0
        try:
            work = self._arrived.get(block=not self._background)
            while work is not None:
                if work.is_background:
                    self._background.append(BackgroundSearch(work))
                else:
                    batch.append(work)
                    rows += work.rows
                    if rows >= self._max_rows:
                        return batch
                work = self._arrived.get_nowait()
            self._is_open = False
        except queue.Empty:
            pass
        return batch
