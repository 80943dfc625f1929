"""The controller's rules, without a controller."""

import random
from dataclasses import replace

import pytest

from shardline.cluster.control.placement import (
    Event,
    Instruction,
    Place,
    Placement,
    Publish,
    ShardFailed,
    ShardRegistered,
    ShardUnreachable,
    open_generation,
    retry_after_s,
    step,
)
from shardline.shards.core.messages import RoutingTable, ShardRoute
from shardline.shards.core.schema import Metric


def a_table(num_shards: int = 3) -> RoutingTable:
    return RoutingTable(
        version=0,
        generation=7,
        generation_dir="generations/000007",
        model_version="abc",
        dim=4,
        metric=Metric.COSINE,
        index="flat",
        shards=tuple(
            ShardRoute(shard=shard, rows=10, epoch=0, address=None) for shard in range(num_shards)
        ),
    )


def opened(num_shards: int = 3) -> Placement:
    return open_generation(a_table(num_shards), counter=5)[0]


def published(instructions: tuple[Instruction, ...]) -> list[RoutingTable]:
    return [each.table for each in instructions if isinstance(each, Publish)]


def test_opening_places_every_shard_at_once_and_none_answers_yet() -> None:
    placement, instructions = open_generation(a_table(), counter=5)
    assert instructions == tuple(Place(shard=shard, after_s=0.0) for shard in range(3))
    assert not placement.ready
    assert placement.table.version == 5
    assert all(route.address is None for route in placement.table.shards)


def test_ready_and_published_once_every_shard_registered() -> None:
    placement = opened()
    tables = []
    for shard in (2, 0, 1):
        assert not placement.ready
        assert tables == [], "a table with holes would take shards away from the routers"
        placement, instructions = step(
            placement, ShardRegistered(shard=shard, address=("127.0.0.1", 1000 + shard))
        )
        tables += published(instructions)
    assert placement.ready
    assert tables == [placement.table]
    assert [route.address for route in placement.table.shards] == [
        ("127.0.0.1", 1000),
        ("127.0.0.1", 1001),
        ("127.0.0.1", 1002),
    ]
    assert [route.epoch for route in placement.table.shards] == [7, 8, 6]


def test_a_restarted_shard_gets_a_higher_epoch_and_its_new_address() -> None:
    placement, _ = step(opened(1), ShardRegistered(shard=0, address=("h", 1)))
    first = placement.places[0].route
    lost, instructions = step(
        placement, ShardUnreachable(shard=0, epoch=first.epoch, reason="killed")
    )
    assert instructions == (Publish(table=lost.table),)
    assert lost.table.shards[0].address is None
    assert lost.places[0].reason == "killed"
    again, _ = step(lost, ShardRegistered(shard=0, address=("h", 2)))
    assert again.table.shards[0].address == ("h", 2)
    assert again.table.shards[0].epoch > first.epoch
    assert again.ready


def test_a_shard_that_cannot_load_does_not_hold_back_the_others() -> None:
    placement, first = step(opened(2), ShardRegistered(shard=0, address=("h", 1)))
    assert published(first) == []
    placement, second = step(placement, ShardFailed(shard=1, reason="corrupt file"))
    (table,) = published(second)
    assert [route.address for route in table.shards] == [("h", 1), None]


def test_news_of_a_replaced_epoch_changes_nothing() -> None:
    placement, _ = step(opened(1), ShardRegistered(shard=0, address=("h", 1)))
    old_epoch = placement.places[0].route.epoch
    placement, _ = step(placement, ShardRegistered(shard=0, address=("h", 2)))
    after, instructions = step(
        placement, ShardUnreachable(shard=0, epoch=old_epoch, reason="late news")
    )
    assert after is placement
    assert instructions == ()


def test_a_failed_shard_is_placed_again_later_and_later() -> None:
    placement = opened(1)
    delays = []
    for _ in range(7):
        placement, (published, place) = step(placement, ShardFailed(shard=0, reason="corrupt file"))
        assert isinstance(published, Publish)
        assert isinstance(place, Place)
        delays.append(place.after_s)
    assert delays == [1, 2, 4, 8, 16, 30, 30]
    assert placement.places[0].reason == "corrupt file"
    placement, _ = step(placement, ShardRegistered(shard=0, address=("h", 1)))
    assert placement.places[0].failures == 0


@pytest.mark.parametrize("failures", [0, 1, 5, 1000])
def test_retry_delay_is_bounded(failures: int) -> None:
    assert 1 <= retry_after_s(failures) <= 30


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_keep_the_invariants(seed: int) -> None:
    rng = random.Random(seed)
    placement = opened(4)
    versions = [placement.table.version]
    epochs_seen: dict[int, int] = dict.fromkeys(range(4), 0)
    for number in range(200):
        shard = rng.randrange(4)
        event: Event = rng.choice(
            [
                ShardRegistered(shard=shard, address=("h", number)),
                ShardUnreachable(
                    shard=shard,
                    epoch=placement.places[shard].route.epoch - rng.randrange(2),
                    reason="gone",
                ),
                ShardFailed(shard=shard, reason="failed"),
            ]
        )
        before = placement
        placement, instructions = step(placement, event)
        assert placement.settled or not published(instructions)
        if placement is not before:
            versions.append(placement.table.version)
        assert placement.table.shards == tuple(place.route for place in placement.places)
        assert replace(placement.table, version=0, shards=()) == replace(
            before.table, version=0, shards=()
        )
        for route in placement.table.shards:
            assert route.epoch >= epochs_seen[route.shard]
            epochs_seen[route.shard] = route.epoch
    assert versions == sorted(set(versions)), "every table has a higher version"
