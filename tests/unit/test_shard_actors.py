"""What checks of shard actors amount to. The actors are stand-ins: there is no Ray here."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    RayError,
)

from shardline.cluster.control import shard_actors
from shardline.cluster.control.actor_name import ActorName
from shardline.cluster.control.events import (
    Event,
    LeaderSeen,
    LeaderSilent,
    LeadFailed,
    Leading,
    ReplicaFailed,
    ReplicaIdle,
    ReplicaUnreachable,
    Sealed,
    SealFailed,
)
from shardline.cluster.control.opening import cluster_id_of
from shardline.cluster.control.shard_actors import (
    ShardActors,
    ShardSettings,
    reason_of,
)
from shardline.shards.core.errors import (
    CorruptFile,
    NewerFormat,
    NotPrimary,
    ReadOnly,
    ShardlineError,
    Unavailable,
)
from shardline.shards.core.messages import Absence, Pulse, ReplicaKey, ShardHealth
from shardline.shards.index.spec import Device
from tests.engine import build_generation
from tests.fake_actor import HANG, Handle, raised_in_a_method, raised_in_the_constructor

SECRET = b"0" * 32
EPOCH = 7
KEY = ReplicaKey(7, 1, 0)
NODE = "a" * 56


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> dict[str, Handle]:
    """Every actor that is looked for is found alive here, by its name."""
    found: dict[str, Handle] = {}
    monkeypatch.setattr(ray, "get_actor", lambda name: found.setdefault(name, Handle()))
    return found


@pytest.fixture
def actors(tmp_path: Path, alive: dict[str, Handle]) -> ShardActors:
    vectors = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    manifest = build_generation(tmp_path, vectors, np.arange(20), 2, kind="flat")
    settings = ShardSettings(
        secret=SECRET,
        shard_host="127.0.0.1",
        threads_per_shard=1,
        cpus_per_shard=0.5,
        gpus_per_shard=1.0,
        huge_pages=True,
    )
    actors = ShardActors(settings, "the-controller")
    actors.open(tmp_path, manifest)
    return actors


@pytest.fixture
def handle(actors: ShardActors, alive: dict[str, Handle]) -> Handle:
    """That of shard 1, the only one placed."""
    assert actors.place(KEY, NODE) is None
    return next(iter(alive.values()))


def check(actors: ShardActors, *, lost: bool = False) -> Event | None:
    return asyncio.run(actors.check(KEY, EPOCH, lambda: lost))


def test_a_name_tells_the_replica_and_the_secret(
    actors: ShardActors, handle: Handle, alive: dict[str, Handle]
) -> None:
    digest = cluster_id_of(SECRET)[:8]
    assert list(alive) == [f"shardline-shard-7-1-0-{digest}-{NODE}"]
    assert actors.placed == (KEY,)


@pytest.mark.parametrize("error", [RayError("no room\nleft here"), ValueError("left here")])
def test_a_shard_that_ray_cannot_place_has_failed(
    actors: ShardActors, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(name: ActorName) -> None:
        raise error

    monkeypatch.setattr(shard_actors, "_existing", lambda name: None)
    monkeypatch.setattr(actors, "_create", refuse)
    failed = actors.place(KEY, NODE)
    assert failed is not None
    assert failed.now_s > 0, "its time, as of events that elect a primary"
    assert replace(failed, now_s=0.0) == ReplicaFailed(
        key=KEY, reason=Absence("unavailable", "left here")
    )
    assert actors.placed == ()


def test_one_that_answers_is_told_to_register_only_when_it_is_lost(
    actors: ShardActors, handle: Handle
) -> None:
    assert check(actors) is None
    assert (handle.ping.calls, handle.announce.calls) == (1, 0)
    assert check(actors, lost=True) is None
    assert (handle.ping.calls, handle.announce.calls) == (2, 1)


def test_whether_it_is_lost_is_asked_after_it_has_answered(
    actors: ShardActors, handle: Handle
) -> None:
    """One that registers while it is being checked must not be told to register again."""
    asked_after: list[int] = []

    def is_lost() -> bool:
        asked_after.append(handle.ping.calls)
        return False

    asyncio.run(actors.check(KEY, EPOCH, is_lost))
    assert asked_after == [1]
    assert handle.announce.calls == 0


def test_a_dead_one_has_failed_once(actors: ShardActors, handle: Handle) -> None:
    handle.ping.plan = [ActorDiedError()]
    event = check(actors)
    assert isinstance(event, ReplicaFailed)
    assert event.key == KEY
    assert actors.placed == (KEY,)  # until the failure is on disk
    actors.forget(KEY)
    assert actors.placed == ()


def test_health_is_that_of_the_last_look_and_forgotten_with_the_actor(
    actors: ShardActors, handle: Handle
) -> None:
    known = ShardHealth(rows=10, changed=3, unseen=1, imbalance=None)
    handle.ping.plan = [Pulse(pid=1, seq=5, health=known), Pulse(pid=1, seq=6)]
    assert actors.health == {}
    for _ in range(2):  # the second one could not say
        assert check(actors) is None
        assert actors.health == {KEY: known}
    actors.forget(KEY)
    assert actors.health == {}


def test_a_dead_one_that_was_replaced_during_the_check_is_no_event(
    actors: ShardActors, handle: Handle, alive: dict[str, Handle]
) -> None:
    async def replace_while_asking() -> Event | None:
        alive.clear()
        running = asyncio.ensure_future(actors.check(KEY, EPOCH, lambda: False))
        await asyncio.sleep(0)
        assert actors.place(KEY, NODE) is None
        return await running

    handle.ping.plan = [ActorDiedError()]
    assert asyncio.run(replace_while_asking()) is None
    assert actors.placed == (KEY,)


def test_only_the_second_miss_in_a_row_is_an_event(actors: ShardActors, handle: Handle) -> None:
    away = ActorUnavailableError("restarting", None)
    handle.ping.plan = [away, handle.ping.then, away, away]
    assert [check(actors) for _ in range(3)] == [None, None, None]
    event = check(actors)
    assert isinstance(event, ReplicaUnreachable)
    assert (event.key, event.epoch) == (KEY, EPOCH)
    assert event.reason.code == "unavailable"
    assert "restarting" in event.reason.text
    assert actors.placed == (KEY,)


def test_a_slow_one_is_not_dead(
    actors: ShardActors,
    handle: Handle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(shard_actors, "DESCRIBE_TIMEOUT_S", 0.01)
    handle.ping.plan = [HANG]
    assert check(actors) is None
    assert "replica 7-1-0 has not answered" in caplog.text
    assert actors.placed == (KEY,)


def checked_as_leader(actors: ShardActors) -> Event | None:
    return asyncio.run(actors.check(KEY, EPOCH, lambda: False, leads=70))


def test_a_leader_that_is_looked_at_says_whether_it_leads(
    actors: ShardActors, handle: Handle
) -> None:
    full = Absence("store_full", "no space left")
    handle.ping.plan = [
        Pulse(pid=1, seq=5, leads=70, refused=full),
        Pulse(pid=1, seq=6),
    ]
    first, second = checked_as_leader(actors), checked_as_leader(actors)
    assert isinstance(first, LeaderSeen)
    assert isinstance(second, LeaderSeen)
    assert (first.key, first.epoch, first.leads, first.refused) == (KEY, 70, 70, full)
    assert (second.epoch, second.leads, second.refused) == (70, None, None)
    assert actors.applied.seq(KEY) == 6


@pytest.mark.parametrize("outcome", [HANG, ActorUnavailableError("restarting", None)])
def test_a_leader_that_does_not_answer_once_is_silent(
    actors: ShardActors, handle: Handle, monkeypatch: pytest.MonkeyPatch, outcome: object
) -> None:
    monkeypatch.setattr(shard_actors, "DESCRIBE_TIMEOUT_S", 0.01)
    handle.ping.plan = [outcome]
    event = checked_as_leader(actors)
    assert isinstance(event, LeaderSilent)
    assert (event.key, event.epoch) == (KEY, 70)


@pytest.mark.parametrize(
    ("outcome", "code", "text"),
    [
        (raised_in_a_method(ReadOnly("no log")), "read_only", "no log"),
        (raised_in_a_method(NotPrimary("above")), "not_primary", "above"),
        (ActorDiedError(), "unavailable", "The actor died"),
        (HANG, "deadline_exceeded", "replica 0 did not take the lead within 0.05 s"),
    ],
)
def test_one_that_does_not_lead_says_why(
    actors: ShardActors,
    handle: Handle,
    monkeypatch: pytest.MonkeyPatch,
    outcome: object,
    code: str,
    text: str,
) -> None:
    monkeypatch.setattr(shard_actors, "LEAD_TIMEOUT_S", 0.05)
    handle.lead.plan = [outcome]
    event = asyncio.run(actors.lead(KEY, 8))
    assert isinstance(event, LeadFailed)
    assert (event.key, event.epoch, event.reason.code) == (KEY, 8, code)
    assert event.reason.text.startswith(text)


def test_one_that_leads_says_what_it_has_applied(actors: ShardActors, handle: Handle) -> None:
    handle.lead.plan = [41]
    event = asyncio.run(actors.lead(KEY, 8))
    assert isinstance(event, Leading)
    assert (event.key, event.epoch, event.seq) == (KEY, 8, 41)
    assert handle.lead.asked == [(8,)]


def test_one_that_has_no_process_is_not_asked_to_lead(actors: ShardActors) -> None:
    event = asyncio.run(actors.lead(KEY, 8))
    assert isinstance(event, LeadFailed)
    assert event.reason == Absence("unavailable", "it has no process")


def test_what_it_says_of_itself_or_why_it_does_not(actors: ShardActors, handle: Handle) -> None:
    handle.describe.plan = [{"rows": 10}, ActorUnavailableError("restarting", None)]
    assert asyncio.run(actors.describe(KEY)) == {"rows": 10}
    reason = asyncio.run(actors.describe(KEY))
    assert isinstance(reason, Absence)
    assert reason.code == "unavailable"
    assert "restarting" in reason.text
    handle.describe.plan = [ActorUnschedulableError("its host is dead")]
    assert isinstance(asyncio.run(actors.describe(KEY)), Absence)


def test_a_name_that_is_no_shard_actors_is_none() -> None:
    name = f"shardline-shard-7-1-0-abcdef01-{NODE}"
    parsed = ActorName.parse(name)
    assert parsed == ActorName(KEY, "abcdef01", NODE)
    assert str(parsed) == name
    for other in ("shardline-controller", name[:-57], f"{name}-x", name.replace("-7-", "-x-")):
        assert ActorName.parse(other) is None


def test_those_that_are_found_are_of_this_cluster_and_generation(
    actors: ShardActors, handle: Handle, alive: dict[str, Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = alive
    others = [name.replace("-7-1-0-", "-3-1-0-"), name.replace(name.split("-")[5], "ffffffff")]
    monkeypatch.setattr(ray.util, "list_named_actors", lambda: [name, *others, "x"])
    assert actors.found(KEY.generation) == {KEY: NODE}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an actor is created with."""
    found: dict[str, Any] = {}

    class Remote:
        def options(self, **options: Any) -> "Remote":
            found.update(options)
            return self

        def remote(self, **arguments: Any) -> str:
            found.update(arguments)
            return "handle"

    monkeypatch.setattr(ray, "remote", lambda kind: Remote())
    return found


