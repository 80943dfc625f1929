"""The controller has one replica of each shard take writes; the shard actors are stand-ins."""

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from shardline.cluster.control import orders, reconcile, replacing, shard_actors
from shardline.cluster.control.controller import Controller
from shardline.cluster.store import Store
from shardline.shards.core.errors import NotPrimary, ReadOnly, StoreFull
from shardline.shards.core.messages import Absence, Pulse, ReplicaKey
from tests.fake_actor import HANG, Handle, raised_in_a_method
from tests.fake_shard import until
from tests.unit.test_controller import (  # noqa: F401 - fixtures
    SHARDS,
    alive,
    made,
    register_placed,
    running,
    store,
    two_hosts,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, alive: dict[str, Handle]) -> None:  # noqa: F811
    """On two hosts; what is looked at every second is looked at every hundredth."""
    two_hosts(monkeypatch)
    monkeypatch.setattr(orders, "RETRY_S", 0.01)
    monkeypatch.setattr(replacing, "FIRST_RETRY_S", 0.01)


def primaries(controller: Controller) -> list[int | None]:
    """By the newest table."""
    table = controller._decisions.published
    return [None] * SHARDS if table is None else [shard.primary for shard in table.shards]


def notes(controller: Controller) -> list[tuple[str, str]]:
    table = controller._decisions.published
    return [] if table is None else [(note.code, note.text) for note in table.notes]


def handle_of(alive: dict[str, Handle], shard: int, replica: int) -> Handle:  # noqa: F811
    (name,) = (name for name in alive if f"-57-{shard}-{replica}-" in name)
    return alive[name]


async def placed(controller: Controller, alive: dict[str, Handle]) -> None:  # noqa: F811
    await until(lambda: len(controller._shards.placed) == 2 * SHARDS)


async def led(controller: Controller, alive: dict[str, Handle]) -> None:  # noqa: F811
    """All replicas answer, and the first of each shard leads."""
    await placed(controller, alive)
    await register_placed(controller)
    await until(lambda: primaries(controller) == [0] * SHARDS)


async def test_the_first_replica_of_each_shard_is_asked_with_an_epoch_that_is_saved(
    store: Store,  # noqa: F811
    alive: dict[str, Handle],  # noqa: F811
) -> None:
    async with running(store, replicas=2) as controller:
        await led(controller, alive)
        assert await controller.wait_ready(1) == 57
        asked = [handle_of(alive, shard, 0).lead.asked for shard in range(SHARDS)]
        epochs = [int(str(epoch)) for ((epoch,),) in asked]
        assert len(set(epochs)) == SHARDS
        assert max(epochs) <= store.counter()
        assert [handle_of(alive, shard, 1).lead.calls for shard in range(SHARDS)] == [0, 0]
        report = await controller.report()
        assert report["shards"] == [
            {"shard": shard, "primary": 0, "primary_epoch": epochs[shard]}
            for shard in range(SHARDS)
        ]


async def test_without_writes_nobody_is_asked(
    store: Store,  # noqa: F811
    alive: dict[str, Handle],  # noqa: F811
) -> None:
    async with running(store, replicas=2, writes=False) as controller:
        await placed(controller, alive)
        await register_placed(controller)
        await until(lambda: all(handle.ping.calls > 2 for handle in alive.values()))
        assert [handle.lead.calls for handle in alive.values()] == [0] * 2 * SHARDS
        report = await controller.report()
        assert (report["writes"], report["notes"]) == (False, [])


async def test_a_dead_leader_is_followed_by_the_other_replica(
    store: Store,  # noqa: F811
    alive: dict[str, Handle],  # noqa: F811
) -> None:
    async with running(store, replicas=2) as controller:
        await led(controller, alive)
        handle_of(alive, 0, 0).ping.plan = [ActorDiedError()]
        await until(lambda: primaries(controller) == [1, 0])
        ((first,),) = handle_of(alive, 0, 0).lead.asked
        ((second,),) = handle_of(alive, 0, 1).lead.asked
        assert int(str(second)) > int(str(first))


@pytest.mark.parametrize("kind", [ReadOnly, StoreFull])
async def test_a_log_that_cannot_be_written_keeps_nobody_from_serving_and_is_told(
    store: Store,  # noqa: F811
    alive: dict[str, Handle],  # noqa: F811
    kind: type[ReadOnly],
) -> None:
    async with running(store, replicas=2) as controller:
        await placed(controller, alive)
        for handle in alive.values():
            handle.lead.plan = [raised_in_a_method(kind("the log cannot be written"))] * 1000
        await register_placed(controller)
        assert await controller.wait_ready(5) == 57
        text = "writes to shards 0, 1 are refused: the log cannot be written"
        await until(lambda: notes(controller) == [(kind.code, text)])
        assert primaries(controller) == [None] * SHARDS
        assert (await controller.report())["notes"] == [{"code": kind.code, "text": text}]
        await until(lambda: all(handle.lead.calls > 1 for handle in alive.values()))
        for handle in alive.values():
            handle.lead.plan.clear()
        await until(lambda: None not in primaries(controller))
        await until(lambda: notes(controller) == [])


