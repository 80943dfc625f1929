"""Tables as people have them: imported, or refused with one line that says what to do."""

import csv
import datetime as dt
import gzip
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardline.cluster.cli import cli
from shardline.router.encoder.inputs import Number
from shardline.shards.core.errors import DataError, InvalidInput, NotFound, ShardlineError
from shardline.shards.core.name_lists import joined_names, split_names
from shardline.shards.storage.column_types import (
    Unusable,
    feature_column,
    id_column,
    time_column,
)
from shardline.training.config.tower_config import NumericFeature
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.importers import Format, ImportConfig, import_dataset
from shardline.training.data.tables import Dataset, open_dataset
from shardline.training.features.fitted import _fit_standardiser, fit
from shardline.training.features.infer import _suggest, infer_config
from tests.data_shapes.columns import IDS, REFUSED, ROWS, TAKEN, TIMES
from tests.data_shapes.random_columns import WRAPPED, values_of

CLICKS = pa.table(
    {
        "user_id": np.repeat(np.arange(ROWS), 6),
        "item_id": np.tile(np.arange(6), ROWS),
        "timestamp": np.arange(ROWS * 6),
    }
)


def users(column: pa.Array, name: str = "x") -> pa.Table:
    return pa.table({"user_id": np.arange(ROWS), name: column})


def imported(folder: Path, **config: Any) -> Dataset:
    out = folder.parent / f"{folder.name}-out"
    import_dataset(Format.TABLE, folder, out, ImportConfig.model_validate(config), overwrite=True)
    return open_dataset(out)


def parquet_folder(folder: Path, **tables: pa.Table) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