def test_an_actor_stays_on_its_host(actors: ShardActors, asked: dict[str, Any]) -> None:
    assert actors._create(ActorName(KEY, "d", NODE)) == "handle"
    strategy = asked["scheduling_strategy"]
    assert (strategy.node_id, strategy.soft) == (NODE, False)
    assert (asked["max_restarts"], asked["lifetime"], asked["num_cpus"]) == (-1, "detached", 0.5)
    assert (asked["num_gpus"], asked["key"]) == (0, KEY)
    assert asked["cpu_when_gpu_fails"] is False


def test_a_shard_on_a_card_reserves_it(actors: ShardActors, asked: dict[str, Any]) -> None:
    folder, manifest = actors._opened[KEY.generation]
    index = manifest.index.model_copy(update={"device": Device.CUDA})
    actors.open(folder, replace(manifest, index=index))
    actors._settings = replace(actors._settings, gpus_per_shard=0.25, cpu_when_gpu_fails=True)
    actors._create(ActorName(KEY, "d", NODE))
    assert (asked["num_gpus"], asked["cpu_when_gpu_fails"]) == (0.25, True)


def test_one_whose_host_is_gone_has_failed(actors: ShardActors, handle: Handle) -> None:
    handle.ping.plan = [ActorUnschedulableError("the node is dead")]
    event = check(actors)
    assert isinstance(event, ReplicaFailed)
    assert "the node is dead" in event.reason.text


