"""Writes of one generation brought to another: on disk, without Ray, killed at every step."""

import asyncio
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardline.cluster.rollover import mirror_opening, mirror_source, mirror_term
from shardline.cluster.rollover.fanout_target import FanoutTarget
from shardline.cluster.rollover.mirror import Mirror, trouble_of
from shardline.cluster.rollover.mirror_opening import MirrorOrder, TargetEncoder, open_mirror
from shardline.cluster.rollover.mirror_progress import MirrorProgress
from shardline.cluster.rollover.mirror_term import MirrorReplaced
from shardline.cluster.rollover.replayed_note import (
    Replayed,
    note_path,
    read_note,
    write_note,
)
from shardline.cluster.rollover.way_back import parting
from shardline.cluster.store import Store
from shardline.router.fanout.fanout import Fanout
from shardline.router.router_config import RouterConfig
from shardline.router.written import Part
from shardline.shards.core.encoder_files import CONFIG, ITEM_ENCODER_FOLDER, write_encoder
from shardline.shards.core.errors import (
    CorruptFile,
    DeltaFull,
    InvalidInput,
    NotFound,
    NotPrimary,
    VersionMismatch,
    WritesLost,
)
from shardline.shards.core.files import MANIFEST_NAME, sha256_of
from shardline.shards.core.messages import RoutingTable, WriteReply
from shardline.shards.live.kept_segments import KEPT_FOLDER
from shardline.shards.storage.cut import Cut
from shardline.shards.storage.generation import read_generation, write_generation
from tests.fake_encoder import ITEM_FEATURES, item_encoder_parts, item_vector
from tests.fake_shard import SECRET
from tests.two_generations import DIM, ROWS, Written, build, unit_vectors

LIFE_S = 20.0  # far above what a test takes, so that a mirror that hangs fails it


class Killed(BaseException):
    """The process of the mirror ends here."""


class FakeTarget:
    """The target's primaries in this process. ``before_each`` is called with "deliver" before a
    part is applied, and "applied" before it is acknowledged; it may raise. ``late``: parts of
    killed processes, one of which may arrive with every other part."""

    def __init__(self, written: Written, before_each: Callable[[str], None] | None = None) -> None:
        self.written = written
        self.before_each = before_each or (lambda step: None)
        self.late: list[Part] = []
        self.rng = random.Random(0)
        self.parts: list[Part] = []
        self.is_open = True

    async def table(self) -> RoutingTable:
        return self.written.table

    async def deliver(self, part: Part, /) -> WriteReply:
        self.parts.append(part)
        self.some_late()
        try:
            self.before_each("deliver")
        except Killed:
            self.late.append(part)
            raise
        reply = self.written.deliver(part)
        self.some_late()
        self.before_each("applied")
        return reply

    def some_late(self) -> None:
        if self.late and self.rng.random() < 0.5:
            part = self.late.pop(self.rng.randrange(len(self.late)))
            self.written.deliver(part)


async def no_sleep(seconds: float) -> None:
    await asyncio.sleep(0)


def order(store: Path, *, source: int = 1, target: int = 2) -> MirrorOrder:
    return MirrorOrder(store=str(store), source=source, target=target, controller="", secret=b"")


def opened(given: MirrorOrder, target: FakeTarget, encoder: Any = None) -> Mirror:
    mirror = open_mirror(given, target, encoder)
    mirror._sleep = no_sleep
    return mirror


def drained(
    given: MirrorOrder, target: FakeTarget, final: Sequence[int], encoder: Any = None
) -> MirrorProgress:
    """One life of a mirror: until the target has ``final``. Raises Killed."""

    async def live() -> MirrorProgress:
        mirror = opened(given, target, encoder)
        run = asyncio.create_task(mirror.run())
        drain = asyncio.create_task(mirror.drain(final, LIFE_S))
        await asyncio.wait([run, drain], return_when=asyncio.FIRST_COMPLETED)
        if run.done():
            drain.cancel()
            run.result()
        await mirror.stop()
        await run
        return drain.result()

    return asyncio.run(live())


def test_a_target_with_other_shards_gets_what_the_source_gets(tmp_path: Path) -> None:
    source = Written(build(tmp_path, 1, 2))
    target = Written(build(tmp_path, 2, 3, partitioning="hash-range"))
    source.upsert([3, 40, 1000], 1, title=["a", "b", "c"])
    source.delete([4, 41, 999])
    source.upsert([40, 4], 2)
    source.delete([1000])
    progress = drained(order(tmp_path), FakeTarget(target), source.seqs)
    assert target.contents() == source.contents()
    assert target.column("title") == source.column("title")
    assert target.column("title")[3] == "a" and target.column("title")[40] is None
    assert progress.positions == progress.ends == source.seqs
    assert progress.target_seqs == target.seqs
    assert (progress.behind, progress.unreplayed, progress.trouble) == (0, 0, None)


