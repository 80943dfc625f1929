"""A compaction's main index that is damaged: the one before it and the log are the same shard."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardline.cluster.housekeeping import erase
from shardline.cluster.housekeeping.removals import bytes_of
from shardline.shards.core.errors import CorruptFile
from shardline.shards.core.files import remove_tree
from shardline.shards.core.messages import NO_PARAMS
from shardline.shards.live.changeover import PAUSE_S, Changeover
from shardline.shards.live.compaction import compact
from shardline.shards.live.epoch_file import raise_epoch
from shardline.shards.live.kept_segments import KEPT_FOLDER
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.live_rows import open_live_rows
from shardline.shards.live.loading import Loaded, load_caught_up
from shardline.shards.live.mains import compacted_seqs, main_folder, remove_older
from shardline.shards.live.writes import ShardWrites
from shardline.shards.server.shard import Shard
from shardline.shards.storage.generation import INDEX_NAME, read_generation
from tests.live_shard import (
    NEW_ITEMS,
    built,
    contents,
    delete_request,
    opened,
    unit_vectors,
    upsert_request,
    wrote,
)
from tests.live_store import live_store, rows_of


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage(generation: Path, seq: int) -> None:
    flip(main_folder(live_folder(generation, 0), seq) / INDEX_NAME)


def loaded_of(generation: Path) -> Loaded:
    return load_caught_up(generation, read_generation(generation), 0)


@pytest.fixture
def generation(tmp_path: Path) -> Path:
    return built(tmp_path)


def written(generation: Path, *, compactions: int, adopted: int) -> tuple[Shard, ShardWrites]:
    """With two writes before each compaction and one after the last; the first ones adopted."""
    shard, writes = opened(generation)
    writes.lead(1)
    for number in range(compactions):
        wrote(writes, upsert_request([NEW_ITEMS + number, 3], seed=number, key=f"{number}"))
        wrote(writes, delete_request([number]))
        compact(generation, 0)
        if number < adopted:
            assert writes.adopt(loaded_of(generation))
    wrote(writes, upsert_request([NEW_ITEMS + 90, 5], seed=90))
    return shard, writes


@pytest.mark.parametrize(
    ("compactions", "adopted", "main_seq"),
    [(1, 0, 0), (1, 1, 0), (2, 1, 2), (2, 2, 2), (3, 3, 4)],
)
def test_a_replica_that_starts_passes_over_it(
    generation: Path,
    caplog: pytest.LogCaptureFixture,
    compactions: int,
    adopted: int,
    main_seq: int,
) -> None:
    """Whether the log was trimmed since or not: what was trimmed is kept."""
    shard, writes = written(generation, compactions=compactions, adopted=adopted)
    writes.close()
    newest = 2 * compactions
    damage(generation, newest)
    with caplog.at_level(logging.ERROR):
        loaded = loaded_of(generation)
    assert (loaded.main_seq, loaded.damaged) == (main_seq, (newest,))
    assert "wrong checksum" in caplog.text
    again, other = opened(generation)
    assert contents(again) == contents(shard)
    assert other.seq == newest + 1
    other.lead(2)
    (reply,) = wrote(other, upsert_request([NEW_ITEMS, 3], seed=0, key="0"))
    assert reply.seq == 1, "keys are known"
    assert open_live_rows(generation, read_generation(generation), 0).seq == newest + 1


def test_two_that_are_damaged(generation: Path) -> None:
    shard, writes = written(generation, compactions=2, adopted=2)
    writes.close()
    damage(generation, 2)
    damage(generation, 4)
    loaded = loaded_of(generation)
    assert (loaded.main_seq, loaded.damaged) == (0, (2, 4))
    assert contents(opened(generation)[0]) == contents(shard)


def test_with_a_last_write_that_is_not_certain(generation: Path) -> None:
    _, writes = written(generation, compactions=1, adopted=0)
    wrote(writes, delete_request([7]))
    compact(generation, 0)
    writes.close()
    raise_epoch(live_folder(generation, 0), 2)  # by a primary that never begins
    damage(generation, 4)
    assert loaded_of(generation).state.seq == 3
    _, other = opened(generation)
    assert other.lead(3) == 4


def cut(live: Path) -> None:
    sorted(live.glob("log-*"))[-1].unlink()


def without_kept(live: Path) -> None:
    shutil.rmtree(live / KEPT_FOLDER)


@pytest.mark.parametrize(("adopted", "harm"), [(0, cut), (2, without_kept)])
def test_it_is_refused_where_the_log_does_not_have_its_writes(
    generation: Path, adopted: int, harm: Callable[[Path], None]
) -> None:
    _, writes = written(generation, compactions=2, adopted=adopted)
    writes.close()
    damage(generation, 4)
    harm(live_folder(generation, 0))
    with pytest.raises(CorruptFile, match=INDEX_NAME):
        loaded_of(generation)


class Ended:
    """A compaction that has run at once, here."""

    def poll(self) -> int:
        return 0


def test_the_primary_compacts_anew_and_the_delta_does_not_fill(generation: Path) -> None:
    shard, writes = opened(generation)
    writes.lead(1)
    now_s = [0.0]
    started: list[int] = []

    def start(folder: Path, number: int, until: int) -> Ended:
        started.append(until)
        compact(folder, number, until=until)
        if len(started) == 1:
            damage(folder, until)
        return Ended()

    config = LiveConfig(compact_share=1e-9, compact_min_rows=10)
    change = Changeover(
        generation, 0, main_seq=0, config=config, start=start, clock=lambda: now_s[0]
    )
    wrote(writes, upsert_request(range(NEW_ITEMS, NEW_ITEMS + 12)))
    assert change.turn(writes.state, leads=True) is None
    while change.is_busy:
        assert change.turn(writes.state, leads=True) is None
    live = live_folder(generation, 0)
    assert str(main_folder(live, 1)) in change.describe()["compaction_trouble"]
    now_s[0] += PAUSE_S - 1
    change.turn(writes.state, leads=True)
    assert started == [1], "the disk may be failing"
    now_s[0] += 1
    expected = contents(shard)
    loaded = change.turn(writes.state, leads=True)
    while loaded is None and change.is_busy:
        loaded = change.turn(writes.state, leads=True)
    assert started == [1, 1], "of the same write"
    assert loaded is not None
    assert writes.adopt(loaded)
    change.main_seq = loaded.main_seq
    assert (shard.state.delta.rows, loaded.main_seq) == (0, 1)
    assert contents(shard) == contents(opened(generation)[0]) == expected
    assert change.describe()["compaction_trouble"] is None
    aside = main_folder(live, 1).with_name(f".{main_folder(live, 1).name}.damaged")
    assert aside.is_dir(), "for people"
    for number in range(2):
        wrote(writes, delete_request([number]))
        compact(generation, 0)
        assert writes.adopt(loaded_of(generation))
    assert not aside.exists()
    assert compacted_seqs(live) == [2, 3]


def test_a_follower_that_passes_over_it_goes_on(generation: Path) -> None:
    shard, writes = opened(generation)
    replica, follower = opened(generation)
    writes.lead(1)
    wrote(writes, upsert_request([NEW_ITEMS]))
    compact(generation, 0)
    damage(generation, 1)
    change = Changeover(generation, 0, main_seq=0, clock=lambda: 0.0)
    change.turn(follower.state, leads=False)
    while change.is_busy:
        assert change.turn(follower.state, leads=False) is None
    wrote(writes, delete_request([1]))
    follower.catch_up()
    assert contents(replica) == contents(shard)
    ids, _ = replica.state.search(unit_vectors(1), 3, NO_PARAMS)
    assert ids.shape == (1, 3)


def test_gc_leaves_the_one_before_though_nothing_serves(tmp_path: Path) -> None:
    made = live_store(tmp_path, 1)
    for number in range(3):
        made.upsert([number])
        made.compact(0)
    live = live_folder(made.folder, 0)
    made.run("gc")
    assert compacted_seqs(live) == [2, 3]
    flip(main_folder(live, 3) / INDEX_NAME)
    assert rows_of(made.folder) == made.expected
    made.run("gc")
    assert rows_of(made.folder) == made.expected


def test_an_erasure_repairs_it_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    made = live_store(tmp_path, 1)
    made.upsert([1])
    live = live_folder(made.folder, 0)
    compact(made.folder, 0)
    flip(main_folder(live, 1) / INDEX_NAME)
    made.run("gc", "--erase")
    assert rows_of(made.folder) == made.expected
    assert list(live.glob(".main-*")) == []


def test_an_erasure_trims_no_log_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = live_store(tmp_path, 1)
    made.upsert([1])
    live = live_folder(made.folder, 0)

    def on_a_bad_disk(folder: Path, shard: int, **options: Any) -> Any:
        done = compact(folder, shard, **options)
        flip(main_folder(live, done.seq) / INDEX_NAME)
        return done

    monkeypatch.setattr(erase, "compact", on_a_bad_disk)
    with pytest.raises(CorruptFile, match=INDEX_NAME):
        made.run("gc", "--erase")
    assert rows_of(made.folder) == made.expected


def test_what_cannot_be_removed_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = live_store(tmp_path, 1)
    made.upsert([1])
    made.compact(0)
    made.delete([1])
    live = live_folder(made.folder, 0)
    inner = os.unlink

    def refuses(path: Any, **kwargs: Any) -> None:
        if str(path).endswith(INDEX_NAME):
            raise PermissionError(13, "Permission denied", str(path))
        inner(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuses)
        with pytest.raises(PermissionError, match=INDEX_NAME):
            made.run("gc", "--erase")
        done = erase.Erasure(generation=1, shard=0, seq=2)
        with pytest.raises(PermissionError, match=INDEX_NAME):
            erase.drop_superseded(made.store, done, is_loaded=False)
    assert (main_folder(live, 1) / INDEX_NAME).exists()
    remove_older(live, kept=1)
    assert not main_folder(live, 1).exists()


def test_what_goes_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a cluster, whose primary removes the same files."""
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    for name in ("a", "b", "inner/c"):
        (folder / name).write_bytes(bytes(10))
    assert bytes_of(folder) == 30
    assert bytes_of(folder / "a") == 10
    assert bytes_of(folder / "z") == 0
    inner_stat, inner_unlink = Path.lstat, os.unlink

    def gone(path: Path) -> os.stat_result:
        if path.name == "b":
            raise FileNotFoundError(2, "No such file", str(path))
        return inner_stat(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "lstat", gone)
        assert bytes_of(folder) == 20

    def twice(path: Any, **kwargs: Any) -> None:
        inner_unlink(path, **kwargs)
        if path == "b":
            raise FileNotFoundError(2, "No such file", path)

    monkeypatch.setattr(os, "unlink", twice)
    remove_tree(folder)
    assert not folder.exists()
    remove_tree(folder)
