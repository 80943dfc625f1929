"""Files of ours that are something else by now: too large, a pipe, a device, a folder, a socket."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from shardline.cluster.config import load_config
from shardline.cluster.serving.endpoint import NOTE_NAME, find_endpoint
from shardline.cluster.store import Store
from shardline.router.http.api_keys import read_keys
from shardline.shards.core.encoder_files import read_encoder
from shardline.shards.core.errors import ConfigError, CorruptFile, NotFound, ShardlineError
from shardline.shards.core.files import MANIFEST_NAME, FileEntry, verify_file
from shardline.shards.core.small_files import parse_json, read_json, read_small
from shardline.shards.storage.embedding_set import open_embedding_set
from shardline.shards.storage.generation import read_generation
from shardline.training.loop.runlog import LOG, read_log
from shardline.training.model.checkpoint import open_run

SPARSE_BYTES = 20 << 30  # more than the machine has memory for


def make(path: Path, kind: str) -> None:
    if kind == "sparse":
        path.touch(mode=0o600)
        os.truncate(path, SPARSE_BYTES)
    elif kind == "pipe":
        os.mkfifo(path, 0o600)
    elif kind == "folder":
        path.mkdir(0o700)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
        path.chmod(0o600)


# what reads the file below a folder, and its name there
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "generation": (MANIFEST_NAME, read_generation),
    "embedding set": (MANIFEST_NAME, open_embedding_set),
    "run": (MANIFEST_NAME, open_run),
    "run log": (LOG, lambda folder: read_log(folder / LOG)),
    "CURRENT": ("CURRENT", lambda folder: Store(folder).current()),
    "encoder": ("encoder.json", read_encoder),
    "keys": ("keys", lambda folder: read_keys(folder / "keys")),
    "configuration": ("c.yaml", lambda folder: load_config(folder / "c.yaml", [])),
    "note": (NOTE_NAME, lambda folder: find_endpoint(Store(folder))),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["sparse", "pipe", "folder", "device", "socket"])
def test_every_reader_of_a_small_file_refuses_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a Unix socket must be short
    name, read = READERS[reader]
    make(Path(name), kind)
    with pytest.raises(ShardlineError) as refused:
        read(tmp_path)
    assert isinstance(refused.value, CorruptFile | ConfigError)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_absent_is_told_apart(tmp_path: Path, reader: str) -> None:
    with pytest.raises(NotFound):
        READERS[reader][1](tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotFound):
        READERS[reader][1](tmp_path / "file")


def test_a_file_may_have_as_many_bytes_as_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == b"12345"
    with pytest.raises(CorruptFile, match="file: too large; expected at most 4 bytes; got 5"):
        read_small(path, 4)
    assert read_json(path, 5) == 12345


def test_a_file_that_is_exchanged_for_a_pipe_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pipe = tmp_path / "file", tmp_path / "pipe"
    path.touch()
    os.mkfifo(pipe)
    real = os.open
    monkeypatch.setattr(os, "open", lambda _path, flags: real(pipe, flags))
    with pytest.raises(CorruptFile, match="a named pipe"):
        read_small(path, 5)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"1" * 5000, b"", b"{'a': 1}"])
def test_what_is_no_json_is_one_line(content: bytes) -> None:
    with pytest.raises(CorruptFile, match="x: not JSON") as refused:
        parse_json(content, Path("x"))
    assert "\n" not in str(refused.value)


def test_a_listed_file_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "index.faiss")
    with pytest.raises(CorruptFile):
        verify_file(tmp_path, FileEntry(name="index.faiss", bytes=0, sha256="0" * 64))
