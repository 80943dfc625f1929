"""`shardline upsert` and `delete` against a real HTTP server over fake shards."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardline.cluster.cli import main
from shardline.router.client import write_calls
from shardline.router.http.api_keys import Key, Keyring, Scope
from shardline.router.http.auth import AuthSettings, Guard
from shardline.router.router_config import RouterConfig
from shardline.shards.core.messages import ErrorReply
from tests.fake_encoder import item_vector
from tests.live_router import DIM, NUM_ROWS, LiveRouter, running_router

WRITE, SEARCH = Key(Scope.WRITE, "w" * 43), Key(Scope.SEARCH, "s" * 43)
GUARD = Guard(AuthSettings(keyring=Keyring.of([WRITE, SEARCH])))
CONFIG = RouterConfig(backoff_base_ms=1, backoff_max_ms=5)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def router():
    with running_router(CONFIG, GUARD) as router:
        yield router


@pytest.fixture
def run(
    router: LiveRouter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Exit code, stdout and stderr of a command; the key file has a key of each scope."""
    monkeypatch.chdir(tmp_path)
    keys = tmp_path / "keys"
    keys.write_text(f"search:{SEARCH.secret}\nwrite:{WRITE.secret}\n")
    keys.chmod(0o600)

    def command(*arguments: str, key_file: Path = keys) -> tuple[int, str, str]:
        code = 0
        try:
            main([*arguments, "--url", router.url, "--key-file", str(key_file)])
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def items(path: Path, first: int = 50, count: int = 20, **columns: list) -> str:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(count * DIM, np.float32)), DIM)
    table = {"item_id": np.arange(first, first + count), "vector": vectors, **columns}
    pq.write_table(pa.table(table), path)
    return str(path)


def test_items_of_files_are_written_with_their_attributes(
    run: Run, router: LiveRouter, tmp_path: Path
) -> None:
    titles = [f"title {number}" for number in range(20)]
    path = items(tmp_path / "items.parquet", title=titles)
    code, out, err = run("upsert", path, "--model-version", "m1")
    assert code == 0
    assert out.startswith("10 items created, 10 updated in generation 1, ")
    assert "upsert: 20/20" in err
    assert router.shards[3].attributes[69] == {"title": "title 19"}
    code, out, _ = run("upsert", path, "--json")
    report = json.loads(out)
    assert (report["rows"], report["created"], report["updated"]) == (20, 0, 20)
    assert report["seq"] == [None, None, None, 2]


@pytest.mark.parametrize("name", ["new.parquet", "new.csv", "new.jsonl", "folder"])
def test_items_without_vectors_are_written_by_features(
    run: Run, router: LiveRouter, tmp_path: Path, name: str
) -> None:
    """Columns that the cluster's item encoder does not take are attributes, and ids are the id."""
    columns: dict[str, list] = {
        "title": ["a", "b"],
        "tags": [["x"], []],
        "item_id": [70, 71],
        "released": [None, datetime(2014, 5, 13, 16, 53, 20)],
        "category": ["film", "song"],
        "size": [2, None],
    }
    path = tmp_path / name
    if name.endswith("csv"):
        lines = ['a,"[""x""]",70,,film,2', "b,[],71,2014-05-13 16:53:20,song,"]
        path.write_text("\n".join([",".join(columns), *lines]))
    elif name.endswith("jsonl"):
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("\n".join(json.dumps(row, default=str) for row in rows))
    else:
        path = path / "part-0.parquet" if name == "folder" else path
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), path)
    code, out, err = run("upsert", str(tmp_path / name), "--model-version", "m1")
    assert code == 0, err
    assert out.startswith("2 items created, 0 updated in generation 1, ")
    shard = router.shards[3]
    expected = [item_vector(DIM, 1, 0, 1, 2, 1), item_vector(DIM, 0, 1)]
    found = shard.vectors[np.isin(shard.ids, [70, 71])]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert shard.attributes == {
        70: {"title": "a", "tags": ["x"], "released": None, "category": "film", "size": 2},
        71: {
            "title": "b",
            "tags": [],
            "released": "2014-05-13T16:53:20",
            "category": "song",
            "size": None,
        },
    }


def test_a_cluster_without_an_item_encoder_needs_vectors(
    run: Run, router: LiveRouter, tmp_path: Path
) -> None:
    router.service._fanout.snapshot.items = None
    (tmp_path / "new.csv").write_text("item_id,category\n70,film\n")
    code, _, err = run("upsert", str(tmp_path / "new.csv"))
    told = " ".join(err.split())
    assert code == 3
    assert "new.csv: embedding | emb | vector: no such column; got item_id, category" in told
    assert "the cluster has no item encoder" in told


