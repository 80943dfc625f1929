"""Where the stages of a batch job on Ray fit: on one host each, or refused with the numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardline.cluster.batch.ray_room import (
    HostRoom,
    StageNeed,
    needs_of,
    no_room_left,
    packed,
    planned_stages,
    stage_cpus,
)
from shardline.shards.core.errors import Unavailable

GIB = 1 << 30


def hosts(*free: tuple[float, int]) -> list[HostRoom]:
    return [HostRoom(name=f"h{at}", cpus=c, memory=m * GIB) for at, (c, m) in enumerate(free)]


def test_the_sum_of_all_hosts_is_not_room_for_a_stage() -> None:
    """3 GiB are free together, 1 on each host: Ray would wait for ever."""
    with pytest.raises(
        Unavailable, match=r"room for shard 0.*2,048 MiB free on one.*h0.*1,024 MiB"
    ):
        planned_stages(hosts((2, 1), (2, 1), (2, 1)), [2 * GIB], None)
    with pytest.raises(Unavailable, match="room for shard 2, one of 5 stages"):
        planned_stages(hosts((4, 3), (4, 3)), [2 * GIB] * 3, 4)


def test_a_stage_takes_no_more_cpus_than_a_host_has() -> None:
    share, needs = planned_stages(hosts((2, 8), (2, 8), (2, 8)), [GIB], 6)
    assert (share.shard, share.threads) == (2, 2)
    assert len(packed(needs, hosts((2, 8), (2, 8), (2, 8)))) == 3


def test_fewer_cpus_are_taken_where_the_wanted_ones_do_not_fit() -> None:
    """12 CPUs would be 5 for each shard, and only one host has 5."""
    free = hosts((2, 8), (2, 8), (2, 8), (2, 8), (9, 8))
    share, needs = planned_stages(free, [GIB] * 2, None)
    packed(needs, free)
    assert share.shard == 4
    with pytest.raises(Unavailable, match=r"room for shard 1.*5 CPUs.*h4 4 CPUs"):
        planned_stages(free, [GIB] * 2, 12)


def test_too_few_cpus_are_refused() -> None:
    with pytest.raises(Unavailable, match="expected 8; got 4"):
        planned_stages(hosts((2, 8), (2.5, 8)), [GIB], 8)
    with pytest.raises(Unavailable, match="expected 1; got 0"):
        planned_stages(hosts((0.5, 8)), [GIB], None)


@pytest.mark.parametrize("shards", [1, 999, 5000, 100_000])
def test_every_stage_reserves_something(shards: int) -> None:
    share = stage_cpus(1, shards)
    assert share.shard >= 1e-4
    if shards <= 8000:
        assert shards * share.shard + 2 * share.side <= 1 + 1e-9
    else:
        with pytest.raises(Unavailable, match="no host"):
            planned_stages(hosts((1, 8)), [0] * shards, 1)


@given(
    free=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 16)), min_size=1, max_size=4),
    memory=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    cpus=st.none() | st.integers(1, 12),
)
def test_what_is_planned_fits(
    free: list[tuple[int, int]], memory: list[int], cpus: int | None
) -> None:
    try:
        share, needs = planned_stages(hosts(*free), [size * GIB for size in memory], cpus)
    except Unavailable:
        return
    assert needs == needs_of(share, [size * GIB for size in memory])
    chosen = packed(needs, hosts(*free))
    for at, (cores, room) in enumerate(free):
        here: list[StageNeed] = [
            need for need, host in zip(needs, chosen, strict=True) if host == at
        ]
        assert sum(need.cpus for need in here) <= cores + 1e-6
        assert sum(need.memory for need in here) <= room * GIB
    if cpus is not None:
        assert sum(need.cpus for need in needs) <= cpus + 1e-6


def test_a_lost_host_is_said_with_what_is_missing_and_what_to_do() -> None:
    lost = [
        StageNeed(name="shard 1", cpus=2.0, memory=300 << 20),
        StageNeed(name="writing", cpus=0.5),
    ]
    error = no_room_left(lost, [HostRoom(name="a", cpus=1.5, memory=100 << 20)])
    assert "the host of shard 1, writing is lost" in error.message
    assert error.expected == "2 CPUs and 300 MiB for shard 1; 0.5 CPUs and 0 MiB for writing"
    assert error.got == "a 1.5 CPUs and 100 MiB free"
    assert "the same command again" in str(error.hint)
    assert no_room_left(lost, []).got == "nothing free"
