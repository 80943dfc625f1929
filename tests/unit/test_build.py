"""What a build makes of a corpus: read once, cut into shards, attributes and queries kept."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from shardline.bench.vectors import clustered
from shardline.cluster import build as build_module
from shardline.cluster.build import build_checked, build_generation, check_plan, run_here
from shardline.cluster.build_shard import ShardBuilt, ShardJob
from shardline.cluster.cli import cli
from shardline.cluster.serving.endpoint import Endpoint, leave_note
from shardline.cluster.store import Store
from shardline.shards.core.errors import CorruptFile, DataError, InvalidInput
from shardline.shards.core.files import HOST, MANIFEST_NAME, write_manifest
from shardline.shards.core.schema import Metric, normalise
from shardline.shards.storage.embedding_set import EmbeddingSet, embedding_writer
from shardline.shards.storage.generation import (
    ATTRIBUTES_NAME,
    ITEM_IDS_NAME,
    GenerationManifest,
    read_attributes,
    read_generation,
    read_item_ids,
    shard_folder,
    verify_generation,
)
from shardline.shards.storage.spill import spill_file
from shardline.shards.storage.vector_files import read_queries, write_queries
from tests.engine import plan_of, write_set

ROWS, DIM = 500, 8


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def some(rows: int = ROWS, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, dim)).astype(np.float32)


def shuffled_ids(rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(1).permutation(10 * rows)[:rows].astype(np.int64)


def ids_of(store: Store, built: GenerationManifest, shard: int) -> np.ndarray:
    path = store.generation(built.generation) / shard_folder(shard) / ITEM_IDS_NAME
    return read_item_ids(path, rows=built.shards[shard].rows)


def test_the_seconds_of_a_build_count_the_checks(tmp_path: Path, store: Store) -> None:
    write_set(tmp_path / "set", some(), metric=Metric.L2)
    checked = check_plan(tmp_path / "set", plan_of(2, kind="flat"))
    assert 0 < checked.seconds < 60
    manifest = build_checked(
        store,
        replace(checked, seconds=1000.0),
        run_jobs=run_here,
        progress=lambda stage, done, total: None,
    )
    quality = manifest.quality
    assert 1000 < quality["build_seconds"] < 1060
    assert quality["train_seconds"] < 60
    assert quality["rows_per_second"] == pytest.approx(ROWS / quality["build_seconds"], abs=1)


@pytest.mark.parametrize("num_shards", [1, 3, 7])
@pytest.mark.parametrize("partitioning", ["range", "hash-range"])
def test_the_corpus_is_read_once_for_any_number_of_shards(
    tmp_path: Path, store: Store, monkeypatch, num_shards: int, partitioning: str
) -> None:
    """Rows read from the set, and rows read by jobs, are those of the corpus: no job reads more."""
    vectors, ids = normalise(some()), shuffled_ids()
    write_set(tmp_path / "set", vectors, ids, rows_per_file=90)
    from_set, by_jobs = [], []
    batches, job = EmbeddingSet.batches, build_module.build_shard

    def counted(corpus: EmbeddingSet):
        for batch in batches(corpus, 64):
            from_set.append(len(batch.item_ids))
            yield batch

    def counted_job(work):
        path = spill_file(work.generation, work.shard)
        by_jobs.append(pa.ipc.open_file(str(path)).read_all().num_rows)
        return job(work)

    monkeypatch.setattr(EmbeddingSet, "batches", counted)
    monkeypatch.setattr(build_module, "build_shard", counted_job)
    plan = plan_of(num_shards, partitioning=partitioning, kind="flat")
    built = build_generation(store, tmp_path / "set", plan)
    assert sum(from_set) == sum(by_jobs) == ROWS
    assert by_jobs == [entry.rows for entry in built.shards]
    assert max(by_jobs) - min(by_jobs) <= 1
    folder = store.generation(built.generation)
    assert {path.name for path in folder.iterdir()} == {
        MANIFEST_NAME,
        "template.faiss",
        *(shard_folder(shard) for shard in range(num_shards)),
    }
    found = np.concatenate([ids_of(store, built, shard) for shard in range(num_shards)])
    assert sorted(found) == sorted(ids)


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, store: Store, monkeypatch) -> None:
    write_set(tmp_path / "set", some())

    def fails(work):
        raise OSError("disk full")

    monkeypatch.setattr(build_module, "build_shard", fails)
    with pytest.raises(OSError, match="disk full"):
        build_generation(store, tmp_path / "set", plan_of(2, kind="flat"))
    assert list(store.generations.iterdir()) == []


def test_a_build_clears_up_after_killed_ones_and_takes_a_new_number(
    tmp_path: Path, store: Store
) -> None:
    write_set(tmp_path / "set", some())
    (store.generations / f".000007.{HOST}-abcdefgh.tmp").mkdir(parents=True)
    first = build_generation(store, tmp_path / "set", plan_of(2, kind="flat"))
    assert [path.name for path in store.generations.iterdir()] == ["000001"]
    shutil.rmtree(store.generation(first.generation))
    second = build_generation(store, tmp_path / "set", plan_of(2, kind="flat"))
    assert second.generation == 2


def test_values_that_no_writer_lets_in_are_refused(tmp_path: Path, store: Store) -> None:
    """Somebody else's embedding set, every checksum right, with a value that is not finite."""
    write_set(tmp_path / "set", some(), metric=Metric.DOT)
    path = tmp_path / "set" / "items-00000.arrow"
    table = pa.ipc.open_file(str(path)).read_all()
    values = table["embedding"].combine_chunks().flatten().to_numpy().copy()
    values[3 * DIM] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(values), DIM)
    table = table.set_column(1, "embedding", column)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    forge_set(tmp_path / "set")
    with pytest.raises(DataError, match=r"embedding\[3\]: not finite"):
        build_generation(store, tmp_path / "set", plan_of(2, kind="flat"))
    assert list(store.generations.iterdir()) == []


