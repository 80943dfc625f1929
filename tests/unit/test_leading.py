"""Which replica leads a shard: the rules, in a simulated cluster whose hosts and processes fail."""

import random

import pytest

from shardline.cluster.control.events import (
    Announce,
    HostsSeen,
    Lead,
    LeaderSeen,
    LeadFailed,
    Leading,
    Publish,
    ReplicaRegistered,
    RestartAsked,
)
from shardline.cluster.control.leading import HANDOVER_S, HEAD_S
from shardline.cluster.control.placement import open_generation, step
from shardline.cluster.control.placement_state import Placement, Rules
from shardline.shards.core.messages import Absence, ReplicaKey
from tests.unit.simulated_hosts import FENCED, READ_ONLY, World, a_choice
from tests.unit.test_placement import GENERATION, a_table, published

SHARDS = 3


def world(nodes: str = "abc", *, shards: int = SHARDS, replicas: int = 2, **changes) -> World:
    rules = Rules(replicas=replicas, load_limit_s=1e6, writes=changes.pop("writes", True))
    return World(a_table(shards), rules, list(nodes), **changes).start()


def key(shard: int, replica: int) -> ReplicaKey:
    return ReplicaKey(GENERATION, shard, replica)


def primaries(now: World) -> list[ReplicaKey | None]:
    return [now.primary(shard) for shard in range(len(now.table.shards))]


def assert_all_led(now: World) -> None:
    """The newest table names a replica of each shard that does take its writes."""
    assert all(now.leads(primary) for primary in primaries(now)), primaries(now)
    assert [note for note in notes(now) if "writes" in note[1]] == []


def notes(now: World) -> list[tuple[str, str]]:
    return [(note.code, note.text) for note in now.tables[-1].notes]


def test_the_first_replica_of_each_shard_leads_once_all_answer() -> None:
    now = world()
    now.until_calm()
    assert primaries(now) == [key(shard, 0) for shard in range(SHARDS)]
    assert_all_led(now)
    assert len(now.asked) == SHARDS, "nobody is asked again"
    assert now.tables[0].shards[0].primary is None, "searches do not wait for it"


def test_without_writes_nobody_is_asked() -> None:
    now = world(writes=False)
    now.until_calm()
    now.kill_process(key(0, 0))
    now.until_calm()
    assert (now.asked, primaries(now), notes(now)) == ([], [None] * SHARDS, [])


def test_a_lost_leader_is_followed_by_another_at_once() -> None:
    now = world(lead_s=0)
    now.until_calm()
    now.kill_process(key(0, 0))
    assert now.primary(0) is None, "it does not answer"
    assert now.asked[-1].key == key(0, 1)
    now.answer_asked()
    assert now.primary(0) == key(0, 1)
    now.until_calm()
    assert now.primary(0) == key(0, 1), "and stays so when the other is back"
    assert_all_led(now)
    assert len(now.asked) == SHARDS + 1


def test_the_only_replica_leads_again_with_a_new_epoch_when_its_process_is_another() -> None:
    now = world("a", replicas=1, shards=1)
    now.until_calm()
    before = now.asked[-1]
    now.kill_process(key(0, 0))
    now.tick()
    assert (now.primary(0), len(now.asked)) == (None, 1)
    now.until_calm()
    assert_all_led(now)
    assert now.asked[-1].epoch > before.epoch


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_leader_that_was_restarted_before_it_was_missed_is_known_not_to_lead(
    replicas: int,
) -> None:
    now = world("ab"[:replicas], replicas=replicas, shards=1)
    now.until_calm()
    asked = len(now.asked)
    now.kill_process(key(0, 0), is_noticed=False)
    now.until_calm()
    assert_all_led(now)
    assert len(now.asked) == asked + 1


def test_a_leader_that_only_was_not_heard_of_leads_on() -> None:
    now = world("a", replicas=1, shards=1)
    now.until_calm()
    now.lose(key(0, 0), 5)
    assert now.primary(0) is None
    now.until_calm()
    assert_all_led(now)
    assert len(now.asked) == 1


