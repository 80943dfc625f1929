"""What killed processes leave beside a shard's compacted main indexes does not stay."""

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from shardline.shards.core.errors import NotFound
from shardline.shards.core.files import HOST
from shardline.shards.live import compaction, loading
from shardline.shards.live.changeover import Changeover
from shardline.shards.live.compaction import Compacted, compact
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.loading import Loaded, load_caught_up
from shardline.shards.live.mains import compacted_seqs, main_folder, remove_older
from shardline.shards.live.writes import ShardWrites
from shardline.shards.server.write_thread import WriteThread
from shardline.shards.storage.generation import read_generation
from tests.live_shard import NEW_ITEMS, ROWS, built, delete_request, opened, upsert_request, wrote

KILLED_WHILE_STAGING = """
import os, signal, sys
from pathlib import Path
from shardline.shards.live import compaction, loading
from shardline.shards.live.changeover import Changeover
compaction.write_main = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
compaction.compact(Path(sys.argv[1]), 0)
"""


def test_a_removal_that_was_killed_is_finished_by_the_next(tmp_path: Path) -> None:
    generation = built(tmp_path)
    live = live_folder(generation, 0)
    _, writes = opened(generation)
    writes.lead(1)
    for number in range(3):
        wrote(writes, upsert_request([NEW_ITEMS + number]))
        compact(generation, 0)
    writes.close()
    assert compacted_seqs(live) == [1, 2, 3]
    (main_folder(live, 1) / "_manifest.json").unlink()
    remove_older(live, kept=3)
    assert not main_folder(live, 1).exists()
    assert compacted_seqs(live) == [2, 3], "three complete ones are to be kept, and two are there"
    remove_older(live)
    assert compacted_seqs(live) == [2, 3]


def test_a_replica_that_was_behind_learns_the_keys_of_writes_with_the_main_index(
    tmp_path: Path,
) -> None:
    generation = built(tmp_path)
    live = live_folder(generation, 0)
    _, writes = opened(generation)
    _, follower = opened(generation)
    writes.lead(1)
    request = upsert_request([NEW_ITEMS], key="k")
    replies = wrote(writes, request, upsert_request([NEW_ITEMS + 1], key="l"))
    compact(generation, 0)
    writes.adopt(_newest(generation))
    wrote(writes, delete_request([NEW_ITEMS]))
    writes.close()
    with pytest.raises(NotFound):
        follower.catch_up()
    assert follower.adopt(_newest(generation))
    follower.lead(2)
    assert wrote(follower, request) == replies[:1]
    assert follower.seq == 3
    follower.close()
    assert compacted_seqs(live) == [2]


@pytest.mark.parametrize("has_filters", [False, True])
def test_what_filters_need_is_made_before_a_new_main_index_is_searched(
    tmp_path: Path, has_filters: bool
) -> None:
    """It takes tens of milliseconds; only where the index in use is searched with filters."""
    generation = built(tmp_path, kind="ivf", nlist=4)
    replica, writes = opened(generation)
    writes.lead(1)
    wrote(writes, delete_request([1]))
    compact(generation, 0)
    if has_filters:
        replica.state.main.prepare_for_filters()
    change = Changeover(generation, 0, main_seq=0)
    loaded = change.turn(replica.state, leads=False)
    while change.is_busy:
        loaded = change.turn(replica.state, leads=False)
    assert loaded is not None
    assert loaded.state.main.is_prepared_for_filters is has_filters
    writes.close()


def test_a_replica_that_was_behind_a_trim_changes_over_by_itself(tmp_path: Path) -> None:
    generation = built(tmp_path)
    _, writes = opened(generation)
    _, follower = opened(generation)
    trimmed(generation, writes)
    prepared: list[int] = []
    change = Changeover(generation, 0, main_seq=0, prepare=lambda: prepared.append(change.main_seq))
    thread = WriteThread(follower, lambda answered: None, changeover=change)
    thread.start()
    try:
        waited = threading.Event()
        for _ in range(2000):
            if follower.seq == writes.seq and follower.trouble is None:
                break
            waited.wait(0.02)
        assert (follower.seq, follower.trouble, change.main_seq) == (2, None, 2)
        assert prepared == [0], "once, while the old one was in use"
    finally:
        thread.stop()
        writes.close()


def test_a_log_that_is_trimmed_while_a_shard_is_loaded(tmp_path: Path, monkeypatch) -> None:
    generation = built(tmp_path)
    _, writes = opened(generation)
    inner = loading.load_newest

    def slow(*args: Any, **kwargs: Any) -> Loaded:
        loaded = inner(*args, **kwargs)
        monkeypatch.setattr(loading, "load_newest", inner)
        trimmed(generation, writes)
        return loaded

    monkeypatch.setattr(loading, "load_newest", slow)
    loaded = _newest(generation)
    assert (loaded.state.seq, loaded.main_seq) == (2, 2)
    writes.close()


def trimmed(generation: Path, writes: ShardWrites) -> None:
    """Two writes, which the log does not hold any more."""
    writes.lead(1)
    wrote(writes, upsert_request([NEW_ITEMS], key="k"), upsert_request([NEW_ITEMS + 1]))
    compact(generation, 0)
    assert writes.adopt(_newest(generation))


def _newest(generation: Path) -> Loaded:
    return load_caught_up(generation, read_generation(generation), 0)


def test_two_compactions_at_the_same_write_are_one(tmp_path: Path, monkeypatch) -> None:
    """That of a primary that was killed goes on beside its successor's."""
    generation = built(tmp_path)
    _, writes = opened(generation)
    writes.lead(1)
    wrote(writes, upsert_request([NEW_ITEMS]))
    writes.close()
    inner = compaction.write_main

    def meanwhile(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(compaction, "write_main", inner)
        assert compact(generation, 0).seq == 1
        inner(*args, **kwargs)

    monkeypatch.setattr(compaction, "write_main", meanwhile)
    assert compact(generation, 0) == Compacted(1, ROWS + 1)
    assert compacted_seqs(live_folder(generation, 0)) == [1]


def test_what_a_killed_compaction_has_staged_is_removed_by_the_next(tmp_path: Path) -> None:
    generation = built(tmp_path)
    live = live_folder(generation, 0)
    _, writes = opened(generation)
    writes.lead(1)
    wrote(writes, upsert_request([NEW_ITEMS]))
    command = [sys.executable, "-c", KILLED_WHILE_STAGING, str(generation)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    staged = f".main-*.{HOST}-*"
    assert len(list(live.glob(staged))) == 1
    wrote(writes, upsert_request([NEW_ITEMS + 1]))
    writes.close()
    assert compact(generation, 0).seq == 2
    assert list(live.glob(staged)) == []


WITH_PATIENCE = """
import sys
from shardline.shards.live import compaction
compaction.PATIENCE_S = float(sys.argv.pop(1))
compaction.main()
"""


@pytest.mark.parametrize("patience_s", [0, 60])
def test_a_compaction_that_gets_no_time_while_idle_is_begun_again(
    tmp_path: Path, patience_s: float
) -> None:
    generation = built(tmp_path)
    _, writes = opened(generation)
    writes.lead(1)
    wrote(writes, upsert_request([NEW_ITEMS]))
    writes.close()
    command = [sys.executable, "-c", WITH_PATIENCE, str(patience_s), str(generation), "0", "1"]
    subprocess.run(command, check=True)
    assert compacted_seqs(live_folder(generation, 0)) == [1]
    _newest(generation)


def test_a_compaction_that_fails_says_why_and_with_a_code(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITH_PATIENCE, "60", str(tmp_path), "0", "1"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("compaction of shard 0: ")
