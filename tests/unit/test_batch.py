"""``shardline batch`` offline: results as by brute force, however a job is cut, or killed."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from shardline.cluster.batch.batch_job import BatchJob, Wanted, job_of
from shardline.cluster.batch.csv_queries import open_query_files
from shardline.cluster.batch.generation_items import GenerationItems
from shardline.cluster.batch.loaded_shards import block_bytes, loaded_bytes
from shardline.cluster.batch.local_batch import BatchPlan, Room
from shardline.cluster.batch.part_files import claimed_folder
from shardline.cluster.batch.queries import QuerySource
from shardline.cluster.batch.query_files import VectorFiles
from shardline.cluster.cli import cli
from shardline.cluster.commands.batch import answer_here
from shardline.cluster.commands.batch_sources import Asked
from shardline.shards.core.errors import DataError, InvalidInput, NotFound, Unavailable
from shardline.shards.core.schema import Metric, normalise
from shardline.shards.storage.generation import read_generation, write_generation
from tests.batch_store import (
    DIM,
    BatchStore,
    contents,
    make_store,
    part_paths,
    read_parts,
    write_queries,
)
from tests.reference import brute_force

NUM_QUERIES, K = 150, 12
CASES = {"one shard": 1, "three shards": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> BatchStore:
    return make_store(tmp_path_factory.mktemp("batch"))


@pytest.fixture(scope="module")
def vectors(made: BatchStore) -> np.ndarray:
    """Queries, some of which are items that share their vector with others."""
    rng = np.random.default_rng(5)
    drawn = normalise(rng.standard_normal((NUM_QUERIES, DIM)).astype(np.float32))
    drawn[40:60] = made.vectors[200:220]
    return drawn


@pytest.fixture
def queries(tmp_path: Path, vectors: np.ndarray) -> Path:
    return write_queries(tmp_path / "queries.parquet", vectors)


def lists(table: pa.Table, name: str) -> list[list[object]]:
    return table.column(name).to_pylist()


@pytest.mark.parametrize("num_shards", CASES.values(), ids=CASES)
def test_results_are_those_of_brute_force(
    tmp_path: Path, vectors: np.ndarray, queries: Path, num_shards: int
) -> None:
    made = make_store(tmp_path, num_shards)
    printed = made.batch(
        *("--queries", queries, "--out", tmp_path / "out", "-k", K, "--block-rows", 64, "--json")
    )
    table = read_parts(tmp_path / "out")
    expected = brute_force(vectors, made.vectors, made.ids, K, Metric.COSINE)
    assert lists(table, "ids") == expected.ids.tolist()
    assert np.allclose(lists(table, "scores"), expected.scores, atol=1e-5)
    assert lists(table, "query_id") == [f"q{row}" for row in range(NUM_QUERIES)]
    assert table.schema.field("ids").type == pa.list_(pa.int64())
    assert table.schema.field("scores").type == pa.list_(pa.float32())
    assert [pq.read_metadata(path).num_rows for path in part_paths(tmp_path / "out")] == [
        *(64, 64, 22)
    ]
    report = json.loads(printed)
    assert (report["queries"], report["parts"], report["resumed_parts"]) == (NUM_QUERIES, 3, 0)
    assert report["bytes"] == sum(p.stat().st_size for p in part_paths(tmp_path / "out"))
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert [entry["rows"] for entry in manifest["parts"]] == [64, 64, 22]


@pytest.mark.parametrize("cpus", [1, 3])
def test_only_items_that_match_a_filter_are_results(
    made: BatchStore, tmp_path: Path, vectors: np.ndarray, queries: Path, cpus: int
) -> None:
    """Items have prices of half their row's number."""
    options = ("--queries", queries, "-k", K, "--block-rows", 16, "--cpus", cpus)
    for out, given, rows in (
        ("some", {"price": {"$lt": 40}}, np.arange(80)),
        ("few", {"$or": [{"title": "item 5"}, {"item_id": {"$in": [12, 13]}}]}, np.arange(2)),
    ):
        made.batch(*options, "--out", tmp_path / out, "--filter", json.dumps(given))
        expected = brute_force(vectors, made.vectors[rows], made.ids[rows], K, Metric.COSINE)
        found = lists(read_parts(tmp_path / out), "ids")
        assert found == [[item for item in row if item >= 0] for row in expected.ids.tolist()]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"colour": "red"}', r"filter.colour.*item_id.*price"),
        ('{"price": {"$lt": "cheap"}}', r"filter.price.*double"),
        ('{"price": {"$near": 1}}', r"--filter.price.\$near.*no such operator"),
        ("price < 40", r"--filter: not JSON"),
    ],
)
def test_a_wrong_filter_is_refused_before_work_starts(
    made: BatchStore, tmp_path: Path, queries: Path, given: str, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        made.batch("--queries", queries, "--out", tmp_path / "out", "--filter", given)
    assert not (tmp_path / "out").exists()


def test_another_filter_is_another_job_and_none_is_as_before_there_were_any(
    made: BatchStore, tmp_path: Path, queries: Path
) -> None:
    options = ("--queries", queries, "--out", tmp_path / "out", "-k", 3)
    made.batch(*options, "--filter", '{"price": 1}')
    for other in ([], ["--filter", '{"price": 2}']):
        with pytest.raises(DataError, match=r"another job.*filter"):
            made.batch(*options, *other)
    job = BatchJob(queries={}, rows=5, generation=1, content="a", wanted=Wanted(k=3), block_rows=9)
    assert "filter" not in job.described["wanted"]
    assert replace(job, wanted=Wanted(k=3, filter={})).fingerprint != job.fingerprint


@pytest.mark.parametrize("items", [False, True], ids=["vectors", "items"])
def test_passes_give_the_bytes_of_one(
    made: BatchStore, tmp_path: Path, queries: Path, items: bool
) -> None:
    manifest = read_generation(made.folder)
    wanted = Wanted(k=K - items, drops_own=items, attributes=("title",))
    needed = block_bytes(32, DIM, K, 3, 1)
    found = []
    for name, sizes in (("whole", sum(loaded_bytes(manifest))), ("parts", 1)):
        room = max(sizes, max(loaded_bytes(manifest)))
        with claimed_folder(tmp_path / name) as claimed:
            source: QuerySource = GenerationItems(made.folder, manifest, claimed.work)
            if not items:
                files = open_query_files([queries], tmp_path)
                source = VectorFiles(files, dim=DIM, metric=Metric.COSINE)
            plan = BatchPlan(
                job=job_of(source, made.folder, manifest, wanted, 32),
                source=source,
                folder=made.folder,
                manifest=manifest,
            )
            available = int((room + needed) / 0.8) + 1
            report = answer_here(plan, claimed, Silent(), Room(cpus=1, available_bytes=available))
        found.append((report.passes, contents(tmp_path / name)))
    assert [passes for passes, _ in found] == [1, 3]
    assert found[0][1] == found[1][1]


def test_a_shard_that_does_not_fit_is_refused_with_the_arithmetic(
    made: BatchStore, tmp_path: Path, queries: Path
) -> None:
    with pytest.raises(Unavailable, match=r"one shard.*MiB.*free"):
        made.batch("--queries", queries, "--out", tmp_path / "out", "--memory", 1)
    assert not (tmp_path / "out").exists()


class Silent:
    def __call__(self, stage: str, done: int, total: int) -> None:
        pass

    def note(self, line: str) -> None:
        pass


ID_TYPES = {
    "integers": pa.array(np.arange(NUM_QUERIES) % 3),
    "one id, repeated": pa.array(["same"] * NUM_QUERIES),
    "dictionary": pa.array(["a", "b", None] * 50).dictionary_encode(),
    "times": pa.array(np.arange(NUM_QUERIES), pa.timestamp("ms", "UTC")),
    "structs": pa.array([{"a": row, "b": "x"} for row in range(NUM_QUERIES)]),
    "nulls": pa.array([None, 1.5] * 75),
}


@pytest.mark.parametrize("ids", ID_TYPES.values(), ids=ID_TYPES)
def test_query_ids_come_back_as_they_were_given(
    made: BatchStore, tmp_path: Path, vectors: np.ndarray, ids: pa.Array
) -> None:
    path = write_queries(tmp_path / "queries.parquet", vectors, ids)
    made.batch("--queries", path, "--out", tmp_path / "out", "-k", 1, "--block-rows", 40)
    assert lists(read_parts(tmp_path / "out"), "query_id") == ids.to_pylist()


def test_files_of_every_format_give_the_same(
    made: BatchStore, tmp_path: Path, vectors: np.ndarray
) -> None:
    table = pq.read_table(write_queries(tmp_path / "q.parquet", vectors))
    with pa.ipc.new_file(str(tmp_path / "q.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=41)
    with pa.ipc.new_stream(str(tmp_path / "q.arrows"), table.schema) as stream:
        stream.write_table(table, max_chunksize=23)
    rows = [
        f'{name},"{json.dumps(vector)}"'
        for name, vector in zip(table["id"].to_pylist(), vectors.tolist(), strict=True)
    ]
    (tmp_path / "q.csv").write_text("\n".join(["id,embedding", *rows]) + "\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    pq.write_table(table.slice(0, 70), folder / "a.parquet")
    pq.write_table(table.slice(70), folder / "b.parquet")
    found = []
    for place, name in enumerate(("q.parquet", "q.arrow", "q.arrows", "q.csv", "folder")):
        out = tmp_path / f"out{place}"
        made.batch("--queries", tmp_path / name, "--out", out, "-k", K, "--block-rows", 64)
        found.append(read_parts(out).to_pydict())
    assert all(each == found[0] for each in found)


def test_attributes_and_original_ids(made: BatchStore, tmp_path: Path, queries: Path) -> None:
    made.batch(
        *("--queries", queries, "--out", tmp_path / "out", "-k", 5, "--block-rows", 64),
        *("--return", "title,price", "--original-ids"),
    )
    table = read_parts(tmp_path / "out")
    rows = dict(zip(made.ids.tolist(), range(len(made.ids)), strict=True))
    ids = lists(table, "ids")
    assert lists(table, "title") == [[f"item {item}" for item in each] for each in ids]
    assert lists(table, "price") == [[rows[item] / 2 for item in each] for each in ids]
    assert lists(table, "original_ids") == ids


def test_more_results_than_items(made: BatchStore, tmp_path: Path, queries: Path) -> None:
    made.batch("--queries", queries, "--out", tmp_path / "out", "-k", 400, "--return", "price")
    table = read_parts(tmp_path / "out")
    assert {len(each) for each in lists(table, "ids")} == {len(made.ids)}
    assert {len(each) for each in lists(table, "price")} == {len(made.ids)}


def test_all_items_without_themselves(made: BatchStore, tmp_path: Path) -> None:
    made.batch("--items", "--out", tmp_path / "out", "-k", K, "--block-rows", 64)
    table = read_parts(tmp_path / "out")
    assert lists(table, "query_id") == made.ids.tolist()
    expected = [
        brute_force(made.vectors[row : row + 1], made.vectors, made.ids, K, Metric.COSINE, [item])
        for row, item in enumerate(made.ids.tolist())
    ]
    assert lists(table, "ids") == [each.ids[0].tolist() for each in expected]


def test_features_are_encoded_by_the_generation(made: BatchStore, tmp_path: Path) -> None:
    users = np.random.default_rng(0).integers(0, len(made.users), NUM_QUERIES)
    pq.write_table(pa.table({"user": users, "other": users}), tmp_path / "q.parquet")
    options = ("-k", K, "--block-rows", 64)
    made.batch("--queries", tmp_path / "q.parquet", "--features", "--out", tmp_path / "f", *options)
    path = write_queries(tmp_path / "v.parquet", made.users[users])
    made.batch("--queries", path, "--out", tmp_path / "v", *options)
    by_features, by_vectors = read_parts(tmp_path / "f"), read_parts(tmp_path / "v")
    assert by_features["ids"] == by_vectors["ids"]
    assert lists(by_features, "query_id") == list(range(NUM_QUERIES))  # no id column: numbered


def test_a_job_goes_on_where_it_was(made: BatchStore, tmp_path: Path, queries: Path) -> None:
    options = ("--queries", queries, "-k", K, "--block-rows", 20, "--json")
    made.batch(*options, "--out", tmp_path / "whole")
    made.batch(*options, "--out", tmp_path / "out")
    paths = part_paths(tmp_path / "out")
    kept = paths[1].stat().st_mtime_ns
    (tmp_path / "out" / "_manifest.json").unlink()
    paths[0].unlink()
    damaged = bytearray(paths[2].read_bytes())
    damaged[len(damaged) // 3] ^= 1
    paths[2].write_bytes(damaged)
    paths[3].write_bytes(paths[3].read_bytes()[:-50])
    paths[4].write_bytes(paths[5].read_bytes())  # another block's
    report = json.loads(made.batch(*options, "--out", tmp_path / "out"))
    assert (report["parts"], report["resumed_parts"], report["searched"]) == (8, 4, 80)
    assert paths[1].stat().st_mtime_ns == kept
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    report = json.loads(made.batch(*options, "--out", tmp_path / "out"))
    assert (report["resumed_parts"], report["searched"], report["passes"]) == (8, 0, 0)


@pytest.mark.parametrize("parts", [0, 1, 4, 7])
def test_a_killed_job_is_completed_to_the_same_bytes(
    made: BatchStore, tmp_path: Path, parts: int
) -> None:
    rng = np.random.default_rng(parts)
    drawn = rng.standard_normal((8000, DIM)).astype(np.float32)
    path = write_queries(tmp_path / "q.parquet", drawn)
    options = ("--queries", path, "-k", 50, "--block-rows", 400)
    made.batch(*options, "--out", tmp_path / "whole")
    out = tmp_path / "out"
    until = time.monotonic() + 60
    with start(made, *options, "--out", out) as process:
        try:
            while len(part_paths(out)) < parts or not (out / "_job.json").exists():
                assert time.monotonic() < until
                assert process.poll() is None
        finally:
            process.kill()
    assert not (out / "_manifest.json").exists()
    left = f".part-000003-{'0' * 16}.parquet.abc.tmp"
    (out / left).write_bytes(b"as a killed process leaves it")
    made.batch(*options, "--out", out)
    assert contents(out) == contents(tmp_path / "whole")


def start(made: BatchStore, *arguments: object) -> "subprocess.Popen[bytes]":
    code = "from shardline.cluster.cli import main; main()"
    words = [sys.executable, "-c", code, "--store", str(made.store.root), "batch"]
    return subprocess.Popen([*words, *map(str, arguments)], stderr=subprocess.PIPE)


def test_a_full_disk_is_said_and_the_job_goes_on(made: BatchStore, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    drawn = rng.standard_normal((2000, DIM)).astype(np.float32)
    ids = [f"q{row}" if row < 1000 else rng.bytes(400).hex() for row in range(2000)]
    path = write_queries(tmp_path / "q.parquet", drawn, pa.array(ids))  # later parts are larger
    options = ("--queries", path, "-k", 20, "--block-rows", 500, "--out", tmp_path / "out")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1));"
        "from shardline.cluster.cli import main; main()"
    )
    words = [sys.executable, "-c", code, "--store", str(made.store.root), "batch", "--cpus", "1"]
    done = subprocess.run([*words, *map(str, options)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert "larger than a file may be here" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name[:11] for path in part_paths(tmp_path / "out")] == [
        "part-000000",
        "part-000001",
    ]
    assert not (tmp_path / "out" / "_manifest.json").exists()
    report = json.loads(made.batch(*options, "--json"))
    assert (report["resumed_parts"], report["searched"]) == (2, 1000)
    assert lists(read_parts(tmp_path / "out"), "query_id") == ids


@pytest.mark.parametrize("damaged", [True, False], ids=["damaged", "absent"])
def test_a_result_is_not_called_complete_while_a_part_is_missing(
    made: BatchStore, tmp_path: Path, queries: Path, damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--queries", queries, "-k", K, "--block-rows", 50, "--out", tmp_path / "out")
    made.batch(*options)
    path = part_paths(tmp_path / "out")[1]
    if damaged:
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.unlink()

    def stopped(*arguments: object) -> None:
        raise Unavailable("killed")

    monkeypatch.setattr("shardline.cluster.commands.batch.run_local", stopped)
    with pytest.raises(Unavailable, match="killed"):
        made.batch(*options)
    assert not (tmp_path / "out" / "_manifest.json").exists()


def test_a_job_that_was_killed_before_it_began(
    made: BatchStore, tmp_path: Path, queries: Path
) -> None:
    out = tmp_path / "out"
    (out / "_work").mkdir(parents=True)
    for name in ("_lock", "._job.json.abcd.tmp", "_work/items-00000.npy"):
        (out / name).write_bytes(b"cut")
    made.batch("--queries", queries, "--out", out)
    assert {path.name for path in out.iterdir()} == {
        *("_job.json", "_lock", "_manifest.json"),
        *(path.name for path in part_paths(out)),
    }


def test_an_output_that_is_something_else(made: BatchStore, tmp_path: Path, queries: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"not empty.*thesis\.txt"):
        made.batch("--queries", queries, "--out", out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(DataError, match="a file"):
        made.batch("--queries", queries, "--out", out / "thesis.txt")


@pytest.mark.parametrize(
    "name", ["_work/draft.txt", ".x.tmp", f".part-000001-{'0' * 16}.parquet.a.tmp"]
)
def test_nothing_of_a_folder_without_our_lock_is_removed(
    made: BatchStore, tmp_path: Path, queries: Path, name: str
) -> None:
    kept = tmp_path / "out" / name
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        made.batch("--queries", queries, "--out", tmp_path / "out")
    (tmp_path / "out" / "_lock").touch()
    if name == ".x.tmp":
        with pytest.raises(DataError, match="not empty"):
            made.batch("--queries", queries, "--out", tmp_path / "out")
    assert kept.read_text() == "mine"


def test_after_a_publish_the_hint_names_the_generation_of_the_job(
    tmp_path: Path, queries: Path
) -> None:
    made = make_store(tmp_path)
    options = ("--queries", queries, "-k", K, "--block-rows", 50, "--out", tmp_path / "out")
    made.batch(*options)
    before = contents(tmp_path / "out")
    shutil.copytree(made.store.generation(1), made.store.generation(2))
    manifest = read_generation(made.store.generation(1))
    write_generation(made.store.generation(2), replace(manifest, generation=2))
    made.store.set_current(2)
    with pytest.raises(DataError, match=r"another job.*--generation 1 goes on"):
        made.batch(*options)
    report = json.loads(made.batch(*options, "--generation", 1, "--json"))
    assert report["resumed_parts"] == 3
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("-k", 9), r"wanted\.k: 12 there, 9 here"),
        (("--return", "title"), "wanted.attributes"),
        (("--block-rows", 10), "block_rows"),
        (("--params", "rerank_factor=2"), "rerank_factor: None there, 2 here"),
    ],
)
def test_the_output_of_another_job(
    made: BatchStore, tmp_path: Path, queries: Path, options: tuple[object, ...], named: str
) -> None:
    first = ("--queries", queries, "--out", tmp_path / "out", "-k", K, "--block-rows", 20)
    made.batch(*first)
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=named):
        made.batch(*first, *options)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(("first", "got"), [(True, "one by a running cluster"), (False, "one off")])
def test_a_live_job_and_one_offline_are_not_compared_field_by_field(
    tmp_path: Path, first: bool, got: str
) -> None:
    job = BatchJob(
        queries={}, rows=5, generation=1, content="a", wanted=Wanted(k=3), block_rows=9, live=first
    )
    with claimed_folder(tmp_path / "out") as claimed:
        claimed.begin(job)
        with pytest.raises(DataError, match=rf"another job; got {got}\w*; choose"):
            claimed.begin(replace(job, content="b", block_rows=4, live=not first))


def test_a_link_to_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"out: a link to .*gone, which does not exist; make"):
        claimed_folder(tmp_path / "out").__enter__()
    (tmp_path / "gone").mkdir()
    with claimed_folder(tmp_path / "out") as claimed:
        assert claimed.work.is_dir()


def test_other_queries_are_another_job(
    made: BatchStore, tmp_path: Path, vectors: np.ndarray, queries: Path
) -> None:
    made.batch("--queries", queries, "--out", tmp_path / "out")
    write_queries(queries, -vectors)
    with pytest.raises(DataError, match=r"another job.*queries\.sha256"):
        made.batch("--queries", queries, "--out", tmp_path / "out")


def test_two_processes_do_not_share_a_folder(
    made: BatchStore, tmp_path: Path, queries: Path
) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from shardline.cluster.batch.part_files import claimed_folder\n"
        "with claimed_folder(Path(sys.argv[1])): print('held', flush=True); input()"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(Unavailable, match="another process writes"):
            made.batch("--queries", queries, "--out", tmp_path / "out")
        other.communicate(b"\n", timeout=60)
    assert other.returncode == 0
    assert not (tmp_path / "out").exists()


def test_a_lock_removed_between_opening_and_locking_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its holder ends without a job at that moment: else two would hold a lock each."""
    out, locked = tmp_path / "out", fcntl.flock

    def after_its_holder_ended(handle: int, how: int) -> None:
        monkeypatch.undo()
        (out / "_lock").unlink()
        locked(handle, how)

    monkeypatch.setattr(fcntl, "flock", after_its_holder_ended)
    with (
        claimed_folder(out),
        pytest.raises(Unavailable, match="another process writes"),
        claimed_folder(out),
    ):
        pass


def bad(vectors: np.ndarray, row: int, value: float) -> np.ndarray:
    made = vectors.copy()
    made[row, 2] = value
    return made


@pytest.mark.parametrize("value", [np.nan, np.inf, None], ids=["NaN", "infinite", "short"])
@pytest.mark.parametrize("row", [0, 33, 149])
def test_a_wrong_vector_is_named_and_what_was_done_before_it_stays(
    made: BatchStore,
    tmp_path: Path,
    vectors: np.ndarray,
    queries: Path,
    row: int,
    value: float | None,
) -> None:
    options = ("--queries", queries, "--out", tmp_path / "out", "-k", K, "--block-rows", 16)
    if value is None:
        rows = vectors.tolist()
        rows[row] = rows[row][:-1]
        table = {"id": list(range(len(rows))), "embedding": pa.array(rows, pa.list_(pa.float32()))}
        pq.write_table(pa.table(table), queries, row_group_size=37)
    else:
        write_queries(queries, bad(vectors, row, value))
    named = rf"queries\.parquet: embedding\[{row}\]"
    with pytest.raises(DataError, match=named):
        made.batch(*options, "--cpus", 1)
    assert not (tmp_path / "out" / "_manifest.json").exists()
    # what was read with it, 37 rows at once, or ahead of the search may be lost with it
    done = len(part_paths(tmp_path / "out"))
    assert max(0, row // 37 * 37 // 16 - 4) <= done <= row // 16


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        (("--vector-column", "nope"), DataError, "no such column"),
        (("--id-column", "nope"), DataError, "no such column"),
        (("--features",), DataError, r"no such column.*the encoder takes user"),
        (("--return", "colour"), InvalidInput, "title, price"),
        (("-k", 0), InvalidInput, "1 to 2048"),
        (("-k", 2049), InvalidInput, "1 to 2048"),
        (("--params", "nprobe=0"), InvalidInput, "1 to 2048"),
        (("--params", "speed=9"), InvalidInput, "nprobe, ef_search"),
        (("--generation", 9), NotFound, "no generation 9"),
        (("--items",), InvalidInput, "one of --queries"),
        (("--features", "--vector-column", "v"), InvalidInput, "--vector-column names"),
        (("--key-file", "k"), InvalidInput, "--key-file has no effect in a job offline"),
        (("--live", "--cpus", 1), InvalidInput, "--cpus has no effect in --live"),
        (("--live", "--memory", 1), InvalidInput, "--memory has no effect in --live"),
        (("--users", "here"), NotFound, "dataset"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    made: BatchStore,
    tmp_path: Path,
    queries: Path,
    options: tuple[object, ...],
    kind: type[Exception],
    said: str,
) -> None:
    with pytest.raises(kind, match=said):
        made.batch("--queries", queries, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_column_of_no_file_is_refused(made: BatchStore, tmp_path: Path) -> None:
    for option in ("--id-column", "--vector-column"):
        with pytest.raises(InvalidInput, match=f"{option} names a column"):
            made.batch("--items", option, "id", "--out", tmp_path / "out")


def test_memory_is_not_for_a_job_on_ray(made: BatchStore, tmp_path: Path) -> None:
    words = ["--store", str(made.store.root), "--set", "cluster.address=auto", "batch", "--items"]
    done = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "out"), "--memory", "9"])
    assert isinstance(done.exception, InvalidInput)
    assert "--memory has no effect in a job on Ray" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_results_among_the_queries_are_refused(
    made: BatchStore, tmp_path: Path, vectors: np.ndarray
) -> None:
    folder = tmp_path / "queries"
    folder.mkdir()
    write_queries(folder / "q.parquet", vectors)
    for out in (folder, folder / "out"):
        with pytest.raises(InvalidInput, match="lies in the folder of the queries"):
            made.batch("--queries", folder, "--out", out)
    assert [path.name for path in folder.iterdir()] == ["q.parquet"]


def test_paths_may_be_relative(
    made: BatchStore, tmp_path: Path, queries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = json.loads(made.batch("--queries", queries.name, "--out", "out", "--json"))
    assert report["output"] == str(tmp_path / "out")  # where other hosts look for it too
    asked = Asked(
        queries=("a.csv", "s3://b/c", "/d"),
        features=False, users=Path("e"), items=False, id_column=None, vector_column=None,
    ).on_all_hosts()  # fmt: skip
    assert asked.queries == (str(tmp_path / "a.csv"), "s3://b/c", "/d")
    assert asked.users == tmp_path / "e"


def test_the_command_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None;"
        "import shardline.cluster.commands.batch, shardline.cluster.commands.offline_search"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_queries_at_all(made: BatchStore, tmp_path: Path, vectors: np.ndarray) -> None:
    path = write_queries(tmp_path / "q.parquet", vectors[:0])
    with pytest.raises(DataError, match="no rows"):
        made.batch("--queries", path, "--out", tmp_path / "out")
    with pytest.raises(NotFound, match="no such file"):
        made.batch("--queries", tmp_path / "gone", "--out", tmp_path / "out")
    with pytest.raises(InvalidInput, match="say which queries"):
        made.batch("--out", tmp_path / "out")


def test_a_wrong_feature_is_named(made: BatchStore, tmp_path: Path) -> None:
    path = tmp_path / "q.parquet"
    pq.write_table(pa.table({"user": [1, 2, 3]}), path)
    bad_path = tmp_path / "r.parquet"
    pq.write_table(pa.table({"user": ["x", "y"]}), bad_path)
    with pytest.raises(DataError, match=r"r\.parquet: user\[0\].*int or null.*str"):
        made.batch("--queries", bad_path, "--features", "--out", tmp_path / "out")


def test_part_files_that_disagree(made: BatchStore, tmp_path: Path, vectors: np.ndarray) -> None:
    write_queries(tmp_path / "a.parquet", vectors, pa.array(["x"] * NUM_QUERIES))
    write_queries(tmp_path / "b.parquet", vectors, pa.array(np.arange(NUM_QUERIES)))
    with pytest.raises(DataError, match="disagree"):
        made.batch(
            *("--queries", tmp_path / "a.parquet", "--queries", tmp_path / "b.parquet"),
            *("--out", tmp_path / "out"),
        )


def test_a_text_that_fits_no_type_is_named(made: BatchStore, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('id,embedding\n1,"[0.1, 0.2"\n')
    with pytest.raises(DataError, match=r"q\.csv: embedding\[0\].*not a list"):
        made.batch("--queries", tmp_path / "q.csv", "--out", tmp_path / "out")


def test_a_job_that_is_interrupted_ends_as_one_line(made: BatchStore, tmp_path: Path) -> None:
    drawn = np.random.default_rng(1).standard_normal((4000, DIM)).astype(np.float32)
    path = write_queries(tmp_path / "q.parquet", drawn)
    out = tmp_path / "out"
    until = time.monotonic() + 60
    with start(made, "--queries", path, "--out", out, "--block-rows", 50) as process:
        try:
            while not part_paths(out):
                assert time.monotonic() < until
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert b"Traceback" not in said
    assert process.returncode == 130
    assert not (out / "_work").exists()
    assert not (out / "_manifest.json").exists()


def test_a_disk_that_may_become_full_is_warned_of(
    made: BatchStore, tmp_path: Path, queries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type(shutil.disk_usage("/"))(total=1 << 30, used=1 << 30, free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    words = ["--store", str(made.store.root), "batch", "--queries", str(queries)]
    done = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "of results before compression" in done.stderr
