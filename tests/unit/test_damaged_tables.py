"""Damaged and awkward sources: refused by name, or read as they are meant; never a defect."""

import os
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardline.cluster.cli import main
from shardline.training.data.tables import Dataset, open_dataset

CLICKS = pa.table({"user_id": range(8), "item_id": [0, 1] * 4, "timestamp": range(8)})
TEXTS = pa.table({"user_id": range(8), "x": [f"a{row}" for row in range(8)]})
LISTS = pa.table({"user_id": range(8), "x": [[row, row] for row in range(8)]})


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0), capsys.readouterr().err


def imported(
    capsys: pytest.CaptureFixture[str], source: Path, *more: str
) -> tuple[int, str, Dataset | None]:
    out = source.parent / f"{source.name}-out"
    options = ["--val-users", "0", "--test-per-user", "0", "--overwrite", *more]
    code, said = run(capsys, "data", "import", "--source", str(source), "--out", str(out), *options)
    return code, said, open_dataset(out) if code == 0 else None


def clicks_in(folder: Path) -> Path:
    folder.mkdir()
    pq.write_table(CLICKS, folder / "interactions.parquet")
    return folder


@pytest.mark.parametrize("table", [TEXTS, LISTS], ids=["texts", "lists"])
@pytest.mark.parametrize(
    ("place", "offset"), [(2, 2**30), (2, -5), (8, 2**31 - 2)], ids=["far", "negative", "last"]
)
@pytest.mark.parametrize("stream", [True, False])
def test_offsets_beyond_the_data_are_a_named_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: pa.Table, place: int, offset: int,
    stream: bool,
) -> None:  # fmt: skip
    """Arrow would read what lies there, and the process would end."""
    source = clicks_in(tmp_path / "in")
    path = source / "users"
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table)
    content = path.read_bytes()
    good = struct.pack("<9i", *range(0, 18, 2))
    assert content.count(good) == 1
    bad = bytearray(good)
    struct.pack_into("<i", bad, 4 * place, offset)
    path.write_bytes(content.replace(good, bytes(bad)))
    code, said, _ = imported(capsys, source)
    assert code == 3
    if place == 8:  # seen by Arrow as soon as it opens the file
        assert "users: not readable" in said
        assert "In column 1" in said
    else:
        assert "users: x[1]: a value that its type does not allow" in said


def test_names_that_are_no_utf_8_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = clicks_in(tmp_path / "in")
    schema = pa.schema([("user_id", pa.int64()), pa.field(b"caf\xe9", pa.int64())])
    with pa.ipc.new_file(source / "users", schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(range(8))] * 2, schema=schema))
    assert imported(capsys, source)[0] == 3
    vectors = ("build", "--vectors", str(source / "users"), "--in-process")
    assert run(capsys, "--store", str(tmp_path / "store"), *vectors)[0] == 3
    (source / "users").unlink()
    (source / "users").mkdir()
    (Path(os.fsdecode(bytes(source / "users") + b"/caf\xe9.csv"))).write_text("user_id\n1\n")
    code, said, _ = imported(capsys, source)
    assert (code, "not readable" in said) == (3, True)
    code, said = run(
        capsys, "data", "import", "--source", str(source), "--out", os.fsdecode(b"caf\xe9")
    )
    assert (code, said[:40]) == (2, "error: an argument is not UTF-8; names o")


def test_folders_of_keys_are_read_as_they_were_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = clicks_in(tmp_path / "in")
    cities = ["New York", "São Paulo", "a/b=c", None] * 2
    users = pa.table({"user_id": range(8), "x": range(8), "city": cities, "year": [1, 2] * 4})
    pq.write_to_dataset(users, source / "users", partition_cols=["city", "year"])
    for folder in ("--5", "007", "5"):
        (source / "items" / f"code={folder}").mkdir(parents=True)
    pq.write_table(pa.table({"item_id": [0]}), source / "items" / "code=--5" / "a")
    pq.write_table(pa.table({"item_id": [1]}), source / "items" / "code=007" / "a")
    code, said, dataset = imported(capsys, source)
    assert (code, dataset is None) == (0, False), said
    assert dataset is not None
    assert dataset.users()["city"].to_pylist() == cities
    assert dataset.users()["year"].to_pylist() == [1, 2] * 4
    assert dataset.items()["code"].to_pylist() == ["--5", "007"]


def test_types_of_json_are_those_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text made of the number that was inferred would be another id."""
    source = tmp_path / "in"
    source.mkdir()
    rows = [f'{{"user_id": {2**63 + row}, "item_id": 0, "timestamp": 0}}' for row in range(8)]
    (source / "interactions").write_text("\n".join(rows))
    code, said, _ = imported(capsys, source, "--types", "user_id=string")
    assert (code, "not readable" in said) == (3, True)
    rows = [f'{{"user_id": "2026-03-0{row}", "item_id": 0, "timestamp": 0}}' for row in range(1, 9)]
    (source / "interactions").write_text("\n".join(rows))
    code, said, dataset = imported(capsys, source, "--types", "user_id=string")
    assert code == 0, said
    assert dataset is not None
    assert dataset.users()["original_id"].to_pylist()[0] == "2026-03-01"


@pytest.mark.parametrize(
    "content",
    [
        "\n\nuser_id\titem_id\ttimestamp\n7\t1\t1\n",
        ",user_id,item_id,timestamp\n0,7,1,1\n",
        "user_id,item_id,timestamp,,\n7,1,1,,\n",
    ],
    ids=["blank lines first", "the index of a frame", "commas at the end"],
)
def test_awkward_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "interactions").write_text(content)
    code, said, dataset = imported(capsys, source)
    assert code == 0, said
    assert dataset is not None
    np.testing.assert_array_equal(dataset.user_ids, [7])


def test_large_ids_of_csv_are_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    lines = [f"{2**64 + row},{row},0" for row in range(3)]
    (source / "interactions").write_text("\n".join(["user_id,item_id,timestamp", *lines, ""]))
    code, said, dataset = imported(capsys, source)
    assert code == 0, said
    assert dataset is not None
    assert dataset.users()["original_id"].to_pylist() == [str(2**64 + row) for row in range(3)]


def test_ids_of_19_digits_that_fit_are_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As services that number by time and host give them."""
    source = tmp_path / "in"
    source.mkdir()
    ids = [1234567890123456789, 2**63 - 1]
    lines = [f"{each},1,0" for each in ids]
    (source / "interactions").write_text("\n".join(["user_id,item_id,timestamp", *lines, ""]))
    code, said, dataset = imported(capsys, source)
    assert code == 0, said
    assert dataset is not None
    np.testing.assert_array_equal(dataset.user_ids, ids)


@pytest.mark.parametrize("source", ["", "file://"])
def test_no_source_is_not_the_whole_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    arguments = ("data", "import", "--source", source, "--out", str(tmp_path / "out"))
    assert run(capsys, *arguments)[0] == 2
    vectors = ("build", "--vectors", source, "--in-process")
    assert run(capsys, "--store", str(tmp_path / "store"), *vectors)[0] == 2


def test_one_column_is_not_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = clicks_in(tmp_path / "in")
    code, said, _ = imported(capsys, source, "--time-column", "item_id")
    assert (code, "one column named twice" in said) == (2, True)
