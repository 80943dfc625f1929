"""What must hold when a publish goes wrong at its end: the live generation is the one that is on
record, has every write, and is decided by one controller."""

import asyncio
from pathlib import Path

import pytest

from shardline.cluster.control import publish_note, publish_switch, term
from shardline.cluster.control.events import RestartAsked
from shardline.cluster.control.publish_state import PublishOptions
from shardline.cluster.rollover.mirror_progress import MirrorProgress
from shardline.cluster.store import Store
from shardline.shards.core import files
from shardline.shards.core.errors import Superseded
from tests.fake_shard import until
from tests.unit.test_controller import alive, made, store  # noqa: F401 - fixtures
from tests.unit.test_publishing import (  # noqa: F401 - fixtures
    FakeMirror,
    FakeParts,
    cluster,
    ended,
    is_written,
    killed,
    live,
    parts,
)


async def test_no_write_is_taken_before_it_is_certain_which_generation_is_on_record(
    store: Store,  # noqa: F811
    parts: FakeParts,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CURRENT is renamed, and then the disk fails: for a while nothing says which one it is."""
    whole, refused = files.fsync_folder, []

    def fsync(folder: Path) -> None:
        is_current = not refused and store.current() == 3
        if folder == store.root and (is_current or 0 < len(refused) < 4):
            refused.append(store.current())
            raise OSError(5, "Input/output error")
        whole(folder)

    monkeypatch.setattr(publish_switch, "RETRY_S", 0.05)
    async with cluster(store) as controller:
        monkeypatch.setattr(files, "fsync_folder", fsync)
        await controller.publish(PublishOptions(generation=3))
        await until(lambda: len(refused) > 1, timeout=5)
        assert controller._placement.sealing is not None
        assert not is_written(controller)
        assert (await ended(controller))["stage"] == "failed"
        await until(lambda: is_written(controller), timeout=5)
        assert (live(controller), store.current()) == (57, 57)


async def test_a_controller_that_wakes_up_when_another_was_started_decides_nothing(
    store: Store,  # noqa: F811
    parts: FakeParts,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It has drained the live generation, and pauses before it makes the other one live."""
    paused, wakes = asyncio.Event(), asyncio.Event()
    drained = publish_switch._drained

    async def pauses(*given: object) -> MirrorProgress:
        found = await drained(*given)  # type: ignore[arg-type]
        paused.set()
        await wakes.wait()
        return found

    monkeypatch.setattr(publish_switch, "_drained", pauses)
    monkeypatch.setattr(publish_switch, "SWITCH_S", 50)
    async with cluster(store) as first:
        await first.publish(PublishOptions(generation=3))
        await asyncio.wait_for(paused.wait(), 5)
        parts.gate_open.clear()
        first._tasks.cancel = lambda: None  # type: ignore[method-assign]  # as if before it
        async with cluster(store) as second:
            await until(lambda: second._publishing.progress["stage"] == "gate", timeout=5)  # type: ignore[index]
            note = publish_note.told_in(store.root)
            wakes.set()
            assert first._publishing._running is not None
            await asyncio.wait([first._publishing._running], timeout=5)
            assert (store.current(), live(second), live(first)) == (57, 57, 57)
            assert publish_note.told_in(store.root) == note, "nor what the newer one has noted"
            with pytest.raises(Superseded, match="another one of this cluster"):
                await first._take(RestartAsked())
            monkeypatch.setattr(publish_switch, "_drained", drained)
            parts.gate_open.set()
            assert (await ended(second))["stage"] == "live"
            assert store.current() == live(second) == 3
            del first._tasks.cancel
    assert "the publish is the newer controller's" in caplog.text


def test_the_controller_of_another_cluster_and_a_damaged_file_hinder_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = Store(tmp_path)
    first = term.Term(empty, "a")
    term.Term(empty, "b")
    first.check()
    (tmp_path / term.NAME).write_text("{")
    first.check()
    assert "does not say which controller is the newest" in caplog.text
    second = term.Term(empty, "a")
    second.check()
    with pytest.raises(Superseded):
        empty.raise_counter(9, first.check)
    assert empty.counter() == 0
    empty.raise_counter(9, second.check)
    assert empty.counter() == 9
    for number in range(term.CLUSTERS):
        term.Term(empty, f"c{number}")
    first.check()  # its cluster is forgotten, and its epochs are what holds it back
