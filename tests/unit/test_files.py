"""Complete-or-absent files: atomic writes, checksums, manifests."""

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import pytest
import safetensors.numpy

from shardline.shards.core.errors import CorruptFile, NewerFormat, NotFound
from shardline.shards.core.files import (
    HOST,
    MANIFEST_NAME,
    abandoned_folders,
    atomic_path,
    describe_file,
    describe_tree,
    read_manifest,
    sha256_of,
    staged_folder,
    verify_file,
    verify_files,
    write_bytes,
    write_json,
    write_manifest,
)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "file") == expected


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    write_bytes(target, b"one")
    write_bytes(target, b"two")
    assert target.read_bytes() == b"two"
    assert names(target.parent) == ["file"]
    assert target.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_bytes(target, b"old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_bytes(b"half of the n")
        raise ZeroDivisionError
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def write_by_faiss(path: Path) -> None:
    index = faiss.IndexFlatL2(64)
    index.add(np.ones((4096, 64), dtype=np.float32))
    faiss.write_index(index, str(path))


def write_by_numpy(path: Path) -> None:
    np.ones(1 << 16).tofile(path)


def write_by_safetensors(path: Path) -> None:
    safetensors.numpy.save_file({"ones": np.ones(1 << 16)}, path)


def write_by_python(path: Path) -> None:
    path.write_bytes(bytes(1 << 20))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk, but for the number: writing on is refused by the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "write", [write_by_faiss, write_by_numpy, write_by_safetensors, write_by_python]
)
@pytest.mark.parametrize("around", ["atomic_path", "staged_folder"])
def test_what_the_disk_refuses_has_its_number_whoever_writes(
    tmp_path: Path, write: Callable[[Path], None], around: str
) -> None:
    target = tmp_path / "target"
    with files_of_at_most(1 << 16), pytest.raises(OSError) as raised:
        if around == "atomic_path":
            with atomic_path(target) as temporary:
                write(temporary)
        else:
            with staged_folder(target) as staging:
                write(staging / "file")
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path))
    assert names(tmp_path) == []


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path: Path) -> None:
    """The full disk is asked, not the text; nor is any other refusal taken for the reason."""
    with pytest.raises(RuntimeError, match="No space left"), atomic_path(tmp_path / "file"):
        raise RuntimeError("No space left on device")
    with pytest.raises(RuntimeError, match="gone"), staged_folder(tmp_path / "a" / "b"):
        shutil.rmtree(tmp_path / "a")
        raise RuntimeError("gone")


def test_write_json_round_trips(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "ü": "é"}
    write_json(tmp_path / "file.json", value)
    assert json.loads((tmp_path / "file.json").read_bytes()) == value


def test_describe_and_verify(tmp_path: Path) -> None:
    write_bytes(tmp_path / "sub" / "a", b"abc")
    write_bytes(tmp_path / "b", b"")
    (tmp_path / MANIFEST_NAME).write_text("not listed")
    entries = describe_tree(tmp_path)
    assert [(e.name, e.bytes) for e in entries] == [("b", 0), ("sub/a", 3)]
    assert verify_file(tmp_path, entries[1]) == tmp_path / "sub" / "a"
    verify_files(tmp_path, entries)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(b"abcde"), "wrong size"),
        (lambda path: path.write_bytes(b"abcdefg"), "wrong size"),
        (lambda path: path.write_bytes(b"abcdeg"), "wrong checksum"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str) -> None:
    write_bytes(tmp_path / "file", b"abcdef")
    entry = describe_file(tmp_path, "file")
    damage(tmp_path / "file")
    with pytest.raises(CorruptFile, match=message) as caught:
        verify_file(tmp_path, entry)
    assert str(tmp_path / "file") in str(caught.value)


def test_manifest_round_trips(tmp_path: Path) -> None:
    write_manifest(tmp_path, kind="thing", version=3, body={"rows": 5, "names": ["ä"]})
    body = read_manifest(tmp_path, kind="thing", version=4)
    assert body == {"kind": "thing", "format_version": 3, "rows": 5, "names": ["ä"]}


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda path: path.unlink(), NotFound),
        (lambda path: path.write_text("{"), CorruptFile),
        (lambda path: path.write_bytes(b"\xff\xfe{}"), CorruptFile),
        (lambda path: path.write_text("[]"), CorruptFile),
        (lambda path: path.write_text("[" * 100_000), CorruptFile),
        (lambda path: change(path, kind="other"), CorruptFile),
        (lambda path: change(path, rows=6), CorruptFile),
        (lambda path: change(path, checksum=None), CorruptFile),
        (lambda path: change(path, format_version=4), NewerFormat),
        (lambda path: change(path, format_version="3"), CorruptFile),
        (lambda path: change(path, format_version=True), CorruptFile),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, damage, error: type[Exception]) -> None:
    write_manifest(tmp_path, kind="thing", version=3, body={"rows": 5})
    damage(tmp_path / MANIFEST_NAME)
    with pytest.raises(error):
        read_manifest(tmp_path, kind="thing", version=3)


def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no complete thing here"):
        read_manifest(tmp_path / "nowhere", kind="thing", version=1)


def test_staged_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with staged_folder(target) as staging:
        write_bytes(staging / "sub" / "a", b"1")
        assert not target.exists()
    assert (target / "sub" / "a").read_bytes() == b"1"
    assert names(target.parent) == ["target"]


def test_a_failed_staged_folder_vanishes(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "target") as staging:
        write_bytes(staging / "a", b"1")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_what_a_killed_process_left_goes_with_the_next_one_of_its_target(tmp_path: Path) -> None:
    target, other = tmp_path / "target", tmp_path / f".other.{HOST}-abcdefgh.tmp"
    other.mkdir()
    of_another_host = tmp_path / ".target.0badcafe-abcdefgh.tmp"
    of_another_host.mkdir()
    code = (
        "import sys, pathlib; from shardline.shards.core.files import staged_folder\n"
        "with staged_folder(pathlib.Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        (staging,) = tmp_path.glob(f".target.{HOST}*")
        assert abandoned_folders(tmp_path, "target") == [], "it lives"
        with staged_folder(target):
            assert staging.is_dir()
        target.rmdir()
        process.kill()
    assert abandoned_folders(tmp_path) == [other, staging]
    with staged_folder(target):
        assert not staging.exists()
    assert sorted(names(tmp_path)) == [other.name, of_another_host.name, "target"]


def test_without_locks_nothing_counts_as_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / f".target.{HOST}-abcdefgh.tmp").mkdir()
    with staged_folder(tmp_path / "target"):
        pass
    assert sorted(names(tmp_path)) == [f".target.{HOST}-abcdefgh.tmp", "target"]


def test_staging_never_replaces(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(FileExistsError), staged_folder(tmp_path / "target"):
        pass
    assert names(tmp_path) == ["target"]
