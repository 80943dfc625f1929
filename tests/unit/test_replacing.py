"""Replicas on hosts that die and return, moved and restarted: the rules, in a simulated cluster."""

import random
import time
from collections import Counter
from dataclasses import replace

import pytest

from shardline.cluster.control.cluster_report import restart_progress
from shardline.cluster.control.events import (
    RestartAsked,
    RestartStopped,
)
from shardline.cluster.control.hosts import Host
from shardline.cluster.control.outlook import hopeless
from shardline.cluster.control.placement import open_generation
from shardline.cluster.control.placement_state import Rules, Stage
from shardline.cluster.control.reconcile import DRAIN_S, FORGET_S, OVERLAP_S, STEADY_S
from shardline.cluster.control.restart_state import Restart
from shardline.cluster.control.rolling_restart import shards_without_spare
from shardline.shards.core.messages import ReplicaKey
from tests.unit.simulated_hosts import UNREADABLE, World, a_choice
from tests.unit.test_placement import GENERATION, a_table


def world(
    nodes: str = "abc", *, shards: int = 4, replicas: int = 2, load_limit_s: float = 1e6, **changes
) -> World:
    rules = Rules(replicas=replicas, load_limit_s=load_limit_s, cpus=changes.pop("cpus", 0))
    return World(a_table(shards), rules, list(nodes), **changes).start()


def key(shard: int, replica: int) -> ReplicaKey:
    return ReplicaKey(GENERATION, shard, replica)


def assert_whole(now: World) -> None:
    """As wanted: every shard has its replicas, on different hosts, evenly, and they answer."""
    wanted = min(now.rules.replicas, len(now.nodes))
    for shard in range(len(now.table.shards)):
        assert len(now.answering(now.tables[-1], shard)) == wanted
        assert len(now.tables[-1].shards[shard].replicas) == wanted
    spots = now.spots()
    assert len(set(spots)) == len(spots) == wanted * len(now.table.shards)
    loads = now.loads().values()
    assert max(loads) - min(loads) <= 1


def assert_never_fewer(now: World, since: int, wanted: int) -> None:
    """By the tables themselves: what is not in one is not asked."""
    for table in now.tables[since:]:
        for shard in table.shards:
            answering = [route for route in shard.replicas if route.address is not None]
            assert len(answering) >= wanted
            assert len(shard.replicas) <= wanted + 1


def test_at_first_start_all_are_spread_and_published_once_all_answer() -> None:
    now = world()
    now.until_calm()
    assert_whole(now)
    assert len(now.tables) == 1


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_dead_hosts_replicas_are_placed_on_others_and_it_gets_its_share_when_back(
    replicas: int,
) -> None:
    now = world(replicas=replicas)
    now.until_calm()
    lost = now.loads()["c"]
    now.kill_host("c")
    now.tick()
    assert len(now.waiting) + len(now.placed) == 4 * replicas + lost, "at once"
    now.until_calm()
    assert_whole(now)
    since = len(now.tables)
    now.nodes.append("c2")
    now.tick(int(STEADY_S) - 1)
    assert "c2" not in {process.node_id for process in now.processes.values()}
    now.until_calm()
    assert_whole(now)
    assert_never_fewer(now, since, replicas)


@pytest.mark.parametrize("noticed_s", [0, 12])
def test_a_host_that_ray_misses_late_moves_nothing_twice(noticed_s: int) -> None:
    now = world(noticed_s=noticed_s)
    now.until_calm()
    lost, before = now.loads()["b"], len(now.placed)
    now.kill_host("b")
    now.until_calm()
    assert len(now.placed) - before == lost
    assert_whole(now)


def test_with_fewer_hosts_than_replicas_there_are_fewer_and_the_table_says_so() -> None:
    now = world("ab")
    now.until_calm()
    now.kill_host("b")
    now.until_calm()
    assert_whole(now)
    (note,) = now.tables[-1].notes
    assert note.text == (
        "1 instead of 2 replicas of shards 0, 1, 2, 3: "
        "replicas of a shard are on different hosts, and 1 lives (ha)"
    )
    since = len(now.tables)
    now.nodes.append("d")
    now.until_calm()
    assert_whole(now)
    assert_never_fewer(now, since, 1)
    assert now.tables[-1].notes == ()


