"""What checks of shard actors amount to. The actors are stand-ins: there is no Ray here."""

import asyncio
import hashlib
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from shardline.cluster.control import shard_actors
from shardline.cluster.control.placement import Event, ShardFailed, ShardUnreachable
from shardline.cluster.control.shard_actors import ShardActors, ShardSettings, reason_of
from shardline.shards.core.errors import CorruptFile
from tests.engine import build_generation

SECRET = b"0" * 32
EPOCH = 7
HANG = object()


class Method:
    """A remote method: each call gives, or raises, the next of its plan, and None after that."""

    def __init__(self) -> None:
        self.plan: list[Any] = []
        self.calls = 0

    def remote(self) -> Awaitable[Any]:
        self.calls += 1
        return self._outcome(self.plan.pop(0) if self.plan else None)

    async def _outcome(self, outcome: Any) -> Any:
        if outcome is HANG:
            await asyncio.Event().wait()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class Handle:
    def __init__(self) -> None:
        self.ping, self.announce, self.describe = Method(), Method(), Method()


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
    )
    return ShardActors(settings, tmp_path, manifest, "the-controller")


@pytest.fixture
def handle(actors: ShardActors, alive: dict[str, Handle]) -> Handle:
    """That of shard 1, the only one placed."""
    assert actors.place(1) is None
    return next(iter(alive.values()))


def check(actors: ShardActors, *, lost: bool = False) -> Event | None:
    return asyncio.run(actors.check(1, EPOCH, lambda: lost))


def test_a_name_tells_generation_shard_and_secret(
    actors: ShardActors, handle: Handle, alive: dict[str, Handle]
) -> None:
    digest = hashlib.sha256(SECRET).hexdigest()[:8]
    assert list(alive) == [f"shardline-shard-7-1-{digest}"]
    assert actors.placed == (1,)


@pytest.mark.parametrize("error", [RayError("no room\nleft here"), ValueError("left here")])
def test_a_shard_that_ray_cannot_place_has_failed(
    actors: ShardActors, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(name: str, shard: int) -> None:
        raise error

    monkeypatch.setattr(shard_actors, "_existing", lambda name: None)
    monkeypatch.setattr(actors, "_create", refuse)
    assert actors.place(1) == ShardFailed(shard=1, reason="left here")
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

    asyncio.run(actors.check(1, EPOCH, is_lost))
    assert asked_after == [1]
    assert handle.announce.calls == 0


def test_a_dead_one_has_failed_once(actors: ShardActors, handle: Handle) -> None:
    handle.ping.plan = [ActorDiedError()]
    event = check(actors)
    assert isinstance(event, ShardFailed)
    assert event.shard == 1
    assert actors.placed == ()


def test_a_dead_one_that_was_replaced_during_the_check_is_no_event(
    actors: ShardActors, handle: Handle, alive: dict[str, Handle]
) -> None:
    async def replace_while_asking() -> Event | None:
        alive.clear()
        running = asyncio.ensure_future(actors.check(1, EPOCH, lambda: False))
        await asyncio.sleep(0)
        assert actors.place(1) is None
        return await running

    handle.ping.plan = [ActorDiedError()]
    assert asyncio.run(replace_while_asking()) is None
    assert actors.placed == (1,)


def test_only_the_second_miss_in_a_row_is_an_event(actors: ShardActors, handle: Handle) -> None:
    away = ActorUnavailableError("restarting", None)
    handle.ping.plan = [away, None, away, away]
    assert [check(actors) for _ in range(3)] == [None, None, None]
    event = check(actors)
    assert isinstance(event, ShardUnreachable)
    assert (event.shard, event.epoch) == (1, EPOCH)
    assert actors.placed == (1,)


def test_a_slow_one_is_not_dead(
    actors: ShardActors,
    handle: Handle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(shard_actors, "DESCRIBE_TIMEOUT_S", 0.01)
    handle.ping.plan = [HANG]
    assert check(actors) is None
    assert "shard 1 has not answered" in caplog.text
    assert actors.placed == (1,)


def test_what_it_says_of_itself_or_why_it_does_not(actors: ShardActors, handle: Handle) -> None:
    handle.describe.plan = [{"rows": 10}, ActorUnavailableError("restarting", None)]
    assert asyncio.run(actors.describe(1)) == {"rows": 10}
    assert "restarting" in asyncio.run(actors.describe(1))["error"]


def test_ending_kills_every_placed_one(
    actors: ShardActors, handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    actors.end()
    assert killed == [handle]


def test_the_reason_of_an_error_is_ours_or_its_last_line() -> None:
    class Wrapped(Exception):
        cause = CorruptFile("index.faiss: wrong checksum")

    assert reason_of(Wrapped("a long\ntraceback")) == "index.faiss: wrong checksum"
    assert reason_of(Exception("first\n  last \n\n")) == "last"
    assert reason_of(Exception("first\nshards.errors.CorruptFile: x: cut")) == "x: cut"
    assert reason_of(TimeoutError()) == "TimeoutError"
