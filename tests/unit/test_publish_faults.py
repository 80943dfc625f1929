"""What must hold when a publish goes wrong at its end: the live generation is the one that is on
record, has every write, and is decided by one controller."""

import asyncio
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, RaySystemError

from shardline.cluster.commands.publish_text import print_generations
from shardline.cluster.control import (
    mirrors,
    publish_note,
    publish_switch,
    publishing,
    term,
)
from shardline.cluster.control.events import RestartAsked, SealAsked
from shardline.cluster.control.mirrors import Mirrors
from shardline.cluster.control.publish_state import PublishOptions
from shardline.cluster.control.publishing import Publishing
from shardline.cluster.control.tasks import tried
from shardline.cluster.control.term import Superseded
from shardline.cluster.rollover.mirror_progress import MirrorProgress
from shardline.cluster.rollover.mirror_term import MirrorReplaced
from shardline.cluster.store import Store
from shardline.shards.core import files
from shardline.shards.core.errors import NotFound
from shardline.shards.core.messages import Absence, RoutingTable
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


async def test_rows_that_are_left_out_after_the_gate_are_judged_and_told(
    store: Store,  # noqa: F811
    parts: FakeParts,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def drain(self: FakeMirror, final: tuple[int, ...], timeout_s: float) -> MirrorProgress:
        return MirrorProgress(positions=final, ends=final, unreplayed=5, examples=(8,))

    monkeypatch.setattr(FakeMirror, "drain", drain)
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        done = await ended(controller)
        assert (done["stage"], done["unreplayed"], done["examples"]) == ("failed", 5, (8,))
        assert "unreplayed_rows is 5, bound 0" in done["reason"]["text"]
        assert [each["figure"] for each in done["figures"]] == ["recall", "unreplayed_rows"]
        await until(lambda: is_written(controller), timeout=5)
        assert live(controller) == 57
        await controller.publish(PublishOptions(generation=3, skip_gate="an emergency"))
        done = await ended(controller)
        assert (done["stage"], done["unreplayed"]) == ("live", 5)


async def test_hosts_are_looked_at_while_a_mirror_is_ended(
    store: Store,  # noqa: F811
    parts: FakeParts,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without news of hosts for some seconds nobody is elected."""
    stopping, may_stop = asyncio.Event(), asyncio.Event()

    async def stop(self: FakeMirror) -> None:
        stopping.set()
        await may_stop.wait()
        self.is_stopped = True

    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        assert (await ended(controller))["stage"] == "live"
        await until(lambda: len(parts.mirrors) == 2)
        monkeypatch.setattr(FakeMirror, "stop", stop)
        assert await controller.finish_publish() == 57
        await asyncio.wait_for(stopping.wait(), 5)
        before = controller._placement.now_s
        await until(lambda: controller._placement.now_s > before, timeout=5)
        assert controller._fleet.beside is not None
        begun = await controller.roll_back()
        may_stop.set()
        assert (await ended(controller))["generation"] == begun["generation"] == 57
        assert live(controller) == 57, "it was ended first, and is loaded again"


async def test_the_mirror_of_a_kept_generation_is_looked_at_and_started_again(
    store: Store,  # noqa: F811
    parts: FakeParts,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        await ended(controller)

        def mirror() -> dict[str, Any] | None:
            found: dict[str, Any] | None = controller._publishing.report()["beside"]["mirror"]
            return found

        await until(lambda: mirror() == {"behind": 0, "unreplayed": 0, "trouble": None})
        lost = Absence(NotFound.code, "shard 1: the log begins at write 900, not at 12")
        parts.mirrors[-1].trouble = lost
        await until(lambda: (mirror() or {}).get("trouble") == asdict(lost))
        was = len(parts.mirrors)
        answers = FakeMirror.progress
        dead = parts.mirrors[-1]

        async def dies(self: FakeMirror) -> MirrorProgress:
            if self is dead:
                raise ActorDiedError
            return await answers(self)

        monkeypatch.setattr(FakeMirror, "progress", dies)
        await until(lambda: len(parts.mirrors) > was)
        await until(lambda: (mirror() or {}).get("trouble") is None)
        assert (parts.mirrors[-1].source, parts.mirrors[-1].target) == (3, 57)


async def test_a_mirror_in_whose_place_another_was_opened_is_started_anew(
    parts: FakeParts,  # noqa: F811
) -> None:
    """By a controller that woke up late: it gave up what it began, and nobody else has one."""
    one, two = (cast("RoutingTable", SimpleNamespace(generation=number)) for number in (1, 2))
    known = Mirrors(parts)
    await known.look(one, two)
    parts.mirrors[0].trouble = Absence(MirrorReplaced.code, "another one was opened")
    assert (await known.look(one, two)).trouble == parts.mirrors[0].trouble
    assert parts.mirrors[0].is_stopped
    assert (await known.look(one, two)).trouble is None
    assert len(parts.mirrors) == 2


async def test_one_mirror_is_ended_before_another_is_started_whoever_asks(
    parts: FakeParts,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def stop(self: FakeMirror) -> None:
        await asyncio.sleep(0.01)
        self.is_stopped = True

    monkeypatch.setattr(FakeMirror, "stop", stop)
    one, two = (cast("RoutingTable", SimpleNamespace(generation=number)) for number in (1, 2))
    known = Mirrors(parts)
    await known.between(one, two)
    found = await asyncio.gather(*(known.between(two, one) for _ in range(3)))
    assert [(each.source, each.is_stopped) for each in parts.mirrors] == [(1, True), (2, False)]
    assert found == [parts.mirrors[1]] * 3


async def test_a_publish_that_two_stop_is_ended_once(
    store: Store,  # noqa: F811
    parts: FakeParts,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second one must not end the candidate of the publish that is begun after the first."""
    ends: list[str] = []
    failed = Publishing._failed

    async def counted(self: Publishing, error: Exception) -> None:
        ends.append(str(error))
        await failed(self, error)

    monkeypatch.setattr(Publishing, "_failed", counted)
    parts.gate_open.clear()
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        await until(lambda: controller._publishing.progress["stage"] == "gate", timeout=5)  # type: ignore[index]
        told = await asyncio.gather(*(controller.stop_publish() for _ in range(2)))
        assert told[0] == told[1]
        assert ends == ["somebody stopped it"]


async def test_a_seal_that_was_left_when_a_publish_was_stopped_is_dropped(
    store: Store,  # noqa: F811
    parts: FakeParts,  # noqa: F811
) -> None:
    async with cluster(store) as controller:
        await controller._decisions.take(SealAsked(now_s=0.0))
        assert controller._placement.sealing is not None
        await until(lambda: controller._placement.sealing is None)
        await until(lambda: is_written(controller), timeout=5)


async def test_a_mirror_that_could_not_be_ended_is_ended_later(
    store: Store,  # noqa: F811
    parts: FakeParts,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The generation that it wrote to is gone by then, and no note speaks of it any more."""
    refused = 0

    async def end_mirrors(self: FakeParts, but: tuple[int, int] | None) -> None:
        nonlocal refused
        if but is None and refused < 3:
            refused += 1
            raise RaySystemError("the head is away")
        for mirror in self.mirrors:
            mirror.is_stopped |= (mirror.source, mirror.target) != but

    async def hangs(self: FakeMirror) -> None:
        await asyncio.Event().wait()

    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        await ended(controller)
        await until(lambda: len(parts.mirrors) == 2)
        monkeypatch.setattr(FakeMirror, "stop", hangs)
        monkeypatch.setattr(mirrors, "STOP_S", 0.02)
        monkeypatch.setattr(FakeParts, "end_mirrors", end_mirrors)
        assert await controller.finish_publish() == 57
        await until(lambda: controller._fleet.beside is None, timeout=5)
        await until(lambda: parts.mirrors[-1].is_stopped, timeout=5)
        assert refused == 3
        await until(lambda: not controller._publishing._mirrors.may_be_left)


async def test_what_was_told_to_end_is_kept_again_after_the_next_publish(
    store: Store,  # noqa: F811
    parts: FakeParts,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publishing, "RETIRE_AFTER_S", 0.2)
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        await ended(controller)
        assert await controller.finish_publish() == 57, "not before queries on it are over"
        await controller.roll_back()
        await ended(controller)
        await controller.roll_back()
        assert (await ended(controller))["generation"] == 3
        await until(lambda: controller._publishing._book.age_s > 0.3)
        assert (await controller.report())["beside"]["generation"] == 57


async def test_what_fails_and_is_tried_again_is_named(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise ValueError("no")

    await tried(fails, "end a mirror")
    assert "the controller could not end a mirror" in caplog.text


@pytest.mark.parametrize(
    ("mirror", "said"),
    [
        (None, []),
        (
            {"behind": 1200, "unreplayed": 3, "trouble": None},
            ["writes are brought to generation 57: 1,200 behind, without 3 items of another model"],
        ),
        (
            {"behind": 0, "unreplayed": 0, "trouble": {"code": "not_found", "text": "gone"}},
            ["writes are not brought to generation 57: gone"],
        ),
    ],
)
def test_status_says_whether_what_is_kept_gets_the_writes(
    mirror: dict[str, Any] | None, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    beside = {"generation": 57, "role": "kept", "since_s": time.time(), "mirror": mirror}
    print_generations(3, {"beside": beside, "publish": None})
    assert capsys.readouterr().out.splitlines()[1:] == said


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
