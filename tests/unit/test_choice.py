"""Which replica is asked: of two at random the better one; and which are not asked at all."""

import random
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from shardline.router.fanout.choice import (
    CLOCK_S,
    FIRST_SHARE,
    SLOW_START_S,
    SLOWER,
    Chooser,
    last_resort,
)

NOW = 1000.0
SILENT_S = 0.3
TRIES = 4000


@dataclass(eq=False)
class Replica:
    """As much of a ShardConnection as is looked at."""

    name: str
    owed: int = 0
    waiting_since: float | None = None
    is_lost: bool = False
    has_link: bool = True
    latency_s: float = 0.0
    opened_at: float = NOW - 3600.0
    drops: int = 0
    link: SimpleNamespace | None = field(init=False, default=None)

    def __post_init__(self):
        if self.has_link:
            self.link = SimpleNamespace(
                owed=self.owed, waiting_since=self.waiting_since, is_lost=self.is_lost
            )

    @property
    def connected(self):
        return self.has_link and not self.is_lost

    def drop_if_silent(self):
        self.drops += 1


def shares(*replicas, now=NOW, besides=()):
    """How often each is chosen, by name."""
    chooser = Chooser(SILENT_S, random.Random(7))
    found = Counter(
        None if each is None else each.name
        for each in (chooser.choose(replicas, now, besides) for _ in range(TRIES))
    )
    return {name: count / TRIES for name, count in found.items()}


def test_equals_are_asked_equally_often():
    for count in (2, 3, 5):
        found = shares(*(Replica(str(n)) for n in range(count)))
        assert len(found) == count
        assert all(share == pytest.approx(1 / count, abs=0.04) for share in found.values())


def test_the_one_that_owes_fewer_answers_is_asked_whatever_its_latency():
    assert shares(Replica("a", owed=2), Replica("b", owed=1, latency_s=9.0)) == {"b": 1.0}


def test_of_three_the_busiest_is_never_asked_and_the_idlest_when_it_is_one_of_the_two():
    found = shares(Replica("a", owed=3), Replica("b", owed=1), Replica("c", owed=2))
    assert found["b"] == pytest.approx(2 / 3, abs=0.03)
    assert found["c"] == pytest.approx(1 / 3, abs=0.03)
    assert "a" not in found


def test_latency_decides_between_equals_and_is_forgotten_so_that_it_is_measured_anew():
    slow, fast = Replica("slow", latency_s=0.2), Replica("fast", latency_s=0.01)
    chooser = Chooser(SILENT_S, random.Random(7))
    for _ in range(20):
        assert chooser.choose((slow, fast), NOW) is fast
    assert 0.1 < slow.latency_s < 0.2
    assert fast.latency_s == 0.01
    later = [chooser.choose((slow, fast), NOW) for _ in range(400)]
    assert slow in later
    assert slow.latency_s == pytest.approx(SLOWER * 0.01 + CLOCK_S, rel=0.05)


@pytest.mark.parametrize(("slow", "fast"), [(0.019, 0.01), (CLOCK_S, 0.0)])
def test_small_differences_of_latency_are_none(slow, fast):
    found = shares(Replica("a", latency_s=slow), Replica("b", latency_s=fast))
    assert found["a"] == pytest.approx(0.5, abs=0.04)


def test_lost_unconnected_silent_and_excluded_ones_are_not_asked():
    excluded, fine = Replica("excluded"), Replica("fine", owed=50, latency_s=9.0)
    silent = Replica("silent", waiting_since=NOW - SILENT_S)
    others = (None, Replica("lost", is_lost=True), Replica("never", has_link=False), silent)
    assert shares(*others, excluded, fine, besides=[excluded]) == {"fine": 1.0}
    assert silent.drops == TRIES  # whoever is not asked is to be reconnected all the same
    assert shares(*others) == {None: 1.0}
    assert shares(None, None) == {None: 1.0}


def test_one_that_owes_answers_and_has_sent_lately_is_not_silent():
    busy = Replica("busy", owed=1, waiting_since=NOW - 0.9 * SILENT_S)
    assert shares(busy) == {"busy": 1.0}
    chooser = Chooser(SILENT_S, random.Random(0))
    assert not chooser.is_silent(busy, NOW)
    assert chooser.is_silent(busy, NOW + 0.2 * SILENT_S)
    assert not chooser.is_silent(Replica("never", has_link=False), NOW)


@pytest.mark.parametrize("age", [0.0, 0.25, 0.5, 1.0, 2.0])
def test_a_new_connection_beside_an_old_one_gets_a_growing_share(age):
    new = Replica("new", opened_at=NOW - age * SLOW_START_S)
    found = shares(new, Replica("old"))
    share = min(1.0, FIRST_SHARE + (1 - FIRST_SHARE) * age)
    assert found["new"] == pytest.approx(share / 2, abs=0.03)


def test_new_connections_among_themselves_share_equally_and_a_single_one_takes_all():
    found = shares(Replica("a", opened_at=NOW), Replica("b", opened_at=NOW))
    assert found["a"] == pytest.approx(0.5, abs=0.04)
    assert shares(Replica("a", opened_at=NOW), Replica("b", is_lost=True)) == {"a": 1.0}


def test_the_last_resort_is_any_that_is_left_connected_ones_first():
    lost, silent = Replica("lost", is_lost=True), Replica("silent", waiting_since=0.0)
    assert last_resort((None, lost, silent)) is silent
    assert last_resort((None, lost, silent), [silent]) is lost
    assert last_resort((None, lost, silent), [silent, lost]) is None
    assert last_resort((None,)) is None
