"""Writers and their readers: items of their own are upserted and deleted while faults happen.

A writer repeats what was not acknowledged, at once or after other writes, with the same key. A
reader asks with ``min_seq`` for all that was acknowledged when it began, and has every item of
every writer in its answer or knows that it is deleted: ``written_faults`` says what is wrong.
"""

import random
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

from shardline.bench.http_writer import OK, HttpWriter, Kept, look_at
from shardline.bench.journal import Journal, Versions, Write, vectors_of
from shardline.cluster.serving.endpoint import Address
from shardline.router.client.retries import Retry
from shardline.router.client.seq import Seq, newer
from shardline.router.client.sync_client import Client
from shardline.router.written import WriteKind
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.schema import FloatArray
from tests.chaos.askers import CLIENT_TIMEOUT_S, TIMEOUT_MS, Log, said_of
from tests.chaos.corpus import in_space
from tests.chaos.oracle import TITLE, Finding, FindingKind, Oracle, QueryKind, Said
from tests.chaos.windows import Outcome
from tests.chaos.written import WRITTEN_DIM, Asked, written_faults

PAUSE_S, PAUSE_AFTER_ERROR_S = 0.05, 0.1
READ_PAUSE_S = 0.03
MAX_ITEMS = 6  # of one write
UPSERTS = 0.7  # share of writes
LATER = 0.5  # share of failed writes that are repeated after others
REPEATED = 0.05  # share of acknowledged writes that are sent once more
DRAINED_S = 60.0  # until all writes are acknowledged at the end
READER = "reader"


@dataclass(slots=True)
class Written:
    """What all writers share. kept: the GET of every item at the end; None: it did not come."""

    versions: Versions
    journal: Journal = field(default_factory=Journal)
    kept: Kept | None = None

    def figures(self) -> dict[str, Any]:
        """Counts, ready for JSON."""
        journal, kept = self.journal, self.kept or Kept()
        return {
            "acknowledged": journal.writes,
            "refused": journal.refusals,
            "unknown": journal.unknown,
            "repeated_after_acknowledgement": journal.repeats,
            "searches_for_all_items": journal.reads,
            "items_at_the_end": kept.asked,
            "lost": len(kept.lost),
            "returned": len(kept.returned),
        }

    def findings(self) -> list[Finding]:
        """What must not be, at the end of the run."""
        texts = list(self.journal.violations)
        if self.kept is not None:
            for what in ("lost", "returned", "unanswered"):
                if items := getattr(self.kept, what):
                    texts.append(f"{len(items)} items {what} at the end: {items[:5]}")
        return [Finding(kind=FindingKind.WRITES, text=text) for text in texts]


