"""``build --from-live``, and the cut that says which writes a generation contains."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from shardline.cluster import corpus_from_live
from shardline.cluster.build import build_generation
from shardline.cluster.catalogue_cut import assumption_of, catalogue_cut
from shardline.cluster.cli import cli
from shardline.cluster.serving.endpoint import Endpoint, leave_note
from shardline.cluster.store import Store
from shardline.shards.core.errors import CorruptFile, InvalidInput, NotFound
from shardline.shards.core.files import MANIFEST_NAME, read_manifest, write_manifest
from shardline.shards.core.partition import Partitioning, partition
from shardline.shards.core.schema import Metric
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexSpec
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.live_rows import LiveRows, open_live_rows
from shardline.shards.storage.cut import Cut, cut_of
from shardline.shards.storage.embedding_set import open_embedding_set
from shardline.shards.storage.generation import QUERY_ENCODER_FOLDER, read_generation
from shardline.training.data.tables import open_dataset
from tests.engine import build_main, plan_of, write_set
from tests.live_store import LiveStore, live_store, rows_of, vectors_of

FROM_LIVE = ("build", "--from-live", "--in-process")
FLAT = ("--set", "index.kind=flat", "--set", "cluster.shards=2")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> LiveStore:
    """With items that were replaced, deleted and added, in one shard behind a compaction."""
    made = live_store(tmp_path_factory.mktemp("original"))
    made.upsert([4, 6, 7, 170, 1001], title=["a", "b", None, "d", "e"])
    made.delete([8, 10, 90, 5000])
    made.compact(0)
    made.upsert([3, 4], price=[1.5, 2.5])
    return made


@pytest.fixture
def written(original: LiveStore, tmp_path: Path) -> LiveStore:
    return original.copied(tmp_path)


def test_the_live_rows_become_the_next_generation(written: LiveStore) -> None:
    said = written.run(*FROM_LIVE, options=FLAT)
    assert "generation 2: 90 rows in 2 shards, model m1" in " ".join(said.split())
    folder = written.store.generation(2)
    assert rows_of(folder) == written.expected
    built = read_generation(folder)
    ids = np.array(sorted(written.expected))
    assert built.boundaries == tuple(partition(ids, 2, Partitioning.RANGE).upper_keys.tolist())
    old = read_generation(written.store.generation(1))
    assert built.queries == old.queries
    assert built.query_encoder == old.query_encoder
    assert (folder / QUERY_ENCODER_FOLDER / "config.json").read_bytes() == b"{}"
    assert built.model_version == old.model_version
    assert built.quality["query_source"] == "sample queries"
    assert built.cut == Cut(generation=1, seqs=(3, 1, 2))
    assert written.store.current() == 2
    assert list(written.store.generations.glob(".*")) == []


def test_writes_go_on_meanwhile(written: LiveStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard's rows are those of the number of writes that the cut names."""
    states = {}

    def writes_follow(*args: Any, **kwargs: Any) -> LiveRows:
        rows = open_live_rows(*args, **kwargs)
        states[args[2]] = dict(written.expected)
        written.upsert([2, 61, 63, 2000])
        written.delete([12, 64, 168])
        return rows

    monkeypatch.setattr(corpus_from_live, "open_live_rows", writes_follow)
    written.run(*FROM_LIVE, options=FLAT)
    built = read_generation(written.store.generation(2))
    assert built.cut == Cut(generation=1, seqs=(3, 1 + 2, 2 + 4))
    old = written.store.generation(1)
    shards = [old_shard(written, item) for item in rows_of(written.store.generation(2))]
    assert rows_of(written.store.generation(2)) == {
        item: row
        for shard, state in states.items()
        for item, row in state.items()
        if old_shard(written, item) == shard
    }
    assert set(shards) == {0, 1, 2}
    assert read_generation(old).cut is None


def old_shard(made: LiveStore, item: int) -> int:
    keys = np.array(read_generation(made.store.generation(1)).boundaries)
    return int(np.searchsorted(keys, item, side="right"))


