"""A publish in the controller: its stages, its failures, and restarts in the middle of it. Shard
actors, mirror and gate are stand-ins."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from shardline.cluster.control import controller as module
from shardline.cluster.control import (
    mirrors,
    publish_note,
    publish_run,
    publish_switch,
    publishing,
    reconcile,
    watch,
)
from shardline.cluster.control.controller import Controller
from shardline.cluster.control.publish_parts import Bounds, Mirror
from shardline.cluster.control.publish_state import PublishOptions
from shardline.cluster.rollover.gate import GateFigure, GateReport
from shardline.cluster.rollover.mirror_progress import MirrorProgress
from shardline.cluster.rollover.publish_config import PublishConfig
from shardline.cluster.store import Store
from shardline.shards.core.errors import (
    InvalidInput,
    NotFound,
    ReadOnly,
    Unavailable,
    VersionMismatch,
    WritesLost,
)
from shardline.shards.core.messages import Absence, ReplicaKey, RoutingTable
from shardline.shards.live.went_live import WentLive, read_went_live
from tests.fake_actor import Handle, LeadMethod, Method, raised_in_a_method
from tests.fake_shard import until
from tests.unit.test_controller import (  # noqa: F401 - fixtures
    SHARDS,
    alive,
    made,
    running,
    store,
)

WRITES = 40  # of each shard, in what the handles say


@dataclass
class FakeMirror:
    """Brings ``step`` writes of each shard over with each look."""

    source: int
    target: int
    step: int = WRITES
    position: int = 0
    unreplayed: int = 0
    trouble: Absence | None = None
    is_stopped: bool = False
    is_apart: bool = False
    drained: int = 0

    async def progress(self) -> MirrorProgress:
        self.position = min(WRITES, self.position + self.step)
        return MirrorProgress(
            positions=(self.position,) * SHARDS,
            ends=(WRITES,) * SHARDS,
            unreplayed=self.unreplayed,
            target_seqs=(self.position + self.target,) * SHARDS,
            trouble=self.trouble,
            is_apart=self.is_apart,
        )

    async def drain(self, final: tuple[int, ...], timeout_s: float) -> MirrorProgress:
        assert final == (WRITES,) * SHARDS
        self.position = WRITES
        self.drained += 1
        return await self.progress()

    async def stop(self) -> None:
        self.is_stopped = True


@dataclass
class FakeParts:
    """mirrors: those that were started. failed: the gate is to refuse it. parted: pairs of live
    one and candidate, of switches without writes."""

    mirrors: list[FakeMirror] = field(default_factory=list)
    judged: list[tuple[int, int]] = field(default_factory=list)
    parted: list[tuple[int, int]] = field(default_factory=list)
    bounds: list[Bounds] = field(default_factory=list)
    failed: bool = False
    step: int = WRITES
    trouble: Absence | None = None
    is_apart: bool = False
    gate_open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate_open.set()

    async def start_mirror(self, source: RoutingTable, target: RoutingTable) -> Mirror:
        assert all(
            mirror.is_stopped for mirror in self.mirrors if mirror.source != source.generation
        )
        mirror = FakeMirror(
            source.generation,
            target.generation,
            self.step,
            trouble=self.trouble,
            is_apart=self.is_apart,
        )
        self.mirrors.append(mirror)
        return mirror

    async def end_mirrors(self, but: tuple[int, int] | None) -> None:
        for mirror in self.mirrors:
            mirror.is_stopped |= (mirror.source, mirror.target) != but

    async def parting(
        self, live: RoutingTable, candidate: RoutingTable
    ) -> Callable[[], Awaitable[None]]:
        assert all(mirror.is_stopped for mirror in self.mirrors), "nobody writes to it any more"

        async def part() -> None:
            self.parted.append((live.generation, candidate.generation))

        return part

    def check_bounds(self, bounds: Bounds) -> None:
        PublishConfig().with_bounds(bounds)

    async def run_gate(
        self,
        live: RoutingTable,
        candidate: RoutingTable,
        mirrored: MirrorProgress | None,
        bounds: Bounds,
    ) -> GateReport:
        await self.gate_open.wait()
        self.bounds.append(bounds)
        self.judged.append((live.generation, candidate.generation))
        return GateReport((figure("recall", 0.9, 0.95, ok=not self.failed),))

    def judge_unreplayed(self, rows: int, bounds: Bounds) -> GateFigure:
        self.bounds.append(bounds)
        return figure("unreplayed_rows", rows, 0, ok=rows == 0)


def figure(name: str, value: float, bound: float, *, ok: bool) -> GateFigure:
    return GateFigure(figure=name, value=value, bound=f"{bound:g}", ok=ok, text="")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> FakeParts:
    found = FakeParts()
    monkeypatch.setattr(module, "WiredParts", lambda *settings: found)
    return found


@pytest.fixture(autouse=True)
def killed(monkeypatch: pytest.MonkeyPatch, alive: dict[str, Handle]) -> list[str]:  # noqa: F811
    """Names of the actors that were ended. All is quick; each handle has applied WRITES."""
    found: list[str] = []

    def kill(handle: Handle) -> None:
        for name in [each for each, known in alive.items() if known is handle]:
            found.append(name)
            del alive[name]

    def get_actor(name: str) -> Handle:
        if name not in alive:
            alive[name] = handle = Handle()
            handle.ping.then = replace(handle.ping.then, seq=WRITES)
        return alive[name]

    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(ray, "kill", kill)
    monkeypatch.setattr(watch, "WATCH_INTERVAL_S", 0.01)
    monkeypatch.setattr(reconcile, "OVERLAP_S", 0.0)
    monkeypatch.setattr(publishing, "RETIRE_AFTER_S", 0.0)
    monkeypatch.setattr(publishing, "TEND_S", 0.01)
    monkeypatch.setattr(publish_run, "LOOK_S", 0.01)
    monkeypatch.setattr(publish_switch, "PAUSE_S", 0.05)
    monkeypatch.setattr(publish_switch, "SWITCH_S", 0.5)
    return found


@contextlib.asynccontextmanager
async def cluster(store: Store, **changes: Any) -> AsyncIterator[Controller]:  # noqa: F811
    """Generation 57 is live; every replica that is placed registers."""
    async with running(store, changes.pop("generation", None), **changes) as controller:
        registering = asyncio.ensure_future(register_all(controller))
        try:
            await until(lambda: is_written(controller), timeout=5)
            yield controller
        finally:
            registering.cancel()
            await asyncio.gather(registering, return_exceptions=True)


async def register_all(controller: Controller) -> None:
    while True:
        for state in list(controller._fleet.states):
            if not state.answers and state.key in controller._shards.placed:
                port = 1000 + 100 * (state.key.generation % 10) + state.key.shard
                with contextlib.suppress(Unavailable):
                    await controller.register_replica(key=state.key, address=("127.0.0.1", port))
        await asyncio.sleep(0.005)


def is_written(controller: Controller) -> bool:
    table = controller._decisions.published
    return table is not None and all(shard.primary is not None for shard in table.shards)


async def ended(controller: Controller) -> dict[str, Any]:
    """The progress once the publish is over."""
    found: dict[str, Any] = {}

    def is_over() -> bool:
        found.update(controller._publishing.progress or {})
        return bool(found.get("is_over"))

    await until(is_over, timeout=10)
    return found


def live(controller: Controller) -> int:
    table = controller._decisions.published
    assert table is not None
    return table.generation


def went_live_with(controller: Controller) -> tuple[int, ...]:
    """What routers are told."""
    table = controller._decisions.published
    assert table is not None
    return table.went_live_with


async def test_a_generation_goes_live_by_a_publish_and_back_by_a_rollback(
    store: Store,  # noqa: F811
    parts: FakeParts,
    killed: list[str],
) -> None:
    async with cluster(store) as controller:
        begun = await controller.publish(PublishOptions(generation=3))
        assert (begun["stage"], begun["is_over"]) == ("checking", False)
        done = await ended(controller)
        assert (done["stage"], done["source"], done["reason"]) == ("live", 57, None)
        assert [each["figure"] for each in done["figures"]] == ["recall", "unreplayed_rows"]
        assert (live(controller), store.current()) == (3, 3)
        report = await controller.report()
        assert (report["generation"], report["beside"]["generation"]) == (3, 57)
        assert report["beside"]["role"] == "kept"
        await until(lambda: len(parts.mirrors) == 2)
        there, back = parts.mirrors
        assert (there.source, there.target, there.is_stopped) == (57, 3, True)
        assert (back.source, back.target, back.is_stopped) == (3, 57, False)
        assert parts.judged == [(57, 3)]
        assert went_live_with(controller) == (WRITES + 3,) * SHARDS

        assert (await controller.roll_back())["kind"] == "rollback"
        assert (await ended(controller))["stage"] == "live"
        assert (live(controller), store.current()) == (57, 57)
        assert parts.judged == [(57, 3)], "what was live before need not pass the gate"
        assert went_live_with(controller) == (WRITES + 57,) * SHARDS
        assert killed == [], "both stay loaded"
        await until(lambda: is_written(controller), timeout=5)


async def test_a_gate_that_fails_leaves_all_as_it_was_and_says_which_figure(
    store: Store,  # noqa: F811
    parts: FakeParts,
    killed: list[str],
) -> None:
    parts.failed = True
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        done = await ended(controller)
        assert done["stage"] == "failed"
        assert done["reason"]["code"] == "gate_failed"
        assert "recall is 0.9, bound 0.95" in done["reason"]["text"]
        assert (live(controller), store.current()) == (57, 57)
        await until(lambda: len(killed) == SHARDS)
        assert all(name.startswith("shardline-shard-3-") for name in killed)
        assert parts.mirrors[0].is_stopped
        assert (await controller.report())["beside"] is None

        parts.failed = False
        await controller.publish(PublishOptions(generation=3))
        assert (await ended(controller))["stage"] == "live", "and it can be tried again"


async def test_the_gate_can_be_skipped_for_a_reason(store: Store, parts: FakeParts) -> None:  # noqa: F811
    parts.failed = True
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3, skip_gate="an emergency"))
        done = await ended(controller)
        assert (done["stage"], done["skip_gate"], parts.judged) == ("live", "an emergency", [])


async def test_bounds_of_one_publish_go_to_its_gate_and_outlive_its_controller(
    store: Store,  # noqa: F811
    parts: FakeParts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bounds = {"min_recall": 0.5, "max_unreplayed_rows": 7}
    parts.gate_open.clear()
    async with cluster(store) as controller:
        with pytest.raises(InvalidInput, match="min_held_out_recall needs held_out"):
            await controller.publish(
                PublishOptions(generation=3, bounds={"min_held_out_recall": 0.5})
            )
        with pytest.raises(InvalidInput, match=r"publish\.min_recall"):
            await controller.publish(PublishOptions(generation=3, bounds={"min_recall": 2}))
        await controller.publish(PublishOptions(generation=3, bounds=bounds))
        await until(lambda: at(controller) == "gate", timeout=5)
        controller._tasks.cancel()
        monkeypatch.setattr(controller, "close", nothing)
    parts.gate_open.set()
    async with cluster(store) as again:
        done = await ended(again)
        assert (done["stage"], done["bounds"]) == ("live", bounds)
    assert parts.bounds == [bounds, bounds], "of the gate, and of what came after it"


async def test_a_controller_that_is_started_again_tells_what_its_generation_went_live_with(
    store: Store,  # noqa: F811
    parts: FakeParts,
) -> None:
    async with cluster(store) as controller:
        assert went_live_with(controller) == ()
        await controller.publish(PublishOptions(generation=3))
        await ended(controller)
    expected = (WRITES + 3,) * SHARDS
    async with cluster(store) as again:
        assert (live(again), went_live_with(again)) == (3, expected)
        await again.publish(PublishOptions(generation=57, with_writes=False))
        await ended(again)
        assert (live(again), went_live_with(again)) == (57, ())
    async with cluster(store) as again:
        assert (live(again), went_live_with(again)) == (57, ()), "nothing was brought over"
    note = store.writes(57) / "went_live.json"
    note.write_text(json.dumps({"format": 1, "has": [1], "keys_of": None}))
    async with cluster(store) as again:
        assert went_live_with(again) == (), "of another number of shards"
    note.write_text("{")
    async with cluster(store) as again:
        assert went_live_with(again) == ()


async def test_a_generation_takes_over_the_keys_of_one_of_its_model_if_it_has_all_rows(
    store: Store,  # noqa: F811
    parts: FakeParts,
) -> None:
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        await ended(controller)
        assert read_went_live(store.writes(3)).keys_of == "000057"
        await until(lambda: len(parts.mirrors) == 2)
        parts.mirrors[1].unreplayed = 1
        await controller.roll_back()
        await ended(controller)
        assert read_went_live(store.writes(57)) == WentLive(has=(WRITES + 57,) * SHARDS)


async def test_writes_are_brought_over_before_the_gate_and_all_of_them_before_the_switch(
    store: Store,  # noqa: F811
    parts: FakeParts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts.step = 1
    monkeypatch.setattr(publish_run, "FEW", 4)
    parts.gate_open.clear()
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        await until(lambda: at(controller) == "gate", timeout=5)
        assert parts.mirrors[0].position == WRITES - 2, "of each of two shards"
        parts.gate_open.set()
        assert (await ended(controller))["stage"] == "live"
        assert parts.mirrors[0].position == WRITES


async def test_writes_that_cannot_all_be_brought_over_keep_it_from_going_live(
    store: Store,  # noqa: F811
    parts: FakeParts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def half(self: FakeMirror, final: tuple[int, ...], timeout_s: float) -> MirrorProgress:
        return MirrorProgress(positions=(WRITES, WRITES - 7), ends=final)

    monkeypatch.setattr(FakeMirror, "drain", half)
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        done = await ended(controller)
        assert done["stage"] == "failed"
        assert "in 3 attempts; got 7 writes were not brought over" in done["reason"]["text"]
        await until(lambda: is_written(controller), timeout=5)
        assert live(controller) == 57
        assert controller._placement.sealing is None


async def test_without_writes_nothing_is_brought_over(store: Store, parts: FakeParts) -> None:  # noqa: F811
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3, with_writes=False))
        assert (await ended(controller))["stage"] == "live"
        assert [(each.source, each.target) for each in parts.mirrors] == [(3, 57)]
        assert parts.parted == [(57, 3)]


@pytest.mark.parametrize("is_ended", [True, False])
async def test_what_is_kept_goes_live_without_writes_only_when_its_mirror_has_ended(
    store: Store,  # noqa: F811
    parts: FakeParts,
    monkeypatch: pytest.MonkeyPatch,
    is_ended: bool,
) -> None:
    """Else that would go on writing to it."""
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        await ended(controller)
        await until(lambda: len(parts.mirrors) == 2)

        async def hangs(self: FakeMirror) -> None:
            await asyncio.Event().wait()

        if not is_ended:
            monkeypatch.setattr(FakeMirror, "stop", hangs)
            monkeypatch.setattr(mirrors, "STOP_S", 0.05)
        await controller.publish(PublishOptions(generation=57, with_writes=False))
        done = await ended(controller)
        if is_ended:
            assert (done["stage"], live(controller)) == ("live", 57)
            assert parts.parted == [(3, 57)]
            await until(lambda: len(parts.mirrors) == 3)
            assert (parts.mirrors[2].source, parts.mirrors[2].target) == (57, 3)
        else:
            assert (done["stage"], live(controller), parts.parted) == ("failed", 3, [])
            assert done["reason"]["code"] == "unavailable"
            assert "does not end; expected within 0.05 s" in done["reason"]["text"]
            await until(lambda: len(parts.mirrors) == 3)
            assert (parts.mirrors[2].source, parts.mirrors[2].target) == (3, 57), "as before"


async def test_nothing_is_parted_before_writes_are_held_and_a_store_that_takes_no_note_stops_it(
    store: Store,  # noqa: F811
    parts: FakeParts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with cluster(store) as controller:
        seals = []

        async def part() -> None:
            seals.append(controller._placement.sealing)
            raise OSError(28, "No space left on device")

        async def parting(live: RoutingTable, candidate: RoutingTable) -> Any:
            return part

        monkeypatch.setattr(parts, "parting", parting)
        await controller.publish(PublishOptions(generation=3, with_writes=False))
        done = await ended(controller)
        assert done["stage"] == "failed"
        assert "no space left on the disk" in done["reason"]["text"]
        assert len(seals) == 1 and all(each.seq == WRITES for each in seals[0].values())
        assert (live(controller), store.current()) == (57, 57)


async def test_one_that_is_apart_is_returned_to_by_a_rollback_alone(
    store: Store,  # noqa: F811
    parts: FakeParts,
) -> None:
    parts.is_apart = True
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3, with_writes=False))
        await ended(controller)
        await controller.publish(PublishOptions(generation=57))
        done = await ended(controller)
        assert (done["stage"], done["reason"]["code"]) == ("failed", "gate_failed")
        assert "generation 3 went live without the writes of 57" in done["reason"]["text"]
        assert (await controller.report())["beside"]["generation"] == 57, "it stays"
        await controller.roll_back()
        assert (await ended(controller))["stage"] == "live"
        assert live(controller) == 57


async def test_one_that_gets_no_writes_does_not_go_live_as_if_it_had_them(
    store: Store,  # noqa: F811
    parts: FakeParts,
) -> None:
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        await ended(controller)
        fleet = controller._fleet
        assert fleet.beside is not None
        controller._decisions.fleet = replace(
            fleet, beside=replace(fleet.beside, is_mirrored=False)
        )
        await controller.roll_back()
        done = await ended(controller)
        assert (done["stage"], live(controller)) == ("failed", 3)
        assert "57 is not brought the writes of the live one; " in done["reason"]["text"]


@pytest.mark.parametrize("stage", ["loading", "gate", "switched", "kept"])
async def test_a_controller_that_dies_in_the_middle_goes_on(
    store: Store,  # noqa: F811
    parts: FakeParts,
    killed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    """It is killed as Ray's actors are: nothing is done at its end."""
    parts.gate_open.clear()
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        if stage == "loading":
            await until(lambda: controller._fleet.beside is not None)
        else:
            await until(lambda: at(controller) == "gate", timeout=5)
        if stage in ("switched", "kept"):
            if stage == "switched":  # CURRENT is set, and nothing else is on record
                monkeypatch.setattr(publish_note.PublishNote, "keep", lambda self, noted: None)
            parts.gate_open.set()
            await until(lambda: store.current() == 3, timeout=5)
            if stage == "kept":
                await until(lambda: at(controller) == "live", timeout=5)
        controller._tasks.cancel()
        monkeypatch.setattr(controller, "close", nothing)
    assert killed == []
    parts.gate_open.set()
    if stage == "switched":
        monkeypatch.setattr(publish_note.PublishNote, "keep", KEEP)
    async with cluster(store) as again:
        assert (await ended(again))["stage"] == "live"
        assert (live(again), store.current()) == (3, 3)
        assert killed == [], "every process was found"
        beside = (await again.report())["beside"]
        assert (beside["generation"], beside["role"]) == (57, "kept")
        await until(lambda: is_written(again), timeout=5)
        running = {(each.source, each.target) for each in parts.mirrors if not each.is_stopped}
        assert running == {(3, 57)}, "with one in each direction writes would go round"