def forge_set(folder: Path) -> None:
    """Right checksums for the files as they are now."""
    from shardline.shards.core.files import describe_file

    body = json.loads((folder / MANIFEST_NAME).read_text())
    for name in ("kind", "format_version", "checksum"):
        del body[name]
    entry = describe_file(folder, "items-00000.arrow", ROWS)
    body["files"] = [{name: getattr(entry, name) for name in entry.__slots__}]
    write_manifest(folder, kind="embedding set", version=1, body=body)


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("ids", [np.arange(ROWS), shuffled_ids()], ids=["ascending", "shuffled"])
def test_attributes_stay_with_their_items(
    tmp_path: Path, store: Store, num_shards: int, ids: np.ndarray
) -> None:
    attributes = pa.record_batch(
        {
            "name": [f"item {item}" for item in ids],
            "price": pa.array([None if item % 5 == 0 else item / 2 for item in ids]),
            "tags": pa.array([[f"t{item % 3}"] * (item % 4) for item in ids]),
        }
    )
    write_set(tmp_path / "set", some(), ids, attributes=attributes, rows_per_file=120)
    built = build_generation(store, tmp_path / "set", plan_of(num_shards, kind="flat"))
    folder = store.generation(built.generation)
    for shard, entry in enumerate(built.shards):
        table, own = read_attributes(folder, built, shard), ids_of(store, built, shard)
        assert table is not None
        assert table.schema.equals(attributes.schema)
        assert table["name"].to_pylist() == [f"item {item}" for item in own]
        assert table["price"].to_pylist() == [None if i % 5 == 0 else i / 2 for i in own]
        assert table["tags"].to_pylist() == [[f"t{i % 3}"] * (i % 4) for i in own]
        assert f"{shard_folder(shard)}/{ATTRIBUTES_NAME}" in {file.name for file in entry.files}


def test_damaged_attributes_are_named(tmp_path: Path, store: Store) -> None:
    names = pa.record_batch({"name": [f"item {item}" for item in range(ROWS)]})
    write_set(tmp_path / "set", some(), attributes=names)
    built = build_generation(store, tmp_path / "set", plan_of(2, kind="flat"))
    folder = store.generation(built.generation)
    path = folder / shard_folder(1) / ATTRIBUTES_NAME
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert read_attributes(folder, built, 0) is not None
    for read in (
        lambda: read_attributes(folder, built, 1),
        lambda: verify_generation(folder, built),
    ):
        with pytest.raises(CorruptFile, match=r"shard-00001/attributes\.arrow: wrong checksum"):
            read()


def test_queries_of_the_set_are_kept_and_measured_with(tmp_path: Path, store: Store) -> None:
    queries = normalise(some(rows=30))
    write_set(tmp_path / "set", some(), queries=queries)
    built = build_generation(store, tmp_path / "set", plan_of(2, kind="flat"))
    folder = store.generation(built.generation)
    assert (built.quality["query_source"], built.quality["queries"]) == ("sample queries", 30)
    np.testing.assert_array_equal(read_queries(folder / "queries.arrow", dim=DIM), queries)
    (folder / "queries.arrow").write_bytes(b"")
    with pytest.raises(CorruptFile, match=r"queries\.arrow"):
        verify_generation(folder, built)