def ipc_folder(folder: Path, **tables: pa.Table) -> Path:
    """Arrow streams: these hold what Parquet does not."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        path = str(folder / f"{name}.arrows")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return folder


@pytest.mark.parametrize("name", TAKEN)
def test_columns_that_are_taken(tmp_path: Path, name: str) -> None:
    make, kind = TAKEN[name]
    source = ipc_folder(tmp_path / "in", users=users(make()), interactions=CLICKS)
    dataset = imported(source)
    column = dataset.users()["x"]
    assert column.type == kind
    assert column.null_count == make_nulls(make())
    space = fit(infer_config(TrainingConfig(), dataset), dataset)
    block = space.query.encode(dataset.users(), "users")
    assert len(block) == ROWS
    assert np.isfinite(block.numeric).all()


def test_lists_lose_their_nulls() -> None:
    column = pa.chunked_array([pa.array([["a", None], None, [None], []])])
    assert feature_column(column).to_pylist() == [["a"], None, [], []]


def make_nulls(array: pa.Array) -> int:
    """Missing values of a column: nulls and NaN."""
    values = array.to_pylist() if not isinstance(array, pa.ExtensionArray) else [1] * len(array)
    return sum(value is None or value != value for value in values)


@pytest.mark.parametrize("name", REFUSED)
def test_columns_that_are_refused(tmp_path: Path, name: str) -> None:
    make, words = REFUSED[name]
    source = ipc_folder(tmp_path / "in", users=users(make()), interactions=CLICKS)
    with pytest.raises(DataError) as caught:
        imported(source)
    message = str(caught.value)
    assert message.startswith("users.arrows: x: column cannot be a feature; ")
    assert words in message
    assert message.endswith("; --drop x leaves it out")
    assert imported(source, drop=["x"]).users().column_names == ["user_id"]


@pytest.mark.parametrize("name", IDS)
def test_ids(tmp_path: Path, name: str) -> None:
    make, expected = IDS[name]
    ids = make()
    clicks = pa.table(
        {"user_id": pa.chunked_array([ids] * 6), "item_id": np.repeat(np.arange(6), ROWS)}
    )
    source = ipc_folder(tmp_path / "in", interactions=clicks)
    if isinstance(expected, str):
        with pytest.raises(DataError) as caught:
            imported(source, time_column=None)
        assert expected in str(caught.value)
        return
    dataset = imported(source, time_column=None)
    assert dataset.user_ids.tolist() == expected
    has_originals = "original_id" in dataset.users().column_names
    assert has_originals == (expected[0] == 0)


@pytest.mark.parametrize("name", TIMES)
def test_times(name: str) -> None:
    make, expected = TIMES[name]
    column = pa.chunked_array([make()])
    if isinstance(expected, str):
        with pytest.raises(Unusable) as caught:
            time_column(column)
        why = caught.value
        assert expected in f"timestamp: not usable as times; expected {why.expected}; got {why.got}"
        return
    assert np.argsort(np.argsort(time_column(column))).tolist() == expected


def test_binary_ids_are_read_the_same_in_both_tables(tmp_path: Path) -> None:
    """Some users, those without clicks, have ids that are no text."""
    ids = pa.array([*(b"user %d" % n for n in range(7)), b"\xff"])
    table = pa.table({"user_id": ids, "age": range(ROWS)})
    clicks = pa.table({"user_id": ids[:7], "item_id": range(7)})
    dataset = imported(
        parquet_folder(tmp_path / "in", users=table, interactions=clicks), time_column=None
    )
    originals = dataset.users()["original_id"].to_pylist()
    assert sorted(originals) == ["ff", *(f"user {n}" for n in range(7))]


def test_every_refused_column_is_named_at_once(tmp_path: Path) -> None:
    struct = pa.array([{"a": 1}] * ROWS)
    table = users(struct).append_column("y", struct).append_column("age", CLICKS["item_id"][:ROWS])
    source = parquet_folder(tmp_path / "in", users=table, interactions=CLICKS)
    with pytest.raises(DataError, match=r"2 columns cannot.*users.parquet: y.*--drop x,y leaves"):
        imported(source)
    assert imported(source, only=["age"]).users().column_names == ["user_id", "age"]
    with pytest.raises(InvalidInput, match=r"--drop: no such column.*got agee"):
        imported(source, drop=["agee", "x", "y"])


NAMES = ["plain", "height, cm", 'say "hi"', "it's", "two\nlines", " padded ", "", "a;b$(c)"]


def test_names_of_columns_survive_the_command_line() -> None:
    (argument,) = shlex.split(joined_names(NAMES))
    assert split_names("--drop", argument) == NAMES
    for name in NAMES:
        (argument,) = shlex.split(joined_names([name]))
        assert split_names("--drop", argument) == [name]
    assert joined_names(["x", "y"]) == "x,y"
    for text in ('"open', "two\nlines"):
        with pytest.raises(InvalidInput, match="--drop: not a line of CSV"):
            split_names("--drop", text)


def test_the_drop_that_is_proposed_leaves_columns_of_any_name_out(tmp_path: Path) -> None:
    struct = pa.array([{"a": 1}] * ROWS)
    table = users(struct, "height, cm").append_column("it's", struct)
    source = parquet_folder(tmp_path / "in", users=table, interactions=CLICKS)
    with pytest.raises(DataError) as caught:
        imported(source)
    assert caught.value.hint is not None
    drop = shlex.split(caught.value.hint.partition(" leaves ")[0])
    arguments = ["data", "import", "--source", str(source), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, [*arguments, *drop])
    assert done.exit_code == 0, done.exception
    assert open_dataset(tmp_path / "out").users().column_names == ["user_id"]


def test_a_column_called_history_is_refused(tmp_path: Path) -> None:
    table = users(pa.array(["a"] * ROWS), "history")
    with pytest.raises(DataError, match=r"users.parquet: history.*--drop history"):
        imported(parquet_folder(tmp_path / "in", users=table, interactions=CLICKS))


def test_the_index_of_a_pandas_frame_is_no_feature(tmp_path: Path) -> None:
    frame = pd.DataFrame({"user_id": range(20), "age": np.arange(20) * 1.5})
    folder = parquet_folder(tmp_path / "in", interactions=CLICKS)
    frame[frame["user_id"] != 13].to_parquet(folder / "users.parquet")
    assert "__index_level_0__" in pq.read_schema(folder / "users.parquet").names
    dataset = imported(folder)
    config = infer_config(TrainingConfig(), dataset)
    assert [f.column for f in config.towers.query.features or ()] == ["age", "history"]


@pytest.mark.parametrize("form", ["csv", "tsv", "csv.gz", "semicolon", "jsonl", "file", "stream"])
def test_every_format_gives_the_same(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    people = [
        {"user_id": f"u{i}", "age": 20 + i if i % 3 else None, "city": f"a, b {i % 2}"}
        for i in range(ROWS)
    ]
    clicks = [
        {"user_id": f"u{u}", "item_id": i, "timestamp": f"2026-03-0{i + 1} 12:00:00"}
        for u in range(ROWS)
        for i in range(6)
    ]
    for name, rows in (("users", people), ("interactions", clicks)):
        write(folder, name, rows, form)
    dataset = imported(folder)
    table = dataset.users()
    assert table["original_id"].to_pylist() == [row["user_id"] for row in people]
    assert table["age"].to_pylist() == [row["age"] for row in people]
    assert table["city"].to_pylist() == [row["city"] for row in people]
    assert dataset.rows["interactions"] == len(clicks)


def write(folder: Path, name: str, rows: list[dict[str, Any]], form: str) -> None:
    if form in ("csv", "tsv", "csv.gz", "semicolon"):
        delimiter = {"tsv": "\t", "semicolon": ";"}.get(form, ",")
        path = folder / f"{name}.csv"
        with path.open("w", newline="") as file:
            out = csv.DictWriter(file, rows[0], delimiter=delimiter)
            out.writeheader()
            out.writerows(rows)
        if form == "csv.gz":
            (folder / f"{name}.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    elif form == "jsonl":
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    else:
        table = pa.Table.from_pylist(rows)
        make = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
        with pa.OSFile(str(folder / name), "wb") as file, make(file, table.schema) as writer:
            writer.write_table(table)


def test_part_files_of_spark_and_their_folders(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for country in ("FR", "PL"):
        part = folder / "users.parquet" / f"country={country}"
        part.mkdir(parents=True)
        ids = [0, 1, 2, 3] if country == "FR" else [4, 5, 6, 7]
        kinds = pa.array(["a" if country == "FR" else "b"] * 4).dictionary_encode()
        pq.write_table(pa.table({"user_id": ids, "kind": kinds}), part / "part-0.parquet")
    (folder / "users.parquet" / "_SUCCESS").touch()
    (folder / "users.parquet" / ".part.crc").write_bytes(b"\0")
    pq.write_table(CLICKS, folder / "interactions.parquet")
    table = imported(folder).users()
    assert table["country"].to_pylist() == ["FR"] * 4 + ["PL"] * 4
    assert table["kind"].to_pylist() == ["a"] * 4 + ["b"] * 4


def test_part_files_whose_types_drift(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path / "in", interactions=CLICKS) / "users"
    folder.mkdir()
    pq.write_table(pa.table({"user_id": range(4), "x": pa.nulls(4)}), folder / "a")
    pq.write_table(pa.table({"user_id": range(4, 6), "x": [1, 2]}), folder / "b")
    pq.write_table(pa.table({"user_id": range(6, 8), "x": [1.5, 2.5]}), folder / "c")
    assert imported(folder.parent).users()["x"].to_pylist() == [None] * 4 + [1, 2, 1.5, 2.5]
    pq.write_table(pa.table({"user_id": [9], "x": ["z"]}), folder / "d")
    with pytest.raises(DataError, match="users/d: x: part files disagree; expected double, as in"):
        imported(folder.parent)


def test_codes_in_one_part_are_codes_in_all(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "interactions"
    folder.mkdir(parents=True)
    (folder / "a.csv").write_text("user_id,item_id,timestamp\n12,1,1\n7,1,2\n")
    (folder / "b.csv").write_text("user_id,item_id,timestamp\n007,1,3\n12,2,4\n")
    users = imported(folder.parent).users()
    assert users["original_id"].to_pylist() == ["007", "12", "7"]


def test_an_import_says_what_it_did_not_read_and_what_becomes_of_columns(tmp_path: Path) -> None:
    folder = parquet_folder(
        tmp_path / "in", interactions=CLICKS, members=users(pa.array("abcdefgh"))
    )
    source = ["--source", str(folder), "--out", str(tmp_path / "out"), "--overwrite"]
    found = CliRunner().invoke(cli, ["data", "import", *source])
    assert found.exit_code == 0
    assert "no table of users: they are those of the interactions, without features; not read" in (
        found.stderr
    )
    assert "members.parquet (--users-file)" in found.stderr
    named = [*source, "--users-file", "members", "--items-file", "none"]
    found = CliRunner().invoke(cli, ["data", "import", *named])
    assert found.stderr == ""
    assert "features of users: none; not used: x (string)" in found.stdout


def test_repeated_and_missing_ids_are_named(tmp_path: Path) -> None:
    twice = pa.table({"user_id": [3, 5, 4, 5]})
    with pytest.raises(DataError, match=r"ids occur twice; .*got 5 in rows 1 and 3"):
        imported(parquet_folder(tmp_path / "in", interactions=CLICKS, users=twice))
    gap = CLICKS.set_column(0, "user_id", pa.array([*CLICKS["user_id"].to_pylist()[:-1], None]))
    with pytest.raises(DataError, match=f"1 nulls, the first in row {ROWS * 6 - 1}"):
        imported(parquet_folder(tmp_path / "gap", interactions=gap))


def test_urls(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path / "in", interactions=CLICKS)
    out = tmp_path / "out"
    report = import_dataset(Format.TABLE, folder.as_uri(), out)
    assert report.users == ROWS
    with pytest.raises(InvalidInput, match="--source: not a place to read from"):
        import_dataset(Format.TABLE, "nowhere://x/y", tmp_path / "out2")
    with pytest.raises(NotFound):
        import_dataset(Format.TABLE, "file:///no/such/folder", tmp_path / "out2")


def test_types_of_text_columns_can_be_given(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\n007,1,1\n7,2,2\n007,3,3\n")
    assert imported(folder).rows["users"] == 2, "a code with leading zeros is no number"
    assert imported(folder, types=["user_id=int"]).rows["users"] == 1
    with pytest.raises(InvalidInput, match="--types: wrong value; expected column=type"):
        imported(folder, types=["user_id=text"])
    with pytest.raises(InvalidInput, match=r"--types: no such column.*got usr"):
        imported(folder, types=["usr=string"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"[1, 2]", "a JSON array; expected JSON lines"),
        (b'{"user_id": 1}\n{"user_id": ', "not readable"),
        (b"user_id,item_id\n1,2,3\n", "not readable"),
        (b"PAR1 and no more", "not readable"),
        (b"ARROW1 and no more", "not readable"),
        (b"\xff\xff\xff\xff and no more", "not readable"),
        (b"\x1f\x8b and no more", "not readable"),
        (b"\0\1\2", "of no known format"),
        (b"user\ritem\r1\r2", "user_id: missing column"),
        (b"user_id,user_id,item_id\n1,2,3\n", "user_id: column occurs twice"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "clicks").write_bytes(content)
    with pytest.raises(DataError) as caught:
        import_dataset(Format.TABLE, tmp_path / "clicks", tmp_path / "out")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tables_of_other_libraries(tmp_path: Path) -> None:
    rows = {
        "user_id": [f"u{i}" for i in range(ROWS)],
        "age": [1, None] * 4,
        "joined": ["2026-01-01"] * ROWS,
        "tags": [["a"], []] * 4,
    }
    clicks = {
        "user_id": [f"u{i}" for i in range(ROWS)] * 3,
        "item_id": list(range(24)),
        "timestamp": list(range(24)),
    }
    for name in ("pandas", "polars", "duckdb"):
        folder = tmp_path / name
        folder.mkdir()
        for stem, content in (("users", rows), ("interactions", clicks)):
            path = str(folder / f"{stem}.parquet")
            if name == "pandas":
                pd.DataFrame(content).to_parquet(path)
            elif name == "polars":
                pl.DataFrame(content).write_parquet(path)
            else:
                table = pa.table(content)
                duckdb.from_arrow(table).write_parquet(path)
        table = imported(folder).users()
        assert table["age"].to_pylist() == rows["age"]
        assert table["tags"].to_pylist() == rows["tags"]
        assert table["original_id"].to_pylist() == rows["user_id"]


def test_a_missing_number_has_the_mean_and_an_indicator(tmp_path: Path) -> None:
    source = parquet_folder(
        tmp_path / "in", users=users(pa.array([1.0, None] * 4)), interactions=CLICKS
    )
    dataset = imported(source)
    space = fit(infer_config(TrainingConfig(), dataset), dataset)
    numeric = space.query.encode(dataset.users(), "users").numeric
    assert numeric.tolist() == [[0, 0], [0, 1]] * 4


@pytest.mark.parametrize(
    ("column", "sent"),
    [
        (pa.array([1.0, None, 3.0, 1e300]), [1.0, None, 3.0, 1e300]),
        (pa.array([1.0, 2.0, 3.0, 500.0]), [1.0, 2, None, 500.0]),
        (
            pa.array([0, 86_400, None, 10**8], pa.timestamp("s")),
            ["1970-01-01", "1970-01-02T01:00:00+01:00", None, 1e8],
        ),
        (
            pa.array([[1.0, 2.0], None, [5.0, 6.0], [7.0, 8.0]], pa.list_(pa.float32(), 2)),
            [[1.0, 2.0], None, [5.0, 6.0], [7.0, 8.0]],
        ),
    ],
    ids=["nulls", "skewed, nulls in queries only", "times", "vectors"],
)
def test_a_query_is_encoded_as_its_column_was(column: pa.Array, sent: list[Any]) -> None:
    table = pa.table({"user_id": np.arange(4), "x": column})
    feature = infer_column(table)
    fitted = _fit_standardiser(feature, table, "users")
    trained = fitted.encode(table, "users")
    served = Number(asdict(fitted)).rows(sent)
    rows = [
        row for row, value in enumerate(sent) if value is not None or column[row].as_py() is None
    ]
    np.testing.assert_allclose(served[rows], trained[rows], atol=1e-6)
    assert trained.shape[1] == fitted.width
    assert np.abs(trained).max() <= 10
    if not column.null_count:  # nothing was missing in training: a null is an average row
        assert served[2].tolist() == [0.0]


def test_users_and_items_are_called_by_their_own_ids(tmp_path: Path) -> None:
    """Where ids were numbered, a number of ours is nobody's name."""
    texts = pa.array([str(100 + row) for row in range(ROWS)])
    clicks = CLICKS.set_column(0, "user_id", texts.take(CLICKS["user_id"]))
    dataset = imported(parquet_folder(tmp_path / "in", interactions=clicks))
    assert dataset.id_of("users.parquet", "103") == 3
    assert dataset.id_of("items.parquet", "5") == 5
    for file, name in (("users.parquet", "3"), ("users.parquet", "x"), ("items.parquet", "6")):
        with pytest.raises(NotFound, match=f"no {file[:4]} {name}|no item {name}"):
            dataset.id_of(file, name)