def test_the_last_host_gone_leaves_a_route_that_says_why() -> None:
    now = world("a", replicas=1, shards=1)
    now.until_calm()
    now.kill_host("a")
    now.nodes.append("z")
    now.room["z"] = 0
    now.tick(2)
    (route,) = now.tables[-1].shards[0].replicas
    assert route.address is None
    assert route.absence is not None
    assert route.absence.text == "no living host has room for this shard"
    now.nodes.append("b")
    now.until_calm()
    assert len(now.answering(now.tables[-1], 0)) == 1


def test_a_shard_that_one_host_cannot_load_is_tried_on_another_and_the_host_is_named() -> None:
    now = world(unreadable={"c"})
    now.until_calm()
    spots = now.spots()
    assert len(spots) == 8
    assert "c" not in {node for _, node in spots}
    assert hopeless(now.placement) == []
    (note,) = now.tables[-1].notes
    assert note.code == UNREADABLE.code
    assert note.text.endswith(" could not be loaded on hc: index.faiss: wrong checksum")
    placed = len(now.placed)
    now.tick(int(FORGET_S) - 120)
    assert len(now.placed) == placed, "not tried again before long"
    since = len(now.tables)
    now.unreadable.clear()
    now.tick(200)
    now.until_calm()
    assert_whole(now)
    assert_never_fewer(now, since, 2)


def test_a_shard_that_cannot_be_loaded_anywhere_is_hopeless_once_all_were_tried() -> None:
    now = world("ab", replicas=1, shards=1, unreadable={"a", "b"})
    for _ in range(60):
        now.tick()
        tried = {place.node_id for place in now.placed}
        if hopeless(now.placement):
            break
    assert tried == {"a", "b"}
    assert hopeless(now.placement)[0].route.absence == UNREADABLE
    assert {route.absence for route in now.tables[-1].shards[0].replicas} == {UNREADABLE}
    now.tick(100)
    assert len(now.placed) < 12, "later and later"
    now.unreadable.clear()
    now.until_calm()
    assert_whole(now)


def test_a_shard_that_does_not_finish_loading_is_tried_elsewhere() -> None:
    now = world(stuck={"c"}, load_limit_s=30)
    now.until_calm()
    assert "c" not in {node for _, node in now.spots()}
    assert all(len(now.answering(now.tables[-1], shard)) == 2 for shard in range(4))
    assert "did not begin to answer on hc within 30 s" in now.tables[-1].notes[0].text


def test_with_nowhere_else_to_go_loading_takes_as_long_as_it_takes() -> None:
    now = world("a", replicas=1, load_s=500, load_limit_s=30)
    now.until_calm()
    assert_whole(now)
    assert len(now.placed) == 4


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_rolling_restart_replaces_every_replica_and_none_is_missed(replicas: int) -> None:
    now = world(replicas=replicas)
    now.until_calm()
    before, since = set(now.processes), len(now.tables)
    spots = sorted(now.spots())
    now.apply(RestartAsked())
    together = 0
    while not now.placement.restart.is_over:
        now.tick()
        together = max(together, len(now.processes) - 4 * replicas)
        assert now.now < 5000
    assert together == 1, "one after the other"
    assert before.isdisjoint(now.processes)
    assert sorted(now.ended) == sorted(before)
    assert_never_fewer(now, since, replicas)
    now.until_calm()
    assert_whole(now)
    assert sorted(now.spots()) == spots, "each on the host where it was"


def test_the_old_one_serves_beside_the_new_one_before_it_leaves() -> None:
    now = world("a", replicas=1, shards=1)
    now.until_calm()
    since = len(now.tables)
    now.apply(RestartAsked())
    now.until_calm()
    loading, both, one = [
        [(route.key.replica, route.address is not None) for route in table.shards[0].replicas]
        for table in now.tables[since:]
        if table.shards != now.tables[since - 1].shards
    ]
    assert loading == [(0, True), (1, False)]
    assert both == [(0, True), (1, True)]
    assert one == [(1, True)]
    answers_s, leaves_s = now.published_s[-2:]
    assert OVERLAP_S <= leaves_s - answers_s <= OVERLAP_S + 1, "routers connect meanwhile"


def test_a_rolling_restart_that_cannot_load_keeps_the_old_ones_and_goes_on_once_it_can() -> None:
    now = world("ab")
    now.until_calm()
    since = len(now.tables)
    now.unreadable = {"a"}
    now.apply(RestartAsked())
    now.tick(100)
    restart = now.placement.restart
    assert not restart.is_over
    assert restart.trouble.code == UNREADABLE.code
    assert restart.trouble.text == "shard 0: index.faiss: wrong checksum"
    tries = Counter((place.key.shard, place.node_id) for place in now.placed[8:])
    assert [tries[shard, "b"] for shard in range(4)] == [1] * 4, "the others have their turn"
    assert all(2 <= tries[shard, "a"] <= 6 for shard in range(4)), "later and later"
    now.unreadable = set()
    now.until_calm()
    assert now.placement.restart.is_over
    assert now.placement.restart.trouble is None
    assert_never_fewer(now, since, 2)
    assert_whole(now)