@pytest.mark.parametrize("seed", range(3))
def test_random_writes_and_kills_at_any_step(tmp_path: Path, seed: int) -> None:
    """Kills come at random steps, and what was under way then arrives late, or never."""
    rng = random.Random(seed)
    source = Written(build(tmp_path, 1, rng.choice((1, 3))))
    target = Written(build(tmp_path, 2, rng.choice((1, 2, 4)), partitioning="hash-range"))
    expected = {item: row.tobytes() for item, row in enumerate(unit_vectors(range(ROWS), 0))}
    left = 0

    def step(name: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    fake, kills = FakeTarget(target, step), 0
    fake.rng = rng
    for write in range(60):
        ids = rng.sample([*range(ROWS), *range(1000, 1040)], rng.randint(1, 6))
        if rng.random() < 0.3:
            source.delete(ids)
            expected = {item: row for item, row in expected.items() if item not in ids}
        else:
            source.upsert(ids, write, key=f"k{write}")
            expected |= dict(zip(ids, map(bytes, unit_vectors(ids, write)), strict=True))
        if rng.random() < 0.2:
            left = rng.randint(1, 8)
            try:
                drained(order(tmp_path), fake, source.seqs)
            except Killed:
                kills += 1
    left = 0
    drained(order(tmp_path), fake, source.seqs)
    while fake.late:
        fake.some_late()
    assert source.contents() == expected
    assert target.contents() == expected
    assert kills > 1


def test_killed_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each part, and around each note; what was under way arrives last of all."""
    source = Written(build(tmp_path, 1, 2))
    source.upsert([1, 2, 50], 1, title=["a", "b", "c"])
    source.delete([3])
    kills, folder = 0, build(tmp_path, 2, 2, partitioning="hash-range")
    for kill_at in range(1, 60):
        shutil.rmtree(tmp_path / "live" / folder.name, ignore_errors=True)
        target = Written(folder)
        left = kill_at

        def step(name: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed

        def noted(live: Path, replayed: Replayed) -> None:
            step("before the note")
            write_note(live, replayed)
            step("after the note")

        monkeypatch.setattr(mirror_term, "write_note", noted)
        fake, given = FakeTarget(target, step), order(tmp_path)
        try:
            drained(given, fake, source.seqs)
        except Killed:
            kills += 1
        else:
            break
        source.upsert([1, 50], kill_at + 9)  # more has come when it goes on
        late, fake.late = fake.late, []
        drained(given, fake, source.seqs)
        for part in late:
            target.deliver(part)
        assert target.contents() == source.contents(), f"killed at step {kill_at}"
    assert kills > 8, kills


def test_a_round_that_was_under_way_is_sent_again_as_it_was(tmp_path: Path) -> None:
    """Else what a killed process had sent, and arrives late, would bring back older versions."""
    source = Written(build(tmp_path, 1, 1))
    target = Written(build(tmp_path, 2, 1))
    source.upsert([1, 2], 1)

    def kill(name: str) -> None:
        raise Killed

    fake = FakeTarget(target, kill)
    with pytest.raises(Killed):
        drained(order(tmp_path), fake, source.seqs)
    source.upsert([1, 2], 2)
    fake.before_each = lambda step: None
    (late,), fake.late = fake.late, []
    drained(order(tmp_path), fake, source.seqs)
    target.deliver(late)
    assert [part.message.key for part in fake.parts[:2]] == [late.message.key] * 2
    assert target.contents() == source.contents()


def test_a_replay_from_an_earlier_start_ends_with_the_newest_versions(tmp_path: Path) -> None:
    """Its rounds are cut differently: the newest write, which comes in one as it did before, must
    not be passed over as known while the older ones before it are applied again."""
    source, target = Written(build(tmp_path, 1, 1)), Written(build(tmp_path, 2, 1))
    fake = FakeTarget(target)
    for seed in range(1, 6):
        source.upsert([7], seed)
        drained(order(tmp_path), fake, source.seqs)
    log = source.writes[0]._log
    assert log is not None
    log.roll()
    source.upsert([7], 99)
    drained(order(tmp_path), fake, source.seqs)
    note_path(tmp_path / "live" / "000002").unlink()
    drained(order(tmp_path), fake, source.seqs)
    assert [len(part.message.item_ids) for part in fake.parts] == [1] * 8, "two rounds of six"
    assert target.contents() == source.contents()


def test_failures_are_told_and_tried_again(tmp_path: Path) -> None:
    source = Written(build(tmp_path, 1, 1))
    target = Written(build(tmp_path, 2, 2))
    errors = [NotPrimary("none"), DeltaFull("full"), InvalidInput("wrong", field="attributes.x")]
    seen = []

    def fail(name: str) -> None:
        if name == "deliver" and errors:
            raise errors.pop(0)

    async def live() -> None:
        mirror = opened(order(tmp_path), FakeTarget(target, fail))

        async def sleep(seconds: float) -> None:
            seen.append((mirror.progress().trouble, seconds))
            await asyncio.sleep(0)

        mirror._sleep = sleep
        run = asyncio.create_task(mirror.run())
        source.upsert([1, 2], 1)
        assert (await mirror.drain(source.seqs, LIFE_S)).trouble is None
        await mirror.stop()
        await run

    asyncio.run(live())
    told = [(trouble.code, seconds) for trouble, seconds in seen if trouble is not None]
    assert told == [("not_primary", 0.1), ("delta_full", 0.2), ("invalid_input", 0.4)]
    assert target.contents() == source.contents()


@pytest.mark.parametrize(
    ("error", "is_hopeless"),
    [(InvalidInput, True), (WritesLost, True), (VersionMismatch, True), (DeltaFull, False)],
)
def test_who_publishes_is_told_what_will_never_go_on(error, is_hopeless: bool) -> None:
    trouble = trouble_of(error("wrong"))
    found = MirrorProgress(positions=(), ends=(), trouble=trouble)
    assert found.is_hopeless is is_hopeless
    assert not MirrorProgress(positions=(), ends=()).is_hopeless


def test_a_drain_that_is_too_late_says_how_far_it_is(tmp_path: Path) -> None:
    source = Written(build(tmp_path, 1, 1))
    target = Written(build(tmp_path, 2, 1))
    source.delete([1])

    async def live() -> MirrorProgress:
        mirror = opened(order(tmp_path), FakeTarget(target))
        return await mirror.drain((2,), 0.01)

    progress = asyncio.run(live())
    assert progress.positions == (0,) and not progress.has((2,))
    assert progress.behind >= 1, "what has not been read is not taken for nothing"
    assert not note_path(tmp_path / "live" / "000001").exists(), "no way back is noted"


def test_there_and_back_and_there_again(tmp_path: Path) -> None:
    """A publish, a rollback, and a publish: each begins where the one before ended."""
    folders = build(tmp_path, 1, 2), build(tmp_path, 2, 3, partitioning="hash-range")
    one, two = Written(folders[0]), Written(folders[1])
    one.upsert([1, 2, 50], 1)
    drained(order(tmp_path), FakeTarget(two), one.seal(2))
    fake = FakeTarget(Written(folders[0], epoch=3))
    two.upsert([2, 3], 2)
    two.delete([50])
    drained(order(tmp_path, source=2, target=1), fake, two.seal(2))
    assert sum(part.items for part in fake.parts) == 3, "what came from there is not brought back"
    assert fake.written.contents() == two.contents()
    one, again = fake.written, FakeTarget(Written(folders[1], epoch=3))
    one.upsert([3], 3)
    drained(order(tmp_path), again, one.seqs)
    assert sum(part.items for part in again.parts) == 1
    assert again.written.contents() == one.contents()


def test_rows_that_could_not_be_brought_stay_counted_there_and_back(tmp_path: Path) -> None:
    """A publish of another model, a rollback, and the publish again, with a restart in each."""
    one, folder = Written(build(tmp_path, 1, 1)), build(tmp_path, 2, 1)
    changed(folder, model_version="other")
    one.upsert([3], 1)
    one.upsert([4], 1, features=[{"seed": 1}])
    fake = FakeTarget(Written(folder))
    for _ in range(2):
        found = drained(order(tmp_path), fake, one.seal(2), FakeEncoder())
    assert (found.unreplayed, found.examples) == (1, (3,))
    two = fake.written
    two.upsert([5], 2)
    fake = FakeTarget(Written(tmp_path / "generations" / "000001", epoch=3))
    for _ in range(2):
        found = drained(order(tmp_path, source=2, target=1), fake, two.seal(2), FakeEncoder())
    assert [part.message.item_ids.tolist() for part in fake.parts] == []
    assert (found.unreplayed, found.examples) == (1, (5,))
    fake.written.delete([6])
    two = FakeTarget(Written(folder, epoch=3))
    found = drained(order(tmp_path), two, fake.written.seqs, FakeEncoder())
    assert [part.message.item_ids.tolist() for part in two.parts] == [[6]]
    assert (found.unreplayed, found.examples) == (1, (3,)), "2 lacks it as before"


def test_nothing_is_claimed_for_the_way_back_where_writes_were_left_out(tmp_path: Path) -> None:
    """2 is published without the writes of 1; after a rollback it must get them all."""
    one, folder = Written(build(tmp_path, 1, 1)), build(tmp_path, 2, 1)
    two = Written(folder)
    one.upsert([1, 2], 1)
    two.upsert([2], 2)
    fake = FakeTarget(one)
    drained(order(tmp_path, source=2, target=1), fake, two.seal(2))
    assert not note_path(tmp_path / "live" / "000002").exists()
    again = FakeTarget(Written(folder, epoch=3))
    drained(order(tmp_path), again, one.seqs)
    assert again.written.contents() == one.contents()


def test_own_writes_of_a_target_end_what_its_note_claims(tmp_path: Path) -> None:
    """2 got writes of 1, was live, and took writes that 1 never got; then 1 was live again."""
    one, folder = Written(build(tmp_path, 1, 1)), build(tmp_path, 2, 1)
    fake = FakeTarget(Written(folder))
    one.upsert([1], 1)
    drained(order(tmp_path), fake, one.seqs)
    note = read_note(tmp_path / "live" / "000002")
    assert note is not None and note.back == fake.written.seqs == (1,)
    note_path(tmp_path / "live" / "000001").unlink()
    assert opened(order(tmp_path), fake)._route.back
    fake.written.upsert([9], 3, key="of a client")
    assert not opened(order(tmp_path), fake)._route.back


@pytest.mark.parametrize("kill_at", [1, 2])
def test_a_killed_round_is_no_write_of_the_targets_own(tmp_path: Path, kill_at: int) -> None:
    one, two = Written(build(tmp_path, 1, 1)), Written(build(tmp_path, 2, 1))

    def kill(name: str) -> None:
        if name == "applied" and len(fake.parts) == kill_at:
            raise Killed

    fake = FakeTarget(two, kill)
    with pytest.raises(Killed):
        for item in (1, 2):
            one.upsert([item], 1)
            drained(order(tmp_path), fake, one.seqs)
    assert two.seqs == (kill_at,)
    assert opened(order(tmp_path), fake)._route.back


def test_it_begins_at_the_cut_and_says_when_writes_are_lost(tmp_path: Path) -> None:
    source = Written(build(tmp_path, 1, 1))
    folder = build(tmp_path, 2, 1)
    target = Written(folder)
    for seed in range(4):
        source.upsert([seed], seed + 1)
    log = source.writes[0]._log
    assert log is not None
    log.roll()
    log.trim(4)
    source.upsert([9], 9)
    fake = FakeTarget(target)

    async def trouble() -> Any:
        mirror = opened(order(tmp_path), fake)
        run = asyncio.create_task(mirror.run())
        async with asyncio.timeout(LIFE_S):
            while (found := mirror.progress().trouble) is None:
                await asyncio.sleep(0.001)
        await mirror.stop()
        await run
        return found

    for cut in (None, Cut(generation=7, seqs=(4,))):
        changed(folder, cut=cut)
        found = asyncio.run(trouble())
        assert found.code == NotFound.code
        assert "shard 0: writes from 1 on" in found.text and "--from-live" in found.text
    assert not fake.parts
    changed(folder, cut=Cut(generation=1, seqs=(4,)))
    drained(order(tmp_path), fake, source.seqs)
    assert [part.message.item_ids.tolist() for part in fake.parts] == [[9]]


def test_writes_in_the_rows_of_the_source_alone_are_told(tmp_path: Path) -> None:
    """3 was built with 200 writes of 1, 2 with 100 of them; 3 is live, and 2 is to be."""
    source, folder = build(tmp_path, 3, 1), build(tmp_path, 2, 1)
    changed(source, cut=Cut(generation=1, seqs=(200,)))
    changed(folder, cut=Cut(generation=1, seqs=(100,)))
    target = FakeTarget(Written(folder))
    with pytest.raises(WritesLost, match=r"generation 3 .* generation 2 may lack them.*--from-liv"):
        open_mirror(order(tmp_path, source=3), target, None)
    changed(folder, cut=Cut(generation=1, seqs=(200,)))
    live = Written(source)
    live.upsert([1], 1)
    drained(order(tmp_path, source=3), target, live.seqs)
    assert target.written.contents() == live.contents()


@pytest.mark.parametrize("is_cut", [False, True], ids=["by the note", "by the cut"])
def test_a_log_that_is_shorter_than_what_was_read_of_it_is_told(
    tmp_path: Path, is_cut: bool
) -> None:
    """A power cut, or a copy of the log that was put back: later writes have numbers that are known
    as done."""
    source, folder = Written(build(tmp_path, 1, 1)), build(tmp_path, 2, 1)
    live = tmp_path / "live" / "000001"
    source.upsert([1], 1)
    source.writes[0].close()
    shutil.copytree(live, tmp_path / "copy")
    source = Written(source.folder, epoch=2)
    source.upsert([2], 1)
    source.upsert([3], 1)
    fake = FakeTarget(Written(folder))
    if is_cut:
        changed(folder, cut=Cut(generation=1, seqs=source.seqs))
    else:
        drained(order(tmp_path), fake, source.seqs)
    shutil.rmtree(live)
    shutil.copytree(tmp_path / "copy", live)
    source = Written(source.folder, epoch=3)
    pauses: list[float] = []
    with pytest.raises(WritesLost, match=r"shard 0 of generation 1.* write 3 .*expected 3 .*got 1"):
        open_mirror(order(tmp_path), fake, None, sleep=pauses.append)
    assert pauses == [mirror_opening.LOOK_S] * (mirror_opening.LOOKS - 1)

    def written(seconds: float) -> None:
        source.upsert([4, 5], 1)

    open_mirror(order(tmp_path), fake, None, sleep=written)  # it was only shown late


def test_another_log_in_place_of_the_one_that_was_read_is_told_again_and_again(
    tmp_path: Path,
) -> None:
    source = Written(build(tmp_path, 1, 1))
    live = tmp_path / "live" / "000001"
    source.upsert([1], 1)
    source.writes[0].close()
    shutil.copytree(live, tmp_path / "copy")
    source = Written(source.folder, epoch=2)
    source.upsert([2], 1)
    mirrored = mirror_source.SourceShard(source.writes[0]._folder, 0, 0)
    while mirrored.seq < 2:
        assert mirrored.take(1 << 20)
    source.writes[0].close()
    shutil.rmtree(live)
    shutil.copytree(tmp_path / "copy", live)
    source = Written(source.folder, epoch=3)
    for item in (3, 4):
        source.upsert([item], 1)
    for _ in range(2):
        with pytest.raises(CorruptFile, match="not the log that was read before"):
            mirrored.take(1 << 20)


def test_what_is_brought_over_is_durable_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could give its number to another write, which would never be brought."""
    source, target = Written(build(tmp_path, 1, 2)), Written(build(tmp_path, 2, 1))
    source.upsert([1, 50], 1)
    fake, done = FakeTarget(target), []
    mirror = opened(order(tmp_path), fake)

    def refused(live: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(mirror_source, "make_durable", refused)
    with pytest.raises(OSError, match="Input/output"):
        asyncio.run(mirror._round())
    assert not fake.parts and not note_path(tmp_path / "live" / "000002").exists()
    monkeypatch.setattr(mirror_source, "make_durable", done.append)
    asyncio.run(mirror._round())
    assert done == [writes._folder for writes in source.writes]
    assert target.contents() == source.contents()


class Paused(FakeTarget):
    """Of a process that stops before it sends its first part, until ``wake`` is called."""

    def __init__(self, written: Written) -> None:
        super().__init__(written)
        self.is_here, self._wakes = asyncio.Event(), asyncio.Event()

    async def deliver(self, part: Part, /) -> WriteReply:
        if not self._wakes.is_set():
            self.is_here.set()
            await self._wakes.wait()
        return await super().deliver(part)

    def wake(self) -> None:
        self._wakes.set()


@pytest.mark.parametrize("is_back", [False, True], ids=["the same way", "the other way"])
def test_a_mirror_that_wakes_up_after_another_was_opened_sends_no_round_of_its_own(
    tmp_path: Path, is_back: bool
) -> None:
    """Its rounds would be cut differently, and bring older versions over newer ones."""
    source, target = Written(build(tmp_path, 1, 1)), Written(build(tmp_path, 2, 1))
    source.upsert([1, 2], 1)

    async def live() -> None:
        late, fake = Paused(target), FakeTarget(target)
        old = opened(order(tmp_path), late)
        run = asyncio.create_task(old.run())
        await asyncio.wait_for(late.is_here.wait(), LIFE_S)
        source.upsert([1, 2], 2)
        new = opened(order(tmp_path), fake)
        goes_on = asyncio.create_task(new.run())
        await new.drain(source.seqs, LIFE_S)
        await new.stop()
        await goes_on
        if is_back:
            source.seal(2)
            new = opened(order(tmp_path, source=2, target=1), FakeTarget(source))
            target.upsert([1], 9)
        else:
            source.upsert([1], 9)
        before = target.contents()
        late.wake()
        async with asyncio.timeout(LIFE_S):
            await run
        assert late.parts[0].message.key == fake.parts[0].message.key, "what the other has sent"
        assert len(late.parts) == 1
        assert target.contents() == before
        trouble = old.progress().trouble
        assert trouble is not None and trouble.code == MirrorReplaced.code
        with pytest.raises(MirrorReplaced):
            await old.drain((1,), LIFE_S)

    asyncio.run(live())


def published_without_writes(store: Path, live: int, coming: int) -> None:
    """What a publish does beside the switch itself."""
    parting(Store(store), live, coming)()


def test_after_a_publish_without_writes_nothing_older_comes_over_what_is_kept(
    tmp_path: Path,
) -> None:
    """2 was restored: its own log has an old version of an item that 1 was written since."""
    one, two = Written(build(tmp_path, 1, 1)), Written(build(tmp_path, 2, 2))
    two.upsert([7, 50], 1)
    one.upsert([7], 2)
    published_without_writes(tmp_path, 1, 2)
    two.upsert([8], 3)
    before = one.contents()
    fake = FakeTarget(one)
    progress = drained(order(tmp_path, source=2, target=1), fake, two.seal(2))
    assert progress.is_apart, "nothing shows that 1 has the first writes of 2"
    expected = before | {8: unit_vectors([8], 3)[0].tobytes()}
    assert one.contents() == expected


def test_the_same_where_a_mirror_had_brought_older_versions(tmp_path: Path) -> None:
    """2 got the first write of 1, and did not pass the gate; or 1 was live again for long."""
    one, folder = Written(build(tmp_path, 1, 1)), build(tmp_path, 2, 1)
    fake = FakeTarget(Written(folder))
    one.upsert([7], 1)
    drained(order(tmp_path), fake, one.seqs)
    one.upsert([7], 2)
    old = opened(order(tmp_path), fake)
    published_without_writes(tmp_path, 1, 2)
    asyncio.run(old.run())
    assert len(fake.parts) == 1, "a mirror that was there before ends for good"
    fake.written.upsert([8], 3)
    before = one.contents()
    progress = drained(order(tmp_path, source=2, target=1), FakeTarget(one), fake.written.seal(2))
    assert not progress.is_apart
    assert one.contents() == before | {8: unit_vectors([8], 3)[0].tobytes()}


def test_what_two_went_apart_with_counts_nowhere_as_brought(tmp_path: Path) -> None:
    """2 had writes of its own when it went live without those of 1. Then 3 is built of it."""
    one, two = Written(build(tmp_path, 1, 1)), Written(build(tmp_path, 2, 1))
    two.upsert([1, 2], 1)
    published_without_writes(tmp_path, 1, 2)
    target = FakeTarget(one)
    assert not opened(order(tmp_path), FakeTarget(two))._route.back
    changed(build(tmp_path, 3, 1), cut=Cut(generation=2, seqs=(1,)))
    with pytest.raises(WritesLost, match=r"generation 3 .* generation 1 may lack them"):
        open_mirror(order(tmp_path, source=3, target=1), target, None)
    drained(order(tmp_path, source=2, target=1), target, two.seal(2))
    with pytest.raises(WritesLost, match=r"generation 3 .* generation 1 may lack them"):
        open_mirror(order(tmp_path, source=3, target=1), target, None)


def test_damage_of_the_live_one_keeps_nobody_from_leaving_its_writes_out(tmp_path: Path) -> None:
    folder, two = build(tmp_path, 1, 1), Written(build(tmp_path, 2, 1))
    two.upsert([1], 1)
    (folder / MANIFEST_NAME).write_text("{")
    published_without_writes(tmp_path, 1, 2)
    note = read_note(tmp_path / "live" / "000001")
    assert note is not None and (note.generation, note.seqs, note.is_apart) == (2, (1,), True)


def test_kept_segments_are_replayed(tmp_path: Path) -> None:
    source = Written(build(tmp_path, 1, 1))
    target = Written(build(tmp_path, 2, 1))
    for seed in range(6):
        source.upsert([seed, 100], seed + 1)
        log = source.writes[0]._log
        assert log is not None
        log.roll()
        log.trim(source.seqs[0], 1 << 20)
    assert len(list((source.writes[0]._folder / KEPT_FOLDER).iterdir())) >= 6
    drained(order(tmp_path), FakeTarget(target), source.seqs)
    assert target.contents() == source.contents()


class FakeEncoder:
    """Of another model: the vector of an item is made of its feature ``seed``; "bad" is refused."""

    def encode(self, item_ids: np.ndarray, rows: Sequence[dict], /) -> np.ndarray:
        if any(row["seed"] == "bad" for row in rows):
            raise InvalidInput("not a number", field="features")
        pairs = zip(item_ids.tolist(), rows, strict=True)
        return np.concatenate([2 * unit_vectors([item], row["seed"] + 100) for item, row in pairs])


def test_another_model_gets_vectors_of_its_own(tmp_path: Path) -> None:
    source = Written(build(tmp_path, 1, 2))
    folder = build(tmp_path, 2, 3, columns=("title", "brand"))
    target = Written(folder)
    changed(folder, model_version="m2")
    source.upsert([1, 40], 1, features=[{"seed": 1}, {"seed": 2}], title=["a", "b"])
    source.upsert([2, 41], 2)  # by vector
    source.upsert([3, 42, 4], 3, features=[{"seed": 3}, {"seed": "bad"}, {"seed": 4}])
    source.upsert([2], 4, features=[{"seed": 5}])
    source.delete([5, 43])
    before = target.contents()
    fake = FakeTarget(target)
    progress = drained(order(tmp_path), fake, source.seqs, FakeEncoder())
    expected = before | {
        item: unit_vectors([item], 100 + seed)[0].tobytes()
        for item, seed in ((1, 1), (40, 2), (3, 3), (4, 4), (2, 5))
    }
    for item in (5, 43):
        del expected[item]
    found = target.contents()
    assert found.keys() == expected.keys()
    for item, row in expected.items():
        np.testing.assert_allclose(
            np.frombuffer(found[item], np.float32), np.frombuffer(row, np.float32), atol=1e-6
        )
    assert progress.unreplayed in (2, 3) and set(progress.examples) >= {41, 42}
    assert target.column("title")[1] == "a"
    assert all(part.message.features for part in fake.parts if hasattr(part.message, "features"))


def test_without_an_encoder_only_deletes_reach_another_model(tmp_path: Path) -> None:
    source, folder = Written(build(tmp_path, 1, 1)), build(tmp_path, 2, 1)
    target = Written(folder)
    changed(folder, model_version="m2")
    source.upsert([1], 1, features=[{"seed": 1}])
    source.upsert([2], 1)
    source.delete([3])
    progress = drained(order(tmp_path), FakeTarget(target), source.seqs)
    assert (progress.unreplayed, progress.examples) == (2, (2, 1))
    assert progress.rows == 1
    assert 3 not in target.contents()
    note = read_note(tmp_path / "live" / "000002")
    assert note is not None


def changed(folder: Path, **fields: Any) -> None:
    """Has the manifest say something else, another model version for example."""
    manifest = read_generation(folder)
    (folder / MANIFEST_NAME).unlink()
    write_generation(folder, replace(manifest, **fields))


def test_attributes_that_the_target_lacks_are_left_out(tmp_path: Path) -> None:
    source = Written(build(tmp_path, 1, 1, columns=("title", "brand")))
    target = Written(build(tmp_path, 2, 1, columns=("brand",)))
    source.upsert([1], 1, title=["t"], brand=["b"])
    drained(order(tmp_path), FakeTarget(target), source.seqs)
    assert target.column("brand")[1] == "b"


def test_values_that_a_column_of_the_target_does_not_take(tmp_path: Path, caplog) -> None:
    """Texts for a column of integers there: items without one are replayed, others counted."""
    source = Written(build(tmp_path, 1, 1))
    target = Written(build(tmp_path, 2, 1, numbers=("title",)))
    source.upsert([1, 2, 3], 1, title=["a", None, "b"])
    source.upsert([4], 1)
    source.delete([5])
    fake = FakeTarget(target)
    progress = drained(order(tmp_path), fake, source.seqs)
    assert (progress.unreplayed, progress.examples) == (2, (1, 3))
    assert "generation 2 has other types than 1 for title" in caplog.text
    theirs, ours = target.contents(), source.contents()
    assert [item for item in ours if theirs.get(item) != ours[item]] == [1, 3]
    assert 5 not in theirs
    fake.written.upsert([6], 9, title=[6])
    back = FakeTarget(Written(source.folder, epoch=3))
    progress = drained(order(tmp_path, source=2, target=1), back, target.seal(2))
    assert (progress.unreplayed, progress.examples) == (1, (6,))


def test_one_model_name_with_two_kinds_of_vectors_is_refused(tmp_path: Path) -> None:
    source, target = build(tmp_path, 1, 1), build(tmp_path, 2, 1)
    changed(source, dim=4)
    with pytest.raises(VersionMismatch, match="same model"):
        open_mirror(order(tmp_path), FakeTarget(Written(target)), None)


def test_a_note_that_cannot_be_read_counts_as_none(tmp_path: Path, caplog) -> None:
    write_note(tmp_path, Replayed(generation=1, seqs=(5, 6), sending=(5, 7), run="r", rows=3))
    note = read_note(tmp_path)
    assert note is not None and (note.seqs, note.sending, note.rows) == ((5, 6), (5, 7), 3)
    note_path(tmp_path).write_text("{}")
    assert read_note(tmp_path) is None
    assert "from the start" in caplog.text


def test_over_sockets_while_writes_go_on_until_the_seal(tmp_path: Path) -> None:
    """The target's table comes late, and the first one is of another generation."""
    source = Written(build(tmp_path, 1, 2))
    target = Written(build(tmp_path, 2, 3, partitioning="hash-range"))
    rng = random.Random(1)

    def write() -> None:
        for seed in range(60):
            ids = rng.sample([*range(ROWS), *range(1000, 1040)], 5)
            if seed % 4:
                source.upsert(ids, seed, title=[f"{seed}"] * 5)
            else:
                source.delete(ids)

    async def live(table: RoutingTable) -> MirrorProgress:
        tables = [replace(table, generation=9), None, table]

        async def table_after(version: int, timeout_s: float) -> RoutingTable | None:
            if not tables:
                await asyncio.sleep(timeout_s)
            return tables.pop(0)

        config = RouterConfig(backoff_base_ms=1, backoff_max_ms=5)
        over = FanoutTarget(2, Fanout(SECRET, config, random.Random(0)))
        follow = asyncio.create_task(over.follow(table_after))
        mirror = open_mirror(order(tmp_path), over, None)
        run = asyncio.create_task(mirror.run())
        await asyncio.to_thread(write)
        progress = await mirror.drain(source.seal(2), LIFE_S)
        await mirror.stop()
        await run
        follow.cancel()
        await over.close()
        return progress

    with target.served() as table:
        progress = asyncio.run(live(table))
    assert progress.has(source.seqs) and progress.rows >= 100
    assert target.contents() == source.contents()
    assert target.column("title") == source.column("title")


def test_features_are_encoded_by_the_tower_of_the_target(tmp_path: Path) -> None:
    source, folder = Written(build(tmp_path, 1, 1)), build(tmp_path, 2, 1)
    (folder / ITEM_ENCODER_FOLDER).mkdir()
    write_encoder(folder / ITEM_ENCODER_FOLDER, *item_encoder_parts(DIM, "m2"))
    target = Written(folder)
    changed(folder, model_version="m2")
    source.upsert([1, 2], 1, features=[ITEM_FEATURES, ITEM_FEATURES | {"size": "large"}])
    checksum = sha256_of(folder / ITEM_ENCODER_FOLDER / CONFIG)
    encoder = TargetEncoder.of(replace(target.table, item_encoder_checksum=checksum))
    assert encoder is not None
    progress = drained(order(tmp_path), FakeTarget(target), source.seqs, encoder)
    assert (progress.unreplayed, progress.examples) == (1, (2,))
    found = np.frombuffer(target.contents()[1], np.float32)
    np.testing.assert_allclose(found, item_vector(DIM, 1, 0, 1, 2, 1), atol=1e-6)
    assert TargetEncoder.of(replace(target.table, item_encoder_checksum=None)) is None
