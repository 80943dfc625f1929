"""A generation that is loaded beside the live one, and takes its place: the rules, in a simulated
cluster whose hosts, processes and controller fail."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardline.cluster.control.events import (
    BesideEnded,
    BesideOpened,
    SealAsked,
    SealDropped,
    Switched,
)
from shardline.cluster.control.fleet_rules import can_switch, fleet_step
from shardline.cluster.control.fleet_state import Role
from shardline.cluster.control.placement_state import Rules
from shardline.cluster.control.publish_state import Noted, after_restart
from shardline.cluster.control.sealing import RETRY_S, sealed_seqs
from shardline.shards.core.messages import ReplicaKey, RoutingTable
from tests.unit.simulated_hosts import World
from tests.unit.test_placement import GENERATION, a_table

SHARDS = 2
NEXT = GENERATION + 1


def table_of(generation: int, model: str = "abc") -> RoutingTable:
    return replace(
        a_table(SHARDS),
        generation=generation,
        model_version=model,
        generation_dir=f"generations/{generation:06d}",
    )


@dataclass
class Store:
    """What is on record: the live generation, and the note of what is beside it."""

    current: int = GENERATION
    noted: Noted | None = None


class Publishing:
    """Does what the controller does in a publish, in its order, and may be killed anywhere."""

    def __init__(self, now: World, model: str = "abc") -> None:
        self.now, self.store, self.model = now, Store(), model

    def open(self, generation: int, role: Role = Role.CANDIDATE) -> None:
        live = self.now.placement.table.generation
        self.store.noted = Noted(live=live, beside=generation, role=role, is_mirrored=True)
        self.now.apply(self._opened(generation, role))

    def seal(self) -> None:
        self.now.apply(SealAsked(now_s=self.now.now))

    def switch(self, has: tuple[int, ...] = ()) -> bool:
        """Whether it could. has: the writes that the generation beside has."""
        beside = self.now.fleet.beside
        if beside is None or not can_switch(self.now.fleet):
            return False
        was = self.now.placement.table.generation
        self.store.current = beside.generation
        event = Switched(
            generation=beside.generation, now_s=self.now.now, is_mirrored=True, has=has
        )
        self.now.apply(event)
        live = self.store.current
        self.store.noted = Noted(live=live, beside=was, role=Role.KEPT, is_mirrored=True)
        return True

    def restart_controller(self) -> None:
        """It knows what is on record, and what it finds."""
        self.now.table = table_of(self.store.current, self.model)
        self.now.start()
        noted = after_restart(self.store.noted, self.store.current)
        if noted is not None and noted.beside is not None:
            self.now.apply(self._opened(noted.beside, noted.role))
        self.store.noted = noted

    def _opened(self, generation: int, role: Role) -> BesideOpened:
        return BesideOpened(
            table=table_of(generation, self.model),
            role=role,
            rules=self.now.rules,
            now_s=self.now.now,
            found=tuple(self.now.found(generation).items()),
            is_mirrored=True,
        )


def publishing(
    nodes: str = "ab", *, replicas: int = 1, model: str = "abc", **changes
) -> Publishing:
    rules = Rules(
        replicas=replicas,
        load_limit_s=1e6,
        cpus=changes.pop("cpus", 0),
        writes=changes.pop("writes", True),
    )
    now = World(table_of(GENERATION), rules, list(nodes), **changes).start()
    now.until_calm()
    return Publishing(now, model)


def tick_until(now: World, holds: Callable[[], bool], limit: int = 60) -> None:
    for _ in range(limit):
        if holds():
            return
        now.tick()
    raise AssertionError("it never came")


def is_loaded(now: World) -> bool:
    return now.fleet.beside is not None and now.fleet.beside.placement.ready


def is_sealed(now: World) -> bool:
    return sealed_seqs(now.placement) is not None


def leaders(now: World, generation: int) -> list[ReplicaKey]:
    return sorted(key for key in now.processes if key.generation == generation and now.leads(key))


def published(now: World) -> list[int]:
    return [table.generation for table in now.tables]


def test_a_candidate_is_loaded_and_led_and_no_router_hears_of_it() -> None:
    one = publishing()
    tables = len(one.now.tables)
    one.open(NEXT)
    tick_until(one.now, lambda: len(leaders(one.now, NEXT)) == SHARDS)
    assert is_loaded(one.now)
    assert len(one.now.tables) == tables
    assert len(leaders(one.now, GENERATION)) == SHARDS, "who takes writes meanwhile"


def test_the_switch_is_one_step_and_needs_all_shards_of_both() -> None:
    one = publishing()
    now = one.now
    one.open(NEXT)
    assert not one.switch(), "nothing is loaded, nothing sealed"
    tick_until(now, lambda: len(leaders(now, NEXT)) == SHARDS)
    before = now.fleet
    now.apply(Switched(generation=NEXT, now_s=now.now))
    assert now.fleet is before, "the live one is not sealed"
    one.seal()
    tick_until(now, lambda: is_sealed(now))
    before = now.fleet
    now.apply(Switched(generation=NEXT + 1, now_s=now.now))
    assert now.fleet is before, "another one is beside"
    tables = len(now.tables)
    assert one.switch()
    (table,) = now.tables[tables:]
    assert table.generation == NEXT
    assert all(shard.primary is not None for shard in table.shards), "it takes writes at once"
    assert now.fleet.beside is not None
    assert (now.fleet.beside.generation, now.fleet.beside.role) == (GENERATION, Role.KEPT)
    tick_until(now, lambda: len(leaders(now, GENERATION)) == SHARDS)
    assert now.ended == [], "what was live is kept"


def test_a_rollback_is_the_same_step_back() -> None:
    one = publishing()
    now = one.now
    for generation in (NEXT, GENERATION):
        if generation == NEXT:
            one.open(NEXT)
        tick_until(now, lambda: len(leaders(now, generation)) == SHARDS)  # noqa: B023
        one.seal()
        tick_until(now, lambda: is_sealed(now))
        has = (generation, *range(1, SHARDS))
        assert one.switch(has)
        assert published(now)[-1] == generation
        tick_until(now, lambda: all(shard.primary is not None for shard in now.tables[-1].shards))
        now.apply(SealAsked(now_s=now.now))  # a later table of the same generation
        tick_until(now, lambda: is_sealed(now))
        now.apply(SealDropped(now_s=now.now))
        tick_until(now, lambda: not is_sealed(now))
        assert {t.went_live_with for t in now.tables if t.generation == generation} >= {has}
        assert now.tables[-1].went_live_with == has, "all tables say what it went live with"
    assert now.ended == []


def test_a_sealed_shard_acknowledges_nothing_whoever_led_it() -> None:
    one = publishing(replicas=2)
    now = one.now
    (first, *_) = leaders(now, GENERATION)
    now.write()
    now.stopped = {first}  # it sleeps, and wakes up later
    now.write()
    one.seal()
    tick_until(now, lambda: is_sealed(now))
    assert all(route.primary is None for route in now.tables[-1].shards)
    counted = dict(now.acknowledged)
    now.stopped = set()
    for _ in range(10):
        now.tick()
        now.write()
    assert now.acknowledged == counted
    assert sealed_seqs(now.placement) == tuple(
        counted[GENERATION, shard] for shard in range(SHARDS)
    )


def test_once_the_seal_is_dropped_writes_go_on_with_higher_epochs() -> None:
    one = publishing()
    now = one.now
    one.seal()
    tick_until(now, lambda: is_sealed(now))
    highest = max(now.log_epochs.values())
    now.apply(SealDropped(now_s=now.now))
    assert not is_sealed(now)
    tick_until(now, lambda: len(leaders(now, GENERATION)) == SHARDS)
    assert min(now.log_epochs.values()) > highest
    now.tick()
    assert all(route.primary is not None for route in now.tables[-1].shards)


def test_a_seal_that_fails_is_tried_with_another_replica_and_again() -> None:
    one = publishing("abc", replicas=2)
    now = one.now
    first = leaders(now, GENERATION)[0]
    now.unwritable = {now.processes[first].node_id}
    one.seal()
    tick_until(now, lambda: is_sealed(now), limit=int(4 * RETRY_S) + 2)
    asked = [order.key for order in now.asked if order.key.shard == first.shard]
    assert asked[-2] == first, "who led is asked first"
    assert asked[-1] != first


def test_without_a_replica_that_answers_a_shard_is_not_sealed() -> None:
    one = publishing()
    now = one.now
    now.unwritable = {"a", "b"}
    one.seal()
    now.tick(5)
    assert not is_sealed(now)
    assert not one.switch()
    assert now.placement.sealing is not None
    assert all(each.failed is not None for each in now.placement.sealing.values())
    now.unwritable = set()
    tick_until(now, lambda: is_sealed(now))


def test_one_that_wakes_up_and_says_that_it_leads_does_not_lead_a_sealed_shard() -> None:
    one = publishing(replicas=2)
    now = one.now
    one.seal()
    key = leaders(now, GENERATION)[0]
    now.lose(key, 2)
    tick_until(now, lambda: is_sealed(now))
    now.tick(5)
    assert all(route.primary is None for route in now.tables[-1].shards)


def test_a_cluster_without_writes_needs_no_seal() -> None:
    one = publishing(writes=False)
    one.open(NEXT)
    one.seal()
    assert one.now.placement.sealing is None
    tick_until(one.now, lambda: is_loaded(one.now))
    assert one.switch()


def test_the_next_publish_ends_the_one_that_is_kept() -> None:
    one = publishing(writes=False)
    now = one.now
    one.open(NEXT)
    tick_until(now, lambda: is_loaded(now))
    one.switch()
    one.open(NEXT + 1)
    assert {key.generation for key in now.ended} == {GENERATION}
    assert len(now.ended) == SHARDS
    tick_until(now, lambda: is_loaded(now))
    assert {key.generation for key in now.processes} == {NEXT, NEXT + 1}
    now.apply(BesideEnded())
    assert {key.generation for key in now.processes} == {NEXT}
    assert now.fleet.beside is None


def test_hosts_share_their_room_and_the_live_one_comes_first() -> None:
    one = publishing("ab", replicas=2, cpus=2, room={"a": 6, "b": 6})
    now = one.now
    one.open(NEXT)
    now.tick(30)
    assert now.loads() == {"a": 3, "b": 3}, "two CPUs each; the candidate has what is left"
    assert not is_loaded(now)
    now.apply(BesideEnded())
    now.room |= {"a": 8, "b": 8}
    one.open(NEXT)
    tick_until(now, lambda: is_loaded(now))
    now.kill_host("b")
    now.room["a"] = 8
    now.nodes.append("c")
    now.room["c"] = 4
    now.tick(60)
    live = [key for key in now.processes if key.generation == GENERATION]
    assert len(live) == 2 * SHARDS
    assert now.placement.ready


def test_a_candidate_that_takes_room_that_the_live_one_needs_is_ended() -> None:
    one = publishing("ab", replicas=1, cpus=2, room={"a": 2, "b": 2})
    now = one.now
    now.room |= {"a": 4, "b": 4}
    one.open(NEXT)
    tick_until(now, lambda: is_loaded(now))
    now.room["a"] = 4
    now.kill_host("b")
    now.tick(2)
    assert now.fleet.beside is None
    tick_until(now, lambda: now.placement.ready)


def test_routers_are_told_of_the_other_model_while_writes_are_brought_to_it() -> None:
    one = publishing(model="xyz")
    now = one.now
    one.open(NEXT)
    assert now.tables[-1].other_model == "xyz"
    assert now.tables[-1].generation == GENERATION
    tick_until(now, lambda: len(leaders(now, NEXT)) == SHARDS)
    one.seal()
    tick_until(now, lambda: is_sealed(now))
    assert one.switch()
    assert (now.tables[-1].model_version, now.tables[-1].other_model) == ("xyz", "abc")
    now.apply(BesideEnded())
    assert now.tables[-1].other_model is None


def test_an_event_about_a_generation_that_is_not_loaded_changes_nothing() -> None:
    one = publishing()
    before = one.now.fleet
    assert fleet_step(before, BesideEnded()) == (before, ())
    assert fleet_step(before, Switched(generation=NEXT, now_s=1.0)) == (before, ())


@pytest.mark.parametrize("stage", ["loading", "loaded", "sealing", "sealed", "set", "switched"])
def test_a_restarted_controller_knows_what_is_live_and_what_is_beside(stage: str) -> None:
    one = publishing()
    now = one.now
    one.open(NEXT)
    if stage != "loading":
        tick_until(now, lambda: len(leaders(now, NEXT)) == SHARDS)
    if stage not in ("loading", "loaded"):
        one.seal()
    if stage in ("sealed", "set", "switched"):
        tick_until(now, lambda: is_sealed(now))
    if stage == "set":  # on record, and then killed
        one.store.current = NEXT
    elif stage == "switched":
        assert one.switch()
    tables = len(now.tables)
    one.restart_controller()
    tick_until(now, lambda: len(now.tables) > tables)
    live, other = (NEXT, GENERATION) if stage in ("set", "switched") else (GENERATION, NEXT)
    assert set(published(now)[tables:]) == {live}
    assert now.fleet.beside is not None
    assert now.fleet.beside.generation == other
    assert now.fleet.beside.role is (Role.KEPT if live == NEXT else Role.CANDIDATE)
    tick_until(now, lambda: len(leaders(now, live)) == len(leaders(now, other)) == SHARDS)
    assert now.ended == [], "every process was found"


STEPS = (
    *("open", "prepare", "prepare", "publish", "publish", "publish", "rollback", "switch"),
    *("seal", "unseal", "end", "restart", "cut restart"),
    *("kill host", "new host", "kill process", "stop", "unwritable", "head", "write"),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9)), min_size=8, max_size=30),
    replicas=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_in_any_history_tables_are_of_what_is_live_and_no_acknowledged_write_is_left_behind(
    steps: list[tuple[str, int]], replicas: int, seed: int
) -> None:
    """``World`` asserts that versions and epochs rise strictly."""
    rng = random.Random(seed)
    one = publishing("abc", replicas=replicas, load_s=1)
    now = one.now
    lives, newest = [GENERATION], GENERATION
    for number, (kind, ticks) in enumerate(steps):
        sealed, was = sealed_seqs(now.placement), now.placement.table.generation
        if kind in ("open", "prepare", "publish"):
            newest += 1
            one.open(newest)
        if kind in ("prepare", "publish", "rollback"):
            now.tick(12)
            one.seal()
            now.tick(3)
            now.write()
            sealed = sealed_seqs(now.placement)
        act(one, kind, rng, number)
        if one.store.current != lives[-1]:
            lives.append(one.store.current)
            assert sealed == tuple(now.acknowledged[was, shard] for shard in range(SHARDS))
        assert now.placement.table.generation == one.store.current
        for _ in range(ticks):
            now.tick()
            now.write()
            assert_counts_are_final(now)
    seen = published(now)
    changes = [each for at, each in enumerate(seen) if at == 0 or seen[at - 1] != each]
    assert is_part(changes, lives), "what was replaced returns by a switch alone"
    for table in now.tables:
        assert {route.key.generation for shard in table.shards for route in shard.replicas} == {
            table.generation
        }


def act(one: Publishing, kind: str, rng: random.Random, number: int) -> None:
    now = one.now
    alive = [key for key in now.processes if now.fleet.state(key) is not None]
    if kind == "seal":
        one.seal()
    elif kind in ("switch", "publish", "rollback"):
        one.switch()
    elif kind == "unseal":
        now.apply(SealDropped(now_s=now.now))
    elif kind == "end":
        now.apply(BesideEnded())
        one.store.noted = None
    elif kind == "restart":
        one.restart_controller()
    elif kind == "cut restart" and can_switch(now.fleet) and now.fleet.beside is not None:
        one.store.current = now.fleet.beside.generation
        one.restart_controller()
    elif kind == "kill host" and len(now.nodes) > 2:
        now.kill_host(rng.choice(now.nodes))
    elif kind == "new host" and len(now.nodes) < 4:
        now.nodes.append(f"n{number}")
    elif kind == "kill process" and alive:
        now.kill_process(rng.choice(alive), is_noticed=rng.random() < 0.7)
    elif kind == "stop":
        now.stopped = {rng.choice(alive)} if alive and not now.stopped else set()
    elif kind == "unwritable":
        now.unwritable = {rng.choice(now.nodes)} if not now.unwritable else set()
    elif kind == "head":
        now.is_head_away = not now.is_head_away


def assert_counts_are_final(now: World) -> None:
    for shard, each in (now.placement.sealing or {}).items():
        if each.seq is not None:
            assert each.seq == now.acknowledged[now.placement.table.generation, shard]


def is_part(found: list[int], lives: list[int]) -> bool:
    """Whether it is a subsequence."""
    left = iter(lives)
    return all(each in left for each in found)