def test_a_rolling_restart_without_room_for_one_more_says_so() -> None:
    now = world("ab", cpus=1, room={"a": 4, "b": 4})
    now.until_calm()
    now.apply(RestartAsked())
    now.tick(5)
    trouble = now.placement.restart.trouble
    assert trouble.text.startswith("no host has room for one more replica of shard 0: ")
    now.nodes.append("c")
    now.until_calm()
    assert now.placement.restart.is_over
    assert_whole(now)


def test_a_rolling_restart_waits_for_a_shard_that_does_not_answer() -> None:
    now = world("ab", shards=1)
    now.until_calm()
    now.kill_process(key(0, 1))
    now.processes[key(0, 1)].ready_s = now.now + 30
    now.apply(RestartAsked())
    now.tick(20)
    assert key(0, 0) in now.processes
    assert "waits until all replicas of shard 0 answer" in now.placement.restart.trouble.text
    now.until_calm()
    assert now.placement.restart.is_over


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_replacement_that_hangs_is_given_up_and_the_old_one_stays(replicas: int) -> None:
    """Nowhere else to go, and no other host either that may do better."""
    now = world("ab"[:replicas], replicas=replicas, shards=2, load_limit_s=30)
    now.until_calm()
    since = len(now.tables)
    now.stuck = {"a"}
    now.apply(RestartAsked())
    now.tick(40)
    restart = now.placement.restart
    assert restart.trouble.text == "shard 0: did not begin to answer on ha within 30 s"
    assert len(now.processes) <= 2 * replicas + 1, "what hung has been ended"
    now.tick(100)
    assert not now.placement.restart.is_over
    now.stuck = set()
    now.until_calm()
    assert now.placement.restart.is_over
    assert_never_fewer(now, since, replicas)
    assert_whole(now)


def test_a_restart_goes_on_elsewhere_where_others_have_taken_the_cpus() -> None:
    """Ray has room for the new one by its own numbers, and does not start it."""
    now = world("ab", replicas=1, shards=2, load_limit_s=30)
    now.until_calm()
    since = len(now.tables)
    before = set(now.processes)
    now.free = {"a": 1}
    now.apply(RestartAsked())
    now.until_calm()
    assert now.placement.restart.is_over
    assert before.isdisjoint(now.processes)
    assert_never_fewer(now, since, 1)
    first = next(place for place in now.placed[2:] if place.key.shard == 0)
    assert (first.key, first.node_id) == (key(0, 2), "b"), "number 1 was given up on its own host"


def test_a_move_that_hangs_does_not_hinder_a_restart() -> None:
    now = world("ab", replicas=1, load_limit_s=30)
    now.until_calm()
    now.nodes.append("c")
    now.stuck = {"c"}
    now.tick(int(STEADY_S) + 5)
    assert [state.stage for state in now.placement.replicas.values()].count(Stage.LEAVING) == 1
    now.apply(RestartAsked())
    now.until_calm()
    assert now.placement.restart.is_over
    assert "c" not in {node for _, node in now.spots()}


def test_a_host_that_fails_does_not_keep_a_restart_from_the_others() -> None:
    now = world("abc", replicas=2, shards=3)
    now.until_calm()
    since, before = len(now.tables), set(now.processes)
    now.unreadable = {"a"}
    now.apply(RestartAsked())
    now.until_calm()
    assert now.placement.restart.is_over
    assert before.isdisjoint(now.processes), "those of the host that fails are on others"
    assert "a" not in {node for _, node in now.spots()}
    assert_never_fewer(now, since, 2)