class Writers:
    """All writers and the reader at once, between entering and leaving the block; at its end every
    write is acknowledged, and every item is looked at."""

    def __init__(
        self, address: Address, oracle: Oracle, log: Log, clock: Callable[[], float], seed: int
    ) -> None:
        self._address, self._oracle, self._log, self._clock = address, oracle, log, clock
        self._seed = seed
        owned = oracle.corpus.owned
        self.written = Written(Versions({i: v for each in owned for i, v in each.items()}))
        self._clients = ExitStack()
        self._writers = [self._writer(number, secrets.token_hex(4)) for number in range(len(owned))]
        self._stopped = threading.Event()
        names = [writer_name(writer) for writer in self._writers]
        self.needed = {(name, kind) for name in names for kind in WriteKind}
        self.needed.add((READER, QueryKind.VECTORS))
        self._threads = [
            threading.Thread(target=self._write, args=(writer, random.Random(f"{seed} {name}")))
            for writer, name in zip(self._writers, names, strict=True)
        ]
        self._threads.append(
            threading.Thread(target=self._read, args=(random.Random(f"{seed} reader"),))
        )

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._clients:
            self._stopped.set()
            for thread in self._threads:
                thread.join()
            with self._client(Retry()) as client:
                items = [item for each in self._oracle.corpus.owned for item in each]
                self.written.kept = look_at(client, self.written.versions, items, titled=True)

    def _client(self, retry: Retry) -> Client:
        return Client(self._address.url, CLIENT_TIMEOUT_S, key=self._address.key, retry=retry)

    def _writer(self, number: int, run: str) -> HttpWriter:
        def vectors(write: Write) -> FloatArray:
            return in_space(vectors_of(self._seed, write, WRITTEN_DIM))

        return HttpWriter(
            number=number,
            run=run,
            client=self._clients.enter_context(self._client(Retry(attempts=1))),
            journal=self.written.journal,
            versions=self.written.versions,
            vectors=vectors,
            titled=True,
            timeout_ms=TIMEOUT_MS,
        )

    def _write(self, writer: HttpWriter, rng: random.Random) -> None:
        items = list(self._oracle.corpus.owned[writer.number])
        left: list[Write] = []
        while not self._stopped.is_set():
            write = next_write(writer, items, left, rng)
            if self._attempt(writer, write) == OK:
                if rng.random() < REPEATED:
                    writer.repeat(write)  # counted, and not an outcome: nothing depends on it
                self._stopped.wait(PAUSE_S)
            else:
                left.insert(len(left) if rng.random() < LATER else 0, write)
                self._stopped.wait(PAUSE_AFTER_ERROR_S)
        self._drain(writer, left)

    def _drain(self, writer: HttpWriter, left: list[Write]) -> None:
        until = self._clock() + DRAINED_S
        pause = threading.Event()
        while left and self._clock() < until:
            if self._attempt(writer, left[0]) == OK:
                left.pop(0)
            else:
                pause.wait(PAUSE_AFTER_ERROR_S)
        if left:
            self.written.journal.violation(
                f"{len(left)} writes were not acknowledged within {DRAINED_S:g} s"
            )

    def _attempt(self, writer: HttpWriter, write: Write) -> str:
        began = self._clock()
        code = writer.attempt(write)
        outcome = Outcome(
            asker=writer_name(writer),
            kind=WriteKind.UPSERT if write.is_upsert else WriteKind.DELETE,
            began_s=began,
            ended_s=self._clock(),
            code=code,
        )
        self._log.add(outcome, [])
        return code

    def _read(self, rng: random.Random) -> None:
        versions, items = self.written.versions, list(self.written.versions.moment())
        with self._client(Retry(attempts=1)) as client:
            while not self._stopped.wait(READ_PAUSE_S):
                item = rng.choice(items)
                moment = versions.moment()  # before the numbers: they have all of it
                vector = versions.last_vector(item, moment)
                if vector is None:
                    continue
                asked = Asked(item=item, vector=vector, moment=moment)
                self._ask(client, asked, self._seq())

    def _seq(self) -> Seq | None:
        """Of all that is acknowledged."""
        found: Seq | None = None
        for writer in self._writers:
            if writer.seq:
                found = writer.seq if found is None else newer(found, writer.seq)
        return found

    def _ask(self, client: Client, asked: Asked, seq: Seq | None) -> None:
        began = self._clock()
        answer: Said | None = None
        code, text = OK, ""
        try:
            answer = said_of(
                client.search(
                    vectors=[asked.vector],
                    k=asked.k_for(self._oracle.corpus),
                    timeout_ms=TIMEOUT_MS,
                    return_=[TITLE],
                    min_seq=seq,
                ),
                titled=True,
            )
        except ShardlineError as error:
            code, text = error.code, str(error)
        ended = self._clock()
        degraded = () if answer is None else answer.coverage.degraded
        outcome = Outcome(
            asker=READER,
            kind=QueryKind.VECTORS,
            began_s=began,
            ended_s=ended,
            code=code,
            missing=tuple(sorted(each.shard for each in degraded)),
            reasons=frozenset(each.code for each in degraded),
            text=text or ", ".join(f"{each.shard} {each.code}" for each in degraded),
        )
        findings: Sequence[Finding] = ()
        if answer is not None:
            self.written.journal.reads += 1
            findings = written_faults(self._oracle, self.written.versions, asked, answer, began)
        self._log.add(outcome, list(findings))


def next_write(
    writer: HttpWriter, items: Sequence[int], left: list[Write], rng: random.Random
) -> Write:
    """One of those ``left``, which it takes out, or a new one of items that none of them has."""
    taken = {item for write in left for item in write.items}
    free = [item for item in items if item not in taken]
    if left and (len(free) < MAX_ITEMS or rng.random() < LATER):
        return left.pop(0)
    chosen = rng.sample(free, rng.randint(1, MAX_ITEMS))
    return writer.write(chosen, is_upsert=rng.random() < UPSERTS)


def writer_name(writer: HttpWriter) -> str:
    return f"writer {writer.number}"
