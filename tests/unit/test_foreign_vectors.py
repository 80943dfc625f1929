"""Vectors made elsewhere, in the files that people have: built, or refused with file and row."""

import tempfile
import uuid
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardline.cluster.cli import cli, main
from shardline.cluster.store import Store
from shardline.shards.core.errors import DataError, InvalidInput, NotFound
from shardline.shards.core.partition import Partitioning, partition
from shardline.shards.core.schema import Metric
from shardline.shards.storage import table_parts
from shardline.shards.storage.embedding_set import embedding_writer, open_embedding_set
from shardline.shards.storage.foreign_vectors import read_foreign, read_foreign_queries
from shardline.shards.storage.generation import read_attributes, read_generation, read_item_ids
from shardline.shards.storage.spill import read_spill, spill_writer
from shardline.shards.storage.vector_files import write_table
from tests.data_shapes.random_columns import WRAPPED, values_of

NAN = float("nan")
FLOATS = pa.list_(pa.float32())


def save(path: Path, **columns: Any) -> Path:
    """One part: an IPC stream or file by suffix, which hold any type, or else Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if path.suffix in (".arrows", ".arrow"):
        make = pa.ipc.new_stream if path.suffix == ".arrows" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path)
    return path


def vectors(rows: int, dim: int = 4) -> list[list[float]]:
    return np.random.default_rng(rows).standard_normal((rows, dim)).tolist()


def read(*paths: Path, **options: Any) -> tuple[list[int], pa.Table]:
    """Item ids and attributes of all rows."""
    batches = list(read_foreign(paths, **options))
    ids = [item for batch in batches for item in batch.item_ids.tolist()]
    return ids, pa.Table.from_batches([batch.attributes for batch in batches])


def ended(capsys: pytest.CaptureFixture[str], store: Path, *arguments: object) -> tuple[int, str]:
    """Exit code of ``build --in-process``, and what it says of an error."""
    with pytest.raises(SystemExit) as end:
        main(["--store", str(store), "build", "--in-process", *map(str, arguments)])
    return int(end.value.code or 0), capsys.readouterr().err


# --- ids ---

UUIDS = [uuid.UUID(int=number) for number in (3, 1, 2)]
# name -> (the ids of three items, their numbers, or the words of refusal)
IDS: dict[str, tuple[Callable[[], pa.Array], list[int] | str]] = {
    "int8": (lambda: pa.array([3, 1, 2], pa.int8()), [3, 1, 2]),
    "uint64": (lambda: pa.array([3, 1, 2], pa.uint64()), [3, 1, 2]),
    "uint64 beyond int64": (lambda: pa.array([2**64 - 1, 7, 2**63], pa.uint64()), [2, 0, 1]),
    "negative": (lambda: pa.array([5, -1, 0]), [2, 0, 1]),
    "whole floats": (lambda: pa.array([3.0, 1.0, 2.0]), [3, 1, 2]),
    "decimal": (lambda: pa.array([Decimal(3), Decimal(1), Decimal(2)]), [3, 1, 2]),
    "string": (lambda: pa.array(["b", "a", "日本"]), [1, 0, 2]),
    "large_string": (lambda: pa.array(["b", "a", "c"], pa.large_string()), [1, 0, 2]),
    "string_view": (lambda: pa.array(["b", "a", "c"], pa.string_view()), [1, 0, 2]),
    "uuid": (
        lambda: pa.ExtensionArray.from_storage(
            pa.uuid(), pa.array([each.bytes for each in UUIDS], pa.binary(16))
        ),
        [2, 0, 1],
    ),
    "binary": (lambda: pa.array([b"b", b"a", b"\xff"]), [1, 0, 2]),
    "dictionary of strings": (lambda: pa.array(["b", "a", "c"]).dictionary_encode(), [1, 0, 2]),
    "dictionary of ints": (lambda: pa.array([3, 1, 2]).dictionary_encode(), [3, 1, 2]),
    "null": (
        lambda: pa.array(["b", "a", None]),
        "key[2]: not usable as ids; expected no nulls; got a null",
    ),
    "fraction": (
        lambda: pa.array([1.0, 2.5, 3.0]),
        "key[1]: not usable as ids; expected ids that are whole numbers; got 2.5",
    ),
    "nan": (lambda: pa.array([1.0, 2.0, NAN]), "key[2]: not usable as ids"),
    "bool": (lambda: pa.array([True, False, True]), "key: not usable as ids; expected integers"),
    "list": (lambda: pa.array([[1], [2], [3]]), "key: not usable as ids; expected integers or str"),
    "bad utf-8": (
        lambda: pa.array([b"a", b"\xc9", b"b"]).view(pa.string()),
        "key[1]: a value that its type does not allow; expected string, text in UTF-8",
    ),
    "only nulls": (lambda: pa.nulls(3), "key[0]: not usable as ids; expected no nulls"),
    "int twice": (lambda: pa.array([3, 1, 3]), "key[2]: duplicate id; expected unique ids; got 3"),
    "text twice": (
        lambda: pa.array(["sku-7", "a", "sku-7"]),
        "key[2]: duplicate id; expected unique ids; got 'sku-7', as in ",
    ),
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("suffix", [".arrow", ".arrows"])
def test_ids(tmp_path: Path, name: str, suffix: str) -> None:
    make, expected = IDS[name]
    path = save(tmp_path / f"a{suffix}", key=make(), vector=vectors(3))
    if isinstance(expected, str):
        with pytest.raises(DataError) as caught:
            read(path, id_column="key")
        assert f"{path}: {expected}" in str(caught.value)
        return
    ids, attributes = read(path, id_column="key")
    assert ids == expected
    is_numbered = min(expected) == 0
    assert attributes.column_names == (["original_id"] if is_numbered else [])
    if name == "uuid":
        assert attributes["original_id"].to_pylist() == [str(each) for each in UUIDS]


def test_ids_are_numbered_over_all_files_and_found_twice_by_the_original(tmp_path: Path) -> None:
    first = save(tmp_path / "a.parquet", id=["d", "b"], vector=vectors(2))
    save(tmp_path / "b.parquet", id=pa.array(["c", "a"]).dictionary_encode(), vector=vectors(2))
    ids, attributes = read(tmp_path)
    assert ids == [3, 1, 2, 0]
    assert attributes["original_id"].to_pylist() == ["d", "b", "c", "a"]
    last = save(tmp_path / "c.parquet", id=["e", "b"], vector=vectors(2))
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    words = f"{last}: id[1]: duplicate id; expected unique ids; got 'b', as in {first}: id[1]"
    assert str(caught.value) == words


def test_numbers_of_several_types_are_one_kind_of_id(tmp_path: Path) -> None:
    save(tmp_path / "a", id=pa.array([2**63], pa.uint64()), vector=vectors(1))
    save(tmp_path / "b", id=pa.array([5], pa.int8()), vector=vectors(1))
    ids, attributes = read(tmp_path)
    assert (ids, attributes["original_id"].to_pylist()) == ([1, 0], [2**63, 5])
    save(tmp_path / "c", id=[-1], vector=vectors(1))
    assert read(tmp_path)[1]["original_id"].to_pylist() == [str(2**63), "5", "-1"]
    save(tmp_path / "d", id=["x"], vector=vectors(1))
    with pytest.raises(DataError, match=r"d: id: part files disagree; expected uint64, as in .*a;"):
        read(tmp_path)


# --- vectors ---

TWO = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
VECTORS: dict[str, pa.DataType] = {
    "list": FLOATS,
    "large_list": pa.large_list(pa.float64()),
    "fixed_size_list": pa.list_(pa.float16(), 2),
    "list_view": pa.list_view(pa.float32()),
    "large_list_view": pa.large_list_view(pa.int8()),
    "ints": pa.list_(pa.int64()),
    "decimals": pa.list_(pa.decimal128(6, 2), 2),
    "tensor": pa.fixed_shape_tensor(pa.float32(), [2]),
}
# name -> (the vectors, the words of refusal after file and column)
BAD_VECTORS: dict[str, tuple[Callable[[], pa.Array], str]] = {
    "nan": (lambda: pa.array([*TWO, [1.0, NAN]]), "[3]: not finite"),
    "beyond float32": (lambda: pa.array([*TWO, [1.0, 1e300]]), "[3]: not finite"),
    "zero": (lambda: pa.array([*TWO, [0.0, 0.0]]), "[3]: zero vector; expected a non-zero"),
    "null": (lambda: pa.array([*TWO, None]), "[3]: not usable as vectors; expected no nulls"),
    "null of fixed size": (lambda: pa.array([*TWO, None], pa.list_(pa.float32(), 2)), "[3]: not"),
    "null inside": (
        lambda: pa.array([*TWO, [1.0, None]]),
        "[3]: not usable as vectors; expected no nulls; got a null inside a vector",
    ),
    "longer": (
        lambda: pa.array([*TWO, [1.0, 2.0, 3.0]]),
        "[3]: not usable as vectors; expected vectors of 2 numbers, as the others; got 3 numbers",
    ),
    "empty": (lambda: pa.array([[], []], FLOATS), "[0]: not usable as vectors"),
    "numbers": (lambda: pa.array([1.0]), ": not usable as vectors; expected lists of numbers"),
    "texts": (lambda: pa.array([["a"]]), ": not usable as vectors; expected lists of numbers"),
    "bools": (lambda: pa.array([[True]]), ": not usable as vectors; expected lists of numbers"),
    "structs": (lambda: pa.array([[{"a": 1}]]), ": not usable as vectors; expected lists of"),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(tmp_path: Path, name: str) -> None:
    kind = VECTORS[name]
    if isinstance(kind, pa.FixedShapeTensorType):
        column = pa.ExtensionArray.from_storage(kind, pa.array(TWO, kind.storage_type))
    else:
        column = pa.array([[int(x) for x in row] for row in TWO], kind)
    path = save(tmp_path / "a.arrow", id=[1, 2, 3], v=column)
    (batch,) = read_foreign([path], vector_column="v")
    assert batch.vectors.dtype == np.float32 and batch.vectors.tolist() == TWO
    queries = read_foreign_queries([path], dim=2, vector_column="v")
    assert queries.tolist() == TWO


@pytest.mark.parametrize("name", BAD_VECTORS)
def test_vectors_that_are_refused(tmp_path: Path, name: str) -> None:
    make, words = BAD_VECTORS[name]
    column = make()
    path = save(tmp_path / "a.arrows", id=range(len(column)), v=column)
    dim = 1 if name == "bools" else 2
    for reading in (
        lambda: list(read_foreign([path], vector_column="v", metric=Metric.COSINE)),
        lambda: read_foreign_queries([path], dim=dim, vector_column="v", metric=Metric.COSINE),
    ):
        with pytest.raises(DataError) as caught:
            reading()
        assert f"{path}: v{words}" in str(caught.value)


@pytest.mark.parametrize("value", [NAN, 0.0])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_the_row_is_that_of_the_file(tmp_path: Path, value: float, suffix: str) -> None:
    """The last of 65,537 vectors is alone in its batch, and the file is not the first."""
    many = np.ones((65_537, 2), np.float32)
    many[-1] = value
    save(tmp_path / "a.parquet", id=["x"], vector=[[1.0, 1.0]])
    text = pa.array(map(str, range(65_537)))
    columns = pa.FixedSizeListArray.from_arrays(pa.array(many.ravel()), 2)
    path = save(tmp_path / f"b{suffix}", id=text, vector=columns)
    with pytest.raises(DataError) as caught:
        list(read_foreign([tmp_path], metric=Metric.COSINE))
    assert str(caught.value).startswith(f"{path}: vector[65536]: ")


# --- attributes, parts and files ---


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (pa.nulls(1), pa.array([1.5]), pa.float64()),
        (pa.array([1]), pa.array([1.5]), pa.float64()),
        (pa.array([1], pa.int32()), pa.array([2**40]), pa.int64()),
        (pa.array(["a"]), pa.array(["b"], pa.large_string()), pa.large_string()),
        (pa.array(["a"]), pa.array(["b"], pa.string_view()), pa.large_string()),
        (pa.array(["a"]).dictionary_encode(), pa.array(["b"]).dictionary_encode(), pa.string()),
        (pa.array([1]).dictionary_encode(), pa.array([1.5]), pa.float64()),
        (pa.array([{"a": 1}]), pa.array([{"a": 1.5, "b": "x"}]), None),
        (pa.array([[1]]), pa.array([[1.5]]), pa.list_(pa.float64())),
        (None, pa.array(["b"]), pa.string()),
    ],
)
def test_types_of_part_files_are_unified(
    tmp_path: Path, first: pa.Array | None, second: pa.Array, kind: pa.DataType | None
) -> None:
    save(tmp_path / "a.arrow", id=[1], vector=[[1.0]], **({"x": first} if first else {}))
    save(tmp_path / "b.arrow", vector=[[1.0]], x=second, id=[2])
    for paths in ([tmp_path], [tmp_path / "b.arrow", tmp_path / "a.arrow"]):
        _, table = read(*paths)
        assert kind is None or table.schema.field("x").type == kind
        assert second[0].as_py() in table["x"].to_pylist()


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"id": [2], "v": [[1.0]], "x": ["a"]}, "x: part files disagree; expected int64, as in "),
        ({"id": [2], "v": [[1.0]], "x": [2.0**70]}, None),
        ({"v": [[1.0]]}, "item_id | id | idx: no such column; got v"),
        ({"id": [2], "vec": [[1.0]]}, "v: no such column; got id, vec"),
        ({"id": [2], "v": [[1.0]], "item_id": [5], "x": [1]}, None),
        ({"id": [2], "v": [[1.0]], "embedding": [5]}, "embedding: column name is taken"),
        ({"id": ["a"], "v": [[1.0]]}, "id: part files disagree; expected int64, as in "),
        ({"id": [2], "v": [[1.0, 2.0]]}, "v[0]: not usable as vectors; expected vectors of 1 num"),
    ],
)
def test_a_second_part(tmp_path: Path, second: dict[str, Any], words: str | None) -> None:
    save(tmp_path / "a.parquet", id=[1], v=[[1.0]], x=[7])
    path = save(tmp_path / "b.parquet", **second)
    if words is None:
        assert len(read(tmp_path, vector_column="v")[0]) == 2
        return
    with pytest.raises(DataError) as caught:
        read(tmp_path, vector_column="v")
    assert str(caught.value).startswith(f"{path}: {words}")


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ({"sku": ["a"], "item_id": [1]}, {"id_column": "sku"}, "item_id: column name is taken"),
        (
            {"id": ["a"], "original_id": [1]},
            {},
            "original_id: column name is taken",
        ),
        ({"id": [1], "x": pa.array([b"\xff"]).view(pa.string())}, {}, "x[0]: a value that its"),
        (
            {"id": [1], "x": pa.array([["a"]], pa.list_(pa.string_view()))},
            {},
            "x: an attribute's type cannot be stored",
        ),
    ],
)
def test_columns_that_are_refused(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, str], words: str
) -> None:
    path = save(tmp_path / "a.arrow", vector=[[1.0]], **columns)
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert str(caught.value).startswith(f"{path}: {words}")


def test_two_columns_of_one_name_and_one_column_for_both(tmp_path: Path) -> None:
    table = pa.table([[1], [[1.0]], [2], [3]], names=["id", "vector", "x", "x"])
    pq.write_table(table, tmp_path / "a")
    with pytest.raises(DataError, match="a: x: column occurs twice"):
        read(tmp_path / "a")
    with pytest.raises(InvalidInput, match="--vector-column: one column as id and as vector"):
        read(tmp_path / "a", id_column="id", vector_column="id")


def test_parts_are_known_by_content_and_those_without_rows_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    save(folder / "country=FR" / "part-0", id=[1], vector=[[1.0]], x=[1])
    save(folder / "country=PL" / "part-0.arrows", id=[2], vector=[[1.0]], x=[2])
    save(folder / "none", id=pa.nulls(0), vector=pa.nulls(0), x=pa.array([], pa.string()))
    save(folder / "no-columns.arrow")
    for name in ("_SUCCESS", ".part.crc", "state.json"):
        (folder / name).write_bytes(b"{}")
    ids, table = read(folder)
    assert ids == [1, 2] and table["country"].to_pylist() == ["FR", "PL"]
    assert table["x"].to_pylist() == [1, 2]
    assert next(read_foreign([folder.as_uri()])).item_ids.tolist() == [1]
    (folder / "zero.parquet").touch()
    with pytest.raises(DataError, match=r"zero\.parquet: not readable; .*got an empty file"):
        read(folder)
    with pytest.raises(NotFound, match="in: no Parquet or Arrow file in it"):
        (tmp_path / "other" / "in").mkdir(parents=True)
        read(tmp_path / "other" / "in")
    with pytest.raises(InvalidInput, match="--vectors: not a place to read from"):
        list(read_foreign(["nowhere://x/y"]))


def test_the_index_of_a_pandas_frame_is_no_attribute_but_may_be_the_id(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": [4, 5, 9, 7], "vector": vectors(4), "x": range(4)})
    frame[frame["id"] != 5].to_parquet(tmp_path / "a")
    frame.set_index("id").to_parquet(tmp_path / "b")
    assert "__index_level_0__" in pq.read_schema(tmp_path / "a").names
    for name, expected in (("a", [4, 9, 7]), ("b", [4, 5, 9, 7])):
        ids, table = read(tmp_path / name)
        assert ids == expected and table.column_names == ["x"]


def test_vectors_are_read_a_batch_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids are read first; then no more is read than batches are asked for."""
    monkeypatch.setattr(table_parts, "ROWS_PER_BATCH", 10)
    for suffix in ("parquet", "arrow", "arrows"):
        save(tmp_path / f"a.{suffix}", id=[f"{suffix}{n}" for n in range(100)], vector=vectors(100))
    seen: list[tuple[str, ...]] = []
    check = table_parts.refuse_invalid

    def count(batch: pa.RecordBatch, path: str, start: int) -> None:
        assert batch.num_rows <= 10
        seen.append(tuple(batch.schema.names))
        check(batch, path, start)

    monkeypatch.setattr(table_parts, "refuse_invalid", count)
    batches = read_foreign([tmp_path])
    next(batches)
    assert seen.count(("vector",)) == 1, "one batch of vectors"
    assert seen.count(("id",)) == 30 + 3, "the ids of all files, and a look whether there are rows"
    assert sum(len(batch.item_ids) for batch in batches) == 290
    assert seen.count(("vector",)) == 30