def test_a_leader_that_returns_while_its_successor_is_asked_leads_until_that_answers() -> None:
    now = world(lead_s=20)
    now.until_calm()
    now.lose(key(0, 0), 3)
    assert now.asked[-1].key == key(0, 1)
    now.tick(5)
    assert now.primary(0) == key(0, 0)
    assert now.leads(now.primary(0))
    now.until_calm()
    assert now.primary(0) == key(0, 1)
    assert_all_led(now)


def test_a_stopped_leader_is_followed_by_another_if_there_is_one() -> None:
    now = world()
    now.until_calm()
    now.stopped = {key(0, 0)}
    now.tick(2)
    assert now.primary(0) == key(0, 1)
    assert_all_led(now)
    now.stopped = set()
    now.until_calm()
    assert now.primary(0) == key(0, 1)
    assert len(now.asked) == SHARDS + 1


def test_a_stopped_leader_without_another_leads_on_when_it_wakes() -> None:
    now = world("a", replicas=1)
    now.until_calm()
    now.stopped = {key(0, 0)}
    now.tick(30)
    assert now.primary(0) == key(0, 0)
    now.stopped = set()
    now.until_calm()
    assert_all_led(now)
    assert len(now.asked) == SHARDS


def test_two_stopped_replicas_are_asked_later_and_later() -> None:
    now = world("ab", shards=1, lead_s=30)
    now.until_calm()
    now.stopped = {key(0, 0), key(0, 1)}
    asked = len(now.asked)
    now.tick(600)
    assert len(now.asked) - asked <= 600 / 30
    now.stopped = set()
    now.until_calm()
    assert_all_led(now)


def test_a_dead_hosts_shards_are_led_by_others() -> None:
    now = world()
    now.until_calm()
    lost = [k for k in primaries(now) if now.processes[k].node_id == "a"]
    assert lost
    now.kill_host("a")
    now.tick()
    assert set(lost).isdisjoint(primaries(now))
    assert_all_led(now)


@pytest.mark.parametrize("lead_s", [0, 7])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_rolling_restart_hands_over_each_shard_once_before_its_leader_leaves(
    replicas: int, lead_s: float
) -> None:
    now = world(replicas=replicas, lead_s=lead_s)
    now.until_calm()
    since = len(now.tables)
    now.apply(RestartAsked())
    now.until_calm()
    assert now.placement.restart is not None
    assert now.placement.restart.is_over
    assert_all_led(now)
    assert len(now.asked) == 2 * SHARDS, "not to one that is to be replaced itself"
    assert all(shard.primary is not None for table in now.tables[since:] for shard in table.shards)


def test_a_move_hands_over_before_the_leader_leaves() -> None:
    now = world("a", replicas=1, shards=4)
    now.until_calm()
    since = len(now.tables)
    now.nodes.append("b")
    now.until_calm()
    assert sum(now.processes[primary].node_id == "b" for primary in primaries(now)) == 2
    assert all(shard.primary is not None for table in now.tables[since:] for shard in table.shards)
    assert_all_led(now)


def test_a_leader_whose_successor_cannot_lead_stays_for_a_while() -> None:
    now = world("a", replicas=1, shards=1)
    now.until_calm()
    now.nodes.append("b")
    now.unwritable = {"a", "b"}
    now.apply(RestartAsked())
    now.tick(int(HANDOVER_S) - 10)
    assert now.primary(0) == key(0, 0)
    assert now.leads(now.primary(0))
    assert notes(now) == [
        (
            "read_only",
            f"writes to shard 0 cannot be handed over to another replica: {READ_ONLY.text}",
        )
    ]
    now.tick(20)
    assert now.primary(0) is None
    assert notes(now) == [("read_only", f"writes to shard 0 are refused: {READ_ONLY.text}")]
    now.unwritable = set()
    now.until_calm()
    assert_all_led(now)


def test_a_host_that_cannot_write_leads_nothing() -> None:
    now = world(unwritable={"a"})
    now.until_calm()
    assert {now.processes[primary].node_id for primary in primaries(now)} <= {"b", "c"}
    assert_all_led(now)


