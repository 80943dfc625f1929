"""A publish one shard at a time, in the controller: shards, gate and files are stand-ins."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from shardline.cluster.commands.publish_text import publish_line
from shardline.cluster.control import controller as module
from shardline.cluster.control import publish_by_shard
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
    """has: the token of what each shard searches. busy: answers of a primary that it cannot begin
    yet. failures: by shard, why what it was ordered fails. undone: see ``taken_over``."""

    has: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, str] = field(default_factory=dict)
    marked: list[int] = field(default_factory=list)
    undone: int | None = None
    ordered: list[int] = field(default_factory=list)
    busy: int = 0
    failures: dict[int, Absence] = field(default_factory=dict)
    takes: int = 2  # looks until a shard has taken its index over
    refused: Exception | None = None
    silent: set[int] = field(default_factory=set)
    judged_files: list[tuple[int, int]] = field(default_factory=list)
    _left: dict[int, int] = field(default_factory=dict)
    together: list[set[int]] = field(default_factory=list)  # shards that were at it at once

    async def takeovers(
        self, live: RoutingTable, generation: int, token: str
    ) -> tuple[Takeover, ...]:
        if self.refused is not None:
            raise self.refused
        assert token
        source = f"{generation}"
        return tuple(Takeover(source=source, after_seq=each, token=token) for each in range(SHARDS))

    async def mark(self, key: ReplicaKey) -> None:
        self.marked.append(key.shard)

    async def take_over(self, key: ReplicaKey, order: Takeover) -> None:
        assert (order.source, order.after_seq) == ("3", key.shard)
        self.tokens[key.shard] = order.token
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
                self.has[key.shard] = self.tokens[key.shard]
                if self.undone == key.shard + 1:  # by a compaction of the shard before
                    self.undone = None
                    del self.has[key.shard - 1]
        return TakeoverLook(
            token=self.has.get(key.shard),
            is_busy=bool(left),
            failure=self.failures.get(key.shard) if left == 0 else None,
            trouble=None,
        )

    async def judge_files(self, live: RoutingTable, generation: int, bounds: Bounds) -> GateReport:
        await self.gate_open.wait()
        self.judged_files.append((live.generation, generation))
        return GateReport((figure("recall", 0.9, 0.95, ok=not self.failed),))


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Shards:
    found = Shards()
    monkeypatch.setattr(module, "WiredParts", lambda *settings: found)
    monkeypatch.setattr(publish_by_shard, "LOOK_S", 0.01)
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
        assert sorted(parts.marked) == list(range(SHARDS)), "caches are not used any more"
        with pytest.raises(NotFound, match="nothing is known to have been live"):
            await controller.roll_back()
        assert "all shards of generation 57 search its index" in publish_line(done, done["since_s"])


async def test_one_that_was_undone_is_taken_over_again(store: Store, parts: Shards) -> None:  # noqa: F811
    parts.undone = SHARDS
    async with cluster(store) as controller:
        await controller.publish(OPTIONS)
        assert (await ended(controller))["stage"] == "live"
        assert parts.ordered == [*range(SHARDS), SHARDS - 2]
        assert len(set(parts.has.values())) == 1
        assert set(parts.has) == set(range(SHARDS))


async def test_there_is_no_way_back_to_what_was_live_before(store: Store, parts: Shards) -> None:  # noqa: F811
    async with cluster(store) as controller:
        await controller.publish(PublishOptions(generation=3))
        assert (await ended(controller))["stage"] == "live"
        parts.failed = True
        await controller.publish(PublishOptions(generation=57, one_at_a_time=True))
        assert (await ended(controller))["stage"] == "failed"
        report = await controller.report()
        assert report["beside"]["generation"] == 57, "a gate that fails changes nothing"
        parts.failed = False
        await controller.roll_back()
        assert (await ended(controller))["stage"] == "live"
        await controller.publish(OPTIONS)
        assert (await ended(controller))["stage"] == "live"
        with pytest.raises(NotFound, match="nothing is known to have been live"):
            await controller.roll_back()


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
        assert parts.ordered == [0, 1, *range(SHARDS)], (
            "of one publish nothing is of use to another"
        )


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
        assert "shard 0 has not taken its index over" in done["reason"]["text"]


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
    del said["one_at_a_time"], said["token"]
    assert not PublishProgress.from_json(json.loads(json.dumps(said))).options.one_at_a_time


def test_older_versions_read_the_note_of_another_publish() -> None:
    said = PublishProgress(number=1, options=PublishOptions(generation=3), source=2).as_json()
    assert not {"one_at_a_time", "token"} & set(said)
