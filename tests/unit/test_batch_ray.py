"""Stages of a batch job on Ray, without Ray: one reader for all blocks, parts seen late."""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from shardline.cluster.batch.batch_job import BatchJob, Wanted
from shardline.cluster.batch.part_files import claimed_folder
from shardline.cluster.batch.queries import Queries, cut
from shardline.cluster.batch.ray_batch import await_part
from shardline.cluster.batch.ray_stages import Reader
from shardline.cluster.batch.ray_tables import spans_in
from shardline.cluster.batch.spans import Span, spans_of
from shardline.shards.core.errors import DataError


class Source:
    """20 rows; counts how often they are opened."""

    opened = 0

    def read(self, spans: Iterable[Span]) -> Iterator[tuple[Span, Queries]]:
        yield from cut(spans, self.pieces)

    def pieces(self, start: int) -> Iterator[Queries]:
        self.opened += 1
        for row in range(start, 20):
            yield Queries(ids=pa.array([row]), vectors=np.full((1, 2), row, np.float32))


def test_a_reader_opens_its_files_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "setpriority", lambda *arguments: None)
    source = Source()
    reader = Reader(SimpleNamespace(source=source))  # type: ignore[arg-type]
    spans = spans_of(20, 3)
    asked = [spans[0], spans[1], spans[2], spans[5], spans[6]]  # the two between were done before
    for span in asked:
        row = {"number": [span.number], "start": [span.start], "stop": [span.stop]}
        found = reader(pa.table(row))
        assert set(spans_in(found)) == {span}
        assert found["query_id"].to_pylist() == list(range(span.start, span.stop))
    assert source.opened == 2


def test_a_part_that_is_seen_late_is_waited_for(tmp_path: Path) -> None:
    path, times = tmp_path / "part", iter(range(0, 1000, 10))
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            path.touch()

    await_part(path, times.__next__, wait)
    assert len(waited) == 3
    path.unlink()
    with pytest.raises(DataError, match="not the same folder"):
        await_part(path, times.__next__, lambda seconds: None)


def test_parts_are_found_by_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that was asked for and absent stays absent for a while on a network disk."""
    job = BatchJob(queries={}, rows=40, generation=1, content="", wanted=Wanted(k=1), block_rows=10)
    with claimed_folder(tmp_path / "out") as claimed:
        output = claimed.begin(job)
        spans = spans_of(40, 10)
        output.write(spans[2], pa.table({"a": range(10)}))
        asked: list[str] = []
        exists = Path.exists
        monkeypatch.setattr(Path, "exists", lambda path: asked.append(path.name) or exists(path))
        assert [span for span, _ in output.kept(spans)] == [spans[2]]
        assert asked == []


def test_giving_way_twice_is_giving_way_once() -> None:
    code = (
        "import os; from shardline.cluster.batch.priority import NICENESS, give_way;"
        "give_way(); give_way(); assert os.nice(0) == NICENESS"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
