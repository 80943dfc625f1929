"""A writer's attempts over HTTP, each journaled: acknowledged, refused, or with an unknown outcome.

No thread and no schedule: whoever has one says what is written when.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from shardline.bench.journal import Journal, Log, Versions, Write
from shardline.router.client.answers import DeleteAnswer, UpsertAnswer
from shardline.router.client.seq import Seq, newer
from shardline.router.client.sync_client import Client
from shardline.shards.core.errors import NotFound, ShardlineError
from shardline.shards.core.schema import FloatArray

OK = "ok"
TITLE = "title"
# Least cosine between an item's stored vector and the one that was written: of an index that keeps
# float32, and of any other, whose compactions make the vector one of its codes. Vectors of other
# writes are nowhere near.
EXACT, CODED = 1 - 1e-5, 0.8


@dataclass(slots=True, kw_only=True)
class HttpWriter:
    """One writer's view: its client (which must not repeat by itself), what it may write.

    run: begins its idempotency keys, so that no other run's are repeated. vectors: (n, dim) of a
    write. seq: asks a search for all that was acknowledged to this writer. titled: items have a
    title, which names their version. model_version: goes with every upsert.
    """

    number: int
    run: str
    client: Client
    journal: Journal
    versions: Versions
    vectors: Callable[[Write], FloatArray]
    titled: bool = False
    model_version: str | None = None
    timeout_ms: float | None = None
    seq: Seq = field(default_factory=Seq)
    _written: int = 0
    _newest: dict[Log, int] = field(default_factory=dict)
    _generation: int | None = None

    def write(self, items: Sequence[int], *, is_upsert: bool) -> Write:
        """A new one, to be tried until it is acknowledged."""
        self._written += 1
        write = Write(
            writer=self.number,
            number=self._written,
            items=list(items),
            is_upsert=is_upsert,
            floor=dict(self._newest),
        )
        self.versions.send(write, self.vectors(write), self._title_of(write))
        return write

    def attempt(self, write: Write) -> str:
        """OK, or the code of the error that came instead of an acknowledgement."""
        write.attempts += 1
        try:
            answer = self._sent(write)
        except ShardlineError as error:
            self.journal.refused(error.code)
            return error.code
        self._acknowledged(write, answer)
        return OK

    def repeat(self, write: Write) -> str:
        """Sends once more what was acknowledged: the same answer must come. OK, or a code."""
        try:
            answer = self._sent(write)
        except ShardlineError as error:
            self.journal.refused(error.code)
            return error.code
        self.journal.repeats += 1
        assert isinstance(write.reply, UpsertAnswer | DeleteAnswer)
        is_same = answer.generation != write.reply.generation or (
            (answer.seq, existed(answer)) == (write.reply.seq, existed(write.reply))
        )
        if not is_same:
            self.journal.violation(f"write {write.key}: {write.reply}, repeated {answer}")
        return OK

    def _sent(self, write: Write) -> UpsertAnswer | DeleteAnswer:
        key = f"{self.run}-{write.key}"
        if not write.is_upsert:
            return self.client.delete(write.items, key=key, timeout_ms=self.timeout_ms)
        title = self._title_of(write)
        return self.client.upsert(
            item_ids=write.items,
            vectors=self.vectors(write),
            attributes={TITLE: [title(item) for item in write.items]} if self.titled else None,
            model_version=self.model_version,
            key=key,
            timeout_ms=self.timeout_ms,
        )

    def _title_of(self, write: Write) -> Callable[[int], str | None]:
        return write.title if self.titled else lambda item: None

    def _acknowledged(self, write: Write, answer: UpsertAnswer | DeleteAnswer) -> None:
        """In this order: a reader takes the moment before ``seq``."""
        living = self.versions.living(write.items)
        is_crossing = self._generation not in (None, answer.generation)
        if not is_crossing and (answer.rows, existed(answer)) != (len(write.items), living):
            self.journal.violation(f"write {write.key}: {living} items existed, but {answer}")
        write.reply, self._generation = answer, answer.generation
        numbers = {
            (answer.generation, shard): seq
            for shard, seq in enumerate(answer.seq)
            if seq is not None
        }
        self.journal.acknowledge(write, numbers)
        self._newest |= numbers
        self.seq = newer(self.seq, answer.seq) if self.seq else answer.seq
        self.versions.acknowledge(write)


def existed(answer: UpsertAnswer | DeleteAnswer) -> int:
    """How many of the items were there before."""
    return answer.updated if isinstance(answer, UpsertAnswer) else answer.deleted


def cosine(one: FloatArray, other: FloatArray) -> float:
    """Of two vectors (dim,)."""
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


@dataclass(slots=True, kw_only=True)
class Kept:
    """Items as they are found one by one. lost: acknowledged and not there, or in another version;
    returned: deleted and there; unanswered: nobody could be asked."""

    asked: int = 0
    lost: list[int] = field(default_factory=list)
    returned: list[int] = field(default_factory=list)
    unanswered: list[int] = field(default_factory=list)


def look_at(
    client: Client,
    versions: Versions,
    items: Sequence[int],
    *,
    least_cosine: float = EXACT,
    titled: bool = False,
    pause_s: float = 0.0,
) -> Kept:
    """GET of every item, each compared with what is acknowledged of it when it is asked for."""
    kept = Kept()
    for item in items:
        begin = versions.moment([item])
        kept.asked += 1
        try:
            found = client.item(item)
            fits = [
                version.vector is not None
                and cosine(found.vector, version.vector) >= least_cosine
                and (not titled or found.attributes.get(TITLE) == version.title)
                for version in versions.since(item, begin)
            ]
        except NotFound:
            fits = [version.is_deleted for version in versions.since(item, begin)]
        except ShardlineError:
            kept.unanswered.append(item)
            continue
        if not any(fits):
            is_deleted = versions.newest(item).is_deleted
            (kept.returned if is_deleted else kept.lost).append(item)
        time.sleep(pause_s)
    return kept
