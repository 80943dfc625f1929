"""The controller's shell over a store and stand-ins for its shard actors: no Ray runs here."""

import asyncio
import hashlib
import json
import os
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

from shardline.cluster.control import controller as module
from shardline.cluster.control import news, opening, reconcile, replacing, restart_note, watch
from shardline.cluster.control.controller import Controller, ControllerSettings
from shardline.cluster.control.hosts import Host
from shardline.cluster.control.start import wait_ready
from shardline.cluster.rollover.mirror_actor import MIRROR_PREFIX
from shardline.cluster.store import Store
from shardline.router.limits import resolve
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core import files
from shardline.shards.core.encoder_files import CONFIG
from shardline.shards.core.errors import CorruptFile, DataError, ShardlineError, Unavailable
from shardline.shards.core.messages import (
    Absence,
    Quality,
    ReplicaKey,
    RouterNews,
    RouterSeen,
    RoutingTable,
    ShardHealth,
)
from shardline.shards.core.partition import Partitioning
from shardline.shards.storage.generation import write_generation
from tests.engine import build_generation
from tests.fake_actor import Handle, raised_in_a_method, raised_in_the_constructor
from tests.fake_shard import SECRET, FakeShard, make_rows, running_shards, until

SHARDS = 2
HOSTS = (Host(node_id="na", address="10.0.0.1", cpus=2),)
IDS, VECTORS = make_rows(20, 4)
FAST = RouterConfig(backoff_base_ms=1, backoff_max_ms=5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generations 3 and 57 of one store."""
    store = Store(tmp_path_factory.mktemp("made"))
    for number in (3, 57):
        folder = store.generation(number)
        folder.mkdir(parents=True)
        manifest = build_generation(folder, VECTORS, IDS, SHARDS, kind="flat")
        write_generation(folder, replace(manifest, generation=number))
    return store.root


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    """With those generations, of which 57 is live and has given out 57 numbers."""
    store = Store(tmp_path)
    (tmp_path / "generations").symlink_to(made / "generations")
    store.set_current(57)
    files.write_json(tmp_path / "epochs" / "000057.json", {"counter": 57})  # an older version's
    return store


@pytest.fixture(autouse=True)
def alive(monkeypatch: pytest.MonkeyPatch) -> dict[str, Handle]:
    """Every shard actor that is looked for is found alive here, by its name; there is no mirror."""
    found: dict[str, Handle] = {}

    def get_actor(name: str) -> Handle:
        if name.startswith(MIRROR_PREFIX):
            raise ValueError(name)
        return found.setdefault(name, Handle())

    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(ray.util, "list_named_actors", lambda: list(found))
    monkeypatch.setattr(ray, "kill", lambda handle: None)
    ray_says(monkeypatch, HOSTS)
    return found


def ray_says(monkeypatch: pytest.MonkeyPatch, hosts: Sequence[Host]) -> None:
    """These hosts live, from now on."""
    for user in (watch, opening):
        monkeypatch.setattr(user, "fresh_hosts", lambda known=(): tuple(hosts))


def settings(store: Store, generation: int | None, **changes: Any) -> ControllerSettings:
    plain = {"shard_host": "127.0.0.1", "threads_per_shard": 1, "huge_pages": False}
    reserved = {"cpus_per_shard": 0, "gpus_per_shard": 0}
    return ControllerSettings(
        store=str(store.root),
        generation=generation,
        secret=SECRET,
        **(plain | reserved | changes),
    )


@asynccontextmanager
async def running(
    store: Store, generation: int | None = None, **changes: Any
) -> AsyncIterator[Controller]:
    """A controller, from its constructor, which Ray runs again at a restart, to its end."""
    controller = Controller(settings(store, generation, **changes))
    try:
        yield controller
    finally:
        await controller.close()


async def register(controller: Controller, generation: int) -> RoutingTable:
    """Every shard announces itself; the table that is published then."""
    await until(lambda: len(controller._shards.placed) >= SHARDS)
    for shard in range(SHARDS):
        key = ReplicaKey(generation, shard)
        epoch = await controller.register_replica(key=key, address=("127.0.0.1", 1000 + shard))
        assert epoch > 0
    table = await controller.table_after(0, 1)
    assert table is not None
    return table


async def announce(controller: Controller, shards: list[FakeShard]) -> None:
    for shard in shards:
        address = ("127.0.0.1", shard.port)
        shard.epoch = await controller.register_replica(key=shard.key, address=address)


async def test_generation_3_after_generation_57_reaches_a_router(store: Store) -> None:
    service = SearchService(FAST, SECRET, load_encoder=lambda table: None)
    query = resolve(FAST, vectors=VECTORS[:1].tolist(), k=3)
    async with (
        running_shards(IDS, VECTORS, SHARDS, generation=57) as old,
        running_shards(IDS, VECTORS, SHARDS, generation=3) as new,
    ):
        async with running(store) as controller:
            await announce(controller, old)
            table = await controller.table_after(0, 1)
            assert table is not None
            assert await service.apply(table)
        assert table.version > 57
        store.set_current(3)
        async with running(store) as controller:
            assert await controller.table_after(table.version, 0.01) is None, "not heard of yet"
            await announce(controller, new)
            newer = await controller.table_after(table.version, 1)
            assert newer is not None
            assert await service.apply(newer)
        answer = await service.search(query, arrived_at=asyncio.get_running_loop().time())
        assert (answer.generation, answer.coverage.share) == (3, 1.0)
        await service.close()
    lowest = min(route.epoch for shard in newer.shards for route in shard.replicas)
    assert lowest > table.version, "epochs rise across generations too"


async def test_a_restarted_controller_serves_what_is_live_then(store: Store) -> None:
    async with running(store) as controller:
        assert (await register(controller, 57)).generation == 57
        assert await controller.wait_ready(1) == 57
    store.set_current(3)
    async with running(store) as controller:
        with pytest.raises(Unavailable, match="not being served; expected one of generation 3"):
            await controller.register_replica(key=ReplicaKey(57, 0), address=("127.0.0.1", 1))
        assert (await register(controller, 3)).generation == 3
        assert await controller.wait_ready(1) == 3


async def test_a_controller_started_for_one_generation_stays_with_it(store: Store) -> None:
    store.set_current(3)
    for _ in range(2):
        async with running(store, generation=57) as controller:
            assert (await register(controller, 57)).generation == 57


async def test_the_table_carries_the_boundaries_of_the_shards(store: Store) -> None:
    async with running(store) as controller:
        table = await register(controller, 57)
    assert table.partitioning is Partitioning.RANGE
    np.testing.assert_array_equal(table.partition.shard_of(IDS), np.repeat([0, 1], 10))


async def test_no_number_is_seen_before_it_is_saved(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for _ in range(3):  # killed each time: nothing is saved at the end
        async with running(store) as controller:
            table = await register(controller, 57)
            numbers = [route.epoch for shard in table.shards for route in shard.replicas]
            assert max(*numbers, table.version) <= Store(store.root).counter()
            seen += [*numbers, table.version]
    epochs = seen[0::3] + seen[1::3]
    assert len(set(epochs)) == len(epochs), "no epoch is given out twice"
    assert sorted(seen[2::3]) == seen[2::3]

    def full(self: Store, number: int, guard: object) -> None:
        raise OSError(28, "No space left on device")

    async with running(store) as controller:
        monkeypatch.setattr(Store, "raise_counter", full)
        with pytest.raises(OSError, match="No space"):
            await register(controller, 57)
        assert await controller.table_after(0, 0.01) is None


async def test_shards_of_a_replaced_generation_end_once_the_new_one_answers(
    store: Store, alive: dict[str, Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[Any] = []
    async with running(store) as controller:
        await until(lambda: len(alive) == SHARDS)
        await register(controller, 57)
    old = list(alive.values())
    monkeypatch.setattr(module, "RETIRE_AFTER_S", 0)
    monkeypatch.setattr(ray, "kill", killed.append)
    store.set_current(3)
    async with running(store) as controller:
        await until(lambda: len(alive) == 2 * SHARDS)
        for _ in range(10):
            await asyncio.sleep(0)
        assert killed == [], "the older ones serve until the new ones do"
        await register(controller, 3)
        await until(lambda: len(killed) > 0)
        assert killed == old


@pytest.mark.parametrize("kind", [CorruptFile, Unavailable])
async def test_a_replica_that_cannot_load_ends_the_wait_with_its_code(
    store: Store,
    alive: dict[str, Handle],
    monkeypatch: pytest.MonkeyPatch,
    kind: type[ShardlineError],
) -> None:
    monkeypatch.setattr(watch, "WATCH_INTERVAL_S", 0.01)
    async with running(store) as controller:
        await until(lambda: len(alive) == SHARDS)
        (name,) = (name for name in alive if name.startswith("shardline-shard-57-1-0-"))
        alive[name].ping.plan = [raised_in_the_constructor(kind("index.faiss: odd"))]
        alive[name.replace("57-1-0", "57-0-0")].describe.plan = [{"rows": 10}]
        with pytest.raises(kind, match=r"^shard 1: index\.faiss: odd$"):
            await controller.wait_ready(5)
        first, second = await controller.shard_reports()
    assert first == {"generation": 57, "shard": 0, "replica": 0, "failures": 0, "rows": 10}
    assert second == {
        "generation": 57,
        "shard": 1,
        "replica": 0,
        "failures": 1,
        "reason": {"code": kind.code, "text": "index.faiss: odd"},
    }


async def test_a_full_disk_does_not_lose_the_failure_of_a_replica(
    store: Store, alive: dict[str, Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "WATCH_INTERVAL_S", 0.01)
    async with running(store) as controller:
        await until(lambda: len(alive) == SHARDS)
        await register(controller, 57)
        (name,) = (name for name in alive if name.startswith("shardline-shard-57-1-0-"))
        refused = []

        def full(self: Store, number: int, guard: object) -> None:
            refused.append(number)
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as disk:
            disk.setattr(Store, "raise_counter", full)
            alive[name].ping.plan = [ActorDiedError()] * 1000
            await until(lambda: len(refused) > 3)
        await until(lambda: controller._placement.replicas[ReplicaKey(57, 1)].failures == 1)
        table = await controller.table_after(0, 1)
    assert table is not None
    assert [route.absence is None for s in table.shards for route in s.replicas] == [True, False]


async def test_a_counter_that_cannot_be_saved_is_told_at_once_and_until_it_can(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = SearchService(FAST, SECRET, load_encoder=lambda table: None)
    async with running(store) as controller:
        assert await controller.trouble_after(None, 0.01) is None
        waiting = asyncio.ensure_future(controller.wait_ready(60))
        told = asyncio.ensure_future(controller.trouble_after(None, 60))
        await asyncio.sleep(0)
        with monkeypatch.context() as disk:
            disk.setattr(files, "write_json", refuse_to_write)
            with pytest.raises(OSError, match="Read-only"):
                await register(controller, 57)
            with pytest.raises(DataError, match=r"cannot save its counter.*a read"):
                await asyncio.wait_for(waiting, 5)
        service.controller_trouble = trouble = await asyncio.wait_for(told, 5)
        assert trouble is not None
        assert trouble.code == DataError.code
        assert await controller.trouble_after(trouble, 0.01) == trouble
        mended = asyncio.ensure_future(controller.trouble_after(trouble, 60))
        table = await register(controller, 57)
        assert await asyncio.wait_for(mended, 5) is None
        assert await controller.wait_ready(5) == 57
    await service.apply(table)
    assert {"about": "controller", "code": trouble.code, "text": trouble.text} in service.status()[
        "warnings"
    ]
    await service.close()


def refuse_to_write(path: Path, value: object) -> None:
    raise OSError(30, "Read-only file system", "/s/counter.json")


async def test_when_the_time_is_up_those_that_do_not_answer_are_named_with_their_hosts(
    store: Store, alive: dict[str, Handle]
) -> None:
    async with running(store) as controller:
        key = ReplicaKey(57, 0)
        await controller.register_replica(key=key, address=("127.0.0.1", 1000))
        with pytest.raises(Unavailable) as caught:
            await controller.wait_ready(0.01)
    assert str(caught.value).startswith(
        "shards did not become ready; expected within 0.01 s; got no answer from shard 1, "
        "replica 0 on 10.0.0.1; give it longer"
    )


async def test_the_secret_can_be_had_from_the_controller(store: Store) -> None:
    async with running(store) as controller:
        assert await controller.connection_secret() == SECRET


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (raised_in_a_method(CorruptFile("shard 1: x: cut")), CorruptFile, "shard 1: x: cut"),
        (raised_in_a_method(Unavailable("shard 1: busy")), Unavailable, "shard 1: busy"),
        (raised_in_the_constructor(CorruptFile("y: cut")), CorruptFile, "y: cut"),
        (ActorDiedError(), Unavailable, "the controller does not answer: The actor died.*"),
        (GetTimeoutError("slow"), Unavailable, "the controller does not answer: slow"),
    ],
)
def test_waiting_from_outside_raises_by_code(
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    kind: type[ShardlineError],
    text: str,
) -> None:
    class Remote:
        class wait_ready:  # noqa: N801 - a method of the actor
            remote = staticmethod(lambda timeout_s: None)

    def get(reference: object, timeout: float) -> None:
        assert timeout > 3
        raise raised

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(ShardlineError, match=f"^{text}$") as caught:
        wait_ready(Remote(), 3)  # type: ignore[arg-type]
    assert type(caught.value) is kind


LOST = {
    "damaged": lambda path: path.write_bytes(b"{"),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "restored older": lambda path: files.write_json(path, {"counter": 2}),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("harm", LOST)
async def test_a_controller_comes_back_without_its_counter_and_routers_follow(
    store: Store, harm: str
) -> None:
    """Its shards tell the epochs that they have, its routers the version."""
    service = SearchService(FAST, SECRET, load_encoder=lambda table: None)
    async with running_shards(IDS, VECTORS, SHARDS, generation=57) as shards:
        async with running(store) as controller:
            await announce(controller, shards)
            table = await controller.table_after(0, 1)
            assert table is not None
            await service.apply(table)
        epochs = [shard.epoch for shard in shards]
        for path in (store.root / "epochs").iterdir():
            path.unlink()
        LOST[harm](store.root / "counter.json")
        async with running(store) as controller:
            for shard in shards:
                shard.epoch = await controller.register_replica(
                    key=shard.key, address=("127.0.0.1", shard.port), epoch=shard.epoch
                )
            newer = await controller.table_after(table.version, 1)
            assert newer is not None
            assert await service.apply(newer)
            assert store.counter() >= newer.version
            is_told = harm in ("damaged", "emptied", "a pipe")
            assert len(newer.notes) == int(is_told)
            for note in newer.notes:  # it may have been written anew since
                assert note.text.startswith("found when the controller started: ")
        await until(lambda: service.ready()[1].get("shards_connected") == SHARDS)
        query = resolve(FAST, vectors=VECTORS[:1].tolist(), k=3)
        answer = await service.search(query, arrived_at=asyncio.get_running_loop().time())
        assert answer.coverage.share == 1.0
        await service.close()
    assert all(shard.epoch > before for shard, before in zip(shards, epochs, strict=True))


async def test_a_routers_version_alone_is_enough_and_shards_are_told_anew(
    store: Store, alive: dict[str, Handle]
) -> None:
    """The shards died too, and the new ones know no epoch: the router's table is the record."""
    async with running(store) as controller:
        await until(lambda: len(alive) == SHARDS)
        table = await register(controller, 57)
        newer = await controller.table_after(table.version + 500, 1)
        assert newer is not None
        assert newer.version > table.version + 500
        assert store.counter() == newer.version
        await until(lambda: all(handle.announce.calls for handle in alive.values()))
        assert (await register(controller, 57)).version > newer.version


async def test_a_damaged_encoder_keeps_no_controller_from_coming_back(
    tmp_path: Path, alive: dict[str, Handle]
) -> None:
    store = Store(tmp_path)
    folder = store.generation(1)
    encoders = {"query_encoder": {CONFIG: b"{}"}, "item_encoder": {CONFIG: b"[]"}}
    build_generation(folder, VECTORS, IDS, SHARDS, kind="flat", **encoders)
    store.set_current(1)
    checksum = files.sha256_of(folder / "query_encoder" / CONFIG)
    (folder / "query_encoder" / CONFIG).write_bytes(b"}{")
    async with running(store) as controller:
        table = await register(controller, 1)
    assert table.encoder_checksum == checksum, "the manifest's, which routers compare with"
    of_items = files.sha256_of(folder / "item_encoder" / CONFIG)
    assert table.item_encoder_checksum == of_items != checksum


async def test_a_generation_without_an_encoder_has_no_checksum_of_one(store: Store) -> None:
    async with running(store) as controller:
        table = await register(controller, 57)
        assert table.encoder_checksum is table.item_encoder_checksum is None


def test_a_restarted_controller_waits_for_what_it_is_to_serve(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray starts no actor again whose constructor has failed; the routers serve on meanwhile."""
    (store.root / "CURRENT").write_bytes(b"\x00")
    with pytest.raises(CorruptFile, match="CURRENT"):
        opening.opened(store, None, is_restart=False)
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            store.set_current(57)

    monkeypatch.setattr(opening.time, "sleep", sleep)
    folder, manifest = opening.opened(store, None, is_restart=True)
    assert (folder, manifest.generation) == (store.generation(57), 57)
    assert pauses == [opening.REOPEN_S] * 3
    assert caplog.text.count("waits for what it is to serve") == 1


async def test_the_reason_stays_in_the_table_while_a_damaged_shard_starts_again_and_again(
    store: Store, alive: dict[str, Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two attempts, during one, and after a restart of the controller."""
    monkeypatch.setattr(watch, "WATCH_INTERVAL_S", 0.01)
    monkeypatch.setattr(replacing, "FIRST_RETRY_S", 0.01)
    reason = Absence(CorruptFile.code, "index.faiss: wrong checksum")
    key = ReplicaKey(57, 1)
    for _ in range(2):
        async with running(store) as controller:
            await until(lambda: len(alive) == SHARDS)
            (name,) = (name for name in alive if name.startswith("shardline-shard-57-1-0-"))
            alive[name].ping.plan = [raised_in_the_constructor(CorruptFile(reason.text))] * 500
            await controller.register_replica(key=ReplicaKey(57, 0), address=("127.0.0.1", 1000))
            for failures in (1, 2, 4):
                await until(lambda: controller._placement.replicas[key].failures >= failures)  # noqa: B023
                table = await controller.table_after(0, 5)
                assert table is not None
                (route,) = table.shards[1].replicas
                assert (route.address, route.absence) == (None, reason)
            alive[name].ping.plan.clear()
            await controller.register_replica(key=key, address=("127.0.0.1", 1001))
            table = await controller.table_after(table.version, 5)
            assert table is not None
            assert table.shards[1].replicas[0].absence is None


def names_of(alive: dict[str, Handle], shard: int) -> list[str]:
    """Actors of the shard, as "replica at node"."""
    parts = [name.split("-") for name in alive if name.startswith(f"shardline-shard-57-{shard}-")]
    return [f"{part[4]} at {part[6]}" for part in parts]


def two_hosts(monkeypatch: pytest.MonkeyPatch) -> list[Host]:
    """Of Ray, from now on; the list may be changed."""
    hosts = [*HOSTS, Host(node_id="nb", address="10.0.0.2", cpus=2)]
    ray_says(monkeypatch, hosts)
    monkeypatch.setattr(watch, "WATCH_INTERVAL_S", 0.01)
    return hosts


async def register_placed(controller: Controller) -> None:
    for key, state in list(controller._placement.replicas.items()):
        if not state.answers:
            await controller.register_replica(key=key, address=(state.route.host or "", 1))


async def test_replicas_are_placed_on_hosts_and_anew_when_one_is_gone(
    store: Store, alive: dict[str, Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = two_hosts(monkeypatch)
    async with running(store, replicas=2) as controller:
        await until(lambda: len(alive) == 2 * SHARDS)
        assert [names_of(alive, shard) for shard in range(SHARDS)] == [["0 at na", "1 at nb"]] * 2
        await register_placed(controller)
        assert await controller.wait_ready(1) == 57
        hosts[1] = Host(node_id="nc", address="10.0.0.3", cpus=2)
        await until(lambda: len(alive) == 3 * SHARDS)
        assert names_of(alive, 0) == ["0 at na", "1 at nb", "2 at nc"]
        table = await controller.table_after(0, 1)
        assert table is not None
        hosts_of_0 = [(route.host, route.address) for route in table.shards[0].replicas]
        assert hosts_of_0 == [("10.0.0.1", ("10.0.0.1", 1)), ("10.0.0.3", None)]


async def test_while_rays_head_is_away_nothing_is_decided_about_hosts(
    store: Store, alive: dict[str, Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = two_hosts(monkeypatch)
    async with running(store, replicas=2) as controller:
        await until(lambda: len(alive) == 2 * SHARDS)
        await register_placed(controller)
        before = controller._placement
        asked: list[object] = []

        def away(known: object) -> tuple[Host, ...]:
            asked.append(known)
            return ()

        monkeypatch.setattr(watch, "fresh_hosts", away)
        await until(lambda: len(asked) > 3)
        assert controller._placement.replicas == before.replicas
        hosts.pop()


async def test_a_controller_finds_actors_by_their_names_and_knows_their_hosts(
    store: Store, alive: dict[str, Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_hosts(monkeypatch)
    async with running(store, replicas=2) as controller:
        await until(lambda: len(alive) == 2 * SHARDS)
        await register_placed(controller)
    before = list(alive)
    async with running(store, replicas=2) as controller:
        await until(lambda: all(handle.announce.calls for handle in alive.values()))
        assert list(alive) == before
        nodes = {str(key): state.node_id for key, state in controller._placement.replicas.items()}
    assert nodes == {"57-0-0": "na", "57-0-1": "nb", "57-1-0": "na", "57-1-1": "nb"}


async def test_a_rolling_restart_goes_on_after_a_restart_of_the_controller(
    store: Store, alive: dict[str, Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_hosts(monkeypatch)
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(reconcile, "OVERLAP_S", 0.0)
    monkeypatch.setattr(reconcile, "DRAIN_S", 0.0)
    async with running(store, replicas=2) as controller:
        assert await controller.restart_progress() is None
        await until(lambda: len(alive) == 2 * SHARDS)
        await register_placed(controller)
        begun = await controller.restart_rolling()
        number = begun.pop("number")
        assert begun == {
            "total": 4, "done": 0, "is_over": False, "is_stopped": False, "trouble": None
        }  # fmt: skip
        assert (await controller.restart_rolling())["number"] == number
        await until(lambda: len(alive) == 2 * SHARDS + 1)
    killed.clear()  # all: a controller that is closed ends its shards; of this one they live on
    async with running(store, replicas=2) as controller:
        while True:
            await register_placed(controller)
            progress = await controller.restart_progress()
            assert progress is not None
            assert progress["number"] == number
            if progress["is_over"]:
                break
            await asyncio.sleep(0.01)
        assert progress == {
            "number": number,
            "total": 4,
            "done": 4,
            "is_over": True,
            "is_stopped": False,
            "trouble": None,
        }
        await until(lambda: json.loads((store.root / "restart.json").read_text())["is_over"])
        assert len(killed) == 4
        assert {key.replica for key in controller._placement.replicas} >= {2}
    async with running(store, replicas=2) as controller:
        assert await controller.restart_progress() == progress, "it was not cut short"
        await register_placed(controller)
        assert await controller.restart_progress() == progress


async def test_a_rolling_restart_is_stopped_and_stays_so(
    store: Store, alive: dict[str, Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_hosts(monkeypatch)
    async with running(store, replicas=2) as controller:
        await until(lambda: len(alive) == 2 * SHARDS)
        await register_placed(controller)
        assert await controller.stop_restart() is None, "there was none"
        begun = await controller.restart_rolling()
        stopped = await controller.stop_restart()
    assert stopped == begun | {"is_over": True, "is_stopped": True}
    async with running(store, replicas=2) as controller:
        assert await controller.restart_progress() == stopped
        again = await controller.restart_rolling()
    assert again["number"] > stopped["number"]


async def test_a_rolling_restart_without_room_is_refused(
    store: Store, alive: dict[str, Handle]
) -> None:
    async with running(store, cpus_per_shard=1) as controller:
        await until(lambda: len(alive) == SHARDS)
        await register(controller, 57)
        with pytest.raises(Unavailable, match=r"no host has room for one more .*\[0, 1\]; .*down"):
            await controller.restart_rolling()
        assert await controller.restart_progress() is None


async def test_a_rolling_restart_goes_on_where_the_store_takes_no_note_yet(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "WATCH_INTERVAL_S", 0.01)
    async with running(store) as controller:
        await register(controller, 57)
        with monkeypatch.context() as disk:
            disk.setattr(restart_note.files, "write_json", refuse_to_write)
            with pytest.raises(DataError, match="read"):  # nor the counter
                await controller.restart_rolling()
            disk.setattr(Store, "raise_counter", lambda self, number, guard: None)
            begun = await controller.restart_rolling()
            assert not begun["is_over"]
            assert not (store.root / "restart.json").exists()
        await until((store.root / "restart.json").exists)


async def test_a_store_that_is_well_again_is_noticed_though_nothing_happens(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "WATCH_INTERVAL_S", 0.01)
    async with running(store) as controller:
        await register(controller, 57)
        with monkeypatch.context() as disk:
            disk.setattr(files, "write_json", refuse_to_write)
            with pytest.raises(OSError, match="Read-only"):
                await controller.register_replica(key=ReplicaKey(57, 1), address=("h", 9))
            for _ in range(10):
                await asyncio.sleep(0.01)
            assert await controller.trouble_after(None, 1) is not None
        await until(lambda: controller._decisions.unsaved is None)


async def test_older_generations_end_though_one_replica_of_the_new_one_fails(
    store: Store, alive: dict[str, Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And though Ray does not take the first orders."""
    two_hosts(monkeypatch)
    refusals = [RayError("the head is away")] * 2
    killed: list[Any] = []

    def kill(handle: Handle) -> None:
        if refusals:
            raise refusals.pop()
        killed.append(handle)

    async with running(store) as controller:
        await until(lambda: len(alive) == SHARDS)
        await register(controller, 57)
    old = [handle for name, handle in alive.items() if "shard-57-" in name]
    monkeypatch.setattr(module, "RETIRE_AFTER_S", 0)
    monkeypatch.setattr(ray, "kill", kill)
    store.set_current(3)
    async with running(store, replicas=2) as controller:
        await until(lambda: sum("shard-3-" in name for name in alive) == 2 * SHARDS)
        (name,) = (name for name in alive if "shard-3-1-1-" in name)
        for key in list(controller._placement.replicas)[:3]:
            await controller.register_replica(key=key, address=("10.0.0.1", 1 + key.shard))
        for _ in range(5):
            await asyncio.sleep(0.01)
        assert killed == [], "nothing is published yet"
        alive[name].ping.plan = [ActorDiedError()] * 1000
        await until(lambda: not controller._placement.ready)
        await until(lambda: killed[: len(old)] == old)


async def test_silence_of_rays_head_is_reported_and_logged_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "WATCH_INTERVAL_S", 0.01)
    monkeypatch.setattr(news, "SILENT_S", 0.1)
    async with running(store) as controller:
        await register(controller, 57)
        assert (await controller.report())["notes"] == []
        ray_says(monkeypatch, ())
        await until(lambda: "no news of hosts" in caplog.text)
        (note,) = (await controller.report())["notes"]
        assert (note["code"], note["text"][:20]) == ("unavailable", "no news of hosts for")
        for _ in range(5):
            await asyncio.sleep(0.01)
        assert caplog.text.count("no news of hosts") == 1
        ray_says(monkeypatch, HOSTS)
        await asyncio.sleep(0.05)
        await until(lambda: controller._news.silence(time.monotonic()) is None)


@pytest.mark.parametrize("content", ["{", "[]", '{"number": 1}'])
async def test_a_rolling_restart_whose_note_is_damaged_is_cut_short(
    store: Store, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (store.root / "restart.json").write_text(content)
    async with running(store) as controller:
        await register(controller, 57)
        assert await controller.restart_progress() is None
    assert "a rolling restart was cut short" in caplog.text


async def test_a_rolling_restart_of_another_cluster_is_of_no_meaning(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    note = {"cluster_id": "f" * 16, "generation": 57, "number": 1, "below": {"0": 9}, "total": 2}
    files.write_json(store.root / "restart.json", note)
    async with running(store) as controller:
        await register(controller, 57)
        assert await controller.restart_progress() is None
    assert caplog.text == ""


async def test_the_report_tells_hosts_replicas_and_routers(
    store: Store, alive: dict[str, Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = two_hosts(monkeypatch)
    async with running(store, replicas=2, http_host="0.0.0.0", http_port=81) as controller:
        await until(lambda: len(alive) == 2 * SHARDS)
        await register_placed(controller)
        seen = RouterSeen(host="10.0.0.2", node_id="nb", pid=7)
        assert await controller.router_lives(seen) == (), "a router of before"
        poor = Quality(generation=57, recall=0.5, queries=100, k=10, since=0.0)
        (due,) = await controller.router_lives(seen, RouterNews(quality=poor))
        assert due.code == "retrain_index"
        table = await controller.table_after(0, 1)
        health = ShardHealth(rows=777, changed=0, unseen=0, imbalance=1.0)
        controller._shards.health[ReplicaKey(57, 0, 1)] = health
        report = await controller.report()
        assert report["quality"]["recall"] == 0.5
        assert [each["code"] for each in report["repairs"]] == ["retrain_index"]
        assert table is not None
        assert report["cluster_id"] == table.cluster_id
        assert (report["generation"], report["version"]) == (57, table.version)
        assert (report["http_port"], report["replicas_wanted"]) == (81, 2)
        assert report["hosts"] == [
            {"host": "10.0.0.1", "node_id": "na", "alive": True, "replicas": ["0/0", "1/0"],
             "router": False},
            {"host": "10.0.0.2", "node_id": "nb", "alive": True, "replicas": ["0/1", "1/1"],
             "router": True},
        ]  # fmt: skip
        assert report["replicas"][1] == {
            "shard": 0, "replica": 1, "host": "10.0.0.2", "node_id": "nb",
            "address": ("10.0.0.2", 1), "epoch": table.shards[0].replicas[1].epoch,
            "answers": True, "stage": "staying", "failures": 0, "reason": None,
            "seq": report["replicas"][1]["seq"], "lag": report["replicas"][1]["lag"],
            "rows": 777, "index_of": None, "device_note": None,
        }  # fmt: skip
        (router,) = report["routers"]
        assert 0 <= router.pop("heard_s") < 5
        assert router == {
            "host": "10.0.0.2", "node_id": "nb", "pid": 7, "url": "http://10.0.0.2:81"
        }  # fmt: skip
        assert (report["notes"], report["restart"]) == ([], None)
        hosts.pop()
        await until(lambda: len(controller._placement.hosts) == 1)
        report = await controller.report()
        assert [host["alive"] for host in report["hosts"]] == [True, False]
        assert report["routers"] == [], "its host is gone"
        assert "1 instead of 2 replicas of shards 0, 1" in report["notes"][0]["text"]
        assert json.loads(json.dumps(report))["hosts"] == report["hosts"]


def test_hosts_and_routers_are_forgotten_in_time() -> None:
    a, b = (Host(node_id=f"n{name}", address=f"10.0.0.{name}", cpus=1) for name in (1, 2))
    known = news.News([b, a], 100.0)
    known.heard(RouterSeen(host="10.0.0.1", node_id="n1", pid=1), 100.0)
    known.saw_hosts([a], 101.0)
    assert known.hosts() == [a, b]
    known.saw_hosts([a], 100.0 + news.FORGET_HOST_S)
    assert known.hosts() == [a]
    again = replace(a, node_id="n9")
    known.saw_hosts([again], 4000.0)
    assert known.hosts() == [again], "one address, one host"
    later = 100.0 + news.EXPIRE_S
    assert known.routers(later) == []
    known.heard(RouterSeen(host="10.0.0.2", node_id="n2", pid=2), later)
    assert [each.router.pid for each in known.routers(later)] == [2]
    assert len(known._routers) == 1, "what expired takes no memory"


async def test_the_cluster_id_stays_and_does_not_tell_the_secret(store: Store) -> None:
    ids = set()
    for _ in range(2):
        async with running(store) as controller:
            ids.add((await register(controller, 57)).cluster_id)
    (cluster_id,) = ids
    assert re.fullmatch("[0-9a-f]{16}", cluster_id)
    assert cluster_id not in (SECRET.hex(), hashlib.sha256(SECRET).hexdigest()[:16])
    assert opening.cluster_id_of(b"another") != cluster_id


async def test_a_replica_that_fails_on_one_host_is_named_with_its_host(
    store: Store, alive: dict[str, Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_hosts(monkeypatch)
    async with running(store, replicas=2) as controller:
        await until(lambda: len(alive) == 2 * SHARDS)
        (name,) = (name for name in alive if name.startswith("shardline-shard-57-1-1-"))
        alive[name].ping.plan = [raised_in_the_constructor(CorruptFile("index.faiss: odd"))]
        with pytest.raises(CorruptFile, match=r"^shard 1 on 10\.0\.0\.2: index\.faiss: odd$"):
            await controller.wait_ready(5)


async def test_a_shard_that_no_host_has_room_for_ends_the_wait(store: Store) -> None:
    async with running(store, cpus_per_shard=2) as controller:
        with pytest.raises(Unavailable, match=r"^no host has room .* of shards \[1\]; lower"):
            await controller.wait_ready(5)


async def test_an_actor_that_cannot_be_ended_is_tried_again(
    store: Store, alive: dict[str, Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = two_hosts(monkeypatch)
    refusals = [RayError("the head is away")] * 3
    killed: list[Any] = []

    def kill(handle: Handle) -> None:
        if refusals:
            raise refusals.pop()
        killed.append(handle)

    async with running(store, replicas=2) as controller:
        await until(lambda: len(alive) == 2 * SHARDS)
        await register_placed(controller)
        monkeypatch.setattr(ray, "kill", kill)
        hosts.pop()
        await until(lambda: len(killed) == SHARDS)
    gone = [handle for name, handle in alive.items() if name.endswith("-nb")]
    assert set(map(id, killed[:SHARDS])) == set(map(id, gone))
