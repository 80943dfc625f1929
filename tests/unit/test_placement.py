"""The controller's rules, without a controller."""

import random
from dataclasses import replace

import pytest

from shardline.cluster.control.events import (
    Announce,
    Event,
    Instruction,
    NumberSeen,
    Place,
    Publish,
    ReplicaFailed,
    ReplicaRegistered,
    ReplicaUnreachable,
)
from shardline.cluster.control.hosts import Host
from shardline.cluster.control.placement import open_generation, step
from shardline.cluster.control.placement_state import Placement, Rules
from shardline.cluster.control.replacing import retry_after_s
from shardline.shards.core.messages import (
    Absence,
    ReplicaKey,
    ReplicaRoute,
    RoutingTable,
    ShardRoute,
)
from shardline.shards.core.partition import Partitioning
from shardline.shards.core.schema import Metric

GENERATION = 7
GONE = Absence("unavailable", "gone")
CORRUPT = Absence("corrupt_file", "index.faiss: wrong checksum")


def key(shard: int, replica: int = 0) -> ReplicaKey:
    return ReplicaKey(GENERATION, shard, replica)


def a_table(num_shards: int = 3) -> RoutingTable:
    return RoutingTable(
        version=0,
        generation=GENERATION,
        generation_dir="generations/000007",
        model_version="abc",
        dim=4,
        metric=Metric.COSINE,
        index="flat",
        partitioning=Partitioning.RANGE,
        boundaries=tuple(range(10, 10 * num_shards, 10)),
        shards=tuple(ShardRoute(shard=shard, rows=10, replicas=()) for shard in range(num_shards)),
    )


def begun(num_shards: int = 3, replicas: int = 1) -> tuple[Placement, tuple[Instruction, ...]]:
    """On as many hosts as there are replicas of a shard: a, b, c."""
    hosts = [Host(node_id=name, address=f"h{name}", cpus=2) for name in "abc"[:replicas]]
    return open_generation(
        a_table(num_shards), counter=5, rules=Rules(replicas=replicas), hosts=hosts, found={}
    )


def opened(num_shards: int = 3, replicas: int = 1) -> Placement:
    return begun(num_shards, replicas)[0]


def published(instructions: tuple[Instruction, ...]) -> list[RoutingTable]:
    return [each.table for each in instructions if isinstance(each, Publish)]


def routes(table: RoutingTable) -> list[ReplicaRoute]:
    return [route for shard in table.shards for route in shard.replicas]


def test_opening_places_every_replica_at_once_and_none_answers_yet() -> None:
    placement, instructions = begun(replicas=2)
    keys = [key(shard, replica) for shard in range(3) for replica in range(2)]
    assert instructions == tuple(
        Place(key=each, node_id=node) for each, node in zip(keys, "ababab", strict=True)
    )
    assert not placement.ready
    assert placement.table.version == 5
    assert [route.key for route in routes(placement.table)] == keys
    assert [route.host for route in routes(placement.table)] == ["ha", "hb"] * 3
    assert all(route.address is None for route in routes(placement.table))
    assert begun()[1] == tuple(Place(key=key(shard), node_id="a") for shard in range(3))


def test_ready_and_published_once_every_shard_registered() -> None:
    placement = opened()
    tables = []
    for shard in (2, 0, 1):
        assert not placement.ready
        assert tables == [], "a table with holes would take shards away from the routers"
        placement, instructions = step(
            placement, ReplicaRegistered(key=key(shard), address=("127.0.0.1", 1000 + shard))
        )
        tables += published(instructions)
    assert placement.ready
    assert tables == [placement.table]
    assert [route.address for route in routes(placement.table)] == [
        ("127.0.0.1", 1000),
        ("127.0.0.1", 1001),
        ("127.0.0.1", 1002),
    ]
    assert [route.epoch for route in routes(placement.table)] == [7, 8, 6]