# --- the command ---


def test_a_folder_of_dictionaries_and_text_ids_becomes_a_generation(tmp_path: Path) -> None:
    for part in range(2):
        kinds = pa.array(["ab"[part]] * 20).dictionary_encode()
        ids = [f"sku-{n:02d}" for n in range(part, 40, 2)]
        save(tmp_path / "in" / f"{part}.parquet", sku=ids, vector=vectors(20), kind=kinds)
    arguments = ["--store", str(tmp_path / "store"), "--set", "cluster.shards=2", "build"]
    arguments += ["--in-process", "--vectors", str(tmp_path / "in"), "--id-column", "sku"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    folder = Store(tmp_path / "store").generation(1)
    built = read_generation(folder)
    for shard in range(2):
        table = read_attributes(folder, built, shard)
        assert table is not None
        ids = read_item_ids(folder / f"shard-{shard:05d}" / "item_ids.npy", rows=20).tolist()
        assert ids == list(range(20 * shard, 20 * shard + 20))
        assert table["original_id"].to_pylist() == [f"sku-{n:02d}" for n in ids]
        assert table["kind"].to_pylist() == ["ab"[n % 2] for n in ids]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"id": [1, 2], "vector": [[1.0], [NAN]]}, "vector[1]: not finite"),
        ({"id": [1, 2], "vector": [[1.0], [0.0]]}, "vector[1]: zero vector"),
        ({"id": [1, 2], "vector": [[1.0], None]}, "vector[1]: not usable as vectors"),
        ({"id": ["a", None], "vector": [[1.0], [1.0]]}, "id[1]: not usable as ids"),
        ({"id": ["a", "a"], "vector": [[1.0], [1.0]]}, "id[1]: duplicate id"),
        ({"id": [1], "vector": [[1.0]], "item_id": [[1]]}, "item_id: not usable as ids"),
        ({"id": [1], "vector": [[1.0]], "embedding": ["a"]}, "embedding: not usable as vectors"),
        ({"id": pa.array([], pa.int64()), "vector": pa.array([], FLOATS)}, "no rows"),
    ],
)
def test_what_is_refused_ends_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], columns: dict[str, Any], words: str
) -> None:
    path = save(tmp_path / "a.parquet", **columns)
    good = save(tmp_path / "good.parquet", id=[1, 2], vector=[[1.0], [2.0]])
    code, said = ended(capsys, tmp_path / "store", "--vectors", path)
    assert code == 3
    assert f"{path}: {words}" in said.replace("\n", "")
    if "vector[" in words:
        code, said = ended(capsys, tmp_path / "store", "--vectors", good, "--queries", path)
        assert code == 3
        assert f"{path}: {words}" in said.replace("\n", "")
    assert not list((tmp_path / "store").glob("embeddings/*"))