@pytest.mark.parametrize("ids", [np.arange(ROWS), [f"u{row}" for row in range(ROWS)]])
def test_no_column_may_pose_as_original_ids(tmp_path: Path, ids: Any) -> None:
    table = pa.table({"user_id": ids, "original_id": ["a"] * ROWS})
    clicks = CLICKS.set_column(0, "user_id", pa.array(ids).take(CLICKS["user_id"]))
    folder = parquet_folder(tmp_path / "in", users=table, interactions=clicks)
    with pytest.raises(DataError, match="original_id: column name is taken; rename it in the s"):
        imported(folder)
    assert imported(folder, drop=["original_id"]).rows["users"] == ROWS


@pytest.mark.parametrize("log", [False, True])
def test_a_time_has_cycles_where_they_are_asked_for(log: bool) -> None:
    noons = [dt.datetime(2026, 3, day, 12) for day in (2, 3, 9)]  # Monday, Tuesday, Monday
    column = pa.array([*noons, None], pa.timestamp("ns"))
    table = pa.table({"user_id": np.arange(4), "x": column})
    feature = NumericFeature(column="x", cycles=("day", "week"), log=log)
    fitted = _fit_standardiser(feature, table, "users")
    trained = fitted.encode(table, "users")
    assert trained.shape == (4, fitted.width) == (4, 6)
    np.testing.assert_allclose(trained[0, 1:], trained[2, 1:], atol=1e-3)
    assert np.abs(trained[0, 3:5] - trained[1, 3:5]).max() > 1
    assert trained[0, 0] > trained[1, 0] > trained[2, 0]
    assert trained[3].tolist() == [0, 0, 0, 0, 0, 1]
    seconds = noons[2].replace(tzinfo=dt.UTC).timestamp()
    sent = [noons[0].isoformat(), "2026-03-03T13:00:00+01:00", seconds, None]
    np.testing.assert_allclose(Number(asdict(fitted)).rows(sent), trained, atol=1e-5)