def test_a_restarted_shard_gets_a_higher_epoch_and_its_new_address() -> None:
    placement, _ = step(opened(1), ReplicaRegistered(key=key(0), address=("h", 1)))
    first = placement.replicas[key(0)].route
    lost, instructions = step(
        placement, ReplicaUnreachable(key=key(0), epoch=first.epoch, reason=GONE)
    )
    assert instructions == (Publish(table=lost.table),)
    assert routes(lost.table)[0].address is None
    assert lost.replicas[key(0)].route.absence == GONE
    again, _ = step(lost, ReplicaRegistered(key=key(0), address=("h", 2)))
    assert routes(again.table)[0].address == ("h", 2)
    assert routes(again.table)[0].epoch > first.epoch
    assert again.ready


def test_a_shard_that_cannot_load_does_not_hold_back_the_others() -> None:
    placement, first = step(opened(2), ReplicaRegistered(key=key(0), address=("h", 1)))
    assert published(first) == []
    placement, second = step(placement, ReplicaFailed(key=key(1), reason=CORRUPT))
    (table,) = published(second)
    assert [route.address for route in routes(table)] == [("h", 1), None]


@pytest.mark.parametrize("failure", ["unreachable", "failed"])
def test_what_befalls_one_replica_leaves_the_other(failure: str) -> None:
    placement = opened(2, replicas=2)
    keys = list(placement.replicas)
    for port, each in enumerate(keys):
        assert not placement.ready
        placement, _ = step(placement, ReplicaRegistered(key=each, address=("h", port)))
    assert placement.ready
    before = dict(zip(keys, routes(placement.table), strict=True))
    epoch = before[key(1, 0)].epoch
    event = (
        ReplicaFailed(key=key(1, 0), reason=CORRUPT)
        if failure == "failed"
        else ReplicaUnreachable(key=key(1, 0), epoch=epoch, reason=GONE)
    )
    placement, instructions = step(placement, event)
    (table,) = published(instructions)
    after = dict(zip(keys, routes(table), strict=True))
    assert after.pop(key(1, 0)).address is None
    del before[key(1, 0)]
    assert after == before
    assert [each for each in instructions if isinstance(each, Place)] == (
        [Place(key=key(1, 0), node_id="a", after_s=1.0)] if failure == "failed" else []
    )
    placement, _ = step(placement, ReplicaRegistered(key=key(1, 0), address=("h", 9)))
    again = dict(zip(keys, routes(placement.table), strict=True))
    assert again.pop(key(1, 0)).address == ("h", 9)
    assert again == before


def test_news_of_a_replaced_epoch_changes_nothing() -> None:
    placement, _ = step(opened(1), ReplicaRegistered(key=key(0), address=("h", 1)))
    old_epoch = placement.replicas[key(0)].route.epoch
    placement, _ = step(placement, ReplicaRegistered(key=key(0), address=("h", 2)))
    after, instructions = step(
        placement, ReplicaUnreachable(key=key(0), epoch=old_epoch, reason=GONE)
    )
    assert after is placement
    assert instructions == ()


@pytest.mark.parametrize("stranger", [ReplicaKey(6, 0), ReplicaKey(7, 1), ReplicaKey(7, 0, 1)])
def test_news_of_a_replica_that_was_not_placed_changes_nothing(stranger: ReplicaKey) -> None:
    placement = opened(1)
    for event in (
        ReplicaRegistered(key=stranger, address=("h", 1)),
        ReplicaUnreachable(key=stranger, epoch=0, reason=GONE),
        ReplicaFailed(key=stranger, reason=CORRUPT),
    ):
        after, instructions = step(placement, event)
        assert after is placement
        assert instructions == ()


def test_a_failed_shard_is_placed_again_later_and_later() -> None:
    placement = opened(1)
    delays = []
    for number in range(7):
        placement, instructions = step(placement, ReplicaFailed(key=key(0), reason=CORRUPT))
        *told, place = instructions
        assert bool(told) == (number == 0), "the reason is the same"
        assert isinstance(place, Place)
        delays.append(place.after_s)
    assert delays == [1, 2, 4, 8, 16, 30, 30]
    assert placement.replicas[key(0)].route.absence == CORRUPT
    placement, _ = step(placement, ReplicaRegistered(key=key(0), address=("h", 1)))
    assert placement.replicas[key(0)].failures == 0
    assert placement.replicas[key(0)].route.absence is None


