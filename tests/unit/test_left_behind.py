"""Without a cluster a generation goes live only if it has the writes of the live one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardline.cluster.build import build_generation
from shardline.cluster.rollover.left_behind import check_none_left_behind
from shardline.cluster.rollover.mirror_plan import Unreplayed
from shardline.cluster.rollover.replayed_note import Replayed, read_note, write_note
from shardline.cluster.rollover.way_back import parting
from shardline.cluster.serving import going_live
from shardline.cluster.store import Store
from shardline.shards.core.errors import CorruptFile, GateFailed, Unavailable
from shardline.shards.core.files import MANIFEST_NAME
from shardline.shards.storage.cut import Cut
from shardline.shards.storage.generation import read_generation, write_generation
from tests.engine import plan_of
from tests.live_store import LiveStore, live_store, rows_of

FLAT = ("--set", "cluster.shards=2", "--set", "index.kind=flat")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> LiveStore:
    """Generations 1, live, and 2 and 3 of the same embedding set. Shard 0 of the live one has two
    writes, the first of which is compacted, and shard 1 has one."""
    root = tmp_path_factory.mktemp("original")
    made = live_store(root, 2)
    for _ in range(2):
        build_generation(made.store, root / "set", plan_of(2, kind="flat"))
    made.upsert([1, 3, 121])
    made.compact(0)
    made.delete([0])
    return made


@pytest.fixture
def made(original: LiveStore, tmp_path: Path) -> LiveStore:
    return original.copied(tmp_path)


def set_cut(store: Store, number: int, generation: int, *seqs: int) -> None:
    folder = store.generation(number)
    cut = Cut(generation=generation, seqs=seqs)
    write_generation(folder, replace(read_generation(folder), cut=cut))


@pytest.mark.parametrize(
    ("cut", "lacks"),
    [
        ((1, 2, 1), None),
        ((1, 5, 1), "log was read up to write 5 before, and is another one now"),
        ((1, 2, 0), "lacks 1 writes of generation 1, which is live"),
        ((1, 0, 0), "lacks 3 writes of generation 1, which is live"),
        ((3, 2, 1), "lacks 3 writes of generation 1"),
        ((1, 2, 1, 1), "lacks 3 writes of generation 1"),
        (None, "lacks 3 writes of generation 1"),
    ],
)
def test_publish_counts_from_the_cut(
    made: LiveStore, cut: tuple[int, ...] | None, lacks: str | None
) -> None:
    if cut is not None:
        set_cut(made.store, 2, *cut)
    if lacks is not None:
        with pytest.raises(GateFailed, match=lacks) as refused:
            made.run("publish", "2")
        assert "`shardline publish 2 --without-writes` leaves them out" in str(refused.value)
        assert made.number == 1
    made.run("publish", "2", *(() if lacks is None else ("--without-writes",)))
    assert made.number == 2


def test_a_build_that_lacks_writes_does_not_go_live(made: LiveStore, original: LiveStore) -> None:
    words = ("build", "--in-process", "--embeddings", original.store.root.parent / "set")
    said = made.run(*words, options=FLAT)
    assert "generation 4 does not go live: it lacks 3 writes of generation 1" in said
    assert made.number == 1
    made.run("build", "--in-process", "--from-live", options=FLAT)
    assert made.number == 5
    assert rows_of(made.folder) == made.expected


def test_a_restored_generation_that_lacks_writes_does_not_go_live(
    made: LiveStore, tmp_path: Path
) -> None:
    made.run("snapshot", tmp_path / "s")
    made.run("restore", tmp_path / "s")
    assert made.number == 4
    made.store.set_current(1)
    made.delete([2])
    said = made.run("restore", tmp_path / "s")
    assert "generation 5 does not go live: it lacks 1 writes of generation 1" in said
    assert made.number == 1


def test_what_was_brought_before_counts(made: LiveStore) -> None:
    """By the note of a mirror; rows that it could not bring are missing."""
    note = Replayed(generation=1, seqs=(2, 1), sending=(2, 1), run="one")
    write_note(made.store.writes(2), note)
    check_none_left_behind(made.store, 2)
    write_note(made.store.writes(2), replace(note, seqs=(1, 1)))
    with pytest.raises(GateFailed, match="it lacks 1 writes of generation 1, which is live"):
        check_none_left_behind(made.store, 2)
    left_out = Unreplayed(rows=4, examples=(1,))
    write_note(made.store.writes(2), replace(note, unreplayed=left_out))
    with pytest.raises(GateFailed, match="it lacks 4 rows that were written as vectors of another"):
        check_none_left_behind(made.store, 2)
    write_note(made.store.writes(2), replace(note, generation=3))
    with pytest.raises(GateFailed, match="it lacks 3 writes"):
        check_none_left_behind(made.store, 2)


def test_writes_that_are_left_out_are_noted_as_a_cluster_notes_them(made: LiveStore) -> None:
    """Where a way back begins."""
    made.run("publish", "2", "--without-writes")
    noted = read_note(made.store.writes(1))
    assert noted is not None
    assert (noted.generation, noted.seqs, noted.is_apart) == (2, (0, 0), False)
    made.upsert([1, 100])  # to generation 2
    made.run("publish", "3", "--without-writes")
    noted = read_note(made.store.writes(2))
    assert noted is not None
    assert (noted.generation, noted.seqs, noted.is_apart) == (3, (0, 0), False)
    made.store.set_current(1)
    made.run("publish", "2", "--without-writes")
    offline = read_note(made.store.writes(1))
    assert offline is not None
    assert (offline.generation, offline.is_apart) == (2, True), "1 lacks what 2 was written"
    assert sum(offline.seqs) >= 1
    parting(made.store, 1, 2)()
    online = read_note(made.store.writes(1))
    assert online is not None
    assert replace(online, run=offline.run) == offline
    assert online.run != offline.run


def test_what_went_live_without_the_writes_of_another_may_lack_some(made: LiveStore) -> None:
    note = Replayed(generation=1, seqs=(2, 1), sending=(2, 1), run="one", is_apart=True)
    write_note(made.store.writes(2), note)
    with pytest.raises(GateFailed, match="1, which is live, went live without its writes"):
        check_none_left_behind(made.store, 2)


def test_writes_that_are_in_the_rows_of_the_live_one_alone(made: LiveStore) -> None:
    """Both were built from generation 1, one of them earlier."""
    set_cut(made.store, 2, 1, 2, 1)
    made.run("publish", "2")
    for cut in ((1, 1, 0), (7, 5, 5)):
        set_cut(made.store, 3, *cut)
        with pytest.raises(GateFailed, match=r"of generation 1 in its rows.*3 may lack them"):
            made.run("publish", "3")
    set_cut(made.store, 3, 1, 2, 2)
    made.run("publish", "3")
    assert made.number == 3
    set_cut(made.store, 2, 3, 0, 0)
    made.run("publish", "2")
    assert made.number == 2, "built from the live one"


def test_where_the_live_one_is_damaged_somebody_has_to_say_so(made: LiveStore) -> None:
    (made.folder / MANIFEST_NAME).write_text("{")
    with pytest.raises(GateFailed, match=r"which writes it lacks; got .*/_manifest\.json"):
        made.run("publish", "2")
    current = made.store.root / "CURRENT"
    current.write_text("one")
    with pytest.raises(GateFailed, match=r"which writes it lacks; got .*/CURRENT"):
        made.run("publish", "2")
    made.run("publish", "2", "--without-writes")
    assert made.number == 2


@pytest.mark.parametrize("gone", ["CURRENT", f"generations/000001/{MANIFEST_NAME}"])
def test_where_nothing_is_live_nothing_is_left_behind(made: LiveStore, gone: str) -> None:
    (made.store.root / gone).unlink()
    made.run("publish", "2")
    assert made.number == 2


@pytest.mark.parametrize("error", [Unavailable("no Ray"), CorruptFile("a note")])
def test_where_a_cluster_may_serve_the_live_one_stays(
    made: LiveStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def served(config: Any, *, verbose: bool) -> int | None:
        raise error

    monkeypatch.setattr(going_live, "served_generation", served)
    said = made.run("build", "--in-process", "--from-live", options=FLAT)
    assert f"not live: whether a cluster serves the store is not known ({error});" in said
    assert "`shardline publish 4` to change over" in said
    assert made.number == 1
    (made.store.root / "CURRENT").unlink()
    set_live = made.run("restore", *snapshot_of(made), "--json")
    assert '"state": "live"' in set_live


def snapshot_of(made: LiveStore) -> tuple[Path]:
    folder = made.store.root.parent / "snapshot"
    made.run("snapshot", folder, "--generation", "2")
    return (folder,)
