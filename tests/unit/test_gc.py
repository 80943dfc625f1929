"""``shardline gc``: what goes, what stays, whatever ends it, and that what was deleted is gone."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from shardline.cluster.backup.restore import FOLDER as RESTORED
from shardline.cluster.commands import gc as gc_command
from shardline.cluster.control.fleet_state import Role
from shardline.cluster.control.publish_note import PublishNote
from shardline.cluster.control.publish_state import (
    Noted,
    PublishOptions,
    PublishProgress,
    PublishStage,
)
from shardline.cluster.generation_stages import LocalGeneration
from shardline.cluster.housekeeping import rebase as rebase_module
from shardline.cluster.housekeeping import removals as removals_module
from shardline.cluster.housekeeping.erase import (
    Erasure,
    Waiting,
    compact_away,
    drop_superseded,
)
from shardline.cluster.housekeeping.rebase import rebase
from shardline.cluster.housekeeping.removals import Policy, Removal, old_generations
from shardline.cluster.serving.endpoint import Endpoint, leave_note
from shardline.cluster.serving.start_lock import LOCK, removing
from shardline.cluster.store import Store
from shardline.shards.core.errors import CorruptFile, InvalidInput, NewerFormat, Unavailable
from shardline.shards.core.files import HOST, MANIFEST_NAME, read_manifest, scratch_folder
from shardline.shards.live.health import HealthLook
from shardline.shards.live.kept_segments import KEPT_FOLDER
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.loading import load_caught_up
from shardline.shards.live.mains import compacted_seqs
from shardline.shards.live.writes import ShardWrites
from shardline.shards.storage.generation import read_generation, verify_generation
from tests.live_store import LiveStore, live_store, rows_of

MARKER = "a text that nothing else contains"


class Killed(BaseException):
    """Nothing of ours catches it."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> LiveStore:
    """Generations 1 to 6, all copies of one; 5 is live, and one of its shards compacted."""
    made = live_store(tmp_path_factory.mktemp("original"), 2)
    made.upsert([1, 3, 121])
    body = read_manifest(made.folder, kind="generation", version=9)
    for number in range(2, 7):
        another_generation(made, number)
    made.store.set_current(5)
    made.upsert([5])
    made.compact(0)
    assert body["generation"] == 1
    return made


def another_generation(made: LiveStore, number: int) -> None:
    made.run("snapshot", made.store.root.parent / f"s{number}", "--generation", "1")
    made.run("restore", made.store.root.parent / f"s{number}", "--no-publish")
    assert made.store.generation_numbers()[-1] == number


@pytest.fixture
def store(original: LiveStore, tmp_path: Path) -> LiveStore:
    return original.copied(tmp_path)


def files_of(root: Path) -> set[str]:
    found = {path.relative_to(root).as_posix() for path in root.rglob("*")}
    return found - {LOCK}


def serve(made: LiveStore, number: int) -> None:
    started = psutil.Process().create_time()
    note = Endpoint(url="http://127.0.0.1:1", generation=number, pid=os.getpid(), started=started)
    leave_note(made.store, note)


def test_older_generations_go_with_what_was_written_to_them(store: LiveStore) -> None:
    writes = store.store.writes(1)
    assert writes.is_dir()
    before = files_of(store.store.root)
    would = json.loads(store.run("gc", "--dry-run", "--json"))
    assert files_of(store.store.root) == before
    assert [Path(each["path"]).name for each in would["removed"]] == ["000001", "000002"]
    assert would["held"] == {"5": "live"}
    assert would["bytes"] > 1000
    assert "MiB removed" in store.run("gc")
    assert store.store.generation_numbers() == [3, 4, 5, 6]
    assert not writes.exists()
    assert rows_of(store.folder) == store.expected
    assert "nothing to remove" in store.run("gc")
    store.run("gc", "--keep", "0")
    assert store.store.generation_numbers() == [5, 6], "6 may be published yet"
    assert store.store.next_generation() == 7