async def test_one_that_does_not_answer_in_time_is_passed_over(
    store: Store,  # noqa: F811
    alive: dict[str, Handle],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_actors, "LEAD_TIMEOUT_S", 0.05)
    async with running(store, replicas=2) as controller:
        await placed(controller, alive)
        handle_of(alive, 0, 0).lead.plan = [HANG] * 1000
        await register_placed(controller)
        await until(lambda: primaries(controller) == [1, 0])


async def test_a_leader_says_when_it_takes_no_writes_and_when_it_has_lost_the_lead(
    store: Store,  # noqa: F811
    alive: dict[str, Handle],  # noqa: F811
) -> None:
    async with running(store, replicas=2) as controller:
        await led(controller, alive)
        ping = handle_of(alive, 1, 0).ping
        well = ping.then
        ping.then = Pulse(pid=1, seq=9, leads=well.leads, refused=Absence("store_full", "full"))
        await until(
            lambda: notes(controller) == [("store_full", "writes to shard 1 are refused: full")]
        )
        assert primaries(controller) == [0, 0], "it recovers by itself"
        ping.then = well
        await until(lambda: notes(controller) == [])
        ping.then = Pulse(pid=1, seq=9)
        await until(lambda: primaries(controller) == [0, 1])


async def test_a_restarted_controller_leaves_the_lead_where_it_is(
    store: Store,  # noqa: F811
    alive: dict[str, Handle],  # noqa: F811
) -> None:
    async with running(store, replicas=2) as controller:
        await led(controller, alive)
        handle_of(alive, 0, 0).ping.plan = [ActorDiedError()]
        await until(lambda: primaries(controller) == [1, 0])
    calls = [handle.lead.calls for handle in alive.values()]
    async with running(store, replicas=2) as controller:
        await placed(controller, alive)
        for key in list(controller._placement.replicas):
            leads = handle_of(alive, key.shard, key.replica).ping.then.leads
            if key == ReplicaKey(57, 0, 0):
                leads = None  # its process is a new one
            await controller.register_replica(key=key, address=("h", 1), leads=leads)
        await until(lambda: primaries(controller) == [1, 0])
        assert [handle.lead.calls for handle in alive.values()] == calls


async def test_a_full_disk_does_not_lose_the_answer_of_who_was_asked(
    store: Store,  # noqa: F811
    alive: dict[str, Handle],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running(store, replicas=2) as controller:
        await placed(controller, alive)
        refused: list[int] = []
        may_answer = asyncio.Event()

        async def lead(key: ReplicaKey, epoch: int) -> Any:
            await may_answer.wait()
            return shard_actors.Leading(key=key, epoch=epoch, seq=0)

        def full(self: Store, number: int, guard: object) -> None:
            refused.append(number)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(controller._shards, "lead", lead)
        await register_placed(controller)
        with monkeypatch.context() as disk:
            disk.setattr(Store, "raise_counter", full)
            may_answer.set()
            await until(lambda: len(refused) > 3)
            assert primaries(controller) == [None] * SHARDS
        await until(lambda: primaries(controller) == [0] * SHARDS)


async def test_a_rolling_restart_never_leaves_a_shard_without_a_leader(
    store: Store,  # noqa: F811
    alive: dict[str, Handle],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconcile, "OVERLAP_S", 0.0)
    monkeypatch.setattr(reconcile, "DRAIN_S", 0.0)
    async with running(store, replicas=2) as controller:
        await led(controller, alive)
        seen: list[list[int | None]] = []
        await controller.restart_rolling()
        while True:
            await register_placed(controller)
            seen.append(primaries(controller))
            progress = await controller.restart_progress()
            assert progress is not None
            if progress["is_over"]:
                break
            await asyncio.sleep(0.002)
        assert all(None not in each for each in seen)
        assert min(number or 0 for number in primaries(controller)) >= 2


async def test_a_replica_whose_log_has_a_higher_epoch_tells_it_and_is_asked_above_it(
    store: Store,  # noqa: F811
    alive: dict[str, Handle],  # noqa: F811
) -> None:
    async with running(store) as controller:
        await until(lambda: len(controller._shards.placed) == SHARDS)
        handle = handle_of(alive, 0, 0)
        handle.lead.plan = [raised_in_a_method(NotPrimary("the log has epoch 5000"))]
        await register_placed(controller)
        await until(lambda: handle.announce.calls == 1)
        await controller.register_replica(key=ReplicaKey(57, 0), address=("h", 1), epoch=5000)
        await until(lambda: primaries(controller) == [0, 0])
        assert int(str(handle.lead.asked[-1][0])) > 5000
        assert store.counter() > 5000


async def test_the_report_tells_what_replicas_have_applied(
    store: Store,  # noqa: F811
    alive: dict[str, Handle],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running(store, replicas=2) as controller:
        await led(controller, alive)
        primary, follower = (handle_of(alive, 0, replica).ping for replica in range(2))
        primary.then = Pulse(pid=1, seq=100, leads=primary.then.leads)
        follower.then = Pulse(pid=1, seq=93)
        report: dict[str, Any] = {}
        while [each["lag"] for each in report.get("replicas", ())][:2] != [0, 7]:
            await asyncio.sleep(0.01)
            report = await controller.report()
        assert [each["seq"] for each in report["replicas"]] == [100, 93, 0, 0]
