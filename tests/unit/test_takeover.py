"""A shard that serves takes over the index of another generation, with all that was written."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardline.cluster.build import check_plan, fill_generation, run_here
from shardline.cluster.housekeeping.rebase import rebase
from shardline.shards.core.errors import (
    CorruptFile,
    InvalidInput,
    NotPrimary,
    ShardlineError,
    Unavailable,
    VersionMismatch,
    WritesLost,
)
from shardline.shards.core.messages import SearchParams
from shardline.shards.live import compaction
from shardline.shards.live.changeover import LOOK_S, Changeover
from shardline.shards.live.compaction import compact
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.loading import load_built, load_caught_up
from shardline.shards.live.mains import compacted_seqs, main_folder
from shardline.shards.live.takeover import Takeover, check_log, check_takeover, load_takeover
from shardline.shards.live.write_keys import WriteKeys
from shardline.shards.live.writes import ShardWrites
from shardline.shards.server.shard import Shard
from shardline.shards.server.write_thread import WriteThread
from shardline.shards.storage.generation import (
    GenerationManifest,
    OwnIndex,
    read_generation,
    write_generation,
)
from tests.engine import plan_of
from tests.live_shard import (
    NEW_ITEMS,
    ROWS,
    built,
    contents,
    delete_request,
    opened,
    unit_vectors,
    upsert_request,
    wrote,
)
from tests.loaded_generation import Ended

COMING = 8
CUT = 1  # write of generation 7 that the rows of the coming one are said to have
IVF = {"kind": "ivf", "nlist": 4, "nprobe": 4}


@pytest.fixture
def generation(tmp_path: Path) -> Path:
    return built(tmp_path)


def coming_of(generation: Path, change: Callable[[GenerationManifest], GenerationManifest]) -> Path:
    """Another generation beside it, of the same rows, with inverted lists."""
    folder = generation.parent / f"{COMING:06d}"
    folder.mkdir()
    corpus = generation.parent.parent / "set"
    plan = check_plan(corpus, plan_of(1, **IVF))
    fill_generation(
        folder, COMING, plan, run_jobs=run_here, progress=lambda stage, done, total: None
    )
    write_generation(folder, change(read_generation(folder)))
    return folder


def same(manifest: GenerationManifest) -> GenerationManifest:
    return manifest


def takeover_here(
    generation: Path, shard: int, until: int, takeover: Takeover, keys: bytes
) -> Ended:
    try:
        compact(generation, shard, until=until, takeover=takeover, keys=keys)
    except ShardlineError:
        return Ended(1)
    return Ended(0)


def changing(generation: Path, now_s: list[float]) -> Changeover:
    config = LiveConfig(compact_min_rows=1000)
    return Changeover(
        generation,
        0,
        main_seq=0,
        config=config,
        start_takeover=takeover_here,
        clock=lambda: now_s[0],
    )


def changed_over(change: Changeover, writes: ShardWrites, now_s: list[float]) -> None:
    for _ in range(200):
        now_s[0] += LOOK_S
        loaded = change.turn(writes.state, leads=writes.leads)
        if change._loader is not None:
            change._loader.join()
        if loaded is not None:
            assert writes.adopt(loaded)
            change.adopted(loaded)
            return
    raise AssertionError("nothing to change over to")


def taken_over(generation: Path, source: Path, after_seq: int = 0) -> tuple[Shard, ShardWrites]:
    shard, writes = opened(generation)
    writes.lead(1)
    wrote(writes, upsert_request(range(NEW_ITEMS, NEW_ITEMS + 5), key="a", title=["new"] * 5))
    wrote(writes, delete_request([3, NEW_ITEMS], key="b"))
    now_s = [0.0]
    change = changing(generation, now_s)
    change.take_over(Takeover(source=str(source), after_seq=after_seq, token="t"), writes.mark)
    wrote(writes, upsert_request([4], seed=9))
    changed_over(change, writes, now_s)
    assert change.own is not None
    assert change.own.generation == COMING
    return shard, writes


def test_it_has_all_rows_and_the_other_index(generation: Path) -> None:
    source = coming_of(generation, same)
    before, _ = opened(generation)
    assert not before.state.main.layers.is_ivf
    shard, writes = taken_over(generation, source)
    assert shard.state.main.layers.is_ivf
    has = contents(shard)
    assert set(has) == {*range(ROWS), *range(NEW_ITEMS + 1, NEW_ITEMS + 5)} - {3}
    assert has[4] == unit_vectors(1, 9).tobytes()
    assert has[NEW_ITEMS + 1] == unit_vectors(5, 1)[1].tobytes()
    _, values = shard.state.attributes_of(np.array([5, NEW_ITEMS + 1]), ["title"], 1e18, 1 << 20)
    assert b"item 5" in values
    assert b"new" in values
    writes.close()


def test_a_start_and_later_compactions_go_on_with_it(generation: Path) -> None:
    source = coming_of(generation, same)
    shard, writes = taken_over(generation, source)
    has = contents(shard)
    wrote(writes, upsert_request([NEW_ITEMS + 50]))
    writes.close()
    for path in source.iterdir():  # nothing of the other generation is needed any more
        if path.is_file():
            path.unlink()
    compact(generation, 0)
    again, _ = opened(generation)
    assert again.state.main.layers.is_ivf
    assert again.state.main._defaults == SearchParams(nprobe=4)
    assert set(contents(again)) == {*has, NEW_ITEMS + 50}
    assert again.state.delta.rows == 0


def test_keys_outlive_it(generation: Path) -> None:
    source = coming_of(generation, same)
    _, writes = taken_over(generation, source)
    writes.close()
    _, again = opened(generation)
    again.lead(2)
    seq = again.seq
    request = upsert_request(range(NEW_ITEMS, NEW_ITEMS + 5), key="a", title=["new"] * 5)
    (reply,) = wrote(again, request)
    assert (reply.seq, again.seq) == (1, seq), "known, so not applied once more"


def test_an_erasure_keeps_the_index(generation: Path) -> None:
    source = coming_of(generation, same)
    shard, writes = taken_over(generation, source)
    has = set(contents(shard))
    writes.close()
    compact(generation, 0)
    assert rebase(generation, 0)
    entry = read_generation(generation).shard_entry(0)
    assert entry.own is not None
    loaded = load_built(generation, read_generation(generation), 0)
    assert set(loaded.state.ids_by_row[:-1].tolist()) == has
    assert loaded.template == generation / entry.folder / "template.faiss"


def test_what_the_rows_have_is_not_applied_again(generation: Path) -> None:
    shard, writes = opened(generation)
    writes.lead(1)
    wrote(writes, delete_request([7]))  # which the coming generation is said to have seen
    source = coming_of(generation, same)
    seq, packed = writes.mark()
    order = Takeover(source=str(source), after_seq=CUT, token="t")
    loaded = load_takeover(
        generation, read_generation(generation), 0, order, until=seq, keys=packed
    )
    assert 7 in loaded.state.ids_by_row, "its rows are what it was built with"
    assert loaded.state.seq == seq == shard.state.seq == 2
    writes.close()


def test_a_log_that_does_not_go_back_is_refused(generation: Path) -> None:
    _, writes = opened(generation, keep_log_mib=0)
    writes.lead(1)
    wrote(writes, delete_request([7]))
    wrote(writes, upsert_request([NEW_ITEMS]))
    compact(generation, 0)
    assert writes.adopt(load_caught_up(generation, read_generation(generation), 0))
    source = coming_of(generation, same)
    seq, packed = writes.mark()
    order = Takeover(source=str(source), after_seq=0, token="t")
    manifest = read_generation(generation)
    with pytest.raises(WritesLost, match="writes from 1 on"):
        check_log(generation, 0, 0)
    check_log(generation, 0, 2)
    with pytest.raises(WritesLost, match="writes from 1 on"):
        load_takeover(generation, manifest, 0, order, until=seq, keys=packed)
    writes.close()


def test_a_failure_is_told_and_the_shard_serves_on(generation: Path) -> None:
    source = coming_of(generation, same)
    (source / "shard-00000" / "index.faiss").write_bytes(b"damaged")
    shard, writes = opened(generation)
    writes.lead(1)
    now_s = [0.0]
    change = Changeover(generation, 0, main_seq=0, clock=lambda: now_s[0])  # a real process
    change.take_over(Takeover(source=str(source), after_seq=0, token="t"), writes.mark)
    while change.is_busy:
        change.turn(writes.state, leads=True)
    assert change.takeover_failure is not None
    assert change.takeover_failure.code == "corrupt_file"
    assert "index.faiss" in change.takeover_failure.text
    assert change.own is None
    assert set(contents(shard)) == set(range(ROWS))
    wrote(writes, delete_request([1]))
    writes.close()


def test_a_process_does_it(generation: Path) -> None:
    source = coming_of(generation, same)
    shard, writes = opened(generation)
    writes.lead(1)
    change = Changeover(generation, 0, main_seq=0)
    thread = WriteThread(writes, lambda answered: None, changeover=change)
    thread.start()
    order = Takeover(source=str(source), after_seq=0, token="t")
    assert thread.take_over(order).result(10) == 1
    with pytest.raises(Unavailable, match="under way"):
        thread.take_over(order).result(10)
    _wait(lambda: change.own is not None)
    assert shard.state.main.layers.is_ivf
    _wait(lambda: not change.is_busy)
    thread.stop()
    names = {path.name for path in live_folder(generation, 0).iterdir()}
    assert {name for name in names if not name.startswith(("EPOCH", "log-", "main-"))} <= {"kept"}


def test_a_compaction_that_began_before_does_not_undo_it(
    generation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = coming_of(generation, same)
    shard, writes = opened(generation)
    writes.lead(1)
    wrote(writes, delete_request([7]))
    now_s = [0.0]
    change = changing(generation, now_s)
    write = compaction._write

    def taken_over_meanwhile(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(compaction, "_write", write)
        change.take_over(Takeover(source=str(source), after_seq=0, token="t"), writes.mark)
        write(*args, **kwargs)

    wrote(writes, delete_request([8]))
    monkeypatch.setattr(compaction, "_write", taken_over_meanwhile)
    with pytest.raises(Unavailable, match="taken over another index"):
        compact(generation, 0, until=shard.state.seq)
    changed_over(change, writes, now_s)
    assert change.own is not None
    assert compacted_seqs(live_folder(generation, 0)) == [shard.state.seq]
    writes.close()


def test_who_no_longer_leads_ends_what_it_was_ordered(generation: Path) -> None:
    source = coming_of(generation, same)
    _, writes = opened(generation)
    writes.lead(1)
    change = Changeover(generation, 0, main_seq=0)
    change.take_over(Takeover(source=str(source), after_seq=0, token="t"), writes.mark)
    assert change.is_busy
    change.turn(writes.state, leads=False)
    assert not change.is_busy
    assert compacted_seqs(live_folder(generation, 0)) == []
    writes.close()


def test_a_damaged_one_is_not_passed_over_for_the_index_before(generation: Path) -> None:
    source = coming_of(generation, same)
    _, writes = taken_over(generation, source)
    writes.close()
    live = live_folder(generation, 0)
    damaged = main_folder(live, compacted_seqs(live)[-1]) / "index.faiss"
    damaged.write_bytes(b"damaged")
    with pytest.raises(CorruptFile, match=r"index\.faiss"):
        opened(generation)


def test_one_that_was_taken_over_itself_can_be_taken_over(generation: Path) -> None:
    """A generation that was restored from a snapshot of such, say."""

    def owning(made: GenerationManifest) -> GenerationManifest:
        (entry,) = made.shards
        own = OwnIndex(generation=5, token="another", index=made.index)
        return replace(made, shards=(replace(entry, own=own),))

    source = coming_of(generation, owning)
    order = Takeover(source=str(source), after_seq=0, token="new")
    manifest = read_generation(generation)
    loaded = load_takeover(generation, manifest, 0, order, until=0, keys=WriteKeys().pack())
    assert loaded.own is not None
    assert (loaded.own.generation, loaded.own.token) == (COMING, "new")
    assert loaded.own.index.nprobe == 4
    assert loaded.template == source / "shard-00000" / "template.faiss"


def test_a_follower_takes_no_order(generation: Path) -> None:
    source = coming_of(generation, same)
    _, writes = opened(generation)
    thread = WriteThread(
        writes, lambda answered: None, changeover=Changeover(generation, 0, main_seq=0)
    )
    thread.start()
    with pytest.raises(NotPrimary):
        thread.take_over(Takeover(source=str(source), after_seq=0, token="t")).result(10)
    thread.stop()


def checked(generation: Path, source: Path) -> None:
    check_takeover(generation, read_generation(generation), source, read_generation(source))


def test_another_model_is_refused(generation: Path) -> None:
    source = coming_of(generation, lambda made: replace(made, model_version="another"))
    with pytest.raises(VersionMismatch, match="two models"):
        checked(generation, source)


def test_other_boundaries_are_refused(generation: Path) -> None:
    source = coming_of(generation, lambda made: replace(made, partitioning="hash-range"))
    with pytest.raises(InvalidInput, match="--same-shards"):
        checked(generation, source)


def test_other_attributes_are_refused(generation: Path) -> None:
    def without(made: GenerationManifest) -> GenerationManifest:
        (entry,) = made.shards
        files = tuple(file for file in entry.files if "attributes" not in file.name)
        return replace(made, shards=(replace(entry, files=files),))

    source = coming_of(generation, without)
    with pytest.raises(InvalidInput, match="attributes"):
        checked(generation, source)


def test_one_that_was_written_to_is_refused(generation: Path) -> None:
    source = coming_of(generation, same)
    _, writes = opened(source)
    writes.lead(1)
    wrote(writes, delete_request([1]))
    writes.close()
    with pytest.raises(InvalidInput, match="has been written to"):
        checked(generation, source)


def _wait(is_so: Callable[[], bool], within_s: float = 60.0) -> None:
    ends_at = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < ends_at
        time.sleep(0.02)
