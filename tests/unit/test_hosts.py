"""Where replicas belong, without a controller: spread, room, moves."""

import itertools
import random
from collections import Counter

import pytest

from shardline.cluster.control.hosts import (
    UNLIMITED,
    Host,
    Spot,
    better_spread,
    choose_host,
    fits,
)


def hosts(*cpus: float) -> list[Host]:
    names = "abcdefgh"
    return [
        Host(node_id=name, address=f"10.0.0.{number}", cpus=each)
        for number, (name, each) in enumerate(zip(names, cpus, strict=False))
    ]


def filled(room: dict[str, int], shards: int, replicas: int) -> list[Spot]:
    """What choosing hosts one replica after the other comes to."""
    spots: list[Spot] = []
    for shard in range(shards):
        for _ in range(replicas):
            node = choose_host(shard, room, spots, failures={}, num_shards=shards)
            if node is not None:
                spots.append(Spot(shard, node))
    return spots


def loads(spots: list[Spot]) -> list[int]:
    return sorted(Counter(spot.node_id for spot in spots).values())


def test_equal_hosts_are_loaded_evenly_and_replicas_of_a_shard_apart() -> None:
    for shards, replicas, count in itertools.product((1, 4, 7), (1, 2, 3), (3, 4, 5)):
        room = dict.fromkeys("abcdefgh"[:count], UNLIMITED)
        spots = filled(room, shards, replicas)
        assert len(set(spots)) == len(spots) == shards * replicas
        placed = [sum(spot.node_id == node for spot in spots) for node in room]
        assert max(placed) - min(placed) <= 1


def can_be_placed(room: list[int], shards: int, replicas: int) -> bool:
    """By trying every choice."""
    if shards == 0:
        return True
    for chosen in itertools.combinations(range(len(room)), replicas):
        if all(room[host] > 0 for host in chosen):
            left = [each - (host in chosen) for host, each in enumerate(room)]
            if can_be_placed(left, shards - 1, replicas):
                return True
    return False


def test_what_fits_is_what_can_be_placed_and_is_placed() -> None:
    rng = random.Random(0)
    seen = Counter()
    for _ in range(300):
        cpus = [rng.randrange(5) for _ in range(rng.randrange(1, 5))]
        shards, replicas = rng.randrange(1, 5), rng.randrange(1, 4)
        reason = fits(hosts(*cpus), shards=shards, replicas=replicas, cpus_per_shard=1)
        assert (reason is None) == can_be_placed(cpus, shards, replicas)
        room = {host.node_id: host.room(cpus=1) for host in hosts(*cpus)}
        is_whole = len(filled(room, shards, replicas)) == shards * replicas
        assert is_whole == (reason is None), (cpus, shards, replicas)
        seen[is_whole] += 1
    assert min(seen.values()) > 50


def test_a_host_without_cpus_holds_nothing_and_no_reservation_needs_none() -> None:
    assert fits(hosts(0, 2), shards=400, replicas=1, cpus_per_shard=0) is None
    reason = fits(hosts(0, 2), shards=4, replicas=2, cpus_per_shard=0)
    assert reason == (
        "2 replicas of each shard are on as many different hosts, and 1 of 2 hosts can hold a shard"
        "; CPUs of the others: 10.0.0.0 0"
    )


@pytest.mark.parametrize(("cpus", "each", "room"), [(1, 0.1, 10), (3, 0.3, 10), (2, 0.75, 2)])
def test_room_is_counted_as_ray_does(cpus: float, each: float, room: int) -> None:
    assert hosts(cpus)[0].room(cpus=each) == room


def test_what_does_not_fit_is_told_with_its_arithmetic() -> None:
    reason = fits(hosts(2, 2, 2), shards=4, replicas=2, cpus_per_shard=1)
    assert reason == (
        "4 shards x 2 replicas = 8, each of which reserves 1 CPUs; there is room for 6: "
        "10.0.0.0 2, 10.0.0.1 2, 10.0.0.2 2"
    )
    reason = fits(hosts(2, 2), shards=4, replicas=1, cpus_per_shard=4)
    assert reason is not None
    assert "0 of 2 hosts can hold a shard, each of which reserves 4 CPUs" in reason
    on_gpu = Host(node_id="a", address="h", cpus=8, gpus=1)
    assert fits([on_gpu], shards=1, replicas=1, cpus_per_shard=0, gpus_per_shard=1) is None
    reason = fits([on_gpu], shards=2, replicas=1, cpus_per_shard=0, gpus_per_shard=1)
    assert reason is not None
    assert "2 shards x 1 replicas = 2, each of which reserves 1 GPUs; there is room for 1" in reason