def test_a_rolling_restart_can_be_stopped_and_what_is_under_way_is_ended_well() -> None:
    now = world("ab", load_s=5)
    now.until_calm()
    since = len(now.tables)
    now.apply(RestartAsked())
    now.tick(20)
    now.apply(RestartStopped())
    restart = now.placement.restart
    assert (restart.is_over, restart.is_stopped) == (True, True)
    placed = len(now.placed)
    now.until_calm()
    assert len(now.placed) <= placed + 1, "one may have been ordered, and not been created yet"
    assert_never_fewer(now, since, 2)
    assert_whole(now)
    progress = restart_progress(now.placement)
    assert 0 < progress["done"] < progress["total"] == 8
    assert progress["is_stopped"]
    placement = now.placement
    now.apply(RestartStopped())
    assert now.placement is placement
    now.apply(RestartAsked())
    now.until_calm()
    assert now.placement.restart.is_over
    assert restart_progress(now.placement)["done"] == 8


def test_shards_without_room_for_one_more_are_told_before_a_restart() -> None:
    now = world("ab", cpus=1, room={"a": 4, "b": 5})
    now.until_calm()
    assert shards_without_spare(now.placement) == [0, 1, 2, 3], "those on a have nowhere to go"
    now.nodes.append("c")
    now.tick()
    assert shards_without_spare(now.placement) == []


def test_what_is_about_to_end_does_not_count_as_no_room() -> None:
    now = world("a", shards=1, replicas=1, cpus=1, room={"a": 2}, connected_s=1e9)
    now.until_calm()
    now.apply(RestartAsked())
    now.tick(20)
    assert len(now.processes) == 2
    assert shards_without_spare(now.placement) == []


@pytest.mark.parametrize("connected_s", [5, 1e9])
def test_a_replaced_one_lives_until_no_router_is_connected_or_for_a_minute(
    connected_s: float,
) -> None:
    now = world("a", shards=1, replicas=1, connected_s=connected_s)
    now.until_calm()
    now.apply(RestartAsked())
    now.tick(120)
    lived_s = now.ended_s[key(0, 0)] - now.left_s[key(0, 0)]
    assert min(connected_s, DRAIN_S) <= lived_s <= min(connected_s, DRAIN_S) + 1
    assert now.placement.restart.is_over


def test_time_without_the_head_is_no_sign_of_being_stuck() -> None:
    now = world("ab", replicas=1, shards=2, load_limit_s=30, load_s=20)
    now.until_calm()
    now.nodes.append("c")
    now.kill_process(key(0, 0))
    now.processes[key(0, 0)].ready_s = now.now + 120
    now.is_head_away = True
    now.tick(100)
    now.is_head_away = False
    now.tick(int(STEADY_S) - 1)
    assert now.ended == []
    assert len(now.placed) == 2, "nor has a new host lived long enough"
    now.tick(15)
    assert key(0, 0) in now.processes, "it was not given up"


def test_a_replica_that_answers_while_the_head_is_away_counts_from_then() -> None:
    now = world("a", shards=1, replicas=1, load_s=50)
    now.until_calm()
    now.apply(RestartAsked())
    now.tick(2)
    now.is_head_away = True
    while not now.placement.replicas[key(0, 1)].answers:
        now.tick()
    came = now.placement.replicas[key(0, 1)].since_s
    assert came > now.placement.now_s + 40
    now.is_head_away = False
    now.tick()
    assert {route.key.replica for route in now.tables[-1].shards[0].replicas} == {0, 1}
    now.tick(int(OVERLAP_S))
    assert {route.key.replica for route in now.tables[-1].shards[0].replicas} == {1}


def test_a_restarted_controller_gives_out_no_number_again_that_a_restart_replaced() -> None:
    table = a_table(1)
    restart = Restart(number=9, below={0: 7}, total=1)
    placement, _ = open_generation(
        table, counter=1, rules=Rules(), hosts=world("a").hosts(), found={}, restart=restart
    )
    assert placement.next_numbers == {0: 8}
    assert list(placement.replicas) == [key(0, 7)]


def test_a_thousand_shards_are_opened_in_one_pass() -> None:
    """Each host has the same share, and it takes a fraction of a second."""
    hosts = [Host(node_id=f"n{number:02}", address=f"h{number}", cpus=8) for number in range(16)]
    began = time.process_time()
    placement, instructions = open_generation(
        a_table(1024), counter=1, rules=Rules(replicas=2), hosts=hosts, found={}
    )
    assert time.process_time() - began < 1.5, "4 s when each replica was placed by itself"
    assert len(instructions) == 2048
    loads = Counter(state.node_id for state in placement.staying())
    assert set(loads.values()) == {128}


def test_asking_again_during_a_rolling_restart_changes_nothing() -> None:
    now = world()
    now.until_calm()
    now.apply(RestartAsked())
    now.tick(3)
    placement = now.placement
    now.apply(RestartAsked())
    assert now.placement is placement


