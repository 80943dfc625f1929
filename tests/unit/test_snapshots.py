"""Snapshots: taken while writes go on, restored to the same rows, refused unless they are whole."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shardline.cluster.backup import restore, take_snapshot
from shardline.cluster.backup.backup_folder import BackupFolder
from shardline.cluster.rollover.replayed_note import read_note
from shardline.cluster.rollover.way_back import has_all, known_back
from shardline.cluster.store import Store
from shardline.shards.core.errors import (
    CorruptFile,
    DataError,
    InvalidInput,
    NewerFormat,
    NotFound,
    Unavailable,
)
from shardline.shards.core.files import MANIFEST_NAME, read_manifest, write_manifest
from shardline.shards.live import log_tail
from shardline.shards.live.epoch_file import raise_epoch
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.live_rows import newest_write
from shardline.shards.live.log_tail import LogTail
from shardline.shards.storage.cut import Cut
from shardline.shards.storage.generation import read_generation, verify_generation
from shardline.shards.storage.locations import Location
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
    assert (note.generation, note.seqs, note.back) == (1, (3, 1, 0), (1, 1, 0))
    assert rows_of(folder) == taken
    assert rows_of(written.folder) == written.expected


def test_what_is_written_to_it_later_is_not_taken_for_the_originals(
    written: LiveStore, tmp_path: Path
) -> None:
    """Its log begins with 1, though one shard of the snapshot has two writes in its main index."""
    written.run("snapshot", tmp_path / "s")
    written.run("restore", tmp_path / "s", "--no-publish")
    note = read_note(written.store.writes(2))
    assert note is not None
    folder = written.store.generation(2)
    logs = [live_folder(folder, shard) for shard in range(3)]
    known = known_back(2, None, None, note, 3)
    assert has_all(logs, known, [newest_write(folder, shard) for shard in range(3)], note)
    written.store.set_current(2)
    written.epochs = iter(range(written.store.counter() + 1, 9999))
    written.delete([12])
    written.delete([14])
    seqs = [newest_write(folder, shard) for shard in range(3)]
    assert seqs == [3, 1, 0]
    assert not has_all(logs, known, seqs, note)


def test_a_log_that_was_cut_since_has_other_writes_under_the_same_numbers(
    written: LiveStore, tmp_path: Path
) -> None:
    written.run("snapshot", tmp_path / "s")
    sorted(live_folder(written.folder, 0).glob("log-*"))[-1].unlink()
    assert newest_write(written.folder, 0) == 2
    written.run("restore", tmp_path / "s", "--no-publish")
    assert read_generation(written.store.generation(2)).cut is None, "a publish replays everything"
    assert read_note(written.store.writes(2)) is None


class Waits(list[float]):
    """What waits for a primary that has not begun; ``led`` begins it at the third wait."""

    def __init__(self, led: LiveStore | None = None) -> None:
        self.led = led

    def __call__(self, seconds: float) -> None:
        self.append(seconds)
        if self.led is not None and len(self) == 3:
            writes = self.led.opened(0)
            writes.lead(6000)
            writes.close()


def test_no_acknowledged_write_is_left_out(
    written: LiveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a shard whose new primary has raised the epoch, and not begun a segment: what its
    predecessor wrote last may be void."""
    raise_epoch(live_folder(written.folder, 0), 5000)
    waits = Waits()
    with pytest.raises(Unavailable, match=r"new primary has not begun.*make room on the store"):
        take_snapshot.take_snapshot(written.store, 1, str(tmp_path / "s"), sleep=waits)
    assert sum(waits) == 5
    with pytest.raises(Unavailable, match="shard-00000"):
        newest_write(written.folder, 0, sleep=Waits())
    with pytest.raises(NotFound):
        written.run("restore", tmp_path / "s")
    waits = Waits(written)
    taken = take_snapshot.take_snapshot(written.store, 1, str(tmp_path / "s"), sleep=waits)
    assert (taken.seqs, len(waits)) == ((3, 1, 0), 3)
    raise_epoch(live_folder(written.folder, 0), 7000)
    assert newest_write(written.folder, 0, is_written=lambda: False, sleep=Waits()) == 3
    assert newest_write(written.folder, 1) == 1
    monkeypatch.setattr(log_tail, "BETWEEN_S", 0.0)
    said = written.run("snapshot", tmp_path / "t")
    assert "writes per shard: 3, 1, 0" in said, "nothing serves: what is on the disk holds"
    assert written.run("gc", "--erase")
    assert rows_of(written.folder) == written.expected


