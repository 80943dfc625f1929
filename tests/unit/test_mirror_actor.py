"""The shell around a mirror, without Ray's processes: what it tells when it cannot begin, and where
it gets its tables from."""

import asyncio
import random
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from shardline.cluster.rollover import controller_tables, fanout_target, mirror_actor
from shardline.cluster.rollover.fanout_target import FanoutTarget
from shardline.cluster.rollover.mirror_actor import MirrorActor
from shardline.cluster.rollover.mirror_opening import MirrorOrder
from shardline.router.fanout.fanout import Fanout
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import Behind, Unavailable
from shardline.shards.core.messages import RoutingTable
from tests.fake_actor import Method, raised_in_a_method
from tests.fake_shard import SECRET, make_table, until

ORDER = MirrorOrder(store="", source=1, target=2, controller="c", secret=SECRET)


class HereMirror(MirrorActor):
    async def _table_after(self, version: int, timeout_s: float) -> RoutingTable | None:
        if version:
            await asyncio.sleep(timeout_s)
        return make_table((), 8, generation=2, version=9)


async def test_a_bug_that_keeps_it_from_beginning_is_its_trouble_until_it_begins(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = 0

    def open_mirror(*given: object) -> Any:
        nonlocal opened
        opened += 1
        raise KeyError("a bug")

    monkeypatch.setattr(mirror_actor, "open_mirror", open_mirror)
    monkeypatch.setattr(mirror_actor, "OPEN_PAUSE_S", 0.001)
    mirror = HereMirror(ORDER)
    try:
        async with asyncio.timeout(5):
            trouble = (await mirror.progress()).trouble
            assert trouble is not None and "a bug" in trouble.text
            with pytest.raises(KeyError):
                await mirror.drain((1,), 1.0)
            await until(lambda: opened > 2)
    finally:
        await mirror.stop()
    assert "the mirror cannot begin" in caplog.text and "Traceback" in caplog.text


class Controller:
    def __init__(self, *plan: object) -> None:
        self.table_of = Method()
        self.table_of.plan = list(plan)


async def test_what_hinders_the_controller_is_told_as_one_of_our_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the loop goes on meanwhile: Ray's client blocks while the head is away."""
    table, loop = object(), asyncio.get_running_loop()
    bug = raised_in_a_method(KeyError("a bug"))
    actor = Controller(ActorDiedError(), raised_in_a_method(Behind("late")), bug, table)
    refusals = [ValueError("no such actor")]

    def get_actor(name: str) -> Controller:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(5)
        if refusals:
            raise refusals.pop()
        return actor

    monkeypatch.setattr(ray, "get_actor", get_actor)
    for expected in (Unavailable, Unavailable, Behind, type(bug)):
        with pytest.raises(expected):
            await controller_tables.table_of("c", 2, 5, 1.0)
    assert await controller_tables.table_of("c", 2, 5, 1.0) is table
    assert actor.table_of.asked[-1] == (2, 5, 1.0)


async def test_why_no_table_comes_is_logged_once_and_a_bug_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fanout_target, "PAUSE_S", 0.001)
    errors = [Unavailable("it restarts")] * 3 + [KeyError("a bug")] * 3
    target = FanoutTarget(2, Fanout(SECRET, RouterConfig(), random.Random(0)))

    async def table_after(version: int, timeout_s: float) -> RoutingTable | None:
        if not errors:
            await asyncio.sleep(timeout_s)
        raise errors.pop(0)

    following = asyncio.ensure_future(target.follow(table_after))
    await until(lambda: not errors)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await target.close()
    said = [record for record in caplog.records if "no table of generation 2" in record.message]
    assert [bool(record.exc_info) for record in said] == [False, True]
    assert isinstance(target.failure, KeyError)