@pytest.mark.parametrize("after_s", range(12))
@pytest.mark.parametrize("kind", ["move", "rolling restart"])
def test_a_controller_that_restarts_at_any_moment_of_a_replacement_goes_on(
    kind: str, after_s: int
) -> None:
    now = world("ab", shards=3)
    now.until_calm()
    since = len(now.tables)
    if kind == "move":
        now.nodes.append("c")
        now.tick(int(STEADY_S) - 1)
    else:
        now.apply(RestartAsked())
    before = set(now.processes)
    now.tick(after_s)
    restart = now.placement.restart
    now.start(restart=restart)
    now.until_calm()
    assert_never_fewer(now, since, 2)
    assert_whole(now)
    if kind == "rolling restart":
        assert now.placement.restart.is_over
        assert before.isdisjoint(now.processes)


def test_a_restarted_controller_does_not_wait_for_a_dead_host() -> None:
    now = world("abc", load_s=100)
    now.until_calm()
    now.kill_host("c")
    now.start()
    tables = len(now.tables)
    now.tick(2)
    assert len(now.tables) > tables, "not even for its replicas to load elsewhere"
    assert all(now.answering(now.tables[-1], shard) for shard in range(4))


def test_a_restarted_controller_waits_three_seconds_for_a_host_that_ray_thinks_alive() -> None:
    now = world("abc", noticed_s=60)
    now.until_calm()
    now.kill_host("c")
    tables = len(now.tables)
    now.start()
    now.tick(2)
    assert len(now.tables) == tables
    now.tick(2)
    assert len(now.tables) > tables
    assert all(now.answering(now.tables[-1], shard) for shard in range(4))


def test_a_restarted_controller_without_news_of_a_whole_shard_publishes_nothing() -> None:
    now = world("ab", replicas=1, noticed_s=60)
    now.until_calm()
    now.kill_host("b")
    tables = len(now.tables)
    now.start()
    now.tick(30)
    assert len(now.tables) == tables, "a table with holes would take shards from the routers"
    now.until_calm()
    assert_whole(now)


def test_a_replacement_whose_host_dies_is_given_up_and_the_old_one_stays() -> None:
    now = world("ab", shards=2, replicas=1, load_s=20)
    now.until_calm()
    now.kill_host("b")
    now.until_calm()
    since = len(now.tables)
    now.nodes.append("c")
    now.tick(int(STEADY_S) + 5)
    assert [state.stage for state in now.placement.replicas.values()].count(Stage.LEAVING) == 1
    now.kill_host("c")
    now.until_calm()
    assert_whole(now)
    assert_never_fewer(now, since, 1)


def test_no_news_of_hosts_is_no_news_of_replicas() -> None:
    """While Ray's head is away nothing is placed, moved or ended, whatever shards say."""
    now = world()
    now.until_calm()
    placed, ended = len(now.placed), len(now.ended)
    now.nodes.remove("c")
    now.kill_process(key(0, 0))
    assert (len(now.placed), len(now.ended), now.waiting) == (placed, ended, [])


@pytest.mark.parametrize("seed", range(30))
def test_after_any_history_of_faults_all_is_as_wanted_again(seed: int) -> None:
    rng = random.Random(seed)
    replicas = rng.choice([1, 2, 3])
    now = world("abc", replicas=replicas, load_s=rng.choice([1, 5]), noticed_s=rng.choice([0, 12]))
    numbers: set[int] = set()
    for number in range(25):
        kind = a_choice(rng, now)
        if kind == "kill host":
            now.kill_host(rng.choice(now.nodes))
        elif kind == "new host":
            now.nodes.append(f"n{number}")
        elif kind == "restart controller":
            now.start(restart=now.placement.restart)
        elif kind == "kill process":
            alive = [k for k in now.processes if k in now.placement.replicas]
            if alive:
                now.kill_process(rng.choice(alive))
        if rng.random() < 0.1:
            now.apply(RestartAsked())
        now.tick(rng.randrange(15))
        table = now.placement.table
        assert all(shard.replicas for shard in table.shards)
        assert table.version >= max(numbers, default=0)
        numbers.add(table.version)
    now.until_calm()
    assert_whole(now)
    versions = [table.version for table in now.tables]
    assert versions == sorted(set(versions))
    assert set(now.processes) == set(now.placement.replicas)
    assert replace(now.tables[-1], version=0, shards=(), notes=()) == replace(
        a_table(4), version=0, shards=(), notes=()
    )
