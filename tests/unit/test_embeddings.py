"""Embedding sets: what is written is read, and anything altered or odd is refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardline.cluster.store import Store
from shardline.shards.core.errors import CorruptFile, DataError, InvalidInput, NewerFormat, NotFound
from shardline.shards.core.files import write_manifest
from shardline.shards.core.schema import Metric, normalise
from shardline.shards.storage.embedding_set import (
    EmbeddingSet,
    embedding_writer,
    open_embedding_set,
)
from shardline.shards.storage.foreign_vectors import read_foreign, read_foreign_queries
from shardline.shards.storage.vector_files import read_queries

WHEN = "2026-01-01T00:00:00Z"


def write(
    target: Path,
    ids: np.ndarray,
    vectors: np.ndarray,
    *,
    metric: Metric = Metric.COSINE,
    rows_per_file: int = 1000,
    parts: int = 1,
    attributes: pa.RecordBatch | None = None,
) -> EmbeddingSet:
    with embedding_writer(
        target,
        model_version="m1",
        dim=vectors.shape[1],
        metric=metric,
        created_at=WHEN,
        rows_per_file=rows_per_file,
    ) as writer:
        for part in np.array_split(np.arange(len(ids)), parts):
            rows = attributes.take(pa.array(part)) if attributes is not None else None
            writer.append(ids[part], vectors[part], rows)
    return open_embedding_set(target)


def some(rows: int = 25, dim: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    vectors = normalise(rng.standard_normal((rows, dim)).astype(np.float32))
    return rng.permutation(1000)[:rows].astype(np.int64), vectors


@pytest.mark.parametrize(("rows_per_file", "parts"), [(1000, 1), (10, 1), (10, 4), (25, 2), (1, 3)])
def test_round_trip(tmp_path: Path, rows_per_file: int, parts: int) -> None:
    ids, vectors = some()
    names = pa.record_batch({"name": [f"item {i}" for i in ids]})
    found = write(
        tmp_path / "set", ids, vectors, rows_per_file=rows_per_file, parts=parts, attributes=names
    )
    assert len(found.files) == -(-25 // rows_per_file)
    assert (found.rows, found.dim, found.model_version, found.metric) == (25, 6, "m1", "cosine")
    assert (found.normalised, found.created_at, found.encoder_folder) == (True, WHEN, None)
    for size in (3, 100):
        batches = list(found.batches(size))
        assert max(len(batch.item_ids) for batch in batches) <= size
        assert (np.concatenate([b.item_ids for b in batches]) == ids).all()
        assert (np.concatenate([b.vectors for b in batches]) == vectors).all()
        read = [name for b in batches for name in b.attributes.column("name").to_pylist()]
        assert read == [f"item {i}" for i in ids]
    assert (found.item_ids() == ids).all()


def test_sets_without_attributes_have_batches_without_columns(tmp_path: Path) -> None:
    (batch,) = write(tmp_path / "set", *some()).batches()
    assert batch.attributes.num_columns == 0


def test_cosine_vectors_have_unit_length_on_disk_and_as_read(tmp_path: Path) -> None:
    ids, vectors = some()
    longer = vectors * np.linspace(0.1, 9, len(ids), dtype=np.float32)[:, None]
    (batch,) = write(tmp_path / "set", ids, longer).batches()
    np.testing.assert_allclose(batch.vectors, vectors, rtol=1e-6, atol=1e-7)
    (again,) = write(tmp_path / "again", ids, batch.vectors).batches()
    assert (again.vectors == batch.vectors).all()
    (kept,) = write(tmp_path / "dot", ids, longer, metric=Metric.DOT).batches()
    assert (kept.vectors == longer).all()
    older = forge(tmp_path / "dot", metric="cosine")  # as sets were written before
    (read,) = older.batches()
    np.testing.assert_allclose(read.vectors, vectors, rtol=1e-6, atol=1e-7)


def test_parts_with_dictionaries_of_their_own_are_one_column(tmp_path: Path) -> None:
    ids, vectors = some()
    with embedding_writer(
        tmp_path / "set", model_version="m1", dim=6, metric=Metric.COSINE, created_at=WHEN
    ) as writer:
        for start in range(0, 25, 10):
            rows = slice(start, start + 10)
            names = pa.array([f"n{item % 4}" for item in ids[rows]]).dictionary_encode()
            writer.append(ids[rows], vectors[rows], pa.record_batch({"name": names}))
    batches = open_embedding_set(tmp_path / "set").batches()
    read = [name for batch in batches for name in batch.attributes.column("name").to_pylist()]
    assert read == [f"n{item % 4}" for item in ids]


def test_queries_are_checked_stored_and_listed(tmp_path: Path) -> None:
    ids, vectors = some()
    assert write(tmp_path / "none", ids, vectors).queries_file is None
    for name, bad in (("ok", None), ("nan", np.nan), ("zero", 0.0)):
        queries = 3 * vectors[:5]
        if bad is not None:
            queries[2] = bad
        try:
            with embedding_writer(
                tmp_path / name, model_version="m1", dim=6, metric=Metric.COSINE, created_at=WHEN
            ) as writer:
                writer.append(ids, vectors)
                writer.queries(queries)
        except InvalidInput as error:
            assert error.field == "queries[2]" and not (tmp_path / name).exists()
    found = open_embedding_set(tmp_path / "ok")
    assert len(found.files) == 1 and found.queries_file is not None
    np.testing.assert_allclose(read_queries(found.queries_file, dim=6), vectors[:5], rtol=1e-6)
    with pytest.raises(CorruptFile, match=r"queries\.arrow: wrong columns"):
        read_queries(found.queries_file, dim=7)
    found.queries_file.write_bytes(b"")
    with pytest.raises(CorruptFile, match=r"queries\.arrow: wrong size"):
        open_embedding_set(tmp_path / "ok")


@pytest.mark.parametrize("where", [0.1, 0.5, 0.95])
def test_one_flipped_bit_is_found(tmp_path: Path, where: float) -> None:
    write(tmp_path / "set", *some(), rows_per_file=10)
    path = tmp_path / "set" / "items-00001.arrow"
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match=r"items-00001\.arrow: wrong checksum"):
        open_embedding_set(tmp_path / "set")


def test_cut_and_lost_files(tmp_path: Path) -> None:
    write(tmp_path / "set", *some(), rows_per_file=10)
    path = tmp_path / "set" / "items-00002.arrow"
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(CorruptFile, match=r"items-00002\.arrow: wrong size"):
        open_embedding_set(tmp_path / "set")
    unverified = open_embedding_set(tmp_path / "set", verify=False)
    with pytest.raises(CorruptFile, match=r"items-00002\.arrow: not an Arrow IPC file"):
        unverified.item_ids()
    path.unlink()
    with pytest.raises(CorruptFile, match=r"items-00002\.arrow: missing"):
        open_embedding_set(tmp_path / "set")


def test_unfinished_and_newer_sets(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no complete embedding set"):
        open_embedding_set(tmp_path)
    write_manifest(tmp_path, kind="embedding set", version=2, body={})
    with pytest.raises(NewerFormat, match="format_version <= 1; got 2"):
        open_embedding_set(tmp_path)


def forge(folder: Path, **changes: Any) -> EmbeddingSet:
    """A set whose manifest is valid but does not tell the truth about its files."""
    content = json.loads((folder / "_manifest.json").read_text())
    for name in ("kind", "format_version", "checksum"):
        content.pop(name)
    write_manifest(folder, kind="embedding set", version=1, body=content | changes)
    return open_embedding_set(folder)


def test_rows_and_columns_are_those_of_the_manifest(tmp_path: Path) -> None:
    write(tmp_path / "set", *some())
    content = json.loads((tmp_path / "set" / "_manifest.json").read_text())
    files = [content["files"][0] | {"rows": 24}]
    with pytest.raises(CorruptFile, match="wrong number of rows; expected 24; got 25"):
        list(forge(tmp_path / "set", files=files).batches())
    with pytest.raises(CorruptFile, match=r"wrong columns; .*\[7\].*got .*\[6\]"):
        list(forge(tmp_path / "set", dim=7).batches())


def test_values_are_checked_again_when_read(tmp_path: Path) -> None:
    ids, vectors = some()
    vectors = vectors.copy()
    vectors[3] = 0
    write(tmp_path / "set", ids, vectors, metric=Metric.DOT)
    with pytest.raises(DataError, match=r"embedding\[3\]: zero vector"):
        list(forge(tmp_path / "set", metric="cosine").batches())


@pytest.mark.parametrize(
    ("row", "value", "words"),
    [(2, np.nan, "not finite"), (0, np.inf, "not finite"), (4, 0.0, "zero vector")],
)
def test_bad_vectors_are_not_written(tmp_path: Path, row: int, value: float, words: str) -> None:
    ids, vectors = some()
    vectors = vectors.copy()
    vectors[row] = value
    with pytest.raises(InvalidInput, match=rf"embedding\[{row}\]: {words}"):
        write(tmp_path / "set", ids, vectors)
    assert list(tmp_path.iterdir()) == []


def test_ids_are_unique_across_files(tmp_path: Path) -> None:
    ids, vectors = some()
    ids[24] = ids[0]
    with pytest.raises(InvalidInput, match=f"duplicate id.*{ids[0]}"):
        write(tmp_path / "set", ids, vectors, rows_per_file=10, parts=5)
    assert not (tmp_path / "set").exists()
    ids[24] = -1
    with pytest.raises(InvalidInput, match="negative id"):
        write(tmp_path / "set", ids, vectors)


def test_nothing_and_clashing_attributes_are_refused(tmp_path: Path) -> None:
    ids, vectors = some()
    with (
        pytest.raises(InvalidInput, match="without items"),
        embedding_writer(
            tmp_path / "set",
            model_version="m1",
            dim=6,
            metric=Metric.DOT,
            created_at=WHEN,
        ),
    ):
        pass
    with pytest.raises(InvalidInput, match="empty batch"):
        write(tmp_path / "set", ids[:0], vectors[:0])
    clash = pa.record_batch({"embedding": pa.array(range(25))})
    with pytest.raises(InvalidInput, match="embedding: an attribute has the name"):
        write(tmp_path / "set", ids, vectors, attributes=clash)


def test_an_existing_set_is_not_overwritten(tmp_path: Path) -> None:
    ids, vectors = some()
    first = write(tmp_path / "set", ids, vectors)
    with pytest.raises(FileExistsError):
        write(tmp_path / "set", ids + 1, vectors)
    assert open_embedding_set(tmp_path / "set") == first


# --- foreign files ---


def lists(vectors: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.array(vectors.tolist(), kind)


@pytest.mark.parametrize("id_name", ["item_id", "id", "idx"])
@pytest.mark.parametrize("vector_name", ["embedding", "emb", "vector"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_foreign_names_and_formats(
    tmp_path: Path, id_name: str, vector_name: str, suffix: str
) -> None:
    ids, vectors = some()
    table = pa.table(
        {
            "note": ["x"] * 25,
            vector_name: lists(vectors, pa.list_(pa.float64())),
            id_name: pa.array(ids, pa.int32()),
        }
    )
    save(table, tmp_path / f"a{suffix}")
    (batch,) = read_foreign([tmp_path])
    assert (batch.item_ids == ids).all() and batch.item_ids.dtype == np.int64
    assert (batch.vectors == vectors).all() and batch.vectors.dtype == np.float32
    assert batch.attributes.schema.names == ["note"]


def save(table: pa.Table, path: Path) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), 6), pa.large_list(pa.float16())]
)
def test_foreign_list_types(tmp_path: Path, kind: pa.DataType) -> None:
    ids, vectors = some()
    save(pa.table({"n": ids, "v": lists(vectors, kind)}), tmp_path / "a.arrow")
    (batch,) = read_foreign([tmp_path / "a.arrow"], id_column="n", vector_column="v")
    np.testing.assert_allclose(batch.vectors, vectors, atol=1e-3)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"key": [1], "emb": [[1.0]]}, "item_id | id | idx: no such column; got key"),
        ({"id": [1], "vec": [[1.0]]}, "embedding | emb | vector: no such column"),
        (
            {"id": [1, None], "emb": [[1.0], [2.0]]},
            "id[1]: not usable as ids; expected no nulls; got a null",
        ),
        (
            {"id": [1], "emb": [1.0]},
            "emb: not usable as vectors; expected lists of numbers; got double",
        ),
        ({"id": [1], "emb": [["a"]]}, "emb: not usable as vectors; expected lists of numbers"),
        (
            {"id": [1, 2], "emb": [[1.0], [2.0, 3.0]]},
            "emb[1]: not usable as vectors; expected vectors of 1 numbers, as the others; got 2",
        ),
        ({"id": [1, 2, 3], "emb": [[1.0], [2.0], []]}, "emb[2]: not usable as vectors"),
        ({"id": [1, 2], "emb": [[1.0], None]}, "emb[1]: not usable as vectors; expected no nulls"),
        ({"id": [1, 2], "emb": [[1.0], [float("nan")]]}, "emb[1]: not finite"),
    ],
)
def test_foreign_tables_that_do_not_fit(
    tmp_path: Path, table: dict[str, list[Any]], words: str
) -> None:
    save(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        list(read_foreign([tmp_path / "a.parquet"]))
    assert words in str(caught.value)
    assert "a.parquet" in str(caught.value)


def test_foreign_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        list(read_foreign([tmp_path / "x.parquet"]))
    with pytest.raises(NotFound, match="no Parquet or Arrow file in it"):
        list(read_foreign([tmp_path]))
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"nonsense, but long enough to look for a footer")
        with pytest.raises(DataError, match=rf"{name}: not readable"):
            list(read_foreign([tmp_path / name]))


def test_foreign_files_of_different_width(tmp_path: Path) -> None:
    save(pa.table({"id": [1], "emb": [[1.0, 2.0]]}), tmp_path / "a.parquet")
    save(pa.table({"id": [2], "emb": [[1.0]]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: emb\[0\]: .*of 2 numbers.*got 1 numbers"):
        list(read_foreign([tmp_path]))


def test_foreign_queries_need_no_ids_and_are_drawn_from_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, vectors = some()
    save(pa.table({"emb": lists(vectors[:20], pa.list_(pa.float32()))}), tmp_path / "a.parquet")
    save(pa.table({"emb": lists(vectors[20:], pa.list_(pa.float32()))}), tmp_path / "b.arrow")
    assert (read_foreign_queries([tmp_path], dim=6) == vectors).all()
    monkeypatch.setattr("shardline.shards.storage.foreign_vectors.MAX_SAMPLE_QUERIES", 4)
    first, again = (read_foreign_queries([tmp_path], dim=6) for _ in range(2))
    assert first.shape == (4, 6) and (first == again).all()
    assert all((vectors == query).all(axis=1).any() for query in first)
    with pytest.raises(DataError, match=r"emb\[0\]: .*of 5 numbers.*got 6 numbers"):
        read_foreign_queries([tmp_path], dim=5)
    save(pa.table({"emb": lists(vectors[:0], pa.list_(pa.float32()))}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="no rows"):
        read_foreign_queries([tmp_path / "c.parquet"], dim=6)


def test_a_set_in_the_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    """Two exchanged sets are whole by all their checksums; only stores name folders by version."""
    written = write(tmp_path / "embeddings" / "set", *some())
    folder, version = written.folder, written.model_version
    assert open_embedding_set(folder) == written
    assert open_embedding_set(folder, version=version) == written
    with pytest.raises(
        CorruptFile, match=f"set: another embedding set's .* version set; got .* {version}"
    ):
        open_embedding_set(folder, version=Store(tmp_path).version_of(folder))
    folder.rename(tmp_path / "embeddings" / version)
    assert Store(tmp_path).version_of(tmp_path / "embeddings" / version) == version
    (tmp_path / "link").symlink_to(tmp_path / "embeddings" / version)
    assert Store(tmp_path).version_of(tmp_path / "link") == version
    assert Store(tmp_path / "elsewhere").version_of(tmp_path / "link") is None
