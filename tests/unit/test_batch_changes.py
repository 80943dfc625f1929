"""Query files that change while a job reads them, and a disk that is full before the first part."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardline.cluster.batch.csv_queries import open_query_files
from shardline.cluster.batch.parked_blocks import ParkedBlocks
from shardline.cluster.batch.queries import Queries
from shardline.cluster.batch.query_files import VectorFiles
from shardline.cluster.batch.spans import Span, spans_of
from shardline.shards.core.errors import DataError
from shardline.shards.core.schema import Metric, Ranked
from tests.unit.test_files import files_of_at_most

DIM, ROWS = 2, 150_000  # rows of more than two batches
HALF = ROWS // 2


def table(value: float) -> pa.Table:
    vectors = np.full((ROWS, DIM), value, np.float32)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)
    return pa.table({"id": np.arange(ROWS), "embedding": lists})


def write_parquet(path: Path, value: float) -> None:
    pq.write_table(table(value), path, row_group_size=20_000)


def write_arrow_file(path: Path, value: float) -> None:
    with pa.ipc.new_file(str(path), table(value).schema) as writer:
        writer.write_table(table(value))


def write_arrow_stream(path: Path, value: float) -> None:
    with pa.ipc.new_stream(str(path), table(value).schema) as writer:
        writer.write_table(table(value))


def replace_it(path: Path, write: Callable[[Path, float], None]) -> None:
    other = path.with_name("other")
    write(other, 2.0)
    other.rename(path)


def rewrite_it(path: Path, write: Callable[[Path, float], None]) -> None:
    write(path.with_name("other"), 2.0)
    with path.open("r+b") as file:
        file.write(path.with_name("other").read_bytes())


def cut_it(path: Path, write: Callable[[Path, float], None]) -> None:
    with path.open("r+b") as file:
        file.truncate(100)


def remove_it(path: Path, write: Callable[[Path, float], None]) -> None:
    path.unlink()


def opened(path: Path) -> VectorFiles:
    return VectorFiles(open_query_files([path], path.parent), dim=DIM, metric=Metric.DOT)


WRITERS = [write_parquet, write_arrow_file, write_arrow_stream]
CHANGES = [replace_it, rewrite_it, cut_it, remove_it]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("blocks_before", [0, 1])
def test_a_file_that_changes_ends_the_job_by_name(
    tmp_path: Path,
    write: Callable[[Path, float], None],
    change: Callable[[Path, Callable[[Path, float], None]], None],
    blocks_before: int,
) -> None:
    """Else the results are of two contents, under the checksum of one."""
    path = tmp_path / "queries"
    write(path, 1.0)
    source = opened(path)
    blocks = source.read(spans_of(ROWS, HALF))
    read = [next(blocks)[1] for _ in range(blocks_before)]
    change(path, write)
    with pytest.raises(DataError, match=rf"^{path}: changed while the job reads it"):
        list(blocks)
    for queries in read:
        assert queries.vectors is not None
        assert (queries.vectors == 1.0).all()


READS_THEN_CUTS = """
import sys
from pathlib import Path
from shardline.cluster.batch.spans import spans_of
from tests.unit.test_batch_changes import HALF, ROWS, opened
path = Path(sys.argv[1])
source = opened(path)
_, queries = next(source.read(spans_of(ROWS, HALF)))
with path.open("r+b") as file:
    file.truncate(100)
print(queries.vectors.sum(), queries.ids.to_numpy().sum())
"""


def test_what_was_read_outlives_the_file(tmp_path: Path) -> None:
    """In a process of its own, for the pages of a mapped file that are gone are its end."""
    path = tmp_path / "queries"
    write_arrow_file(path, 1.0)
    words = [sys.executable, "-c", READS_THEN_CUTS, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{float(HALF * DIM)}", f"{sum(range(HALF))}"]


def test_an_unchanged_file_is_read_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "queries"
    write_arrow_file(path, 1.0)
    source = opened(path)
    for _ in range(2):
        assert sum(len(queries) for _, queries in source.read(spans_of(ROWS, HALF))) == ROWS


def test_a_full_disk_is_not_taken_for_a_damaged_text(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("id,embedding\n" + "".join(f'{row},"[1.5, 2]"\n' for row in range(10_000)))
    work = tmp_path / "work"
    work.mkdir()
    with files_of_at_most(1 << 16), pytest.raises(OSError) as raised:
        open_query_files([path], work)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(work))


def test_a_full_disk_between_two_passes_is_named(tmp_path: Path) -> None:
    parked, span = ParkedBlocks(tmp_path), Span(0, 0, ROWS)
    vectors = np.ones((ROWS, DIM), np.float32)
    with files_of_at_most(1 << 16), pytest.raises(OSError) as raised:
        parked.park(span, Queries(ids=pa.array(range(ROWS)), vectors=vectors))
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path))
    ranked = Ranked(np.ones((ROWS, 1), np.int64), np.ones((ROWS, 1), np.float32))
    with files_of_at_most(1 << 16), pytest.raises(OSError) as raised:
        parked.keep(span, ranked)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path))
