"""A job answered by the running cluster over HTTP: it sees what is live, and yields to others.

Its searches are background ones, at a rate that follows from what others do (``pace``). Only
complete answers count, and one that is unavailable is asked again for a minute. Another generation
than the one that the job began with ends it.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from shardline.cluster.batch.batch_job import BatchJob, Wanted
from shardline.cluster.batch.job_parts import Parts
from shardline.cluster.batch.live_columns import AnsweredColumns
from shardline.cluster.batch.pace import FULL_IN_FLIGHT, SIZES, Pace
from shardline.cluster.batch.part_files import OutputFolder
from shardline.cluster.batch.pipeline import ahead
from shardline.cluster.batch.priority import give_way
from shardline.cluster.batch.queries import Queries, QuerySource
from shardline.cluster.batch.result_columns import result_table
from shardline.cluster.batch.spans import Span
from shardline.router.client.answers import SearchAnswer
from shardline.router.client.sync_client import Client
from shardline.router.contract import PayloadTooLarge
from shardline.router.limits import MAX_RETURNED_VALUES
from shardline.router.query import QueryKind
from shardline.shards.core.errors import InvalidInput, Unavailable, VersionMismatch
from shardline.shards.core.files import FileEntry
from shardline.shards.core.schema import Metric, Ranked

logger = logging.getLogger(__name__)

TIMEOUT_MS = 10_000.0  # the most a router grants by default; where it grants less, its own default
SIZE_FIELDS = frozenset((*QueryKind, "return"))  # of a refusal that fewer queries may avoid
WAITS_S = (0.5, 1, 2, 4, 8, 16, 30)  # before further attempts of a request


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCluster:
    """What answers: a generation of a model, and what its queries must be."""

    generation: int
    model_version: str
    dim: int
    metric: Metric

    @classmethod
    def of(cls, status: dict[str, Any]) -> "LiveCluster":
        """From ``Client.status``."""
        return cls(
            generation=int(status["generation"]),
            model_version=str(status["model_version"]),
            dim=int(status["dim"]),
            metric=Metric(status["metric"]),
        )


@dataclass(slots=True, kw_only=True)
class LiveSearch:
    """Asks the cluster, request by request. types: of the attributes that are wanted; note: prints
    a line."""

    client: Client
    cluster: LiveCluster
    wanted: Wanted
    types: dict[str, pa.DataType]
    pace: Pace = field(init=False)
    timeout_ms: float | None = TIMEOUT_MS
    note: Callable[[str], None] = logger.info
    clock: Callable[[], float] = time.perf_counter
    wait: Callable[[float], None] = time.sleep
    _failures: int = field(default=0, init=False)  # since the last answer

    def __post_init__(self) -> None:
        columns = len(self.wanted.attributes) + self.wanted.original_ids
        most = MAX_RETURNED_VALUES // (self.wanted.k * max(1, columns))
        self.pace = Pace(self.wanted.k, min(SIZES[-1], most))

    def check(self, source: QuerySource) -> None:
        """Asks the first query, so that what the cluster refuses is said before work starts.

        Raises:
            InvalidInput: k, a parameter or a column is none for this cluster. Unavailable: it
                does not answer.
        """
        for _, queries in source.read([Span(0, 0, 1)]):
            self._ask(queries)

    def answers(self, queries: Queries) -> list[SearchAnswer]:
        """To all queries, in their order.

        Raises:
            VersionMismatch: another generation or model answers. Unavailable: still no complete
                answer after all attempts.
        """
        block = _Block(queries)
        with ThreadPoolExecutor(FULL_IN_FLIGHT, initializer=give_way) as pool:
            pending: dict[Future[_Timed], Rows] = {}
            while block.todo or pending:
                while block.todo and len(pending) < self.pace.in_flight:
                    rows = block.take(self.pace.size)
                    pending[pool.submit(self._timed, queries.rows(*rows))] = rows
                for done in futures.wait(pending, return_when=futures.FIRST_COMPLETED).done:
                    self._take(block, pending.pop(done), done)
        return block.in_order()

    def table(self, queries: Queries, answers: Sequence[SearchAnswer]) -> pa.Table:
        """The rows of a part. Raises DataError: attributes of other types than these items'
        generation has."""
        ranked = Ranked(
            np.concatenate([answer.ids for answer in answers]),
            np.concatenate([answer.scores for answer in answers]),
        )
        columns = AnsweredColumns(answers, self.wanted, self.types)
        return result_table(queries.ids, ranked, columns)

    def _take(self, block: "_Block", rows: "Rows", done: "Future[_Timed]") -> None:
        """The answer to some rows of a block, or another try of them; then the pause that the
        others are due."""
        try:
            answer, seconds = done.result()
        except Unavailable as error:
            block.todo.appendleft(rows)
            self._wait_to_ask_again(error)
            return
        except InvalidInput as error:
            is_size = error.field in SIZE_FIELDS or isinstance(error, PayloadTooLarge)
            count = rows[1] - rows[0]
            if count == 1 or not is_size:
                raise
            logger.info("smaller requests from here on: %s", error)
            self.pace.too_large(count)
            block.todo.appendleft(rows)
            return
        if self._failures:
            self.note("answered again")
        self._failures = 0
        block.answers[rows[0]] = answer
        self.wait(self.pace.took(seconds, answer.others_share))

    def _wait_to_ask_again(self, error: Unavailable) -> None:
        """Before another try. Raises Unavailable: there have been enough."""
        if self._failures == len(WAITS_S):
            raise Unavailable(
                f"no complete answer to {self._failures + 1} requests in {sum(WAITS_S):g} s",
                got=str(error),
                hint="what is written stays: the same command goes on once it answers",
            ) from error
        if not self._failures:
            self.note(f"no complete answer, asking again: {error}")
        self.pace.refused()
        self.wait(WAITS_S[self._failures])
        self._failures += 1

    def _timed(self, queries: Queries) -> "_Timed":
        """An answer, and the seconds that it took."""
        started = self.clock()
        answer = self._ask(queries)
        return answer, self.clock() - started

    def _ask(self, queries: Queries) -> SearchAnswer:
        try:
            return self._asked(queries)
        except InvalidInput as error:
            if error.field != "timeout_ms" or self.timeout_ms is None:
                raise
            self.timeout_ms = None
            return self._asked(queries)

    def _asked(self, queries: Queries) -> SearchAnswer:
        answer = self.client.search(
            vectors=queries.vectors,
            features=queries.features,
            item_ids=queries.own if queries.vectors is None else None,
            k=self.wanted.k,
            params=self.wanted.params,
            min_coverage=1.0,
            timeout_ms=self.timeout_ms,
            return_=self.wanted.attributes or None,
            return_original_ids=self.wanted.original_ids or None,
            filter=self.wanted.filter,
            background=True,
        )
        found = answer.generation, answer.model_version
        if found != (self.cluster.generation, self.cluster.model_version):
            raise VersionMismatch(
                "the cluster serves something else than when the job began",
                expected=f"generation {self.cluster.generation}, "
                f"model {self.cluster.model_version}",
                got=f"generation {found[0]}, model {found[1]}",
                hint="start it again with a new output folder",
            )
        if answer.attributes_missing:
            raise Unavailable(
                "attributes are missing", got=", ".join(map(str, answer.attributes_missing))
            )
        return answer


def live_job(
    source: QuerySource, cluster: LiveCluster, wanted: Wanted, block_rows: int
) -> BatchJob:
    """The job of a source's queries for what a cluster serves now."""
    return BatchJob(
        queries=source.identity,
        rows=source.rows,
        generation=cluster.generation,
        content=cluster.model_version,
        wanted=wanted,
        block_rows=block_rows,
        live=True,
    )


