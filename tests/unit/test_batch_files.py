"""Query files as they come: ids of text as they are written, folders of one kind, folder values."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardline.cluster.batch.csv_queries import open_query_files
from shardline.cluster.batch.query_files import IdFiles, VectorFiles
from shardline.cluster.batch.spans import spans_of
from shardline.shards.core.errors import DataError, NotFound
from shardline.shards.core.schema import Metric
from tests.batch_store import write_queries

DIM = 2


def opened(scratch: Path, *sources: Path, id_column: str | None = None) -> VectorFiles:
    scratch.mkdir(exist_ok=True)
    files = open_query_files(sources, scratch, id_column)
    return VectorFiles(files, dim=DIM, metric=Metric.DOT, id_column=id_column)


def ids_of(source: VectorFiles) -> list[object]:
    blocks = source.read(spans_of(source.rows, 2))
    return [value for _, queries in blocks for value in queries.ids.to_pylist()]


def write_csv(path: Path, ids: list[str], name: str = "id") -> Path:
    path.write_text(
        "\n".join([f"{name},embedding", *(f'{each},"[1.5, 2]"' for each in ids)]) + "\n"
    )
    return path


IDS = {
    "integers": (["7", "-3", "0"], [7, -3, 0]),
    "leading zeros": (["007", "8"], ["007", "8"]),
    "largest": ([str(2**63 - 1)], [2**63 - 1]),
    "above 64 bits": (["9223372036854775808", "1"], ["9223372036854775808", "1"]),
    "a sign": (["+7"], ["+7"]),
    "minus zero": (["-0"], ["-0"]),
    "fractions": (["1.0", "2"], ["1.0", "2"]),
    "truth": (["true", "false"], ["true", "false"]),
    "dates": (["2026-01-01"], ["2026-01-01"]),
    "lists": (['"[1]"', "2"], ["[1]", "2"]),
    "missing": (["5", "", "6"], [5, None, 6]),
    "all missing": (["", ""], [None, None]),
}


@pytest.mark.parametrize(("written", "expected"), IDS.values(), ids=IDS)
@pytest.mark.parametrize("name", ["id", "my_key"])
def test_ids_of_text_are_as_written(
    tmp_path: Path, written: list[str], expected: list[object], name: str
) -> None:
    path = write_csv(tmp_path / "q.csv", written, name)
    column = None if name == "id" else name
    assert ids_of(opened(tmp_path / "work", path, id_column=column)) == expected


def test_one_code_in_any_file_makes_all_ids_texts(tmp_path: Path) -> None:
    one, other = write_csv(tmp_path / "a.csv", ["1"]), tmp_path / "b.csv.gz"
    other.write_bytes(gzip.compress(write_csv(tmp_path / "c", ["2", "007"]).read_bytes()))
    assert ids_of(opened(tmp_path / "work", one, other)) == ["1", "2", "007"]


def test_ids_that_begin_after_the_start_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardline.cluster.batch.csv_queries.INFERRED_BYTES", 1 << 12)
    path = write_csv(tmp_path / "q.csv", [""] * 1000 + ["x"])
    assert ids_of(opened(tmp_path / "work", path)) == [None] * 1000 + ["x"]


@pytest.mark.parametrize("beside", ["README.txt", "more.csv"])
def test_text_beside_binary_tables_is_refused_by_name(tmp_path: Path, beside: str) -> None:
    folder = tmp_path / "queries"
    folder.mkdir()
    write_queries(folder / "a.parquet", np.ones((3, DIM), np.float32))
    write_csv(folder / beside, ["1"])
    with pytest.raises(DataError, match=rf"{beside} and a\.parquet; name the files"):
        opened(tmp_path / "work", folder)
    both = opened(tmp_path / "work", folder / "a.parquet", write_csv(tmp_path / "b.csv", ["x"]))
    assert ids_of(both) == ["q0", "q1", "q2", "x"]


def test_other_files_beside_text_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "queries"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"\xff\xd8")
    write_csv(folder / "a.csv", ["4"])
    assert ids_of(opened(tmp_path / "work", folder)) == [4]
    (folder / "noname").write_text("id,embedding\n")  # might be queries: not passed over in silence
    with pytest.raises(DataError, match=r"a\.csv and noname"):
        opened(tmp_path / "work", folder)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_values_of_folders_are_part_of_what_the_queries_are(tmp_path: Path, kind: str) -> None:
    """Moved to another folder, a file has the same bytes and other ids."""
    found = []
    for day in ("5", "6"):
        folder = tmp_path / f"queries{day}" / f"user_id={day}"
        folder.mkdir(parents=True)
        if kind == "parquet":
            vectors = pa.array([[1.0, 2.0]], pa.list_(pa.float32()))
            pq.write_table(pa.table({"vector": vectors}), folder / "a.parquet")
        else:
            (folder / "a.csv").write_text('vector\n"[1.5, 2]"\n')
        source = opened(tmp_path / f"work{day}", folder.parent)
        assert ids_of(source) == [int(day)]
        found.append(source.identity)
    assert found[0] != found[1]
    assert found[0]["sha256"] == found[1]["sha256"]
    json.dumps(found)


def test_a_folder_without_files_names_what_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "queries"
    folder.mkdir()
    write_csv(folder / "_a.csv", ["4"])
    with pytest.raises(NotFound, match=r"queries: no file in it; .*begin with _ or \."):
        opened(tmp_path / "work", folder)


def test_ids_of_other_types_name_no_option_of_another_command(tmp_path: Path) -> None:
    vectors = np.ones((3, DIM), np.float32)
    one = write_queries(tmp_path / "a.parquet", vectors, pa.array([1, 2, 3]))
    other = write_queries(tmp_path / "b.parquet", vectors)
    with pytest.raises(DataError, match=r"b\.parquet: id: part files disagree; .*with one type$"):
        opened(tmp_path / "work", one, other)


def test_text_is_said_to_be_read_because_that_takes_time(tmp_path: Path) -> None:
    text = write_csv(tmp_path / "a.csv", ["4"])
    table = write_queries(tmp_path / "b.parquet", np.ones((3, DIM), np.float32))
    lines: list[str] = []
    open_query_files([table, text], tmp_path, note=lines.append)
    assert lines == [f"reading text: {text}"]


@pytest.mark.parametrize(
    ("ids", "kind"),
    {
        "lists": (pa.array([[1], [2]]), "list"),
        "maps": (pa.array([{"a": 1}]), "struct"),
        "bytes": (pa.array([b"\xff"]), "binary"),
    }.values(),
    ids=["lists", "maps", "bytes"],
)
def test_ids_of_users_that_are_no_texts_are_refused(
    tmp_path: Path, ids: pa.Array, kind: str
) -> None:
    path = tmp_path / "q.parquet"
    pq.write_table(pa.table({"user_id": ids}), path)
    named = IdFiles(open_query_files([path], tmp_path))
    with pytest.raises(DataError, match=rf"user_id: not usable as ids of users; .*got {kind}"):
        list(named.texts())