def test_two_snapshots_to_one_folder_do_not_mix(
    written: LiveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever begins later is the one; at every file of the earlier one."""
    for step in range(len(_steps_of_a_snapshot(written, tmp_path / "whole", monkeypatch)) - 1):
        inner, left, target = BackupFolder.write, [step], str(tmp_path / f"s{step}")

        def write(
            folder: BackupFolder,
            *rest: Any,
            inner: Any = inner,
            left: list[int] = left,
            target: str = target,
        ) -> None:
            inner(folder, *rest)
            left[0] -= 1
            if left[0] == -1:
                take_snapshot.take_snapshot(written.store, 1, target)

        with monkeypatch.context() as patch:
            patch.setattr(BackupFolder, "write", write)
            with pytest.raises(InvalidInput, match="another snapshot is being written here"):
                take_snapshot.take_snapshot(written.store, 1, target)
        into = LiveStore(Store(tmp_path / f"r{step}"))
        into.run("restore", target)
        assert rows_of(into.folder) == written.expected


class TokenExpired(Exception):
    """As of botocore: no OSError, no ValueError."""


class ExpiringFileSystem(MemoryFileSystem):
    """Of which a call raises what no library of the standard does; pyarrow names it."""

    protocol = "expiring"
    failing: ClassVar[str] = ""
    store: ClassVar[dict[str, Any]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("expiring://"))

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == self.failing:
            raise TokenExpired("an error occurred (ExpiredToken)")
        return getattr(super(), name)(*args, **kwargs)

    def info(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("info", *args, **kwargs)

    def find(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("find", *args, **kwargs)

    def open(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("open", *args, **kwargs)

    def rm(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("rm", *args, **kwargs)


@pytest.fixture
def expiring() -> Iterator[str]:
    fsspec.register_implementation("expiring", ExpiringFileSystem, clobber=True)
    yield "expiring://backups/monday"
    ExpiringFileSystem.failing = ""
    ExpiringFileSystem.store.clear()


@pytest.mark.parametrize("call", ["info", "find", "open", "rm"])
def test_what_a_remote_file_system_raises_is_told(
    written: LiveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expiring: str, call: str
) -> None:
    monkeypatch.setattr(ExpiringFileSystem, "failing", call)
    with pytest.raises(DataError, match=r"expiring://backups/monday.*\(ExpiredToken\)"):
        written.run("snapshot", expiring)
    monkeypatch.setattr(ExpiringFileSystem, "failing", "")
    written.run("snapshot", expiring)
    if call in ("info", "open"):
        monkeypatch.setattr(ExpiringFileSystem, "failing", call)
        with pytest.raises(DataError, match=r"expiring://backups/monday/.*\(ExpiredToken\)"):
            restored(written, tmp_path).run("restore", expiring)
        location = Location.of(f"{expiring}/x")
        if call == "info":
            with pytest.raises(DataError, match="ExpiredToken"):
                _ = location.is_file


def test_a_damaged_manifest_is_named_by_its_url(written: LiveStore, expiring: str) -> None:
    written.run("snapshot", expiring)
    with fsspec.open(f"{expiring}/{MANIFEST_NAME}", "wb") as file:
        file.write(b"{")
    with pytest.raises(CorruptFile, match=r"^expiring://backups/monday/_manifest\.json: not"):
        written.run("restore", expiring)


def test_a_number_that_is_taken_costs_neither_generation(
    written: LiveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing gives a number out twice; if something did, a log would be another generation's."""
    written.run("snapshot", tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "claim_generation", lambda store: 1)
        with pytest.raises(FileExistsError):
            restore.restore_snapshot(written.store, str(tmp_path / "s"))
    assert rows_of(written.folder) == written.expected
    inner = Path.rename

    def taken_meanwhile(path: Path, target: Path) -> Path:
        if Path(target) == written.store.generation(2):
            shutil.copytree(written.folder, target)
        return inner(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", taken_meanwhile)
        with pytest.raises(OSError, match="not empty"):
            restore.restore_snapshot(written.store, str(tmp_path / "s"))
    assert not written.store.writes(2).exists()


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
    write_manifest(tmp_path / "s", kind="snapshot", version=3, body=body)
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
