"""One table with every accepted type at once goes from its source to an answer, without a flag."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from shardline.cluster.cli import cli
from shardline.cluster.serving.ray_session import free_port
from shardline.router.client.sync_client import Client
from tests.data_shapes.columns import ROWS, TAKEN
from tests.integration.own.test_cli import START_S, command, shardline

USERS, ITEMS, TAKES = 64, 48, 9


def every_type(num_rows: int) -> pa.Table:
    """The columns of ``TAKEN``, repeated to so many rows."""
    times = num_rows // ROWS
    return pa.table({name: pa.chunked_array([make()] * times) for name, (make, _) in TAKEN.items()})


def written(columns: pa.Table, write: Callable[[pa.Table], object]) -> pa.Table:
    """Those that a format can write; which formats lack which types is theirs to know."""
    kept = []
    for name in columns.column_names:
        with suppress(pa.ArrowException):
            write(columns.select([name]))
            kept.append(name)
    return columns.select(kept)


def as_csv(table: pa.Table, path: Path) -> None:
    pa.csv.write_csv(table, path.with_suffix(".csv"))


def as_parquet_folder(table: pa.Table, path: Path) -> None:
    path.mkdir(exist_ok=True)
    (path / "_SUCCESS").touch()
    half = table.num_rows // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(part, path / f"part-{number:05d}.parquet")


def as_stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def run(folder: Path, *arguments: str) -> str:
    """A command in this process, which has loaded torch already."""
    done = CliRunner().invoke(cli, ["--store", str(folder / "store"), *arguments])
    assert done.exit_code == 0, f"{arguments}\n{done.output}"
    return done.output


@pytest.mark.parametrize(
    ("write", "least"), [(as_csv, 25), (as_parquet_folder, 45), (as_stream, len(TAKEN))]
)
def test_every_type_goes_from_the_source_to_an_answer(
    write: Callable[[pa.Table, Path], None], least: int, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    users, items = (
        written(every_type(rows), lambda table: write(table, tmp_path / "trial"))
        for rows in (USERS, ITEMS)
    )
    assert min(users.num_columns, items.num_columns) >= least
    user_ids, item_ids = (
        pa.array([f"{letter}{row}日本" for row in range(rows)])
        for letter, rows in (("ü", USERS), ("ß", ITEMS))
    )
    titles = pa.array([f"no. {row}" for row in range(ITEMS)])
    write(users.add_column(0, "user_id", user_ids), source / "users")
    write(items.add_column(0, "item_id", item_ids).append_column("title", titles), source / "items")
    taken = [
        (user, (user * 7 + take * 5) % ITEMS) for user in range(USERS) for take in range(TAKES)
    ]
    interactions = {
        "user_id": user_ids.take(pa.array([user for user, _ in taken])),
        "item_id": item_ids.take(pa.array([item for _, item in taken])),
        "timestamp": pa.array(range(len(taken)), pa.timestamp("s")),
    }
    write(pa.table(interactions), source / "interactions")

    data = str(tmp_path / "data")
    run(tmp_path, "data", "import", "--source", str(source), "--out", data)
    quick = ("num_workers=1", "batch_size=64", "validation.k=10", "epochs=1")
    settings = [part for each in quick for part in ("--set", f"training.{each}")]
    run(tmp_path, *settings, "train", "--data", data)
    run(tmp_path, "export", "--data", data)
    run(tmp_path, "--set", "cluster.shards=2", "build", "--in-process")
    check_served(tmp_path, data, users.column_names)


def check_filters(client: Client, columns: list[str]) -> None:
    """By each value of every attribute those items are found that have it in answers."""
    with client:
        everything = client.search(item_ids=[0], k=ITEMS - 1, return_=columns)
        ids = everything.ids[0].tolist()
        for name in columns:
            values = everything.attributes[name][0]
            is_list = any(isinstance(value, list) for value in values)
            parts = [value if is_list else [value] for value in values if value is not None]
            wanted = {part for value in parts for part in value if part is not None}
            for part in [*wanted, *([] if is_list else [None])]:
                condition = {"$contains": part} if is_list else part
                answer = client.search(item_ids=[0], k=ITEMS - 1, filter={name: condition})
                expected = [
                    item
                    for item, value in zip(ids, values, strict=True)
                    if (part in (value or []) if is_list else value == part)
                ]
                found = answer.ids[0][answer.ids[0] >= 0].tolist()
                assert sorted(found) == sorted(expected), (name, part)
                matched = [each.matched for each in answer.reasons]
                assert matched == ([len(expected)] if len(expected) < ITEMS - 1 else [])


def check_served(folder: Path, data: str, columns: list[str]) -> None:
    """A user is asked for by the source's id, and every attribute comes back in JSON."""
    port = str(free_port())
    server = subprocess.Popen(
        command("serve", "--port", port),
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SHARDLINE_API_KEY": "k" * 40},
    )
    assert server.stderr is not None
    try:
        assert any(line.startswith("serving generation 1") for line in server.stderr)
        asked = ("query", "--user", "ü3日本", "--data", data, "-k", "5")
        shown = ",".join(["title", *columns])
        answer = json.loads(shardline(folder, *asked, "--show", shown, "--json").stdout)
        assert len(answer["results"]) == 5
        for row in answer["results"]:
            number = row["attributes"]["title"].removeprefix("no. ")
            assert row["original_id"] == f"ß{number}日本"
            assert row["attributes"].keys() == {"title", *columns}
        table = shardline(folder, *asked, "--show", "title").stdout
        assert answer["results"][0]["original_id"] in table
        assert answer["results"][0]["attributes"]["title"] in table
        key = shardline(folder, "keys", "show").stdout.strip()
        check_filters(Client(f"http://127.0.0.1:{port}", key=key), columns)
        similar = shardline(folder, "query", "--item", "ß7日本", "--data", data).stdout
        assert "similar to item ß7日本" in similar
        assert server.poll() is None
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=START_S)
        server.stderr.close()