@pytest.mark.parametrize(
    ("queries", "error"), [(some(0), CorruptFile), (np.full((3, DIM), np.nan), DataError)]
)
def test_queries_are_checked_before_anything_is_written(
    tmp_path: Path, store: Store, queries: np.ndarray, error: type[Exception]
) -> None:
    with embedding_writer(
        tmp_path / "set", model_version="m", dim=DIM, metric=Metric.L2, created_at="now"
    ) as writer:
        writer.append(np.arange(ROWS), some())
        write_queries(writer.folder / "queries.arrow", queries)
    with pytest.raises(error, match=r"queries\.arrow"):
        build_generation(store, tmp_path / "set", plan_of(2, kind="flat"))
    assert not store.generation(1).parent.exists()


def test_without_queries_items_are_asked_and_named_so(tmp_path: Path, store: Store) -> None:
    write_set(tmp_path / "set", some())
    trained = build_generation(store, tmp_path / "set", plan_of(2, kind="ivf", nlist=4))
    held_out = build_generation(store, tmp_path / "set", plan_of(2, kind="flat"))
    assert trained.quality["query_source"] == "item vectors"
    assert held_out.quality["query_source"] == "item vectors held out of training"
    assert trained.queries is None


def test_format_1_had_neither_attributes_nor_queries(tmp_path: Path, store: Store) -> None:
    write_set(tmp_path / "set", some())
    built = build_generation(store, tmp_path / "set", plan_of(2, kind="flat"))
    folder = store.generation(built.generation)
    body = json.loads((folder / MANIFEST_NAME).read_text())
    for name in ("kind", "format_version", "checksum", "queries"):
        del body[name]
    del body["spec"]["target_recall"]
    write_manifest(folder, kind="generation", version=1, body=body)
    older = read_generation(folder)
    verify_generation(folder, older)
    assert older == built
    assert read_attributes(folder, older, 0) is None
    assert older.queries is None


def test_the_choice_is_the_cheapest_that_reaches_the_target(tmp_path: Path, store: Store) -> None:
    """On clustered rows a few lists hold all neighbours; twice the same build chooses the same."""
    write_set(tmp_path / "set", clustered(12_000, 32, 48, seed=1))
    plan = plan_of(2, kind="ivfpq-fs", nlist=64)
    first, second = (build_generation(store, tmp_path / "set", plan) for _ in range(2))
    assert first.index == second.index
    assert first.index.nprobe is not None and first.index.nprobe <= 8
    quality = first.quality
    assert quality["recall@100"] == quality["chosen"]["recall"] >= 0.98
    assert quality["fixed_default"]["params"] == {"nprobe": 32, "rerank_factor": 4}
    assert quality["chosen"]["params"] == {
        "nprobe": first.index.nprobe,
        "rerank_factor": first.index.rerank_factor,
    }
    assert quality["advice"] is None
    lower = build_generation(
        store, tmp_path / "set", plan_of(2, kind="ivfpq-fs", nlist=64, target_recall=0.3)
    )
    assert lower.index.nprobe == 1


def test_what_the_user_sets_is_kept_and_measured(tmp_path: Path, store: Store) -> None:
    write_set(tmp_path / "set", some(2000))
    plan = plan_of(2, kind="ivfpq-fs", nlist=16, nprobe=1, rerank_factor=3)
    built = build_generation(store, tmp_path / "set", plan)
    assert (built.index.nprobe, built.index.rerank_factor) == (1, 3)
    assert built.quality["chosen"] == built.quality["fixed_default"]
    assert built.quality["recall@100"] < 0.98
    assert "leave out index.nprobe and index.rerank_factor" in built.quality["advice"]


