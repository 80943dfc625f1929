"""Snapshots: taken while writes go on, restored to the same rows, refused unless they are whole."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from shardline.cluster.backup import restore, take_snapshot
from shardline.cluster.backup.backup_folder import BackupFolder
from shardline.cluster.rollover.replayed_note import read_note
from shardline.cluster.store import Store
from shardline.shards.core.errors import CorruptFile, InvalidInput, NewerFormat, NotFound
from shardline.shards.core.files import MANIFEST_NAME, read_manifest, write_manifest
from shardline.shards.live.log_tail import LogTail
from shardline.shards.storage.cut import Cut
from shardline.shards.storage.generation import read_generation, verify_generation
from tests.live_store import LiveStore, live_store, rows_of

KINDS: dict[str, dict[str, int]] = {
    "ivf": {"nlist": 4},
    "hnsw": {},
    "ivfpq": {"nlist": 4, "nbits": 4},
}


class Killed(BaseException):
    """Nothing of ours catches it."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> LiveStore:
    """One shard behind a compaction with a write after it, one with a log alone, one without."""
    made = live_store(tmp_path_factory.mktemp("original"))
    made.upsert([4, 6, 7], title=["a", "b", None])
    made.delete([8, 10])
    made.compact(0)
    made.upsert([3, 4, 70], price=[1.5, 2.5, 3.5])
    return made


@pytest.fixture
def written(original: LiveStore, tmp_path: Path) -> LiveStore:
    return original.copied(tmp_path)


@pytest.fixture
def memory() -> Iterator[str]:
    """A URL that fsspec keeps in memory."""
    yield "memory://backups/monday"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def restored(made: LiveStore, root: Path) -> LiveStore:
    """As a new, empty store sees it."""
    return LiveStore(Store(root / "restored"), dict(made.expected))


@pytest.mark.parametrize(
    ("where", "shards"), [("path", None), ("file", 3), ("memory", None), ("path", 1), ("memory", 5)]
)
def test_a_restored_generation_has_the_same_rows(
    written: LiveStore, tmp_path: Path, memory: str, where: str, shards: int | None
) -> None:
    paths = {"path": str(tmp_path / "b/c"), "file": f"file://{tmp_path}/d", "memory": memory}
    url = paths[where]
    said = written.run("snapshot", url)
    assert "generation 1, 3 shards, model m1" in said
    assert "writes per shard: 3, 1, 0" in said
    taken = dict(written.expected)
    written.upsert([5, 70, 174])  # not in it
    into = restored(written, tmp_path)
    options = () if shards is None else ("--shards", shards)
    assert "live" in into.run("restore", url, *options)
    assert into.number == 1
    assert rows_of(into.folder) == taken
    manifest = into.manifest
    verify_generation(into.folder, manifest)
    assert len(manifest.shards) == (shards or 3)
    assert manifest.cut is None, "generation 1 of this store is another one"
    assert (into.folder / "query_encoder" / "config.json").read_bytes() == b"{}"
    assert [path.name for path in into.store.generations.iterdir()] == ["000001"]
    into.epochs = iter(range(into.store.counter() + 1, 1000))
    into.expected = taken
    into.upsert([9, 11, 71], title=["x", "y", "z"])
    assert rows_of(into.folder) == into.expected


def test_of_its_own_store_it_knows_the_writes_that_it_has(
    written: LiveStore, tmp_path: Path
) -> None:
    written.run("snapshot", tmp_path / "s")
    taken = dict(written.expected)
    written.delete([0, 2])
    report = json.loads(written.run("restore", tmp_path / "s", "--no-publish", "--json"))
    assert (report["restored_as"], report["state"], report["shards"]) == (2, "not live", 3)
    assert written.number == 1
    folder = written.store.generation(2)
    assert read_generation(folder).cut == Cut(generation=1, seqs=(3, 1, 0))
    note = read_note(written.store.writes(2))
    assert note is not None, "a publish knows that its log has nothing that 1 lacks"
    assert (note.generation, note.seqs, note.back) == (1, (3, 1, 0), (3, 1, 0))
    assert rows_of(folder) == taken
    assert rows_of(written.folder) == written.expected


