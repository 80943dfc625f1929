"""What writers have sent and what was acknowledged: so what a cluster must hold follows from it.

Every writer owns its items, and repeats a write that was not acknowledged, with the same key, until
it is, before it writes any of these items again. So the versions of an item are in an order, and a
reader must find one from the last that was acknowledged when it began to the last that was sent
when it had its answer: ``Versions``. ``Journal`` counts outcomes, and holds what must never be.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from shardline.router.client.answers import DeleteAnswer, UpsertAnswer
from shardline.shards.core.errors import (
    Behind,
    DeadlineExceeded,
    DeltaFull,
    NotPrimary,
    Overloaded,
    ReadOnly,
    StoreFull,
    Unavailable,
)
from shardline.shards.core.messages import WriteReply
from shardline.shards.core.schema import FloatArray

Log = tuple[int, int]  # generation, shard: numbers of writes are of one of them
Seqs = Mapping[Log, int]

REFUSED = frozenset(
    each.code for each in (NotPrimary, ReadOnly, StoreFull, DeltaFull, Overloaded, Behind)
)
# applied, or not, or later: no answer came, or a shard gave none
UNKNOWN = frozenset({Unavailable.code, DeadlineExceeded.code})


@dataclass(slots=True)
class Write:
    """floor: the newest numbers that had been acknowledged to the same writer when this one was
    sent first; so its own are higher."""

    writer: int
    number: int
    items: list[int]
    is_upsert: bool
    floor: Seqs
    reply: WriteReply | UpsertAnswer | DeleteAnswer | None = None
    attempts: int = 0

    @property
    def key(self) -> str:
        return f"{self.writer}-{self.number}"

    def title(self, item: int) -> str:
        return f"{self.key}-{item}"


def vectors_of(seed: int, write: Write, dim: int) -> FloatArray:
    """(n, dim) float32, of unit length, of no other write."""
    rng = np.random.default_rng((seed, write.writer, write.number))
    made = rng.standard_normal((len(write.items), dim)).astype(np.float32)
    unit: FloatArray = made / np.linalg.norm(made, axis=1, keepdims=True)
    return unit


@dataclass(slots=True)
class Journal:
    """acknowledged: by log and number. violations: what must never be. refusals, unknown: attempts
    by the code of their error."""

    acknowledged: dict[tuple[Log, int], Write] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    refusals: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    writes: int = 0
    repeats: int = 0
    reads: int = 0

    def violation(self, text: str) -> None:
        with self.lock:
            self.violations.append(text)

    def refused(self, code: str) -> None:
        """An attempt without an acknowledgement; a code that no write may end with is a
        violation."""
        with self.lock:
            counts = self.unknown if code in UNKNOWN else self.refusals
            counts[code] = counts.get(code, 0) + 1
            if code not in UNKNOWN | REFUSED:
                self.violations.append(f"a write ended with {code}")

    def acknowledge(self, write: Write, seqs: Seqs) -> None:
        with self.lock:
            for log, seq in seqs.items():
                known = self.acknowledged.setdefault((log, seq), write)
                if known is not write:
                    self.violations.append(
                        f"writes {known.key} and {write.key} were both acknowledged as {seq} of "
                        f"{log}"
                    )
                if seq <= (floor := write.floor.get(log, 0)):
                    self.violations.append(
                        f"write {write.key} got number {seq} of {log}, though {floor} had been "
                        "acknowledged before it was sent"
                    )
            self.writes += 1


@dataclass(frozen=True, slots=True)
class Version:
    """What a write made of an item: its vector (dim,) and title; None for both: deleted."""

    write: str
    vector: FloatArray | None = None
    title: str | None = None

    @property
    def is_deleted(self) -> bool:
        return self.vector is None


ABSENT = Version("none")
Moment = Mapping[int, int]  # item -> the place of its last acknowledged version by then


class Versions:
    """Of each item all that were sent, in their order. Threads may share it."""

    def __init__(self, built: Mapping[int, Version]) -> None:
        """``built``: the items of all writers before any write, ``ABSENT`` where there was none."""
        self._sent = {item: [version] for item, version in built.items()}
        self._acknowledged = dict.fromkeys(built, 0)
        self._lock = threading.Lock()

    def __contains__(self, item: int) -> bool:
        return item in self._sent

    def add(self, built: Mapping[int, Version]) -> None:
        """Further items, as they are before any write."""
        with self._lock:
            self._sent |= {item: [version] for item, version in built.items()}
            self._acknowledged |= dict.fromkeys(built, 0)

    def send(self, write: Write, vectors: FloatArray, title: Callable[[int], str | None]) -> None:
        """Before the first attempt of a write; ``vectors`` (n, dim) as its items."""
        with self._lock:
            for item, vector in zip(write.items, vectors, strict=True):
                made = Version(write.key, vector, title(item))
                self._sent[item].append(made if write.is_upsert else Version(write.key))

    def acknowledge(self, write: Write) -> None:
        with self._lock:
            for item in write.items:
                self._acknowledged[item] = len(self._sent[item]) - 1

    def moment(self, items: Iterable[int] | None = None) -> Moment:
        """What is acknowledged now, of all items or some."""
        with self._lock:
            if items is None:
                return dict(self._acknowledged)
            return {item: self._acknowledged[item] for item in items}

    def since(self, item: int, begin: Moment) -> list[Version]:
        """Those that a reader may find who began at that moment, and has the answer now."""
        with self._lock:
            return self._sent[item][begin[item] :]

    def newest(self, item: int) -> Version:
        """The last one that is acknowledged."""
        with self._lock:
            return self._sent[item][self._acknowledged[item]]

    def last_vector(self, item: int, begin: Moment) -> FloatArray | None:
        """The newest vector that the item had up to a moment; None: it never had one."""
        with self._lock:
            for version in reversed(self._sent[item][: begin[item] + 1]):
                if version.vector is not None:
                    return version.vector
        return None

    def living(self, items: Iterable[int]) -> int:
        """How many of the items exist, by the last acknowledged version."""
        return sum(not self.newest(item).is_deleted for item in items)
