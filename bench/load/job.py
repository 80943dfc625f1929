"""What a client process is to send, and what became of it: plain data, both ways by pickling."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardline.bench.load.schedule import FloatTimes
from shardline.shards.core.schema import IdArray


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadJob:
    """What one process sends; plain data, crosses to it by pickling.

    messages: whole HTTP requests; order (n,) says which of them each request sends; intended_s
    (n,) are seconds from the start; kept (n,) bool: whose bodies come back. With closed_s the
    times are not used: requests are sent in order for that many seconds.
    """

    address: tuple[str, int]
    messages: tuple[bytes, ...]
    order: IdArray
    intended_s: FloatTimes
    kept: NDArray[np.bool_]
    max_connections: int = 512
    timeout_s: float = 10.0
    closed_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Records:
    """What became of each request, in order: arrays (n,), seconds from the start.

    sent_s is NaN where it was never sent, done_s where there was no whole answer; status is the
    HTTP status, 0 without one; coverage is the share of rows an answer saw, NaN where it says
    none. errors: number -> what came instead of an answer.
    """

    intended_s: FloatTimes
    sent_s: FloatTimes
    done_s: FloatTimes
    status: NDArray[np.int16]
    coverage: NDArray[np.float64]
    errors: dict[int, str]
    bodies: dict[int, bytes]
    cpu_share: float
    connections: int

    @classmethod
    def empty(cls, intended_s: FloatTimes) -> "Records":
        """Nothing sent yet."""
        count = len(intended_s)
        return cls(
            intended_s=intended_s.copy(),
            sent_s=np.full(count, np.nan),
            done_s=np.full(count, np.nan),
            status=np.zeros(count, dtype=np.int16),
            coverage=np.full(count, np.nan),
            errors={},
            bodies={},
            cpu_share=0.0,
            connections=0,
        )