def test_what_is_in_use_stays(store: LiveStore) -> None:
    serve(store, 2)
    (store.store.root / "publish.json").write_text('{"beside": 3, "live": 2}')
    store.run("gc", "--keep", "0")
    assert store.store.generation_numbers() == [2, 3, 5, 6]
    for number, why in ((2, "being served"), (3, "kept for a rollback"), (5, "live")):
        with pytest.raises(InvalidInput, match=why):
            store.run("generations", "delete", number)
    (store.store.root / "CURRENT").unlink()
    (store.store.root / "publish.json").write_text('{"beside": null}')
    assert "nothing to remove" in store.run("gc", "--keep", "0"), "who knows what is old"


@pytest.mark.parametrize("note", ["[]", '{"beside": "3"}', "{"])
def test_where_nobody_can_tell_what_is_in_use_nothing_goes(store: LiveStore, note: str) -> None:
    before = files_of(store.store.root)
    (store.store.root / "publish.json").write_text(note)
    with pytest.raises(CorruptFile, match=r"publish\.json"):
        store.run("gc", "--keep", "0")
    (store.store.root / "publish.json").unlink()
    current = (store.store.root / "CURRENT").read_bytes()
    (store.store.root / "CURRENT").write_bytes(b"five")
    with pytest.raises(CorruptFile, match="CURRENT"):
        store.run("gc", "--keep", "0")
    (store.store.root / "CURRENT").write_bytes(current)
    assert files_of(store.store.root) == before


@pytest.mark.parametrize(
    ("live", "held", "keep", "old"),
    [
        (5, {5}, 0, [1, 2, 3, 4]),
        (5, {5}, 3, [1]),
        (5, {5}, 9, []),
        (4, {4, 5}, 1, [1, 2]),
        (5, {5, 7, 2}, 0, [1, 3, 4]),
        (None, {2}, 0, []),
    ],
)
def test_which_generations_are_old(
    live: int | None, held: set[int], keep: int, old: list[int]
) -> None:
    policy = Policy(live=live, held=held, keep=keep, keep_log_bytes=0)
    assert old_generations([1, 2, 3, 4, 5, 6, 7], policy) == old


def test_what_killed_commands_have_left(store: LiveStore) -> None:
    root = store.store
    live = live_folder(store.folder, 0)
    left = [
        root.generations / f".000007.{HOST}-abcdefgh.tmp",
        root.generations / f".live-rows.{HOST}-abcdefgh.tmp",
        root.embeddings / f".m2.{HOST}-abcdefgh.tmp",
        root.generations / "000009",  # its manifest was removed, then the process killed
        root.writes(8),
        live / f".main-00000000000000000009.{HOST}-abcdefgh.tmp",
        live / "main-00000000000000000001",  # half removed
        store.folder / f".shard-00000-00000000000000000002.{HOST}-abcdefgh.tmp",
        store.folder / "shard-00000-00000000000000000001",  # not listed by the manifest
    ]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes(10))
    elsewhere = root.generations / ".000007.00000000-abcdefgh.tmp"
    elsewhere.mkdir()
    found = json.loads(store.run("gc", "--keep", "9", "--json"))["removed"]
    assert {Path(each["path"]) for each in found} == set(left)
    assert all(each["bytes"] == 10 for each in found)
    assert not any(folder.exists() for folder in left)
    assert elsewhere.exists(), "of another host: who knows whether its process lives"
    assert rows_of(store.folder) == store.expected


def test_what_is_being_made_stays(store: LiveStore) -> None:
    """A restore puts its writes in place an instant before its generation."""
    with scratch_folder(store.store.generations / RESTORED) as scratch:
        store.store.writes(8).mkdir()
        assert "nothing to remove" in store.run("gc", "--keep", "9")
        assert scratch.exists()
    store.run("gc", "--keep", "9")
    assert not store.store.writes(8).exists()