def test_a_store_that_cannot_be_written_is_tried_later_and_later_and_noted() -> None:
    now = world(unwritable={"a", "b", "c"})
    now.until_calm()
    assert primaries(now) == [None] * SHARDS
    assert notes(now) == [("read_only", f"writes to shards 0, 1, 2 are refused: {READ_ONLY.text}")]
    asked = [lead for lead in now.asked if lead.key.shard == 0]
    assert {lead.key for lead in asked} == {key(0, 0), key(0, 1)}
    now.tick(300)
    assert len([lead for lead in now.asked if lead.key.shard == 0]) - len(asked) <= 12
    now.unwritable = set()
    now.tick(31)
    assert_all_led(now)


def test_a_restarted_controller_leaves_those_who_lead() -> None:
    now = world()
    now.until_calm()
    now.kill_process(key(1, 0))
    now.until_calm()
    before, asked = primaries(now), len(now.asked)
    assert before[1] == key(1, 1)
    now.start()
    now.until_calm()
    assert primaries(now) == before
    assert len(now.asked) == asked
    assert_all_led(now)


def test_a_restarted_controller_replaces_a_leader_that_it_does_not_hear_of() -> None:
    now = world(noticed_s=60)
    now.until_calm()
    now.kill_host("a")
    now.start()
    now.tick(5)
    assert_all_led(now)


def test_without_news_of_hosts_nobody_is_asked() -> None:
    now = world()
    now.until_calm()
    now.is_head_away = True
    now.tick(int(HEAD_S) + 1)
    now.kill_process(key(0, 0))
    now.tick(30)
    assert len(now.asked) == SHARDS
    now.is_head_away = False
    now.tick(2)
    assert_all_led(now)


def test_one_whose_answer_is_lost_is_followed_with_a_higher_epoch() -> None:
    now = world(deaf={key(0, 0)})
    now.until_calm()
    assert now.primary(0) == key(0, 1)
    assert_all_led(now)


# Single steps


def led(seq: int = 0) -> tuple[Placement, Lead]:
    """One shard with two replicas, of which the first leads."""
    hosts = world("ab").hosts()
    placement, _ = open_generation(
        a_table(1), counter=5, rules=Rules(replicas=2, writes=True), hosts=hosts, found={}
    )
    for replica in range(2):
        placement, orders = step(
            placement, ReplicaRegistered(key=key(0, replica), address=("h", replica))
        )
    (asked,) = (order for order in orders if isinstance(order, Lead))
    assert isinstance(orders[0], Publish)
    assert (asked.key, asked.epoch) == (key(0, 0), placement.counter)
    placement, (publish,) = step(placement, Leading(key=asked.key, epoch=asked.epoch, seq=seq))
    assert published((publish,))[0].shards[0].primary == 0
    return placement, asked


@pytest.mark.parametrize("replica", [0, 1])
def test_an_answer_to_what_was_asked_before_changes_nothing(replica: int) -> None:
    placement, asked = led()
    for epoch in (asked.epoch - 1, asked.epoch, asked.epoch + 1):
        told = {"key": key(0, replica), "epoch": epoch}
        assert step(placement, Leading(seq=3, **told)) == (placement, ())
        assert step(placement, LeadFailed(reason=READ_ONLY, **told)) == (placement, ())
    for epoch in (asked.epoch - 1, asked.epoch + 1):
        seen = LeaderSeen(key=key(0, 0), epoch=epoch, leads=None)
        assert step(placement, seen) == (placement, ())


def test_a_leader_that_takes_no_writes_now_is_noted_and_stays() -> None:
    placement, asked = led()
    full = Absence("store_full", "no space left on device")
    seen = LeaderSeen(key=asked.key, epoch=asked.epoch, leads=asked.epoch, refused=full)
    placement, (publish,) = step(placement, seen)
    (table,) = published((publish,))
    assert table.shards[0].primary == 0
    assert [(note.code, note.text) for note in table.notes] == [
        ("store_full", "writes to shard 0 are refused: no space left on device")
    ]
    assert step(placement, seen) == (placement, ()), "told once"
    well = LeaderSeen(key=asked.key, epoch=asked.epoch, leads=asked.epoch)
    _, (publish,) = step(placement, well)
    assert published((publish,))[0].notes == ()


