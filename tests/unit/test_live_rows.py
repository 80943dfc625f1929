"""Live rows from files: what a shard holds after a certain number of writes, while they go on."""

from pathlib import Path

import numpy as np
import pytest

from shardline.shards.core.errors import CorruptFile, NotFound
from shardline.shards.live import live_rows
from shardline.shards.live.compaction import compact
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.live_rows import newest_write, open_live_rows
from tests.live_store import LiveStore, Rows, live_store, rows_of


def shard_rows(made: LiveStore, shard: int, until: int | None = None) -> Rows:
    found: Rows = {}
    for block in open_live_rows(made.folder, made.manifest, shard, until=until).blocks(5):
        for item, vector, values in zip(
            block.item_ids.tolist(), block.vectors, block.attributes.to_pylist(), strict=True
        ):
            found[item] = (vector.tobytes(), values)
    return found


@pytest.mark.parametrize("seed", range(2))
def test_every_state_that_a_shard_has_had_since_its_main_index(tmp_path: Path, seed: int) -> None:
    made = live_store(tmp_path, 1)
    rng = np.random.default_rng(seed)
    states, first = [dict(made.expected)], 0
    for number in range(1, 10):
        ids = rng.choice(240, rng.integers(1, 9), replace=False).tolist()
        if rng.random() < 0.6:
            made.upsert(ids, title=[f"t{number} {item}" for item in ids])
        else:
            made.delete(ids)
        states.append(dict(made.expected))
        if rng.random() < 0.2:
            compact(made.folder, 0)
            first = number
    for number, state in enumerate(states):
        if number >= first:
            found = shard_rows(made, 0, until=number)
            assert found == state
            assert list(found) == sorted(found)
        else:
            with pytest.raises(NotFound, match=f"cannot be read as of write {number}"):
                open_live_rows(made.folder, made.manifest, 0, until=number)
    with pytest.raises(NotFound, match="as of write 10"):
        open_live_rows(made.folder, made.manifest, 0, until=10)
    assert newest_write(made.folder, 0) == 9


def test_a_store_that_was_never_written(tmp_path: Path) -> None:
    made = live_store(tmp_path, 3)
    assert rows_of(made.folder) == made.expected
    assert [newest_write(made.folder, shard) for shard in range(3)] == [0, 0, 0]


def test_what_is_read_is_durable_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader can see a group that its writer has not fsynced yet."""
    made = live_store(tmp_path, 1)
    made.upsert([1])
    made.upsert([3])
    synced = []
    inner = live_rows.os.fsync
    monkeypatch.setattr(
        live_rows.os,
        "fsync",
        lambda handle: synced.append(Path(f"/proc/self/fd/{handle}").readlink()) or inner(handle),
    )
    newest = sorted(live_folder(made.folder, 0).glob("log-*"))[-1]
    assert newest_write(made.folder, 0) == 2
    assert open_live_rows(made.folder, made.manifest, 0).seq == 2
    assert synced == [newest, newest]


def test_damage_is_named(tmp_path: Path) -> None:
    made = live_store(tmp_path, 1)
    for item in range(4):
        made.upsert([item])
    segment = sorted(live_folder(made.folder, 0).glob("log-*"))[1]
    damaged = bytearray(segment.read_bytes())
    damaged[150] ^= 1
    segment.write_bytes(damaged)
    with pytest.raises(CorruptFile, match=segment.name):
        open_live_rows(made.folder, made.manifest, 0)
    with pytest.raises(CorruptFile, match=segment.name):
        newest_write(made.folder, 0)
