"""What `serve` and `build` refuse before Ray is started, and what they offer instead."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardline.cluster.cli import main
from shardline.cluster.commands import serve as serve_module
from shardline.cluster.commands.serve import check_serving
from shardline.cluster.config import load_config
from shardline.cluster.preflight import network
from shardline.cluster.preflight.servable import find_damage, servable_generation
from shardline.cluster.serving import deployment
from shardline.cluster.serving.deployment import Started
from shardline.cluster.serving.endpoint import NOTE_NAME, Endpoint, leave_note
from shardline.cluster.serving.ray_session import free_port
from shardline.cluster.store import Store
from shardline.shards.core import files
from shardline.shards.core.errors import (
    CorruptFile,
    NewerFormat,
    NotFound,
    ShardlineError,
    Unavailable,
)
from shardline.shards.core.files import MANIFEST_NAME
from shardline.shards.storage.generation import INDEX_NAME, shard_folder
from tests.engine import build_generation

ENCODER = {"tower.bin": b"weights"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three whole generations, the last one live."""
    store = Store(tmp_path / "store")
    vectors = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    for number in (1, 2, 3):
        folder = store.generation(number)
        folder.mkdir(parents=True)
        build_generation(folder, vectors, np.arange(20), 2, kind="flat", query_encoder=ENCODER)
    store.set_current(3)
    return store


@pytest.fixture
def port() -> Iterator[int]:
    """One that somebody listens on."""
    with socket.create_server(("", 0)) as taken:
        yield taken.getsockname()[1]


def damage(store: Store, number: int, name: str = f"{shard_folder(1)}/{INDEX_NAME}") -> Path:
    path = store.generation(number) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def note_of(store: Store, port: int) -> None:
    """As if this process served the store."""
    started = psutil.Process().create_time()
    url = f"http://127.0.0.1:{port}"
    leave_note(store, Endpoint(url=url, generation=2, pid=os.getpid(), started=started))


