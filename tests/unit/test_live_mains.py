"""What killed processes leave beside a shard's compacted main indexes does not stay."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardline.shards.core.errors import NotFound
from shardline.shards.core.files import HOST
from shardline.shards.live import compaction
from shardline.shards.live.compaction import Compacted, caught_up, compact
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.loading import Loaded, load_newest
from shardline.shards.live.mains import compacted_seqs, main_folder, remove_older
from shardline.shards.storage.generation import read_generation
from tests.live_shard import NEW_ITEMS, ROWS, built, delete_request, opened, upsert_request, wrote

KILLED_WHILE_STAGING = """
import os, signal, sys
from pathlib import Path
from shardline.shards.live import compaction
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
    assert main_folder(live, 1).exists(), "three complete ones are to be kept, and two are there"
    remove_older(live)
    assert not main_folder(live, 1).exists()
    assert compacted_seqs(live) == [2, 3]
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


def _newest(generation: Path) -> Loaded:
    loaded = load_newest(generation, read_generation(generation), 0)
    return caught_up(loaded, live_folder(generation, 0))


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