def test_features_that_do_not_fit_name_column_and_item(
    run: Run, router: LiveRouter, tmp_path: Path
) -> None:
    good = "item_id,category,size,released,tags\n"
    path = tmp_path / "new.csv"

    def told(text: str, *options: str) -> str:
        path.write_text(text)
        code, _, err = run("upsert", str(path), *options)
        assert code == 3
        return " ".join(err.split())

    assert "new.csv: tags: no such column; got item_id, category" in told("item_id,category\n1,a\n")
    assert "item_id | id | idx" in told("category,size\na,1\n")
    bad = told(good + "70,film,1,,\n71,song,big,,\n")
    assert "features.size[0]: wrong value; expected finite number, or null; got str" in bad
    assert "of item 70" in bad
    listed = told(good + '70,film,1,,"[""x"""\n')
    assert "tags[0]: not a list" in listed
    assert "ids that are not integers from 0 up" in told(good + "i7,film,1,,\n")
    assert "got int" in told(good + "70,7,1,,\n")
    path.write_text(good + "70,7,1,,\n")
    assert run("upsert", str(path), "--types", "category=string")[0] == 0
    code, _, err = run("upsert", str(path), "--types", "category")
    assert (code, "expected column=type" in err) == (2, True)
    assert "no items" in told(good)
    assert sum(len(shard.ids) for shard in router.shards) == NUM_ROWS + 1


@pytest.mark.parametrize("name", ["ids.parquet", "ids.csv", "lines.txt"])
def test_items_of_files_are_deleted(
    run: Run, router: LiveRouter, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"id": [1, 2, 500], "other": ["a", "b", "c"]}), path)
    elif name.endswith("csv"):
        path.write_text('title,item_id\n"a, b",1\nc,2\nd,500\n')
    else:
        path.write_text("1\n2\n\n500\n")
    code, out, _ = run("delete", str(path))
    assert code == 0
    assert out.startswith("2 items deleted, 1 were not there in generation 1, ")
    assert sum(len(shard.ids) for shard in router.shards) == NUM_ROWS - 2


def test_ids_on_the_command_line_are_deleted(run: Run) -> None:
    code, out, _ = run("delete", "--json", "--ids", "1,2", "2")
    report = json.loads(out)
    assert code == 0
    assert (report["deleted"], report["missing"], report["duplicates"]) == (2, 0, 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1\nx\n", "lines.csv:2: not an id"),
        ("name\n1\n", "lines.csv:1: not an id; expected an integer from 0 to"),
        ("item_id,a\n,1\n", "lines.csv:2: not an id"),
        (f"{2**63}\n", "lines.csv:1: not an id; expected an integer from 0 to 9223372036854775807"),
        ("9" * 5_000, "lines.csv:1: not an id"),
        ("9" * 200_000, "lines.csv: not CSV"),
        ("\xfc,item_id\na,1\n", "lines.csv: not UTF-8"),
        ("", "no items"),
        ("-1\n", "lines.csv:1: not an id"),
    ],
)
def test_texts_that_hold_no_ids(run: Run, tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "lines.csv"
    path.write_text(text, encoding="latin-1")
    code, _, err = run("delete", str(path))
    assert code == 3
    assert told in err


@pytest.mark.parametrize("text", ["1\n2\n", "item_id\n1\n2\n", "0" * 5_000 + "1\n2\n"])
def test_texts_may_begin_with_a_byte_order_mark(run: Run, tmp_path: Path, text: str) -> None:
    path = tmp_path / "lines.csv"
    path.write_text(text, encoding="utf-8-sig")
    code, out, _ = run("delete", str(path))
    assert code == 0
    assert out.startswith("2 items deleted, 0 were not there")


def test_what_is_wrong_ends_with_its_code(run: Run, router: LiveRouter, tmp_path: Path) -> None:
    path = items(tmp_path / "items.parquet")
    assert run("delete", "--ids", "one")[0] == 2
    assert run("delete", "--ids", "9" * 5_000)[0] == 2
    assert run("upsert", str(tmp_path / "nothing.parquet"))[0] == 3
    code, _, err = run("upsert", path, "--model-version", "m0")
    assert code == 3
    assert "another model" in err
    code, _, err = run("upsert", path, "--vector-column", "embedding")
    assert code == 3
    assert "no such column" in err
    texts = items(tmp_path / "texts.parquet")
    table = pq.read_table(texts)
    pq.write_table(table.set_column(0, "item_id", pa.array([f"i{n}" for n in range(20)])), texts)
    code, _, err = run("upsert", texts)
    assert code == 3
    assert "not integers from 0 up" in err
    search = tmp_path / "search"
    search.write_text(f"search:{SEARCH.secret}\n")
    search.chmod(0o600)
    code, _, err = run("delete", "--ids", "1", key_file=search)
    assert code == 2
    assert "may only search" in err
    assert "expected a key of scope write" in err


def test_an_error_says_what_was_written_before(
    run: Run, router: LiveRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items(tmp_path / "part-0.parquet", 0, 10)
    router.shards[3].write_error = ErrorReply(code="store_full", message="no space")
    items(tmp_path / "part-1.parquet", 50, 10)
    code, _, err = run("upsert", str(tmp_path / "part-0.parquet"), str(tmp_path / "part-1.parquet"))
    assert code == 4
    assert "not acknowledged: no space" in err
    assert "10 items were written before" in err


@pytest.mark.parametrize("command", ["upsert", "delete"])
def test_requests_answered_before_the_one_that_failed_are_counted(
    run: Run, router: LiveRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """One file, of which the last of three requests is refused."""
    monkeypatch.setattr(write_calls, "MAX_WRITE_ITEMS", 10)
    path = items(tmp_path / "items.parquet", 25, 30)
    router.shards[3].write_error = ErrorReply(code="store_full", message="no space")
    code, _, err = run(command, path)
    assert code == 4
    assert "not acknowledged: no space" in err
    how = {"upsert": "written", "delete": "deleted"}[command]
    assert f"20 items were {how} before" in err