def test_a_host_where_the_shard_has_failed_comes_last() -> None:
    room = {"a": UNLIMITED, "b": UNLIMITED, "c": UNLIMITED}
    spots = [Spot(0, "b"), Spot(1, "c"), Spot(2, "c")]

    def chosen(failures: dict[str, int]) -> str | None:
        return choose_host(0, room, spots, failures=failures, num_shards=3)

    assert chosen({}) == "a"
    assert chosen({"a": 1}) == "c"
    assert chosen({"a": 2, "c": 1}) == "c"
    assert chosen({"a": 1, "c": 2}) == "a"
    assert choose_host(0, {"b": 5}, spots, failures={}, num_shards=3) is None


@pytest.mark.parametrize("seed", range(20))
def test_moves_end_evenly_spread_and_each_is_a_gain(seed: int) -> None:
    rng = random.Random(seed)
    count, shards, replicas = rng.randrange(2, 6), rng.randrange(1, 9), rng.randrange(1, 3)
    nodes = "abcdefgh"[:count]
    room = dict.fromkeys(nodes, UNLIMITED)
    spots = [
        Spot(shard, node)
        for shard in range(shards)
        for node in rng.sample(nodes[: max(replicas, rng.randrange(1, count + 1))], replicas)
    ]
    for _ in range(shards * replicas * count):
        move = better_spread(room, spots, barred=(), num_shards=shards)
        if move is None:
            break
        before = sum(each**2 for each in loads(spots))
        spots.remove(move[0])
        spots.append(Spot(move[0].shard, move[1]))
        assert sum(each**2 for each in loads(spots)) < before
        assert len(set(spots)) == len(spots)
    else:
        pytest.fail("moves without end")
    placed = [sum(spot.node_id == node for spot in spots) for node in nodes]
    assert max(placed) - min(placed) <= 1


def test_two_replicas_on_one_host_are_parted_and_barred_hosts_left_alone() -> None:
    room = {"a": UNLIMITED, "b": UNLIMITED}
    doubled = [Spot(0, "a"), Spot(0, "a"), Spot(1, "b"), Spot(2, "b")]
    assert better_spread(room, doubled, barred=(), num_shards=3) == (Spot(0, "a"), "b")
    assert better_spread(room, doubled, barred=[Spot(0, "b")], num_shards=3) is None
    heavy = [Spot(0, "a"), Spot(1, "a")]
    assert better_spread(room, heavy, barred=(), num_shards=2) == (Spot(0, "a"), "b")
    assert better_spread(room, heavy, barred=[Spot(0, "b")], num_shards=2) == (Spot(1, "a"), "b")


def test_no_move_to_where_there_is_no_room() -> None:
    assert better_spread({"a": 3, "b": 0}, [Spot(0, "a")], barred=(), num_shards=1) is None


def test_replicas_are_in_different_zones_where_room_is_ample() -> None:
    zones = {"a": "z1", "b": "z1", "c": "z2"}
    room = dict.fromkeys(zones, UNLIMITED)
    spots: list[Spot] = []
    for shard in range(4):
        for _ in range(2):
            node = choose_host(shard, room, spots, failures={}, num_shards=4, zones=zones)
            assert node is not None
            spots.append(Spot(shard, node))
    for shard in range(4):
        assert {zones[spot.node_id] for spot in spots if spot.shard == shard} == {"z1", "z2"}
    assert loads(spots) == [2, 2, 4]
    assert better_spread(room, spots, barred=(), num_shards=4, zones=zones) is None
    tight = {"a": 2, "b": 2, "c": 1}
    node = choose_host(0, tight, [Spot(0, "a")], failures={}, num_shards=4, zones=zones)
    assert node == "b", "the zone would be c's"


@pytest.mark.parametrize("seed", range(20))
def test_moves_part_what_shares_a_zone_and_end(seed: int) -> None:
    rng = random.Random(seed)
    zones = {node: rng.choice(["z1", "z2"]) for node in "abcd"}
    room = dict.fromkeys(zones, UNLIMITED)
    spots = [Spot(shard, node) for shard in range(5) for node in rng.sample("abcd", 2)]

    def shared() -> int:
        pairs = Counter((spot.shard, zones[spot.node_id]) for spot in spots)
        return sum(count - 1 for count in pairs.values())

    for _ in range(100):
        move = better_spread(room, spots, barred=(), num_shards=5, zones=zones)
        if move is None:
            break
        before = (shared(), sum(each**2 for each in loads(spots)))
        spots.remove(move[0])
        spots.append(Spot(move[0].shard, move[1]))
        assert (shared(), sum(each**2 for each in loads(spots))) < before
        assert len(set(spots)) == len(spots)
    else:
        pytest.fail("moves without end")
    if len(set(zones.values())) == 2:
        assert shared() == 0