@pytest.mark.parametrize("failures", [0, 1, 5, 1000])
def test_retry_delay_is_bounded(failures: int) -> None:
    assert 1 <= retry_after_s(failures) <= 30


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("seed", range(20))
def test_random_histories_keep_the_invariants(seed: int, replicas: int) -> None:
    rng = random.Random(seed)
    placement = opened(4, replicas)
    keys = list(placement.replicas)
    numbers = [placement.table.version]
    epochs_seen = dict.fromkeys(keys, 0)
    for number in range(200):
        about = rng.choice(keys)
        epoch = placement.replicas[about].route.epoch - rng.randrange(2)
        event: Event = rng.choice(
            [
                ReplicaRegistered(key=about, address=("h", number)),
                ReplicaUnreachable(key=about, epoch=epoch, reason=GONE),
                ReplicaFailed(key=about, reason=CORRUPT),
            ]
        )
        before = placement
        placement, instructions = step(placement, event)
        assert placement.settled or not published(instructions)
        if placement.table is not before.table:
            numbers.append(placement.table.version)
        assert placement.counter == placement.table.version
        assert routes(placement.table) == [state.route for state in placement.replicas.values()]
        assert list(placement.replicas) == keys
        assert replace(placement.table, version=0, shards=()) == replace(
            before.table, version=0, shards=()
        )
        for route in routes(placement.table):
            assert epochs_seen[route.key] <= route.epoch <= placement.counter
            epochs_seen[route.key] = route.epoch
            if route.key != about:
                assert route == before.replicas[route.key].route
    assert numbers == sorted(set(numbers)), "every table has a higher version"


def test_a_shard_that_was_told_a_higher_epoch_gets_one_above_it() -> None:
    """The record of what was given out is lost, or older than the shards."""
    placement, _ = step(opened(2), ReplicaRegistered(key=key(0), address=("h", 1), epoch=40))
    assert routes(placement.table)[0].epoch == 41
    placement, (publish,) = step(
        placement, ReplicaRegistered(key=key(1), address=("h", 2), epoch=12)
    )
    assert isinstance(publish, Publish)
    assert [route.epoch for route in routes(publish.table)] == [41, 42]
    assert publish.table.version == 42


def test_a_version_above_the_counter_is_jumped_over_and_every_epoch_given_anew() -> None:
    placement = opened(2)
    for shard in range(2):
        placement, _ = step(placement, ReplicaRegistered(key=key(shard), address=("h", shard)))
    jumped, (publish, *announce) = step(placement, NumberSeen(number=100))
    assert isinstance(publish, Publish)
    assert publish.table.version == jumped.counter == 101
    assert [route.address for route in routes(publish.table)] == [("h", 0), ("h", 1)]
    assert announce == [Announce(key=key(0)), Announce(key=key(1))]
    for shard in range(2):
        jumped, _ = step(jumped, ReplicaRegistered(key=key(shard), address=("h", shard), epoch=6))
    assert min(route.epoch for route in routes(jumped.table)) > 100


@pytest.mark.parametrize("number", [0, 5, 7])
def test_a_version_that_this_counter_gave_out_changes_nothing(number: int) -> None:
    placement, _ = step(opened(1), ReplicaRegistered(key=key(0), address=("h", 1)))
    assert placement.counter >= 6
    assert step(placement, NumberSeen(number=min(number, placement.counter))) == (placement, ())


def test_a_version_seen_before_all_shards_are_heard_of_publishes_nothing() -> None:
    placement, instructions = step(opened(2), NumberSeen(number=100))
    assert instructions == ()
    placement, _ = step(placement, ReplicaRegistered(key=key(0), address=("h", 0)))
    assert routes(placement.table)[0].epoch > 100