def column(data: st.DataObject, rows: int) -> pa.Array:
    kind = data.draw(WRAPPED)
    return pa.array(data.draw(st.lists(values_of(kind), min_size=rows, max_size=rows)), kind)


def texts(values: pa.Array) -> list[str]:
    """A text per row: to compare NaN, and times that Python cannot hold."""
    return [values.slice(row, 1).to_string() for row in range(len(values))]


@given(st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_schema_raises_an_exception_of_a_library(data: st.DataObject) -> None:
    """Random parts are stored and read back from the spill of their shards, or refused."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in range(data.draw(st.integers(1, 2))):
            rows = data.draw(st.integers(0, 3))
            columns = {
                each: column(data, rows) for each in data.draw(st.sets(st.sampled_from("xy")))
            }
            is_odd = data.draw(st.sampled_from(["no", "no", "id", "vector"]))
            ids = pa.array(range(9 * part + rows, 9 * part, -1), pa.int64())
            columns["id"] = column(data, rows) if is_odd == "id" else ids
            ones = pa.array([[1.0, 2.0]] * rows, FLOATS)
            columns["vector"] = column(data, rows) if is_odd == "vector" else ones
            save(folder / "in" / f"{part}.arrows", **columns)
        try:
            batches = list(read_foreign([folder / "in"]))
        except (DataError, InvalidInput) as error:
            assert str(folder) in str(error)
            return
        if not batches:
            return
        dim = batches[0].vectors.shape[1]
        with embedding_writer(
            folder / "set", model_version="m", dim=dim, metric=Metric.DOT, created_at=""
        ) as writer:
            for batch in batches:
                writer.append(batch.item_ids, batch.vectors, batch.attributes)
        stored = open_embedding_set(folder / "set")
        cut = partition(stored.item_ids(), min(stored.rows, 2), Partitioning.RANGE)
        with spill_writer(folder, cut) as spill:
            for batch in stored.batches():
                spill.append(batch)
        kept: dict[str, list[str]] = {}
        for shard, rows in enumerate(spill.rows):
            own = read_spill(folder, shard, rows=rows, dim=dim)
            write_table(folder / f"attributes-{shard}.arrow", own.attributes)
            for name in set("xy") & set(own.attributes.column_names):
                kept.setdefault(name, []).extend(texts(own.attributes[name].combine_chunks()))
        if is_odd != "id" and stored.rows == len(ids):  # one part; its ids descend
            for name, found in kept.items():
                assert found == texts(columns[name])[::-1]


def test_files_in_another_role_are_another_set(tmp_path: Path) -> None:
    for name, ids in (("a", [1, 2, 3]), ("b", [4, 5, 6]), ("c", [7, 8, 9])):
        vectors = np.random.default_rng(ids[0]).standard_normal((3, 4)).tolist()
        pq.write_table(pa.table({"id": ids, "vector": vectors}), tmp_path / name)
    for roles in (("--vectors", "--vectors", "--queries"), ("--vectors", "--queries", "--queries")):
        given = [each for pair in zip(roles, "abc", strict=True) for each in pair]
        arguments = [str(tmp_path / each) if len(each) == 1 else each for each in given]
        command = ["--store", str(tmp_path / "store"), "--set", "cluster.shards=1", "build"]
        done = CliRunner().invoke(cli, [*command, *arguments, "--in-process"])
        assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "store" / "embeddings").iterdir())) == 2