def note_publish(made: LiveStore, live: int, beside: int | None, coming: int | None) -> None:
    """What a controller notes of the two, and of what it publishes."""
    options = PublishOptions(generation=coming or 1)
    stage = PublishStage.LIVE if coming is None else PublishStage.LOADING
    publish = PublishProgress(number=1, options=options, source=live, stage=stage)
    noted = Noted(live=live, beside=beside, role=Role.CANDIDATE, publish=publish)
    PublishNote(made.store.root, "one").keep(noted)


@pytest.mark.parametrize(
    ("beside", "coming", "reason"),
    [
        (6, 6, "generation 6 is being published, from the log that an erasure cuts"),
        (None, 6, "generation 6 is being published"),
        (4, None, "generation 4 is kept for a rollback, and is brought all writes, from the log"),
    ],
)
def test_nothing_is_erased_that_another_generation_is_brought(
    store: LiveStore, beside: int | None, coming: int | None, reason: str
) -> None:
    serve(store, 5)
    note_publish(store, 5, beside, coming)
    before = files_of(store.store.root)
    with pytest.raises(Unavailable, match=reason):
        store.run("gc", "--erase")
    assert files_of(store.store.root) == before


def test_a_publish_that_begins_under_an_erasure_keeps_its_log(
    store: LiveStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(store, 5)
    live = live_folder(store.folder, 0)
    kept = sorted(path.name for path in (live / KEPT_FOLDER).iterdir())
    assert kept, "the write that was compacted"

    def compacts(store_: Store, number: int, shard: int, *, is_loaded: bool) -> Erasure:
        assert is_loaded
        note_publish(store, 5, None, 6)
        return Erasure(generation=number, shard=shard, seq=1)

    monkeypatch.setattr(gc_command, "compact_away", compacts)
    monkeypatch.setattr(gc_command.os, "nice", lambda increment: None)
    said = store.run("gc", "--erase")
    assert said.count("not erased: generation 5, shard") == 2
    assert "shard 0: generation 6 is being published by now" in said
    assert sorted(path.name for path in (live / KEPT_FOLDER).iterdir()) == kept


def test_what_goes_live_while_others_are_erased_stays(
    store: LiveStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollback to 1 while the shards of 5 are compacted, which takes minutes."""
    inner = gc_command.compact_away

    def rolled_back(*args: Any, **kwargs: Any) -> Erasure:
        store.store.set_current(1)
        return inner(*args, **kwargs)

    written = rows_of(store.store.generation(1))
    monkeypatch.setattr(gc_command, "compact_away", rolled_back)
    store.run("gc", "--erase")
    assert store.number == 1
    assert rows_of(store.folder) == written


@pytest.mark.parametrize("is_live", [True, False])
def test_what_is_in_use_by_the_time_of_its_removal_stays(
    store: LiveStore, monkeypatch: pytest.MonkeyPatch, is_live: bool
) -> None:
    def meanwhile(*args: Any) -> list[Removal]:
        found = removals_module.removals(*args)
        if is_live:
            store.store.set_current(2)
        else:
            note_publish(store, 5, None, 2)
        return found

    monkeypatch.setattr(gc_command, "removals", meanwhile)
    removed = json.loads(store.run("gc", "--keep", "0", "--json"))["removed"]
    assert [Path(each["path"]).name for each in removed] == ["000001", "000003", "000004"]
    assert store.store.generation_numbers() == [2, 5, 6]
    assert rows_of(store.store.generation(2))


def test_in_the_middle_of_a_switch_both_stay(store: LiveStore) -> None:
    """CURRENT is changed first, then the note."""
    note_publish(store, 3, 5, 5)
    store.run("gc", "--keep", "0")
    assert store.store.generation_numbers() == [3, 5, 6]


def test_one_at_a_time(store: LiveStore) -> None:
    with removing(store.store), pytest.raises(Unavailable, match="at work"):
        store.run("gc")
    store.run("gc")


def test_kept_segments_beyond_their_bound_go(store: LiveStore) -> None:
    live = live_folder(store.folder, 0)
    shutil.rmtree(live / KEPT_FOLDER)
    (live / KEPT_FOLDER).mkdir()
    for part in range(1, 5):
        name = f"log-{1:020d}-{part:06d}-{part:020d}.seg"
        (live / KEPT_FOLDER / name).write_bytes(bytes(1 << 20))
    store.run("gc", "--keep", "9", options=("--set", "live.keep_log_mib=2.5"))
    names = sorted(path.name for path in (live / KEPT_FOLDER).iterdir())
    assert len(names) == 2
    assert names[0] == f"log-{1:020d}-{3:06d}-{3:020d}.seg", "the oldest go"


def test_days_of_events_beyond_their_room_go_the_oldest_first(tmp_path: Path) -> None:
    made = Store(tmp_path)
    for day in range(1, 6):
        folder = made.events / f"2026-03-0{day}"
        folder.mkdir(parents=True)
        (folder / "h-000001-00000000.arrow").write_bytes(b"x" * 1000)

    def going(keep_bytes: int | None) -> list[str]:
        policy = Policy(live=None, held=(), keep=0, keep_log_bytes=0, keep_event_bytes=keep_bytes)
        found = removals_module.removals(made, policy)
        assert {each.kind for each in found} <= {removals_module.Kind.EVENTS}
        return [each.path.name[-1] for each in found]

    assert going(None) == going(5000) == []
    assert going(4999) == going(4000) == ["1"]
    assert going(2500) == ["1", "2", "3"]
    assert going(1) == ["1", "2", "3", "4"], "routers write to the newest"
    policy = Policy(live=None, held=(), keep=0, keep_log_bytes=0, keep_event_bytes=4000)
    (first,) = removals_module.removals(made, policy)
    assert removals_module.remove(made, first, lambda: ())
    assert not first.path.exists() and len(list(made.events.iterdir())) == 4


def test_embedding_sets_go_only_if_asked(store: LiveStore) -> None:
    for number in range(3):
        folder = store.store.embeddings / f"m{number}"
        folder.mkdir(parents=True)
        (folder / MANIFEST_NAME).write_text("{}")
        os.utime(folder / MANIFEST_NAME, (number, number))
    store.run("gc")
    assert len(list(store.store.embeddings.iterdir())) == 3
    store.run("gc", "--embeddings", "1")
    assert [path.name for path in store.store.embeddings.iterdir()] == ["m2"]


@pytest.mark.parametrize("what", ["unlink", "rmtree"])
def test_a_gc_that_is_killed_at_any_step(
    store: LiveStore, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What is complete then is whole, and the next one removes the rest."""
    owner: Any = Path if what == "unlink" else shutil
    inner = getattr(owner, what)
    for step in range(4):
        left = [step]

        def ends(
            path: Path,
            *args: Any,
            left: list[int] = left,
            is_first: bool = step % 2 == 0,
            **kw: Any,
        ) -> None:
            left[0] -= 1
            if left[0] < 0:
                if what == "rmtree" and is_first:
                    inner(next(each for each in path.iterdir() if each.is_dir()))
                raise Killed
            inner(path, *args, **kw)

        with monkeypatch.context() as patch:
            patch.setattr(owner, what, ends)
            with pytest.raises(Killed):
                store.run("gc", "--keep", "0")
                raise Killed
        for number in store.store.generation_numbers():
            folder = store.store.generation(number)
            verify_generation(folder, read_generation(folder))
            assert rows_of(folder)
    store.run("gc", "--keep", "0")
    assert sorted(path.name for path in store.store.generations.iterdir()) == ["000005", "000006"]
    assert {path.name for path in (store.store.root / "live").iterdir()} <= {"000005", "000006"}
    assert rows_of(store.folder) == store.expected


def marked(made: LiveStore, needles: list[bytes]) -> list[str]:
    """Files of the store that contain one of the needles."""
    return [
        path.relative_to(made.store.root).as_posix()
        for path in sorted(made.store.root.rglob("*"))
        if path.is_file() and any(needle in path.read_bytes() for needle in needles)
    ]


def test_what_was_deleted_is_in_no_file(tmp_path: Path) -> None:
    """Items that were built, replaced, written and deleted: no vector and no attribute of them."""
    made = live_store(tmp_path, 2)
    shutil.copytree(tmp_path / "set", made.store.embeddings / "m1")
    made.upsert([7, 4], title=[MARKER, "an older text"])
    needles = [MARKER.encode(), b"an older text", b"item 100"]
    needles += [made.expected[item][0] for item in (4, 7, 100)]
    made.upsert([4, 9], title=["a newer text", "kept"])
    made.compact(0)
    made.delete([7, 100])
    before = marked(made, needles)
    assert {name.split("/")[0] for name in before} == {"embeddings", "generations", "live"}
    made.run("gc")
    assert marked(made, needles), "a gc alone changes no shard"
    said = made.run("gc", "--erase")
    assert "1 embedding sets keep what they were exported with" in said
    assert [name.split("/")[0] for name in marked(made, needles)] == ["embeddings"]
    made.run("gc", "--embeddings", "0")
    assert marked(made, needles) == []
    assert marked(made, [b"a newer text", b"kept"])
    assert rows_of(made.folder) == made.expected
    verify_generation(made.folder, made.manifest)
    assert made.manifest.rows == len(made.expected)


def test_after_an_erasure_everything_goes_on(tmp_path: Path) -> None:
    made = live_store(tmp_path, 2)
    made.upsert([1, 3, 121], title=["a", "b", "c"])
    made.delete([0])
    made.run("gc", "--erase")
    assert [entry.folder for entry in made.manifest.shards] == [
        f"shard-00000-{2:020d}",
        f"shard-00001-{1:020d}",
    ]
    assert read_manifest(made.folder, kind="generation", version=3)["format_version"] == 3
    with pytest.raises(NewerFormat):
        read_manifest(made.folder, kind="generation", version=2)
    assert LocalGeneration(made.folder, threads=1), "what reads the generation's files alone"
    made.epochs = iter(range(made.store.counter() + 1, 1000))
    made.upsert([5, 123], title=["d", "e"])
    made.delete([1])
    made.compact(0, 1)
    made.run("snapshot", tmp_path / "s")
    made.run("restore", tmp_path / "s", "--no-publish")
    assert rows_of(made.store.generation(2)) == made.expected
    made.run("gc", "--erase")
    assert rows_of(made.folder) == made.expected
    assert len(list(made.folder.glob("shard-*"))) == 2
    first = read_generation(made.store.generation(2))
    verify_generation(made.store.generation(2), first)


def test_health_counts_from_the_newest_erasure(tmp_path: Path) -> None:
    made = live_store(tmp_path, 1)
    made.upsert([1, 3])
    begun = HealthLook(made.folder, 0)

    def unseen(look: HealthLook) -> int:
        return look.look(load_caught_up(made.folder, made.manifest, 0).state).unseen

    assert unseen(begun) == 2
    made.run("gc", "--erase")
    assert unseen(begun) == unseen(HealthLook(made.folder, 0)) == 0
    made.epochs = iter(range(made.store.counter() + 1, 1000))
    made.upsert([5])
    assert unseen(begun) == unseen(HealthLook(made.folder, 0)) == 1


def test_a_shard_of_deleted_items_alone_is_reported(tmp_path: Path) -> None:
    made = live_store(tmp_path, 2)
    made.delete([item for item in made.expected if made.shards_of_item(item) == 0])
    said = made.run("gc", "--erase")
    assert "not erased: generation 1, shard 0: every item of the shard is deleted" in said
    assert rows_of(made.folder) == made.expected


def test_generations_that_are_not_in_use_are_named(store: LiveStore) -> None:
    said = store.run("gc", "--erase")
    assert store.store.generation_numbers() == [5, 6]
    assert "generations 6 are not in use, and keep what they were built from" in said


@pytest.mark.parametrize("step", range(4))
def test_a_rebase_that_is_killed_at_any_step(
    tmp_path: Path, original: LiveStore, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    made = original.copied(tmp_path)
    names = ("_link", "read_item_ids", "write_generation", "write_generation")
    inner = getattr(rebase_module, names[step])

    def ends(*args: Any, **kwargs: Any) -> Any:
        if step == 3:
            inner(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(rebase_module, names[step], ends)
        with pytest.raises(Killed):
            rebase(made.folder, 0)
    verify_generation(made.folder, made.manifest)
    assert rows_of(made.folder) == made.expected
    assert rebase(made.folder, 0) is (step < 3)
    assert not rebase(made.folder, 0)
    assert not rebase(made.folder, 1), "it has no compaction"
    made.run("gc", "--keep", "9")
    verify_generation(made.folder, made.manifest)
    assert rows_of(made.folder) == made.expected
    assert sorted(path.name for path in made.folder.glob("shard-*")) == [
        f"shard-00000-{compacted_seqs(live_folder(made.folder, 0))[-1]:020d}",
        "shard-00001",
    ]


def test_where_no_file_can_have_two_names_it_is_copied(
    store: LiveStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*args: Any) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(rebase_module.os, "link", refuses)
    assert rebase(store.folder, 0)
    verify_generation(store.folder, store.manifest)


class Primary:
    """The primary of a shard in service: changes over to a newer main index when time passes, and
    takes writes meanwhile."""

    def __init__(self, made: LiveStore, *, changes: bool = True) -> None:
        self.made, self.changes = made, changes
        self.writes: ShardWrites = made.opened(0)
        self.writes.lead(1000)
        self.main_seq = 0
        self.began = self.time = time.time()

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        newest = (compacted_seqs(live_folder(self.made.folder, 0)) or [0])[-1]
        if self.changes and newest > self.main_seq:
            loaded = load_caught_up(self.made.folder, self.made.manifest, 0)
            assert self.writes.adopt(loaded)
            self.main_seq = newest

    @property
    def waiting(self) -> Waiting:
        return Waiting(sleep=self.sleep, now=lambda: self.time)


def test_beside_a_cluster_the_primary_trims(tmp_path: Path) -> None:
    made = live_store(tmp_path, 1)
    made.upsert([1], title=[MARKER])
    needle = made.expected[1][0]
    made.delete([1])
    primary = Primary(made)
    done = compact_away(made.store, 1, 0, is_loaded=True, waiting=primary.waiting)
    assert (done.seq, done.left) == (2, None)
    drop_superseded(made.store, done, is_loaded=True, waiting=primary.waiting)
    assert 20 < primary.time - primary.began < 40
    for unlisted in removals_module.removals(
        made.store, Policy(live=1, held={1}, keep=0, keep_log_bytes=0)
    ):
        removals_module.remove(made.store, unlisted, set)
    assert marked(made, [MARKER.encode(), needle]) == []
    primary.writes.close()
    assert rows_of(made.folder) == made.expected


def test_a_primary_that_does_not_change_over_is_not_disturbed(tmp_path: Path) -> None:
    made = live_store(tmp_path, 1)
    made.upsert([1], title=[MARKER])
    made.delete([1])
    primary = Primary(made, changes=False)
    done = compact_away(made.store, 1, 0, is_loaded=True, waiting=primary.waiting)
    drop_superseded(made.store, done, is_loaded=True, waiting=primary.waiting)
    assert done.left == "its primary has not changed over to a new main index; try again"
    assert 180 <= primary.time - primary.began < 200
    assert primary.writes.leads
    assert made.manifest.shards[0].folder == "shard-00000"
    primary.writes.close()
    assert rows_of(made.folder) == made.expected
