"""A publish one shard at a time, in the controller: shards, gate and files are stand-ins."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from shardline.cluster.commands.publish_text import publish_line
from shardline.cluster.control import controller as module
from shardline.cluster.control import publish_in_turn
from shardline.cluster.control.publish_parts import Bounds
from shardline.cluster.control.publish_state import PublishOptions, PublishProgress
from shardline.cluster.rollover.gate import GateReport
from shardline.cluster.store import Store
from shardline.shards.core.errors import InvalidInput, NotFound, Unavailable, VersionMismatch
from shardline.shards.core.messages import Absence, ReplicaKey, RoutingTable
from shardline.shards.live.takeover import Takeover, TakeoverLook
from tests.fake_shard import until
from tests.unit.test_controller import (  # noqa: F401 - fixtures
    SHARDS,
    alive,
    made,
    running,
    store,
)
from tests.unit.test_publishing import (  # noqa: F401 - fixtures
    FakeParts,
    cluster,
    ended,
    figure,
    killed,
    live,
    nothing,
)

OPTIONS = PublishOptions(generation=3, one_at_a_time=True)


@dataclass
class Shards(FakeParts):
    """index_of: what each shard searches. busy: answers of a primary that it cannot begin yet.
    failures: by shard, why what it was ordered fails."""

    index_of: dict[int, int] = field(default_factory=dict)
    ordered: list[int] = field(default_factory=list)
    busy: int = 0
    failures: dict[int, Absence] = field(default_factory=dict)
    takes: int = 2  # looks until a shard has taken its index over
    refused: Exception | None = None
    silent: set[int] = field(default_factory=set)
    judged_files: list[tuple[int, int]] = field(default_factory=list)
    _left: dict[int, int] = field(default_factory=dict)
    together: list[set[int]] = field(default_factory=list)  # shards that were at it at once

    async def takeovers(self, live: RoutingTable, generation: int) -> tuple[Takeover, ...]:
        if self.refused is not None:
            raise self.refused
        return tuple(Takeover(source=f"{generation}", after_seq=s) for s in range(SHARDS))

    async def take_over(self, key: ReplicaKey, order: Takeover) -> None:
        assert order == Takeover(source="3", after_seq=key.shard)
        if self.busy:
            self.busy -= 1
            raise Unavailable("a compaction is under way")
        self.ordered.append(key.shard)
        self._left[key.shard] = self.takes
        self.together.append({shard for shard, left in self._left.items() if left})

    async def taken_over(self, key: ReplicaKey) -> TakeoverLook | None:
        if key.shard in self.silent:
            return None
        left = self._left.get(key.shard)
        if left is not None and left > 0:
            self._left[key.shard] = left = left - 1
            if not left and key.shard not in self.failures:
                self.index_of[key.shard] = 3
        return TakeoverLook(
            index_of=self.index_of.get(key.shard),
            is_busy=bool(left),
            ordered=None if left is None else "3",
            failure=self.failures.get(key.shard) if left == 0 else None,
        )

    async def judge_files(self, live: RoutingTable, generation: int, bounds: Bounds) -> GateReport:
        await self.gate_open.wait()
        self.judged_files.append((live.generation, generation))
        return GateReport((figure("recall", 0.9, 0.95, ok=not self.failed),))


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Shards:
    found = Shards()
    monkeypatch.setattr(module, "WiredParts", lambda *settings: found)
    monkeypatch.setattr(publish_in_turn, "LOOK_S", 0.01)
    return found


async def test_shards_take_it_over_one_after_the_other(store: Store, parts: Shards) -> None:  # noqa: F811
    parts.busy = 2
    async with cluster(store) as controller:
        await controller.publish(OPTIONS)
        done = await ended(controller)
        assert (done["stage"], done["reason"], done["source"]) == ("live", None, 57)
        assert parts.ordered == list(range(SHARDS))
        assert all(len(each) == 1 for each in parts.together)
        assert (live(controller), store.current()) == (57, 57), "it keeps its number"
        report = await controller.report()
        assert report["beside"] is None
        assert parts.judged_files == [(57, 3)]
        assert parts.mirrors == []
        with pytest.raises(NotFound, match="nothing is known to have been live"):
            await controller.roll_back()
        assert "all shards of generation 57 search its index" in publish_line(done, done["since_s"])


async def test_a_gate_that_fails_changes_nothing(store: Store, parts: Shards) -> None:  # noqa: F811
    parts.failed = True
    async with cluster(store) as controller:
        await controller.publish(OPTIONS)
        done = await ended(controller)
        assert (done["stage"], done["reason"]["code"]) == ("failed", "gate_failed")
        assert parts.ordered == []


async def test_a_shard_that_fails_ends_it_and_the_next_goes_on_behind_those_that_have(
    store: Store,  # noqa: F811
    parts: Shards,
) -> None:
    parts.failures[1] = Absence("not_found", "its log is too short")
    async with cluster(store) as controller:
        await controller.publish(OPTIONS)
        done = await ended(controller)
        assert (done["stage"], done["done"], done["total"]) == ("failed", 1, SHARDS)
        assert done["reason"] == {"code": "not_found", "text": "its log is too short"}
        assert f"failed at 1 of {SHARDS} shards" in publish_line(done, done["since_s"])
        parts.failures.clear()
        await controller.publish(OPTIONS)
        assert (await ended(controller))["stage"] == "live"
        assert parts.ordered == [0, 1, *range(1, SHARDS)], "the first has it already"


async def test_a_controller_that_dies_meanwhile_is_followed_by_one_that_goes_on(
    store: Store,  # noqa: F811
    parts: Shards,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts.silent.add(SHARDS - 1)
    async with cluster(store) as controller:
        await controller.publish(OPTIONS)
        await until(lambda: len(parts.ordered) == SHARDS - 1, timeout=5)
        controller._tasks.cancel()
        monkeypatch.setattr(controller, "close", nothing)
    parts.silent.clear()
    async with cluster(store) as again:
        assert (await ended(again))["stage"] == "live"
        assert parts.ordered == list(range(SHARDS))


async def test_one_that_never_answers_is_waited_for_within_bounds(
    store: Store,  # noqa: F811
    parts: Shards,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts.silent.add(0)
    async with cluster(store) as controller:
        tools = controller._publishing._tools
        monkeypatch.setattr(controller._publishing, "_tools", replace(tools, load_s=0.2))
        await controller.publish(OPTIONS)
        done = await ended(controller)
        assert done["stage"] == "failed"
        assert "within 0.2 s" in done["reason"]["text"]
        assert "shard 0 has not taken over" in done["reason"]["text"]


async def test_what_cannot_be_taken_over_is_refused_before_it_begins(
    store: Store,  # noqa: F811
    parts: Shards,
) -> None:
    async with cluster(store) as controller:
        with pytest.raises(InvalidInput, match="is live already"):
            await controller.publish(PublishOptions(generation=57, one_at_a_time=True))
        with pytest.raises(NotFound, match="no generation 58"):
            await controller.publish(PublishOptions(generation=58, one_at_a_time=True))
        parts.refused = VersionMismatch("of two models")
        with pytest.raises(VersionMismatch, match="two models"):
            await controller.publish(OPTIONS)
        assert (await controller.report())["publish"] is None
    async with running(store, writes=False) as controller:
        with pytest.raises(InvalidInput, match=r"cluster\.writes: true"):
            await controller.publish(OPTIONS)


def test_notes_of_older_versions_are_read() -> None:
    said: dict[str, Any] = PublishProgress(number=1, options=OPTIONS, source=2).as_json()
    assert PublishProgress.from_json(json.loads(json.dumps(said))).options.one_at_a_time
    del said["one_at_a_time"]
    assert not PublishProgress.from_json(json.loads(json.dumps(said))).options.one_at_a_time