def test_a_leader_that_has_lost_the_lead_is_followed_by_another() -> None:
    placement, asked = led()
    lost = LeaderSeen(key=asked.key, epoch=asked.epoch, leads=None)
    placement, (publish, order) = step(placement, lost)
    (table,) = published((publish,))
    assert table.shards[0].primary is None
    assert isinstance(order, Lead)
    assert order.key == key(0, 1)
    assert order.epoch > asked.epoch


def test_a_replica_whose_log_has_a_higher_epoch_registers_again_and_is_asked_above_it() -> None:
    """The store's record of what was given out is lost."""
    placement, _ = open_generation(
        a_table(1), counter=5, rules=Rules(writes=True), hosts=world("a").hosts(), found={}
    )
    register = ReplicaRegistered(key=key(0, 0), address=("h", 1))
    placement, (_, asked) = step(placement, register)
    assert isinstance(asked, Lead)
    fenced = LeadFailed(key=asked.key, epoch=asked.epoch, reason=FENCED)
    placement, orders = step(placement, fenced)
    assert Announce(key=key(0, 0)) in orders
    placement, _ = step(placement, ReplicaRegistered(key=key(0, 0), address=("h", 1), epoch=400))
    hosts = tuple(placement.hosts.values())
    _, orders = step(placement, HostsSeen(hosts=hosts, now_s=placement.now_s + 1))
    (order,) = (order for order in orders if isinstance(order, Lead))
    assert order.epoch > 400


@pytest.mark.parametrize("seed", range(60))
def test_in_any_history_of_faults_one_leads_and_after_it_every_shard_is_led(seed: int) -> None:
    """Epochs rise and the table names who answers: ``World`` asserts both in each step."""
    rng = random.Random(seed)
    now = world(
        replicas=rng.choice([1, 2, 3]),
        load_s=rng.choice([1, 5]),
        noticed_s=rng.choice([0, 12]),
        lead_s=rng.choice([0, 1, 4]),
    )
    for number in range(25):
        kind = rng.choice([a_choice(rng, now), "lose", "unwritable", "deaf", "head", "stop"])
        if kind == "kill host":
            now.kill_host(rng.choice(now.nodes))
        elif kind == "new host":
            now.nodes.append(f"n{number}")
        elif kind == "restart controller":
            now.start(restart=now.placement.restart)
        elif kind in ("kill process", "lose"):
            alive = [k for k in now.processes if k in now.placement.replicas]
            alive = [k for k in alive if now.processes[k].registered]
            if alive and kind == "lose":
                now.lose(rng.choice(alive), rng.randrange(1, 9))
            elif alive:
                now.kill_process(rng.choice(alive), is_noticed=rng.random() < 0.7)
        elif kind == "unwritable":
            now.unwritable = {rng.choice(now.nodes)} if not now.unwritable else set()
        elif kind == "deaf":
            now.deaf = {rng.choice(list(now.placement.replicas))} if not now.deaf else set()
        elif kind == "stop":
            now.stopped = {rng.choice(list(now.placement.replicas))} if not now.stopped else set()
        elif kind == "head":
            now.is_head_away = not now.is_head_away
        if rng.random() < 0.1:
            now.apply(RestartAsked())
        now.tick(rng.randrange(15))
    now.unwritable, now.deaf, now.stopped, now.is_head_away = set(), set(), set(), False
    now.tick(60)
    assert_led_where_one_answers(now)
    now.until_calm()
    assert_all_led(now)


def assert_led_where_one_answers(now: World) -> None:
    for shard in range(SHARDS):
        states = [each for each in now.placement.replicas.values() if each.key.shard == shard]
        if any(state.answers for state in states):
            assert now.leads(now.primary(shard)), f"shard {shard}"