def ends(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_a_whole_generation_passes(store: Store) -> None:
    config = load_config(None, [f"store={store.root}", "cluster.http_port=0"])
    assert check_serving(config, None) == 3
    assert check_serving(config, 1) == 1
    assert find_damage(store, 3) is None


def test_an_unknown_generation_is_refused_with_those_there_are(store: Store) -> None:
    with pytest.raises(NotFound, match=r"no generation 7; expected one of 1, 2, 3; make a new"):
        servable_generation(store, 7)
    (store.root / "CURRENT").write_text("7\n")
    with pytest.raises(NotFound, match=r"no generation 7.*`shardline serve --generation 3`"):
        servable_generation(store, None)
    with pytest.raises(NotFound, match="no generation 7; make a new one with `shardline build`"):
        servable_generation(Store(store.root / "empty"), 7)


def test_an_unfinished_generation_is_none(store: Store) -> None:
    (store.generation(3) / MANIFEST_NAME).unlink()
    with pytest.raises(NotFound, match="no generation 3; expected one of 1, 2;"):
        servable_generation(store, None)


@pytest.mark.parametrize("name", [MANIFEST_NAME, "query_encoder/tower.bin"])
def test_damage_is_named_with_the_newest_whole_generation(store: Store, name: str) -> None:
    path = damage(store, 3, name)
    damage(store, 2)
    with pytest.raises(CorruptFile) as refused:
        servable_generation(store, None)
    assert str(path) in str(refused.value)
    assert str(refused.value).endswith(
        "make a new one with `shardline build`, or serve another: `shardline serve --generation 1`"
    )


def test_damage_of_a_shard_is_found_by_reading_every_byte(store: Store) -> None:
    path = damage(store, 3)
    assert servable_generation(store, None) == 3, "shards' files are checked as they are loaded"
    found = find_damage(store, 3)
    assert isinstance(found, CorruptFile)
    assert f"{path}: wrong checksum" in str(found)
    assert "`shardline serve --generation 2`" in str(found)


def test_without_a_whole_generation_there_is_only_a_new_one(store: Store) -> None:
    for number in (1, 2, 3):
        damage(store, number)
    text = str(find_damage(store, 3))
    assert text.endswith("; make a new one with `shardline build`")
    (store.generation(3) / f"{shard_folder(0)}/{INDEX_NAME}").unlink()
    assert "missing" in str(find_damage(store, 3))


def test_a_newer_format_is_refused_too(store: Store) -> None:
    files.write_manifest(store.generation(3), kind="generation", version=99, body={})
    with pytest.raises(NewerFormat, match=r"upgrade shardline.*; make a new.*--generation 2"):
        servable_generation(store, None)


@pytest.mark.parametrize(
    ("kind", "is_checked"),
    [(CorruptFile, True), (NewerFormat, True), (NotFound, True), (Unavailable, False)],
)
def test_files_are_read_again_only_where_a_shard_refused_them(
    store: Store, monkeypatch: pytest.MonkeyPatch, kind: type[ShardlineError], is_checked: bool
) -> None:
    damage(store, 3)
    stages: list[str] = []

    def wait_ready(controller: object, timeout_s: float) -> int:
        raise kind(f"shard 1: {store.generation(3)}/shard-00001/index.faiss: in any words")

    monkeypatch.setattr(deployment, "wait_ready", wait_ready)
    with pytest.raises(CorruptFile if is_checked else Unavailable):
        deployment.wait_loaded(None, store, 3, 60, stages.append)
    told = "a shard refused its files: checking generation 3, then what can be served"
    assert stages == [told] * is_checked


def test_a_port_that_only_root_may_use_is_not_called_taken(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind(self: socket.socket, address: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(network.socket.socket, "bind", bind)
    config = load_config(None, [f"store={store.root}", "cluster.http_port=80"])
    with pytest.raises(Unavailable, match=r"may not listen on port 80; .*root.*--port"):
        check_serving(config, None)


@pytest.mark.parametrize("typed", [(), ("--generation", "1")])
def test_serve_leaves_the_live_generation_open_until_ray_runs(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    typed: tuple[str, ...],
) -> None:
    asked: list[object] = []

    def start_serving(config: object, *, generation: int | None, **_: object) -> Started:
        asked.append(generation)
        return Started(generation=0, urls=("http://10.0.0.1:1", "http://10.0.0.2:1"), key_file=None)

    monkeypatch.setattr(serve_module, "ray_for", lambda *_, **__: nullcontext())
    monkeypatch.setattr(serve_module, "start_serving", start_serving)
    arguments = ("--store", str(store.root), "--set", "cluster.address=elsewhere", "serve")
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--insecure", *typed])
    assert (ended.value.code, asked) == (0, [1 if typed else None])
    assert "at http://10.0.0.1:1, http://10.0.0.2:1 " in capsys.readouterr().err


def test_a_running_cluster_is_named_before_its_port(store: Store, port: int) -> None:
    config = load_config(None, [f"store={store.root}", f"cluster.http_port={port}"])
    with pytest.raises(Unavailable, match=f"port {port} is taken by another program.*--port"):
        check_serving(config, None)
    note_of(store, port)
    expected = f"served already, generation 2 at http://127.0.0.1:{port}; .*`shardline down`"
    with pytest.raises(Unavailable, match=expected):
        check_serving(config, None)


def test_doctor_passes_the_port_of_this_stores_cluster(
    store: Store, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--store", str(store.root), "--set", f"cluster.http_port={port}", "doctor")
    code, out, _ = ends(capsys, *arguments)
    assert code == 3
    assert f"FAIL  port {port}: port {port} is taken by another program; " in out
    note_of(store, port)
    _, out, _ = ends(capsys, *arguments)
    assert f"ok    port {port}: this store's cluster answers there, generation 2" in out
    other = free_port()
    arguments = ("--store", str(store.root), "--set", f"cluster.http_port={other}", "doctor")
    assert f"ok    port {other}: free" in ends(capsys, *arguments)[1]


def test_doctor_lists_what_a_killed_command_left(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    left = store.generations / ".000007.abc.tmp"
    left.mkdir(parents=True)
    (left / "spill").write_bytes(bytes(3 << 20))
    _, out, _ = ends(capsys, "--store", str(store.root), "doctor")
    assert f"ok    unfinished folders: {left} (3 MiB); delete" in out


def test_doctor_fails_a_store_that_is_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    code, out, _ = ends(capsys, "--store", str(tmp_path / "file"), "doctor")
    assert code == 3
    assert f"FAIL  store: {tmp_path / 'file'}: not a folder" in out


def test_serve_refuses_before_ray(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    base = ("--store", str(store.root), "--set", "cluster.http_port=0", "serve")
    code, _, err = ends(capsys, *base, "--generation", "7")
    assert (code, err.count("\n")) == (3, 1), "not a word of Ray, nor of keys"
    assert "no generation 7" in err
    damage(store, 3, MANIFEST_NAME)
    code, _, err = ends(capsys, *base)
    assert (code, err.count("\n")) == (3, 1)
    assert not (store.root / "keys").exists()


def test_build_refuses_before_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    table = pa.table({"id": np.arange(300), "vector": list(vectors)})
    pq.write_table(table, tmp_path / "vectors.parquet")
    root = tmp_path / "store"
    base = ("--store", str(root))
    (tmp_path / "half").mkdir()
    given = ("build", "--vectors", str(tmp_path / "vectors.parquet"))
    cases = [
        (("build", "--embeddings", str(tmp_path / "nowhere")), 3, "nowhere: no such folder"),
        (("build", "--embeddings", str(tmp_path / "half")), 3, "half: not a finished embedding"),
        (("build", "--vectors", str(tmp_path / "nowhere")), 3, "nowhere: no such file"),
        (("--set", "index.kind=pq", "--set", "index.m=3", *given), 2, "index.m: does not divide"),
        (("--set", "index.nlist=400", "--set", "index.kind=ivf", *given), 2, "index.nlist: more"),
        (("--set", "cluster.shards=301", *given), 2, "cluster.shards: more shards than items"),
    ]
    for arguments, code, message in cases:
        ended, out, err = ends(capsys, *base, *arguments)
        assert (ended, out) == (code, "")
        assert message in err
        assert "Ray" not in err
    damaged = next(root.glob("embeddings/*/items-00000.arrow"))
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    ended, _, err = ends(capsys, *base, *given)
    assert ended == 3
    assert f"{damaged}: wrong checksum" in err
    assert not list(root.glob("generations/*"))


def test_exchanged_generations_are_refused_and_another_is_offered(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is whole by all its checksums."""
    aside = store.generations / "aside"
    store.generation(2).rename(aside)
    store.generation(3).rename(store.generation(2))
    aside.rename(store.generation(3))
    with pytest.raises(CorruptFile, match=r"000003: another generation's folder.*--generation 1"):
        servable_generation(store, None)
    code, out, _ = ends(capsys, "--store", str(store.root), "doctor")
    assert code == 3
    for number in (2, 3):
        assert f"FAIL  generation {number}: {store.generation(number)}: another gen" in out
    assert "FAIL  live generation: " in out
    assert "ok    generation 1: " in out


def test_doctor_names_damaged_files_of_state(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--store", str(store.root), "--set", "cluster.http_port=0", "doctor")
    assert "ok    state: " in ends(capsys, *arguments)[1]
    (store.root / "counter.json").write_bytes(b"{")
    (store.root / NOTE_NAME).write_bytes(b"[]")
    code, out, _ = ends(capsys, *arguments)
    assert code == 3
    (line,) = (line for line in out.splitlines() if line.startswith("FAIL  state: "))
    assert f"{store.root / 'counter.json'}: not JSON" in line
    assert f"{store.root / NOTE_NAME}: not a note of ours" in line


def test_a_damaged_note_keeps_nobody_from_serving(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (store.root / NOTE_NAME).write_bytes(b"{")
    config = load_config(None, [f"store={store.root}", "cluster.http_port=0"])
    assert check_serving(config, None) == 3
    for command in ("status", "down"):
        code, _, err = ends(capsys, "--store", str(store.root), command)
        assert code == 3
        assert f"{store.root / NOTE_NAME}: not a note of ours" in err
        assert "`shardline serve` writes it anew" in err
        assert "--url" in err
        assert "SIGTERM" in err
    (store.root / NOTE_NAME).unlink()
    (store.root / NOTE_NAME).mkdir()
    with pytest.raises(CorruptFile, match="a folder, where a note is to be written; remove it"):
        check_serving(config, None)
