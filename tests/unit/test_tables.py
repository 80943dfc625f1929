"""Dataset folders: round trip, splits against a loop, and every way a folder can be wrong."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardline.shards.core.errors import (
    CorruptFile,
    DataError,
    NewerFormat,
    NotFound,
    ShardlineError,
)
from shardline.shards.core.files import describe_file, write_manifest
from shardline.training.data.sequences import Sequences
from shardline.training.data.splits import cold_rows, hold_out, split_codes
from shardline.training.data.table_checks import INTERACTION_SCHEMA, SPLITS, rows_of
from shardline.training.data.table_writer import interaction_batch, write_dataset
from shardline.training.data.tables import open_dataset, vector_column, vector_matrix
from tests.tiny import count_reads


def users_table() -> pa.Table:
    return pa.table(
        {"user_id": pa.array([70, 3, 9]), "age": [30, 40, 50], "gender": ["M", "F", "O"]}
    )


def items_table() -> pa.Table:
    vectors = np.arange(8, dtype=np.float32).reshape(4, 2)
    ids = pa.array([5, 2**60, 11, 6])
    return pa.table({"item_id": ids, "vector": vector_column(vectors), "good": [True] * 4})


def interactions_table() -> pa.Table:
    rows = [(3, 5, 7, 0), (3, 11, 8, 1), (70, 6, 1, 0), (70, 2**60, 3, 2), (70, 5, 2, 0)]
    users, items, times, codes = np.array(rows).T
    return pa.Table.from_batches([interaction_batch(users, items, times, codes.astype(np.int8))])


def write(path: Path, **changes: pa.Table) -> None:
    tables = {"users": users_table(), "items": items_table(), "interactions": interactions_table()}
    write_dataset(path, **(tables | changes), name="tiny", parameters={"a": 1})


def test_round_trip_sorted_by_id(tmp_path: Path) -> None:
    write(tmp_path / "d")
    dataset = open_dataset(tmp_path / "d")
    assert dataset.name == "tiny"
    assert dataset.rows == {"users": 3, "items": 4, "interactions": 5}
    assert dataset.ceilings is None
    assert dataset.oracle() is None
    assert dataset.manifest["parameters"] == {"a": 1}
    assert dataset.users().to_pydict() == {
        "user_id": [3, 9, 70],
        "age": [40, 50, 30],
        "gender": ["F", "O", "M"],
    }
    items = dataset.items()
    assert items["item_id"].to_pylist() == [5, 6, 11, 2**60]
    assert vector_matrix(items["vector"]).tolist() == [[0, 1], [6, 7], [4, 5], [2, 3]]
    assert dataset.interactions().schema == INTERACTION_SCHEMA
    assert dataset.interactions().to_pylist() == interactions_table().to_pylist()


@pytest.mark.parametrize(
    ("split", "items"),
    [("train", [5, 6, 5]), ("val", [11]), ("test", [2**60])],
)
def test_interactions_of_a_split(tmp_path: Path, split: str, items: list[int]) -> None:
    write(tmp_path / "d")
    table = open_dataset(tmp_path / "d").interactions(split)
    assert table["item_id"].to_pylist() == items
    with pytest.raises(DataError, match="unknown split"):
        open_dataset(tmp_path / "d").interactions("valid")


def test_streamed_batches_equal_one_table(tmp_path: Path) -> None:
    table = interactions_table()
    batches = (table.slice(row, 1).to_batches()[0] for row in range(len(table)))
    dataset = write_dataset(tmp_path / "d", users_table(), items_table(), batches, name="streamed")
    assert open_dataset(tmp_path / "d").interactions().to_pylist() == table.to_pylist()
    assert dataset.rows["interactions"] == 5


def test_an_existing_target_stays_unless_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "d")
    before = open_dataset(tmp_path / "d").manifest
    with pytest.raises(DataError, match="already exists"):
        write(tmp_path / "d")
    assert open_dataset(tmp_path / "d").manifest == before
    tables = (users_table(), items_table(), interactions_table())
    write_dataset(tmp_path / "d", *tables, name="second", overwrite=True)
    assert open_dataset(tmp_path / "d").name == "second"


def test_overwrite_deletes_nothing_but_datasets(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    tables = (users_table(), items_table(), interactions_table())
    with pytest.raises(DataError, match="not a dataset"):
        write_dataset(tmp_path / "precious", *tables, name="x", overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        write(tmp_path / "d", users=pa.table({"user_id": pa.array([1])}))
    assert list(tmp_path.iterdir()) == []


def replace(table: pa.Table, column: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(column), column, values)


USERS, ITEMS, ROWS = users_table(), items_table(), interactions_table()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": USERS.drop_columns("user_id")}, "users.parquet: user_id: missing column"),
        (
            {"users": replace(USERS, "user_id", pa.array([1, 2, 3], pa.int32()))},
            "expected int64; got int32",
        ),
        ({"users": replace(USERS, "user_id", pa.array([3, 3, 70]))}, "1 repeated, the first is 3"),
        (
            {"users": replace(USERS, "user_id", pa.array([3, 70, -1]))},
            "negative id; expected >= 0; got -1",
        ),
        (
            {"users": replace(USERS, "user_id", pa.array([1, None, 3]))},
            "users.parquet: user_id: missing values",
        ),
        ({"users": replace(USERS, "age", pa.array([1, 2, np.inf]))}, r"age\[2\]: not finite"),
        (
            {"users": replace(USERS, "age", pa.array([[1.5], [2.5], []]))},
            "age: wrong type.*got list<",
        ),
        ({"users": USERS.append_column("age", USERS["age"])}, "age: column occurs twice"),
        (
            {"items": replace(ITEMS, "vector", vector_column(np.full((4, 2), np.nan)))},
            r"items.parquet: vector\[0\]: not finite",
        ),
        (
            {"interactions": ROWS.drop_columns("timestamp")},
            "interactions.parquet: timestamp: missing",
        ),
        (
            {"interactions": replace(ROWS, "timestamp", pa.array([1.5] * 5))},
            "timestamp: wrong type; expected int64; got double",
        ),
        ({"interactions": replace(ROWS, "split", pa.array(["train"] * 4 + ["dev"]))}, "got 'dev'"),
        (
            {"interactions": replace(ROWS, "user_id", pa.array([3, 3, 70, 70, 71]))},
            r"user_id\[4\]: 1 unknown ids.*got 71; every user_id must be listed in users.parquet",
        ),
        (
            {"interactions": replace(ROWS, "item_id", pa.array([5, 5, 5, 5, 4]))},
            r"item_id\[4\].*got 4",
        ),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, changes: dict[str, pa.Table], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path / "d", **changes)
    assert not (tmp_path / "d").exists()


def test_bad_tables_behind_a_valid_manifest_are_refused(tmp_path: Path) -> None:
    """A folder whose checksums are right and whose content is not."""
    write(tmp_path / "d")
    manifest = open_dataset(tmp_path / "d").manifest
    pq.write_table(USERS, tmp_path / "d" / "users.parquet")  # not ascending
    entry = describe_file(tmp_path / "d", "users.parquet", 3)
    for file in manifest["files"]:
        if file["name"] == "users.parquet":
            file.update(bytes=entry.bytes, sha256=entry.sha256)
    write_manifest(tmp_path / "d", kind="dataset", version=1, body=_body(manifest))
    with pytest.raises(DataError, match=r"users.parquet: user_id: ids are not ascending"):
        open_dataset(tmp_path / "d")


def _body(manifest: dict[str, object]) -> dict[str, object]:
    drop = ("kind", "format_version", "checksum")
    return {key: value for key, value in manifest.items() if key not in drop}


def test_wrong_row_count_in_the_manifest(tmp_path: Path) -> None:
    write(tmp_path / "d")
    manifest = open_dataset(tmp_path / "d").manifest
    manifest["rows"]["interactions"] = 6
    write_manifest(tmp_path / "d", kind="dataset", version=1, body=_body(manifest))
    with pytest.raises(CorruptFile, match=r"interactions.parquet: wrong number of rows.*6; got 5"):
        open_dataset(tmp_path / "d")


@pytest.mark.parametrize("file", ["users", "items", "interactions"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, file: str, harm: str) -> None:
    write(tmp_path / "d")
    path = tmp_path / "d" / f"{file}.parquet"
    data = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    else:
        data[20] ^= 1
        path.write_bytes(data if harm == "flip" else data[:-5])
    with pytest.raises(CorruptFile, match=f"{file}.parquet"):
        open_dataset(tmp_path / "d")


def test_a_flipped_page_is_noticed_even_without_verification(tmp_path: Path) -> None:
    write(tmp_path / "d")
    path = tmp_path / "d" / "interactions.parquet"
    data = bytearray(path.read_bytes())
    data[40] ^= 1  # inside the first data page
    path.write_bytes(data)
    with pytest.raises(CorruptFile, match=r"interactions.parquet"):
        open_dataset(tmp_path / "d", verify=False).interactions()


def test_absent_or_newer_folders(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        open_dataset(tmp_path / "nothing")
    write(tmp_path / "d")
    write_manifest(tmp_path / "d", kind="dataset", version=99, body={})
    with pytest.raises(NewerFormat):
        open_dataset(tmp_path / "d")
    write_manifest(tmp_path / "d", kind="generation", version=1, body={})
    with pytest.raises(ShardlineError):
        open_dataset(tmp_path / "d")


def slow_splits(
    rows: list[tuple[int, int, int]], test_per_user: int, val_ids: set[int]
) -> list[int]:
    codes = [0] * len(rows)
    for user in {row[0] for row in rows}:
        mine = [i for i, row in enumerate(rows) if row[0] == user]
        mine.sort(key=lambda i: (rows[i][2], rows[i][1]))
        if len(mine) > test_per_user:
            kept = mine[: len(mine) - test_per_user]
            for i in mine[len(kept) :]:
                codes[i] = 2
            mine = kept
        if user in val_ids and len(mine) >= 2:
            codes[mine[-1]] = 1
    return codes


@pytest.mark.parametrize("test_per_user", [0, 1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_splits_as_a_loop_says(test_per_user: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    users = rng.integers(0, 30, 150) * 1000
    items, times = rng.permutation(150), rng.integers(0, 4, 150)  # many equal timestamps
    val_ids = np.arange(0, 30_000, 2000)
    codes = split_codes(users, items, times, test_per_user=test_per_user, val_ids=val_ids)
    rows = list(zip(users.tolist(), items.tolist(), times.tolist(), strict=True))
    assert codes.tolist() == slow_splits(rows, test_per_user, set(val_ids.tolist()))


def slow_hold_out(rows: list[tuple[int, int, int]], per_user: int) -> list[bool]:
    """All users who keep something give their last ones by (time, item)."""
    held = []
    for user, item, time in rows:
        mine = sorted((t, i) for u, i, t in rows if u == user)
        held.append(len(mine) > per_user and (time, item) in mine[-per_user:])
    return held


@pytest.mark.parametrize("per_user", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_held_out_rows_as_a_loop_says(per_user: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, 40, 150) * 10, rng.permutation(150)
    times = rng.integers(0, 4, 150)
    held = hold_out(users, items, times, per_user=per_user, most_users=40, order="last", rng=rng)
    rows = list(zip(users.tolist(), items.tolist(), times.tolist(), strict=True))
    assert held.tolist() == slow_hold_out(rows, per_user)


def test_held_out_at_random_from_some_users() -> None:
    users = np.repeat(np.arange(50), 6)
    items, times = np.arange(300), np.arange(300)

    def run(seed: int, most_users: int, order: str = "random") -> np.ndarray:
        rng = np.random.default_rng(seed)
        return hold_out(
            users, items, times, per_user=2, most_users=most_users, order=order, rng=rng
        )

    assert np.array_equal(run(1, 10), run(1, 10))
    assert not np.array_equal(run(1, 10), run(2, 10))
    counts = np.bincount(users[run(1, 10)], minlength=50)
    assert sorted(counts.tolist()) == [0] * 40 + [2] * 10
    assert run(1, 99).sum() == 100
    # each place among a user's six is as likely as another; the last ones are always the last
    places = np.flatnonzero(np.concatenate([run(seed, 50) for seed in range(20)])) % 6
    assert (np.bincount(places) > 250).all()  # of 2000 / 6 on average
    assert set((np.flatnonzero(run(1, 50, "last")) % 6).tolist()) == {4, 5}
    none = hold_out(
        users[:0], items[:0], times[:0],
        per_user=1, most_users=3, order="last", rng=np.random.default_rng(0),
    )  # fmt: skip
    assert none.tolist() == []


def test_cold_rows_take_whole_items() -> None:
    items = np.random.default_rng(0).integers(0, 20, 300) * 7
    cold = cold_rows(items, 0.25, np.random.default_rng(1))
    chosen = np.unique(items[cold])
    assert len(chosen) == 5
    assert np.array_equal(cold, np.flatnonzero(np.isin(items, chosen)))


@pytest.mark.parametrize("splits", [("train",), ("test", "train"), SPLITS, ()])
def test_sequences_against_a_loop(splits: tuple[str, ...]) -> None:
    rng = np.random.default_rng(3)
    user_ids, item_ids = np.sort(rng.choice(10**12, (2, 20), replace=False))
    users, items = rng.choice(user_ids[::2], 200), rng.choice(item_ids, 200)  # with repeats
    times, codes = rng.integers(0, 9, 200), rng.integers(0, 3, 200).astype(np.int8)
    table = pa.Table.from_batches([interaction_batch(users, items, times, codes)])
    rows = [
        (user, time, item)
        for user, time, item, code in zip(users, times, items, codes, strict=True)
        if SPLITS[code] in splits
    ]
    sequences = Sequences.of(table, user_ids, item_ids)
    got = sequences.positives(splits, len(item_ids))
    assert got.lengths.sum() == len(got.items)
    for place, user in enumerate(user_ids):
        mine = [item for _, _, item in sorted(row for row in rows if row[0] == user)]
        expected = list(dict.fromkeys(int(np.flatnonzero(item_ids == item)[0]) for item in mine))
        assert got.items[got.indptr[place] : got.indptr[place + 1]].tolist() == expected
    of_users, of_items = sequences.counts(splits, len(item_ids))
    assert of_users.tolist() == [sum(row[0] == user for row in rows) for user in user_ids]
    assert of_items.tolist() == [sum(row[2] == item for row in rows) for item in item_ids]
    with pytest.raises(DataError, match=r"interactions.item_id"):
        Sequences.of(table, user_ids, item_ids[:5])
    with pytest.raises(DataError, match=r"unknown split; expected train \| val \| test; got 'all'"):
        sequences.positives(("all",), len(item_ids))


def test_tables_and_ids_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "d")
    reads = count_reads(monkeypatch)
    dataset = open_dataset(tmp_path / "d", verify=False)
    for _ in range(2):
        assert dataset.user_ids.tolist() == [3, 9, 70]
        assert dataset.item_ids.tolist() == [5, 6, 11, 2**60]
        assert dataset.positives("train").lengths.tolist() == [1, 0, 2]
    assert reads == {"users.parquet": 1, "items.parquet": 1, "interactions.parquet": 1}
    reads.clear()
    kept = open_dataset(tmp_path / "d", keep=True)
    assert kept.users().num_rows + kept.items().num_rows + len(kept.item_ids) == 11
    assert reads == {"users.parquet": 1, "items.parquet": 1, "interactions.parquet": 1}


def test_rows_of_an_empty_table() -> None:
    none = np.array([], dtype=np.int64)
    assert rows_of(none, none, field="x").tolist() == []
    with pytest.raises(DataError, match=r"x\[0\]: 1 unknown ids"):
        rows_of(none, np.array([4]), field="x")