def test_cycles_of_a_column_of_no_times_are_refused() -> None:
    table = pa.table({"user_id": np.arange(4), "x": np.arange(4.0)})
    with pytest.raises(DataError, match="expected timestamps, because cycles are set; got double"):
        _fit_standardiser(NumericFeature(column="x", cycles=("day",)), table, "users")


def infer_column(table: pa.Table) -> NumericFeature:
    (feature,) = [f for f in _suggest(table, "user_id") if isinstance(f, NumericFeature)]
    return feature


@given(WRAPPED, st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_column_raises_an_exception_of_a_library(kind: pa.DataType, data: st.DataObject) -> None:
    """Random types and values are taken, or refused with a reason; what is taken is known."""
    column = pa.chunked_array([pa.array(data.draw(st.lists(values_of(kind), max_size=6)), kind)])
    try:
        taken = feature_column(column)
    except Unusable as why:
        assert why.expected
        assert why.got
    else:
        assert len(taken) == len(column)
        taken.validate(full=True)
    for boundary in (id_column, time_column):
        try:
            assert len(boundary(column)) == len(column)
        except Unusable as why:
            assert why.expected


@given(
    st.binary(max_size=300), st.sampled_from([b"", b"a,b\n", b"PAR1", b"ARROW1", b"\x1f\x8b", b"{"])
)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_file_raises_an_exception_of_a_library(tmp_path: Path, tail: bytes, head: bytes) -> None:
    (tmp_path / "clicks").write_bytes(head + tail)
    with pytest.raises(ShardlineError):
        import_dataset(Format.TABLE, tmp_path / "clicks", tmp_path / "out")


def test_shapes_are_many() -> None:
    assert len(TAKEN) + len(REFUSED) + len(IDS) + len(TIMES) >= 60


def test_lists_of_times_are_texts_as_queries_send_them(tmp_path: Path) -> None:
    moment = dt.datetime(2026, 3, 1, 12, 30)
    column = pa.array([[moment], [None, moment], None, []] * 2, pa.list_(pa.timestamp("ns")))
    dataset = imported(parquet_folder(tmp_path / "in", interactions=CLICKS, users=users(column)))
    assert dataset.users()["x"].to_pylist()[:2] == [[moment.isoformat()]] * 2