def run_live(
    source: QuerySource,
    search: LiveSearch,
    output: OutputFolder,
    todo: Sequence[Span],
    parts: Parts,
) -> None:
    """Answers the blocks ``todo``, one after the other; each is written while the next one is
    asked. Raises as ``LiveSearch`` and ``OutputFolder.write``."""

    def write(span: Span, queries: Queries, answers: Sequence[SearchAnswer]) -> FileEntry:
        return output.write(span, search.table(queries, answers))

    parts.begin()
    writing: tuple[Span, Future[FileEntry]] | None = None
    with ThreadPoolExecutor(1, initializer=give_way) as writer:
        for span, queries in ahead(source.read(todo)):
            answers = search.answers(queries)
            if writing is not None:
                parts.written(writing[0], writing[1].result())
            writing = span, writer.submit(write, span, queries, answers)
        if writing is not None:
            parts.written(writing[0], writing[1].result())


Rows = tuple[int, int]  # from the first to before the second
_Timed = tuple[SearchAnswer, float]


class _Block:
    """The queries of a part: which rows are still to be asked, and the answers to others by their
    first row."""

    def __init__(self, queries: Queries) -> None:
        self.todo: deque[Rows] = deque([(0, len(queries))])
        self.answers: dict[int, SearchAnswer] = {}

    def take(self, size: int) -> Rows:
        """The next rows, at most ``size``, which must be answered or given back to ``todo``."""
        start, stop = self.todo.popleft()
        cut = min(start + size, stop)
        if cut < stop:
            self.todo.appendleft((cut, stop))
        return start, cut

    def in_order(self) -> list[SearchAnswer]:
        return [self.answers[start] for start in sorted(self.answers)]
