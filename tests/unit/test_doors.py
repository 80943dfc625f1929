"""What a fault cost callers, from records made by hand."""

import numpy as np

from shardline.bench.load.load_client import Records
from tests.hosts.doors import Action, cost_of
from tests.hosts.rig import Host

RATE, COUNT = 10, 300  # 30 s
FAULT_S = 10.0
SINCE = 90  # the first request that counts


def records(failed: list[int], partial: list[int]) -> Records:
    """Every answer after 5 ms, but for those that failed, whose number is given."""
    made = Records.empty(np.arange(COUNT) / RATE)
    made.sent_s[:] = made.intended_s
    made.done_s[:] = made.intended_s + 0.005
    made.status[:], made.coverage[:] = 200, 1.0
    made.status[failed], made.done_s[failed], made.coverage[failed] = 503, np.nan, np.nan
    made.coverage[partial] = 0.75
    made.errors |= dict.fromkeys(failed, "HTTP 503 unavailable")
    return made


ACTIONS = [Action(at_s=FAULT_S, label="fault", do=lambda: None)]


def test_failures_and_partial_answers_are_counted_and_the_last_one_is_timed() -> None:
    found = {"host1": records([50, 99, 102], [110]), "host2": records([], [7])}
    cost = cost_of(found, ACTIONS, away=())
    assert (cost.harmed_before, cost.failed, cost.partial) == (2, 2, 1)
    assert cost.asked == 2 * (COUNT - SINCE)
    assert cost.failures == {"HTTP 503 unavailable": 2}
    assert cost.last_harm_s == 1.0
    assert cost.answered_share == 1 - 2 / cost.asked
    assert cost.p50_before_ms == cost.p99_after_ms == 5.0


def test_what_was_asked_of_a_host_that_is_away_does_not_count() -> None:
    away = Host(rig=None, number=1, name="host1")  # type: ignore[arg-type]  # its name is asked
    found = {"host1": records([101, 102], []), "host2": records([], [])}
    cost = cost_of(found, ACTIONS, away=[away])
    assert (cost.asked, cost.failed, cost.last_harm_s) == (COUNT - SINCE, 0, None)
