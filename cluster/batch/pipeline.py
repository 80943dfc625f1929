"""Threads around a search: blocks are read ahead of it and written behind it, a few at a time."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import pyarrow as pa

from shardline.cluster.batch.part_files import OutputFolder
from shardline.cluster.batch.queries import Queries
from shardline.cluster.batch.result_columns import ItemColumns, result_table
from shardline.cluster.batch.spans import Span
from shardline.cluster.batch.top_k import without_own
from shardline.shards.core.files import FileEntry
from shardline.shards.core.schema import Ranked

READ_AHEAD = 2
WRITTEN_BEHIND = 2

Item = TypeVar("Item")


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


class PartWriter:
    """Makes tables of results and writes them as parts, in a thread of its own.

    Use as a context manager: at its end all that was put is written. An error of a block is raised
    by a later ``put`` or at the end.
    """

    def __init__(
        self,
        output: OutputFolder,
        columns: ItemColumns | None,
        written: Callable[[Span, FileEntry], None],
    ) -> None:
        self._output, self._columns, self._written = output, columns, written
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[tuple[Span, Future[FileEntry]]] = deque()

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
            self._pool.shutdown(cancel_futures=True)

    def put(self, span: Span, queries: Queries, ranked: Ranked) -> None:
        """ranked (n, searched_k): the own items of the queries are still among them."""
        while len(self._pending) >= WRITTEN_BEHIND:
            self._collect()
        self._pending.append((span, self._pool.submit(self._write, span, queries, ranked)))

    def _collect(self) -> None:
        span, future = self._pending.popleft()
        self._written(span, future.result())

    def _write(self, span: Span, queries: Queries, ranked: Ranked) -> FileEntry:
        return self._output.write(span, self.table(queries, ranked))

    def table(self, queries: Queries, ranked: Ranked) -> pa.Table:
        """A part's rows."""
        return finished_table(queries, ranked, self._output.job.wanted.k, self._columns)


def finished_table(
    queries: Queries, ranked: Ranked, k: int, columns: ItemColumns | None
) -> pa.Table:
    """The rows of a part from what all shards found, (n, searched_k)."""
    return result_table(queries.ids, without_own(ranked, queries.own, k), columns)