async def test_what_is_kept_by_a_controller_that_died_gets_the_writes_whatever_was_published(
    store: Store,  # noqa: F811
    parts: FakeParts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CURRENT is set, and nothing else is on record."""
    parts.gate_open.clear()
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3, with_writes=False))
        await until(lambda: at(controller) == "gate", timeout=5)
        monkeypatch.setattr(publish_note.PublishNote, "keep", lambda self, noted: None)
        parts.gate_open.set()
        await until(lambda: store.current() == 3, timeout=5)
        controller._tasks.cancel()
        monkeypatch.setattr(controller, "close", nothing)
    monkeypatch.setattr(publish_note.PublishNote, "keep", KEEP)
    async with cluster(store) as again:
        assert (await ended(again))["stage"] == "live"
        await until(lambda: is_written(again), timeout=5)
        running = {(each.source, each.target) for each in parts.mirrors if not each.is_stopped}
        assert running == {(3, 57)}
        await again.roll_back()
        assert (await ended(again))["stage"] == "live"
        assert sum(each.drained for each in parts.mirrors if each.source == 3) == 1


KEEP = publish_note.PublishNote.keep


async def nothing() -> None:
    return


def at(controller: Controller) -> str:
    progress = controller._publishing.progress
    return "" if progress is None else str(progress["stage"])


async def test_a_publish_that_kills_its_controllers_is_given_up(
    store: Store,  # noqa: F811
    parts: FakeParts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts.gate_open.clear()
    for _ in range(publishing.CONTROLLERS):
        async with cluster(store) as controller:
            if at(controller) == "":
                await controller.publish(PublishOptions(generation=3))
            await until(lambda: at(controller) == "gate", timeout=5)
            controller._tasks.cancel()
            monkeypatch.setattr(controller, "close", nothing)
    async with cluster(store) as controller:
        done = await ended(controller)
        assert done["stage"] == "failed"
        assert "the controller died 3 times" in done["reason"]["text"]
        assert live(controller) == 57
        assert controller._fleet.beside is None
        assert all(each.is_stopped for each in parts.mirrors)


async def test_what_is_kept_ends_in_time_or_when_it_is_told_to(
    store: Store,  # noqa: F811
    parts: FakeParts,
    killed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with cluster(store) as controller:
        assert await controller.finish_publish() is None
        await controller.publish(PublishOptions(generation=3))
        await ended(controller)
        assert await controller.finish_publish() == 57
        await until(lambda: len(killed) == SHARDS)
        assert all(name.startswith("shardline-shard-57-") for name in killed)
        assert (await controller.report())["beside"] is None
        await until(lambda: parts.mirrors[-1].is_stopped)
        parts.failed = True
        await controller.publish(PublishOptions(generation=57))
        assert (await ended(controller))["stage"] == "failed"
        parts.judged.clear()
        begun = await controller.roll_back()
        assert begun["generation"] == 57, "it is loaded first"
        assert (await ended(controller))["stage"] == "live"
        assert parts.judged == []
        controller._tasks.cancel()
        monkeypatch.setattr(controller, "close", nothing)
    killed.clear()
    async with cluster(store, publish=PublishConfig(keep_s=0.0)) as controller:
        await until(lambda: len(killed) == SHARDS, timeout=5)
        assert all(name.startswith("shardline-shard-3-") for name in killed)


@pytest.mark.parametrize("stage", ["checking", "gate", "switching"])
async def test_one_that_is_stopped_leaves_the_live_generation_as_it_is(
    store: Store,  # noqa: F811
    parts: FakeParts,
    killed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    hangs = asyncio.Event()

    async def drain(self: FakeMirror, final: tuple[int, ...], timeout_s: float) -> MirrorProgress:
        await hangs.wait()
        raise AssertionError

    monkeypatch.setattr(FakeMirror, "drain", drain)
    if stage == "gate":
        parts.gate_open.clear()
    async with cluster(store) as controller:
        assert await controller.stop_publish() is None
        await controller.publish(PublishOptions(generation=3))
        await until(lambda: at(controller) == stage, timeout=5)
        if stage == "switching":
            await until(lambda: controller._placement.sealing is not None, timeout=5)
        stopped = await controller.stop_publish()
        assert stopped is not None
        assert (stopped["stage"], stopped["reason"]["text"]) == ("failed", "somebody stopped it")
        assert (live(controller), store.current()) == (57, 57)
        await until(lambda: is_written(controller), timeout=5)
        assert controller._fleet.beside is None
        assert all(each.is_stopped for each in parts.mirrors)
        assert await controller.stop_publish() == stopped


async def test_what_cannot_begin_is_refused(store: Store, parts: FakeParts) -> None:  # noqa: F811
    async with cluster(store) as controller:
        with pytest.raises(InvalidInput, match="generation 57 is live already"):
            await controller.publish(PublishOptions(generation=57))
        with pytest.raises(NotFound, match="no generation 4; expected one of 3, 57"):
            await controller.publish(PublishOptions(generation=4))
        with pytest.raises(NotFound, match="live before generation 57"):
            await controller.roll_back()
        parts.gate_open.clear()
        await controller.publish(PublishOptions(generation=3))
        with pytest.raises(Unavailable, match=r"a publish of generation 3 is under way.*--stop"):
            await controller.publish(PublishOptions(generation=3))
        with pytest.raises(Unavailable, match="under way"):
            await controller.finish_publish()
        with pytest.raises(Unavailable, match="under way"):
            await controller.restart_rolling()
        parts.gate_open.set()
        await ended(controller)
    async with cluster(store, generation=3) as pinned:
        with pytest.raises(InvalidInput, match="serves generation 3 for as long as it runs"):
            await pinned.publish(PublishOptions(generation=57))


async def test_a_generation_without_room_is_refused_with_the_arithmetic(
    store: Store,  # noqa: F811
    parts: FakeParts,
) -> None:
    async with cluster(store, cpus_per_shard=0.75) as controller:
        with pytest.raises(Unavailable, match=r"each of which reserves 0\.75 CPUs") as error:
            await controller.publish(PublishOptions(generation=3))
        assert "has no room beside the live one" in str(error.value)


@pytest.mark.parametrize("code", [NotFound.code, VersionMismatch.code])
async def test_writes_that_are_lost_to_the_mirror_fail_it_at_once(
    store: Store,  # noqa: F811
    parts: FakeParts,
    code: str,
) -> None:
    parts.trouble = Absence(code, "shard 1: the log begins at write 900, not at 12")
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        done = await ended(controller)
        assert done["reason"]["text"] == "shard 1: the log begins at write 900, not at 12"


async def test_a_mirror_that_dies_is_waited_for_and_then_given_up(
    store: Store,  # noqa: F811
    parts: FakeParts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = FakeMirror.progress
    deaths = [RayActorError(), Unavailable("not yet"), TimeoutError()]

    async def dies(self: FakeMirror) -> MirrorProgress:
        if deaths:
            raise deaths.pop()
        return await answers(self)

    monkeypatch.setattr(FakeMirror, "progress", dies)
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        assert (await ended(controller))["stage"] == "live"
        deaths += [RayActorError()] * 10_000
        monkeypatch.setattr(publish_run, "TROUBLE_S", 0.05)
        await controller.roll_back()
        done = await ended(controller)
        assert done["stage"] == "failed"
        assert "the mirror does not answer" in done["reason"]["text"]
        assert live(controller) == 3
        report = await controller.report()
        assert report["beside"]["generation"] == 57, "a rollback that fails ends nothing"


async def test_a_mirror_that_can_never_begin_is_not_waited_for(
    store: Store,  # noqa: F811
    parts: FakeParts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def cannot(self: FakeMirror) -> MirrorProgress:
        raise raised_in_a_method(WritesLost("too old", hint="build again"))

    monkeypatch.setattr(FakeMirror, "progress", cannot)
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        assert (await ended(controller))["reason"]["text"] == "too old; build again"


async def test_one_that_dies_during_the_switch_costs_an_attempt(
    store: Store,  # noqa: F811
    parts: FakeParts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drains = FakeMirror.drain
    deaths: list[Exception] = [RayActorError()]

    async def dies(self: FakeMirror, final: tuple[int, ...], timeout_s: float) -> MirrorProgress:
        if deaths:
            raise deaths.pop()
        return await drains(self, final, timeout_s)

    monkeypatch.setattr(FakeMirror, "drain", dies)
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        done = await ended(controller)
        assert done["stage"] == "live"
        assert deaths == []


async def test_a_candidate_that_takes_no_writes_does_not_go_live(
    store: Store,  # noqa: F811
    parts: FakeParts,
    monkeypatch: pytest.MonkeyPatch,
    alive: dict[str, Handle],  # noqa: F811
) -> None:
    refused = raised_in_a_method(ReadOnly("the store is mounted read-only"))
    async with cluster(store, load_limit_s=0.2) as controller:
        monkeypatch.setattr(
            LeadMethod, "remote", lambda self, *arguments: Method._outcome(self, refused)
        )
        await controller.publish(PublishOptions(generation=3))
        done = await ended(controller)
        assert "not every shard of generation 3 takes writes" in done["reason"]["text"]
        assert "read-only" in done["reason"]["text"]


async def test_the_mirror_and_the_gate_get_the_tables_of_both(
    store: Store,  # noqa: F811
    parts: FakeParts,
) -> None:
    async with cluster(store) as controller:
        with pytest.raises(Unavailable, match="expected one of generation 57"):
            await controller.table_of(3, 0, 0.01)
        parts.gate_open.clear()
        await controller.publish(PublishOptions(generation=3))
        await until(lambda: at(controller) == "gate", timeout=5)
        table = await controller.table_of(3, 0, 1.0)
        assert table is not None
        assert all(shard.primary is not None for shard in table.shards)
        assert await controller.table_of(3, table.version, 0.01) is None
        key = ReplicaKey(3, 0)
        assert await controller.register_replica(key=key, address=("127.0.0.1", 1), leads=None)
        newer = await controller.table_of(3, table.version, 1.0)
        assert newer is not None
        assert newer.version > table.version
        parts.gate_open.set()
        await ended(controller)


async def test_a_note_that_is_damaged_is_logged_and_nothing_is_kept(
    store: Store,  # noqa: F811
    parts: FakeParts,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        await ended(controller)
        assert publish_note.in_use_in(store.root).beside == 57
    assert publish_note.in_use_in(store.root).beside is None, "it has ended with the cluster"
    (store.root / publish_note.NAME).write_bytes(b"{")
    async with cluster(store) as controller:
        assert controller._fleet.beside is None
        assert live(controller) == 3
    assert "nothing is known of a publish" in caplog.text