def test_equal_vectors_are_all_right_answers(tmp_path: Path, store: Store) -> None:
    """Compared by ids, the recall of a hundred different vectors many times over is anything."""
    write_set(tmp_path / "set", np.tile(some(100), (60, 1)))
    built = build_generation(store, tmp_path / "set", plan_of(3, kind="ivf", nlist=8, nprobe=8))
    assert built.quality["recall@100"] == 1.0


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "flat"},
        {"kind": "ivf", "nlist": 16},
        {"kind": "ivfpq", "nlist": 16, "m": 4},
        {"kind": "ivfpq", "nlist": 16, "m": 4, "rerank": "none"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_all_of_the_best_hundred_may_be_copies(tmp_path: Path, store: Store, fields: dict) -> None:
    """Three hundred copies of each vector: which hundred are answered is chance. In two shards each
    list of an index holds all copies of its vectors, and a list is enough for every query."""
    vectors = np.tile(some(100), (300, 1))
    write_set(tmp_path / "set", vectors, queries=normalise(some(100)[:30]))
    built = build_generation(store, tmp_path / "set", plan_of(2, **fields))
    assert built.quality["recall@100"] == 1.0
    assert built.quality["advice"] is None
    if "nlist" in fields:
        assert built.quality["chosen"]["params"]["nprobe"] == 1


@pytest.mark.parametrize(
    "encode",
    [
        lambda texts: texts.cast(pa.string_view()),
        lambda texts: texts.cast(pa.binary()).cast(pa.binary_view()),
        lambda texts: texts.dictionary_encode(),
        lambda texts: pc.run_end_encode(texts),
    ],
)
def test_attributes_of_every_encoding_follow_their_items(
    tmp_path: Path, store: Store, encode: Callable[[pa.Array], pa.Array]
) -> None:
    ids = shuffled_ids()
    column = encode(pa.array([f"{item}" for item in ids]))
    write_set(tmp_path / "set", some(), ids=ids, attributes=pa.record_batch({"text": column}))
    built = build_generation(store, tmp_path / "set", plan_of(3, kind="flat"))
    for shard in range(3):
        kept = read_attributes(store.generation(1), built, shard)
        assert kept is not None
        texts = [t.decode() if isinstance(t, bytes) else t for t in kept["text"].to_pylist()]
        assert texts == [f"{item}" for item in ids_of(store, built, shard)]


def test_an_encoding_inside_a_list_is_refused_by_the_name_of_its_column(tmp_path: Path) -> None:
    inner = pa.array(["a"] * ROWS).dictionary_encode()
    tags = pa.ListArray.from_arrays(pa.array(range(ROWS + 1), pa.int32()), inner)
    with pytest.raises(InvalidInput, match="tags"):
        write_set(tmp_path / "set", some(), attributes=pa.record_batch({"tags": tags}))


def test_a_restore_meanwhile_gets_another_number(tmp_path: Path, store: Store) -> None:
    write_set(tmp_path / "set", some())
    others: list[int] = []

    def meanwhile(jobs: Sequence[ShardJob]) -> Iterator[ShardBuilt]:
        others.append(store.claim_generation())
        return run_here(jobs)

    plan = plan_of(2, kind="flat")
    built = build_generation(store, tmp_path / "set", plan, run_jobs=meanwhile)
    assert (built.generation, others) == (1, [2])
    assert build_generation(store, tmp_path / "set", plan).generation == 3


@pytest.mark.parametrize("is_published", [True, False])
def test_a_build_beside_a_cluster_says_how_to_change_over(
    tmp_path: Path, is_published: bool
) -> None:
    """What is live stays so: the cluster's controller would take it up without a gate."""
    store = Store(tmp_path / "store")
    write_set(store.embeddings / "m1", some())
    build_generation(store, store.newest_embeddings(), plan_of(2, kind="flat"))
    store.set_current(1)
    started = psutil.Process().create_time()
    url = "http://127.0.0.1:1"
    leave_note(store, Endpoint(url=url, generation=1, pid=os.getpid(), started=started))
    options = ["--in-process", *([] if is_published else ["--no-publish"])]
    done = CliRunner().invoke(cli, ["--store", str(store.root), "build", *options])
    assert done.exit_code == 0, done.output
    assert store.current() == 1
    assert "goes on with generation 1; `shardline publish 2` to change over" in done.output


def test_the_command_says_what_was_chosen_and_measured_with(tmp_path: Path) -> None:
    rows, asked = clustered(3000, 16, 10, seed=1), clustered(40, 16, 10, seed=1, first_row=70_000)
    for name, part in {"a": np.arange(1000), "b": np.arange(1000, 3000)}.items():
        kinds = pa.array([f"k{item % 3}" for item in part]).dictionary_encode()
        table = pa.table({"id": part, "emb": rows[part].tolist(), "kind": kinds})
        pq.write_table(table, tmp_path / f"{name}.parquet")  # with dictionaries of their own
    pq.write_table(pa.table({"emb": asked.tolist()}), tmp_path / "q.parquet")
    arguments = ["--store", str(tmp_path / "store"), "--set", "index.kind=ivf", "build"]
    arguments += [
        "--vectors",
        str(tmp_path / "a.parquet"),
        "--vectors",
        str(tmp_path / "b.parquet"),
    ]
    arguments += ["--queries", str(tmp_path / "q.parquet"), "--in-process"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert "measured with 40 sample queries" in done.output
    assert "chosen for a target of 0.98" in done.output
    assert "without measuring: nprobe 32: recall@100 1.000" in done.output
    assert "rows/s" in done.output
    store = Store(tmp_path / "store")
    built = read_generation(store.generation(1))
    attributes = read_attributes(store.generation(1), built, 2)
    assert attributes is not None
    own = ids_of(store, built, 2)
    assert attributes["kind"].to_pylist() == [f"k{item % 3}" for item in own]
