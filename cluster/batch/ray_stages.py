"""The stages of a job on Ray, a process each: read, search one shard, write. No Ray here"""

import pickle
from abc import ABC, abstractmethod
from collections import deque

import pyarrow as pa

from shardline.cluster.batch.loaded_shards import LoadedShards
from shardline.cluster.batch.local_batch import BatchPlan
from shardline.cluster.batch.part_files import OutputFolder
from shardline.cluster.batch.pipeline import finished_table
from shardline.cluster.batch.priority import give_way
from shardline.cluster.batch.ray_tables import NUMBER, START, STOP, block_table, parts_of, spans_in
from shardline.cluster.batch.spans import Span
from shardline.cluster.batch.top_k import merge_parts
from shardline.shards.core.errors import ShardlineError
from shardline.shards.index.main_index import set_search_threads

FAILURE = "failure"  # the column of an error on its way to whoever waits for parts


class Stage(ABC):
    """A stage gives what it raises as its result, which all stages after it hand on: Ray Data's own
    error for a stage that raises is another one, with the text of ours at most.
    """

    _failed: pa.Table | None = None  # of the first failure: nothing comes after it

    def __call__(self, table: pa.Table) -> pa.Table:
        if FAILURE in table.column_names:
            return table
        if self._failed is None:
            try:
                return self.work(table)
            except (ShardlineError, OSError) as error:
                self._failed = pa.table({FAILURE: [pickle.dumps(error)]})
        return self._failed

    @abstractmethod
    def work(self, table: pa.Table, /) -> pa.Table:
        """What the stage makes of a block."""


class Reader(Stage):
    """Spans to queries: one row per query from here on."""

    def __init__(self, plan: BatchPlan) -> None:
        give_way()
        self._asked: deque[Span] = deque()
        # one reader for all: a file is opened again only where a block was done before
        self._blocks = plan.source.read(iter(self._asked.popleft, None))

    def work(self, spans: pa.Table) -> pa.Table:
        (span,) = spans_in(spans)
        self._asked.append(span)
        found, queries = next(self._blocks)
        assert found == span
        return block_table(span, queries, None)


class ShardStage(Stage):
    """Queries, with the best of the shards before, to the best with this one."""

    def __init__(self, plan: BatchPlan, shard: int, threads: int) -> None:
        give_way()
        self._wanted, self._threads = plan.job.wanted, threads
        self._loaded = LoadedShards.load(plan.folder, [shard])

    def work(self, table: pa.Table) -> pa.Table:
        span, queries, before = parts_of(table)
        assert queries.vectors is not None
        set_search_threads(self._threads)  # Ray may call from any thread
        found = self._loaded.search(queries.vectors, self._wanted)
        return block_table(span, queries, found if before is None else merge_parts([before, found]))


class Writer(Stage):
    """Results to parts on disk: one row per part from here on."""

    def __init__(self, plan: BatchPlan, output: OutputFolder) -> None:
        give_way()
        self._k, self._columns, self._output = plan.job.wanted.k, plan.columns(), output

    def work(self, table: pa.Table) -> pa.Table:
        span, queries, ranked = parts_of(table)
        assert ranked is not None
        rows = finished_table(queries, ranked, self._k, self._columns)
        entry = self._output.write(span, rows)
        return pa.table(
            {
                NUMBER: [span.number],
                START: [span.start],
                STOP: [span.stop],
                "name": [entry.name],
                "bytes": [entry.bytes],
                "sha256": [entry.sha256],
                "rows": [entry.rows],
            }
        )