@pytest.mark.parametrize(
    ("described", "event"),
    [
        ({"connections": 0}, ReplicaIdle(key=KEY)),
        ({"connections": 1}, None),
        (ActorUnavailableError("restarting", None), None),
    ],
)
def test_idle_is_one_that_says_so(
    actors: ShardActors, handle: Handle, described: Any, event: Event | None
) -> None:
    handle.describe.plan = [described]
    assert asyncio.run(actors.is_idle(KEY)) == event
    actors.forget(KEY)
    assert asyncio.run(actors.is_idle(KEY)) is None


def test_one_is_ended_by_its_handle_or_its_name(
    actors: ShardActors, handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    for _ in range(2):  # the second time as a controller would that was restarted since
        actors.end_replica(KEY, NODE)
        assert actors.placed == ()
    assert killed == [handle, handle]
    monkeypatch.setattr(shard_actors, "_existing", lambda name: None)
    actors.end_replica(KEY, NODE)
    assert len(killed) == 2


def test_ending_kills_every_placed_one(
    actors: ShardActors, handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    actors.end()
    assert killed == [handle]


def test_only_actors_of_other_generations_of_this_cluster_are_ended(
    actors: ShardActors, handle: Handle, alive: dict[str, Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = cluster_id_of(SECRET)[:8]
    older = f"shardline-shard-3-0-0-{digest}-{NODE}"
    others = [f"shardline-shard-3-0-0-ffffffff-{NODE}", "shardline-controller", f"x-{digest}"]
    names = [*alive, older, *others, f"shardline-shard-3-0-{digest}", f"shardline-shard-{digest}"]
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(ray.util, "list_named_actors", lambda: names)
    actors.end_others([KEY.generation, 3])
    assert killed == []
    actors.end_others([KEY.generation])
    assert killed == [alive[older]]


def test_a_replica_seals_its_shard_or_says_why_not(
    actors: ShardActors, handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_actors, "SEAL_TIMEOUT_S", 0.01)
    handle.ping.then = Pulse(pid=1, seq=41)
    handle.seal.plan = [raised_in_a_method(NotPrimary("epoch 9 leads")), HANG]
    outcomes = [asyncio.run(actors.seal(KEY, 8)) for _ in range(3)]
    nobody = asyncio.run(actors.seal(ReplicaKey(7, 0, 0), 8))
    assert isinstance(nobody, SealFailed)
    assert nobody.reason.text == "it has no process"
    refused, late, sealed = (replace(each, now_s=0.0) for each in outcomes)
    assert refused == SealFailed(key=KEY, epoch=8, reason=Absence("not_primary", "epoch 9 leads"))
    assert isinstance(late, SealFailed)
    assert late.reason == Absence("deadline_exceeded", "replica 7-1-0 was not sealed within 0.01 s")
    assert sealed == Sealed(key=KEY, epoch=8, seq=41)


def refused_by_the_controller(cause: Exception) -> Exception:
    """When the constructor of a shard actor registers."""
    return raised_in_the_constructor(raised_in_a_method(cause))


@pytest.mark.parametrize(
    "wrapped", [raised_in_a_method, raised_in_the_constructor, refused_by_the_controller]
)
@pytest.mark.parametrize("kind", [CorruptFile, NewerFormat, Unavailable])
def test_the_reason_of_our_error_is_its_code_and_text(
    wrapped: Callable[[Exception], Exception], kind: type[ShardlineError]
) -> None:
    ours = kind("index.faiss: wrong", got="x", hint="build again")
    assert reason_of(wrapped(ours)) == Absence(kind.code, "index.faiss: wrong; got x; build again")


def test_the_reason_of_another_error_is_its_last_line() -> None:
    unavailable = Unavailable.code
    assert reason_of(Exception("first\n  last \n\n")) == Absence(unavailable, "last")
    assert reason_of(raised_in_the_constructor(OSError("no port"))) == Absence(
        unavailable, "no port"
    )
    assert reason_of(ActorDiedError()).code == unavailable
    assert reason_of(TimeoutError()) == Absence(unavailable, "TimeoutError")
