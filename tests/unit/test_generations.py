"""``shardline generations``: what a store holds, and what may be deleted of it."""

import json
import os
from pathlib import Path

import click
import numpy as np
import psutil
import pytest
from click.testing import CliRunner

from shardline.cluster.cli import Settings, cli
from shardline.cluster.commands.serve import _warn_of_other_shards
from shardline.cluster.control.fleet_state import Role
from shardline.cluster.control.publish_note import PublishNote
from shardline.cluster.control.publish_state import Noted
from shardline.cluster.serving.endpoint import Endpoint, leave_note
from shardline.cluster.store import Store
from shardline.shards.core.errors import InvalidInput, NotFound
from shardline.shards.core.files import HOST
from shardline.shards.core.schema import normalise
from tests.engine import build_generation
from tests.live_shard import delete_request, opened, wrote

VECTORS = normalise(np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Generations 7 and 8, of which 8 is live."""
    store = Store(tmp_path / "store")
    for number in (7, 8):
        build_generation(store.generation(number), VECTORS, np.arange(60), 2, kind="flat")
    store.set_current(8)
    return store


def run(store: Store, *arguments: str) -> str:
    done = CliRunner().invoke(
        cli, ["--store", str(store.root), "generations", *arguments], standalone_mode=False
    )
    if done.exception is not None:
        raise done.exception
    return done.output


def test_the_list(store: Store) -> None:
    (store.generation(9)).mkdir()  # never completed
    found = json.loads(run(store, "list", "--json"))
    assert [each["generation"] for each in found] == [7, 8]
    assert [each["state"] for each in found] == ["", "live"]
    first = found[0]
    assert (first["rows"], first["shards"], first["index"]) == (60, 2, "flat")
    assert first["bytes"] == sum(
        path.stat().st_size for path in store.generation(7).rglob("*") if path.is_file()
    )
    assert "live" in run(store, "list")


def test_what_a_cluster_has_loaded_beside_the_live_one_is_named_and_stays(store: Store) -> None:
    note = PublishNote(store.root, "a cluster")
    note.keep(Noted(live=8, beside=7, role=Role.KEPT))
    assert json.loads(run(store, "list", "--json"))[0]["state"] == "", "no cluster runs"
    started = psutil.Process().create_time()
    url = "http://127.0.0.1:1"
    leave_note(store, Endpoint(url=url, generation=8, pid=os.getpid(), started=started))
    states = [each["state"] for each in json.loads(run(store, "list", "--json"))]
    assert states == ["beside", "live, served"]
    with pytest.raises(InvalidInput, match="generation 7 is kept for a rollback"):
        run(store, "delete", "7")
    note.keep(Noted(live=8))
    run(store, "delete", "7")


def test_what_was_written_to_a_generation_counts_and_goes_with_it(store: Store) -> None:
    before = json.loads(run(store, "list", "--json"))[0]["bytes"]
    _, writes = opened(store.generation(7))
    writes.lead(1)
    wrote(writes, delete_request([1]))
    writes.close()
    assert store.writes(7).is_dir()
    assert json.loads(run(store, "list", "--json"))[0]["bytes"] > before
    run(store, "delete", "7")
    assert not store.writes(7).exists()
    assert not store.generation(7).exists()


def test_doctor_reads_what_was_written(store: Store) -> None:
    _, writes = opened(store.generation(8))
    writes.lead(1)
    wrote(writes, delete_request([1]), delete_request([2]))
    writes.close()
    command = ["--store", str(store.root), "doctor"]
    told = CliRunner().invoke(cli, command, standalone_mode=False).output
    assert "2 writes to 1 shards" in " ".join(told.split())
    (segment,) = sorted((store.writes(8) / "shard-00000").glob("log-*"))
    damaged = bytearray(segment.read_bytes())
    damaged[20] ^= 1
    segment.write_bytes(damaged)
    told = CliRunner().invoke(cli, command, standalone_mode=False).output
    assert segment.name in "".join(told.split())


def test_a_generation_that_cannot_be_read_is_listed(store: Store) -> None:
    next(store.generation(7).glob("_manifest*")).write_text("{}")
    found = json.loads(run(store, "list", "--json"))
    assert found[0]["state"].startswith("unreadable: ")


def test_an_empty_store(tmp_path: Path) -> None:
    assert "shardline build" in run(Store(tmp_path), "list")


def test_one_that_is_not_needed_is_deleted(store: Store) -> None:
    assert "deleted" in run(store, "delete", "7")
    assert store.generation_numbers() == [8]
    assert not store.generation(7).exists()


def test_a_number_identifies_one_generation_for_ever(store: Store) -> None:
    build_generation(store.generation(9), VECTORS, np.arange(60), 2, kind="flat")
    run(store, "delete", "9")
    assert store.next_generation() == 10


def test_what_a_killed_build_left_is_named(store: Store) -> None:
    left = store.generations / f".000009.{HOST}-abcdefgh.tmp"
    left.mkdir()
    (left / "spill").write_bytes(bytes(3 << 20))
    assert f"{left}: 3.0 MiB of a build that was killed" in run(store, "list")


def test_what_must_stay_stays(store: Store) -> None:
    with pytest.raises(InvalidInput, match="generation 8 is live"):
        run(store, "delete", "8")
    with pytest.raises(NotFound, match="no such generation; expected one of 7, 8"):
        run(store, "delete", "9")
    with pytest.raises(click.UsageError):
        run(store, "delete", "0")
    assert store.generation_numbers() == [7, 8]


@pytest.mark.parametrize(("asked", "warns"), [((), False), (("2",), False), (("3",), True)])
def test_serve_warns_of_another_number_of_shards(
    store: Store, capsys: pytest.CaptureFixture[str], asked: tuple[str, ...], warns: bool
) -> None:
    overrides = tuple(f"cluster.shards={number}" for number in asked)
    settings = Settings(store_path=store.root, overrides=overrides)
    _warn_of_other_shards(settings, settings.config, None)
    warning = capsys.readouterr().err
    assert ("generation 8 was built with 2 shards" in warning) == warns
