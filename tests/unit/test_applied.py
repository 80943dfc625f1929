"""How far replicas are behind their primary, by looks that are not taken at the same moment."""

from shardline.cluster.control.applied import KEPT, Applied, Look
from shardline.shards.core.messages import ReplicaKey

PRIMARY, REPLICA = ReplicaKey(1, 0, 0), ReplicaKey(1, 0, 1)


def test_a_level_replica_has_no_lag_however_fast_writes_come() -> None:
    """1000 per second, and both have applied all of them whenever they are looked at."""
    applied = Applied()
    for second in range(3):
        for key, at_s in ((REPLICA, second + 0.1), (PRIMARY, second + 0.3)):
            applied.saw(key, Look(at_s, at_s + 0.01, round(1000 * at_s)))
        assert applied.lag(REPLICA, PRIMARY) == (None if second == 0 else 0)
    assert applied.seq(REPLICA) == 2100


def test_the_lag_is_what_the_primary_had_before_and_the_replica_lacks() -> None:
    applied = Applied()
    assert applied.lag(REPLICA, PRIMARY) is None
    assert applied.seq(REPLICA) is None
    applied.saw(PRIMARY, Look(1.0, 1.1, 500))
    assert applied.lag(REPLICA, PRIMARY) is None
    applied.saw(REPLICA, Look(1.05, 1.2, 100))
    assert applied.lag(REPLICA, PRIMARY) is None, "the primary had not answered then"
    applied.saw(REPLICA, Look(1.1, 1.2, 480))
    assert applied.lag(REPLICA, PRIMARY) == 20
    assert applied.lag(PRIMARY, PRIMARY) in (None, 0)
    applied.forget(REPLICA)
    assert applied.seq(REPLICA) is None
    applied.forget(REPLICA)


def test_few_looks_are_kept() -> None:
    applied = Applied()
    for second in range(100):
        applied.saw(PRIMARY, Look(second, second + 0.1, second))
    assert len(applied._looks[PRIMARY]) == KEPT
    assert applied.lag(PRIMARY, PRIMARY) == 0
