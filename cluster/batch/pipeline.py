"""Threads of a job in one process: one reads ahead, others search and write a block each."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

import pyarrow as pa

from shardline.cluster.batch.loaded_shards import READ_AHEAD, blocks_in_flight
from shardline.cluster.batch.queries import Queries
from shardline.cluster.batch.result_columns import Columns, result_table
from shardline.cluster.batch.spans import Span
from shardline.cluster.batch.top_k import without_own
from shardline.shards.core.schema import Ranked
from shardline.shards.index.main_index import set_search_threads

Item = TypeVar("Item")
Found = TypeVar("Found")
Result = TypeVar("Result")


def ahead(items: Iterator[Item], depth: int = READ_AHEAD) -> Iterator[Item]:
    """The items in their order, up to ``depth`` made before they are asked for, in one thread."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, items, end) for _ in range(depth))
        while True:
            item = pending.popleft().result()
            if item is end:
                return
            pending.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]  # ``end`` is told apart by identity


class BlockWorkers(Generic[Found, Result]):
    """Threads that search a block each, and as many that finish one: merge with what is parked,
    write and fsync. A thread per block, and not all threads for one block: then nobody waits for
    the slowest at the end of each search. Two kinds of threads: then no core is idle while a disk
    is waited for.

    Use as a context manager: at its end all that was put is done. An error of a block is raised by
    a later ``put`` or at the end.
    """

    def __init__(
        self,
        workers: int,
        threads: int,
        *,
        search: Callable[[Span, Queries], Found],
        finish: Callable[[Span, Queries, Found], Result],
        done: Callable[[Span, Result], None],
    ) -> None:
        """workers: of each kind. threads: of faiss, per worker. done: called in the thread of
        ``put``, in the order of the blocks."""
        self._search, self._finish, self._done = search, finish, done
        self._most = blocks_in_flight(workers)
        self._searchers = ThreadPoolExecutor(
            workers, initializer=set_search_threads, initargs=(threads,)
        )
        self._finishers = ThreadPoolExecutor(workers)
        self._pending: deque[tuple[Span, Future[Future[Result]]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            while self._pending and error is None:
                self._collect()
        finally:
            self._searchers.shutdown(cancel_futures=True)
            self._finishers.shutdown(cancel_futures=True)

    def put(self, span: Span, queries: Queries) -> None:
        """The next block; waits while too many are under way."""
        while len(self._pending) >= self._most:
            self._collect()
        self._pending.append((span, self._searchers.submit(self._answer, span, queries)))

    def _answer(self, span: Span, queries: Queries) -> Future[Result]:
        found = self._search(span, queries)
        return self._finishers.submit(self._finish, span, queries, found)

    def _collect(self) -> None:
        span, future = self._pending.popleft()
        self._done(span, future.result().result())


def finished_table(queries: Queries, ranked: Ranked, k: int, columns: Columns | None) -> pa.Table:
    """The rows of a part from what all shards found, (n, searched_k)."""
    return result_table(queries.ids, without_own(ranked, queries.own, k), columns)