def test_beside_a_cluster_it_does_not_go_live(written: LiveStore) -> None:
    started = psutil.Process().create_time()
    note = Endpoint(url="http://127.0.0.1:1", generation=1, pid=os.getpid(), started=started)
    leave_note(written.store, note)
    said = written.run(*FROM_LIVE, options=FLAT)
    assert "goes on with generation 1; `shardline publish 2` to change over" in said
    assert written.store.current() == 1


def test_it_keeps_the_partitioning_unless_another_is_asked_for(tmp_path: Path) -> None:
    made = live_store(tmp_path, partitioning="hash-range")
    made.upsert([1, 3])
    made.run(*FROM_LIVE, options=FLAT)
    assert read_generation(made.folder).partitioning == "hash-range"
    assert rows_of(made.folder) == made.expected
    made.run(*FROM_LIVE, "--partitioning", "range", options=FLAT)
    assert read_generation(made.folder).partitioning == "range"
    assert made.number == 3


@pytest.mark.parametrize(
    ("index", "is_exact"),
    [
        ({"kind": "flat"}, True),
        ({"kind": "ivf", "nlist": 4}, True),
        ({"kind": "hnsw"}, True),
        ({"kind": "ivfpq", "nlist": 4, "nbits": 4, "rerank": "fp32"}, True),
        ({"kind": "factory", "factory": "IVF4_HNSW32,Flat"}, True),
        ({"kind": "ivfpq-fs", "nlist": 4}, False),
        ({"kind": "sq8"}, False),
        ({"kind": "flat", "pca": 4}, False),
    ],
)
def test_which_kinds_give_back_what_was_written(index: dict[str, Any], is_exact: bool) -> None:
    rows = vectors_of(300, 7)
    main = build_main(rows, **index)
    spec = resolve(IndexSpec(**index), rows=300, dim=rows.shape[1], metric=Metric.COSINE)
    given = main.reconstruct(np.arange(300))
    assert spec.keeps_vectors is is_exact
    assert (given.tobytes() == rows.tobytes()) is is_exact


def test_what_cannot_be_built(written: LiveStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="exclude each other"):
        written.run(*FROM_LIVE, "--vectors", "x.parquet")
    with pytest.raises(NotFound, match="no live generation"):
        LiveStore(Store(tmp_path / "empty")).run(*FROM_LIVE)
    config = written.store.generation(1) / QUERY_ENCODER_FOLDER / "config.json"
    config.write_bytes(b"[]")
    with pytest.raises(CorruptFile, match=r"query_encoder/config\.json"):
        written.run(*FROM_LIVE, options=FLAT)
    config.write_bytes(b"{}")
    written.delete(list(written.expected))
    with pytest.raises(InvalidInput, match="without items"):
        written.run(*FROM_LIVE, options=FLAT)
    assert [path.name for path in written.store.generations.iterdir()] == ["000001"]


def test_a_catalogue_is_cut_where_the_logs_were_before_it_was_read(
    written: LiveStore, tmp_path: Path
) -> None:
    cut = Cut(generation=1, seqs=(3, 1, 2))
    assert catalogue_cut(written.store) == cut
    table = pa.table({"id": [1, 2, 3], "emb": np.eye(3, 8).tolist()})
    pq.write_table(table, tmp_path / "v.parquet")
    written.run("build", "--in-process", "--vectors", tmp_path / "v.parquet", options=FLAT)
    assert read_generation(written.store.generation(2)).cut == cut
    assert catalogue_cut(Store(tmp_path / "none")) is None
    written.store.set_current(2)
    assert catalogue_cut(written.store) == cut_of(2, (0, 0), cut)