def test_each_shard_is_copied_as_of_one_write(
    written: LiveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes and compactions come at every moment; what is copied is a prefix of each log."""
    states: dict[int, dict[int, Any]] = {}
    inner = LogTail.read_proven

    def writes_follow(tail: LogTail) -> Any:
        found = inner(tail)
        if is_on[0]:
            is_on[0] = False
            shard = int(tail._folder.name.removeprefix("shard-"))
            states[shard] = dict(written.expected)
            written.upsert([2, 61, 63, 2000])
            written.delete([12, 64, 168])
            is_on[0] = True
        return found

    is_on = [True]
    monkeypatch.setattr(LogTail, "read_proven", writes_follow)
    written.run("snapshot", tmp_path / "s")
    is_on[0] = False
    written.run("restore", tmp_path / "s", "--no-publish")
    shards = {shard: set() for shard in range(3)}
    for item in rows_of(written.store.generation(2)):
        shards[written.shards_of_item(item)].add(item)
    assert rows_of(written.store.generation(2)) == {
        item: row
        for shard, state in states.items()
        for item, row in state.items()
        if written.shards_of_item(item) == shard
    }
    assert all(shards.values())


def test_a_compaction_that_comes_while_its_shard_is_copied(
    written: LiveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, waiting = take_snapshot.read_main, [0, 0]

    def removed_meanwhile(*args: Any, **kwargs: Any) -> Any:
        if waiting:
            waiting.pop()
            written.upsert([12])
            written.compact(0)
            written.upsert([14])
            written.compact(0)  # the one that is read now goes with the second after it
        return inner(*args, **kwargs)

    monkeypatch.setattr(take_snapshot, "read_main", removed_meanwhile)
    written.run("snapshot", tmp_path / "s")
    assert not waiting
    into = restored(written, tmp_path)
    into.run("restore", tmp_path / "s")
    assert rows_of(into.folder) == into.expected


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_other_kinds_are_copied_as_they_are(tmp_path: Path, kind: str) -> None:
    """Even vectors that an index keeps only as approximations."""
    made = live_store(tmp_path, 2, kind=kind, **KINDS[kind])
    made.upsert([3, 5])
    made.delete([100])
    before = rows_of(made.folder)
    made.run("snapshot", tmp_path / "s")
    into = restored(made, tmp_path)
    into.run("restore", tmp_path / "s")
    assert rows_of(into.folder) == before
    for entry in made.manifest.shards:
        for file in entry.files:
            assert (into.folder / file.name).read_bytes() == (made.folder / file.name).read_bytes()


def test_what_is_not_whole_is_refused_by_name(written: LiveStore, tmp_path: Path) -> None:
    written.run("snapshot", tmp_path / "s")
    into = restored(written, tmp_path)
    names = [name for name in BackupFolder(str(tmp_path / "s")).names() if name != MANIFEST_NAME]
    assert len(names) > 12
    for place, name in enumerate(names):
        path = tmp_path / "s" / name
        whole = path.read_bytes()
        flipped = bytes([whole[0] ^ 1]) + whole[1:] if whole else b"x"
        damages = (whole[:-1] if whole else b"xx", whole + b"x", flipped, None)
        for damaged in (damages[place % 4], damages[(place + 1) % 4]):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(CorruptFile, match=name):
                into.run("restore", tmp_path / "s")
            assert list(into.store.generations.iterdir()) == []
        path.write_bytes(whole)
    assert not (into.store.root / "live").exists()
    manifest = tmp_path / "s" / MANIFEST_NAME
    text = manifest.read_text()
    manifest.write_text(text.replace("m1", "m2"))
    with pytest.raises(CorruptFile, match="altered"):
        into.run("restore", tmp_path / "s")
    manifest.unlink()
    with pytest.raises(NotFound, match="no complete snapshot here"):
        into.run("restore", tmp_path / "s")
    manifest.write_text(text)
    into.run("restore", tmp_path / "s")
    assert rows_of(into.folder) == written.expected


def test_a_manifest_that_leads_elsewhere(written: LiveStore, tmp_path: Path) -> None:
    written.run("snapshot", tmp_path / "s")
    body = read_manifest(tmp_path / "s", kind="snapshot", version=1)
    del body["kind"], body["format_version"]
    write_manifest(tmp_path / "s", kind="snapshot", version=2, body=body)
    with pytest.raises(NewerFormat):
        written.run("restore", tmp_path / "s")
    body["writes"][0]["name"] = "live/../../../../x"
    write_manifest(tmp_path / "s", kind="snapshot", version=1, body=body)
    with pytest.raises(CorruptFile, match="x"):
        written.run("restore", tmp_path / "s")


def test_damage_in_the_store_is_not_copied(written: LiveStore, tmp_path: Path) -> None:
    (entry,) = (f for f in written.manifest.shards[1].files if f.name.endswith("item_ids.npy"))
    path = written.folder / entry.name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match=entry.name):
        written.run("snapshot", tmp_path / "s")
    with pytest.raises(NotFound, match="no complete snapshot here"):
        written.run("restore", tmp_path / "s")


def test_where_a_snapshot_may_be_written(written: LiveStore, tmp_path: Path, memory: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo").write_bytes(b"")
    with pytest.raises(InvalidInput, match="not empty; got photo"):
        written.run("snapshot", tmp_path / "mine")
    written.run("snapshot", memory)
    with pytest.raises(InvalidInput, match="a snapshot is there already"):
        written.run("snapshot", memory)
    with pytest.raises(NotFound):
        written.run("snapshot", tmp_path / "s", "--generation", "5")
    with pytest.raises(InvalidInput, match="more shards than items"):
        written.run("restore", memory, "--shards", "1000")
    assert written.store.generation_numbers() == [1]


def test_a_snapshot_that_is_killed_at_any_step(
    written: LiveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its last file it is refused; the next one to the same folder is whole."""
    target, inner = tmp_path / "s", BackupFolder.write
    steps = len(_steps_of_a_snapshot(written, tmp_path / "whole", monkeypatch))
    assert steps > 12
    into = restored(written, tmp_path)
    for step in range(steps):
        left = [step]

        def write(
            folder: BackupFolder,
            name: str,
            blocks: Any,
            *rest: Any,
            left: list[int] = left,
            has_begun: bool = step % 2 == 1,
        ) -> None:
            left[0] -= 1
            if left[0] < 0:
                if has_begun and name != MANIFEST_NAME:  # which appears whole or not at all
                    inner(folder, name, [b"half"], *rest)
                raise Killed
            inner(folder, name, blocks, *rest)

        monkeypatch.setattr(BackupFolder, "write", write)
        with pytest.raises(Killed):
            take_snapshot.take_snapshot(written.store, 1, str(target))
        with pytest.raises(NotFound):
            restore.restore_snapshot(into.store, str(target))
    monkeypatch.setattr(BackupFolder, "write", inner)
    written.run("snapshot", target)
    into.run("restore", target)
    assert rows_of(into.folder) == written.expected
    same = [sorted(p.relative_to(f) for p in f.rglob("*")) for f in (target, tmp_path / "whole")]
    assert same[0] == same[1], "nothing is left of the ones before"


def _steps_of_a_snapshot(
    written: LiveStore, target: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    inner, names = BackupFolder.write, []

    def write(folder: BackupFolder, name: str, *rest: Any) -> None:
        names.append(name)
        inner(folder, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(BackupFolder, "write", write)
        take_snapshot.take_snapshot(written.store, 1, str(target))
    return names


@pytest.mark.parametrize("is_killed", [True, False])
@pytest.mark.parametrize("shards", [None, 2])
def test_a_restore_that_ends_at_any_step_leaves_nothing(
    written: LiveStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shards: int | None,
    is_killed: bool,
) -> None:
    """A killed one leaves what the next command removes, and a number that is not used again."""
    written.run("snapshot", tmp_path / "s")
    inner = Path.rename
    for step in range(1, 6):  # the first makes the folder in which all is done
        into = LiveStore(Store(tmp_path / f"r{step}"))
        left = [step]

        def rename(path: Path, target: Path, left: list[int] = left) -> Path:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return inner(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            if is_killed:  # nothing is cleaned up behind it
                patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            try:
                restore.restore_snapshot(into.store, str(tmp_path / "s"), num_shards=shards)
            except Killed:
                has_ended = False
            else:
                has_ended = True
        if has_ended:
            break
        assert into.store.generation_numbers() == []
        if not is_killed:
            assert [p for p in into.store.root.rglob("*") if "generations/" in str(p)] == []
            assert list(into.store.root.glob("live/*")) == []
        into.run("restore", tmp_path / "s")
        assert rows_of(into.folder) == written.expected
        left_over = set(into.store.root.glob("live/*")) - {into.store.writes(into.number)}
        assert all(into.store.next_generation() > int(path.name) for path in left_over)
    assert step >= 2