def test_what_is_assumed_of_a_catalogue_is_said_and_can_be_denied(
    written: LiveStore, tmp_path: Path
) -> None:
    table = pa.table({"id": [1, 2, 3], "emb": np.eye(3, 8).tolist()})
    pq.write_table(table, tmp_path / "v.parquet")
    words = ["--store", str(written.store.root), *FLAT, "build", "--in-process", "--no-publish"]
    words += ["--vectors", str(tmp_path / "v.parquet")]
    said = " ".join(CliRunner().invoke(cli, words).stderr.split())
    assert "written to generation 1 before it was read (6 writes)" in said
    assert "--no-cut" in said
    assert "before it was read" not in CliRunner().invoke(cli, [*words, "--no-cut"]).stderr
    assert read_generation(written.store.generation(2)).cut == Cut(generation=1, seqs=(3, 1, 2))
    assert read_generation(written.store.generation(3)).cut is None, "the set has one, of before"
    with pytest.raises(InvalidInput, match="--no-cut"):
        written.run(*FROM_LIVE, "--no-cut")
    assert assumption_of(Cut(generation=1, seqs=(0, 0))) is None
    assert assumption_of(None) is None


def test_a_data_set_carries_the_cut_of_its_import(written: LiveStore, tmp_path: Path) -> None:
    rows = {"user_id": [1, 1, 2, 2], "item_id": [1, 2, 1, 3], "timestamp": [1, 2, 3, 4]}
    pq.write_table(pa.table(rows), tmp_path / "interactions.parquet")
    written.run("data", "import", "--source", tmp_path, "--out", tmp_path / "data")
    assert open_dataset(tmp_path / "data").cut == Cut(generation=1, seqs=(3, 1, 2))
    written.run("data", "import", "--source", tmp_path, "--out", tmp_path / "old", "--no-cut")
    assert open_dataset(tmp_path / "old").cut is None


def test_logs_that_cannot_be_read_make_no_cut(
    written: LiveStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Without one all writes are replayed: an import goes on, and says so."""
    segment = sorted(live_folder(written.folder, 1).glob("log-*"))[0]
    segment.write_bytes(bytes(200))
    assert catalogue_cut(written.store) is None
    assert segment.name in caplog.text
    assert "will replay all writes" in caplog.text


def test_a_set_and_a_generation_without_a_cut_are_read(tmp_path: Path) -> None:
    """As versions before wrote them."""
    write_set(tmp_path / "set", np.eye(4, dtype=np.float32))
    store = Store(tmp_path / "store")
    build_generation(store, tmp_path / "set", plan_of(1, kind="flat"))
    for folder, kind in ((tmp_path / "set", "embedding set"), (store.generation(1), "generation")):
        body = read_manifest(folder, kind=kind, version=9)
        assert body.pop("cut") is None
        version = body.pop("format_version")
        write_manifest(folder, kind=body.pop("kind"), version=version, body=body)
    assert open_embedding_set(tmp_path / "set").cut is None
    assert read_generation(store.generation(1)).cut is None


@pytest.mark.parametrize("cut", [5, {"generation": 1}, {"generation": -1, "seqs": []}, {"a": 1}])
def test_a_cut_that_is_none_is_refused(tmp_path: Path, cut: object) -> None:
    write_set(tmp_path / "set", np.eye(4, dtype=np.float32))
    body = read_manifest(tmp_path / "set", kind="embedding set", version=9) | {"cut": cut}
    version = body.pop("format_version")
    write_manifest(tmp_path / "set", kind=body.pop("kind"), version=version, body=body)
    with pytest.raises(CorruptFile, match="cut"):
        open_embedding_set(tmp_path / "set")
    assert (tmp_path / "set" / MANIFEST_NAME).is_file()


def test_live_rows_have_the_values_of_dictionaries(
    original: LiveStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written ones may be more than the index of a generation's dictionary counts."""
    kind = pa.dictionary(pa.int8(), pa.string())
    table = pa.table({"title": pa.array(["a"]).dictionary_encode().cast(kind)})
    monkeypatch.setattr(corpus_from_live, "read_attributes", lambda *args, **options: table)
    schema = corpus_from_live.common_schema(original.folder, original.manifest)
    assert schema == pa.schema([("title", pa.string())])
    titles = pa.record_batch({"title": [str(row) for row in range(300)]})
    assert corpus_from_live.in_schema(titles, schema) == titles
