"""Which repair an index needs, and what the controller makes of what routers and shards tell."""

import json

import numpy as np
import pytest

from shardline.cluster.control.cluster_quality import EXPIRE_S, MAX_SERVED, ClusterQuality
from shardline.cluster.control.quality_config import QualityConfig
from shardline.cluster.control.repairs import TO_DO, Repair, repairs_due, together
from shardline.cluster.preflight.check import Verdict
from shardline.cluster.preflight.served_index import index_checks
from shardline.shards.core.messages import (
    MAX_SERVED_AT_ONCE,
    Quality,
    ReplicaKey,
    RouterNews,
    ServedQueries,
    ShardHealth,
)

CONFIG = QualityConfig(
    min_recall=0.9, min_queries=32, max_changed_share=0.2, max_imbalance=4.0, max_unseen_share=0.5
)
WELL = ShardHealth(rows=1000, changed=200, unseen=500, imbalance=4.0)
GOOD = Quality(generation=1, recall=0.9, queries=32, k=10, since=0.0)


def health(**changes) -> ShardHealth:
    return ShardHealth(**({"rows": 1000, "changed": 0, "unseen": 0, "imbalance": 1.0} | changes))


def quality(recall: float, queries: int = 32, **changes) -> Quality:
    given = {"generation": 1, "k": 10, "since": 5.0} | changes
    return Quality(recall=recall, queries=queries, **given)


def codes(found, shards) -> list[str]:
    return [str(each.code) for each in repairs_due(CONFIG, found, shards)]


@pytest.mark.parametrize(
    ("found", "shards", "due"),
    [
        (None, {}, []),
        (GOOD, {0: WELL, 1: health(imbalance=None)}, []),
        (quality(0.89), {0: WELL}, ["retrain_index"]),
        (quality(0.0, queries=31), {0: WELL}, []),
        (GOOD, {0: WELL, 1: health(changed=201)}, ["compact"]),
        (GOOD, {0: health(rows=0, changed=1)}, ["compact"]),
        (GOOD, {0: WELL, 1: health(trouble="no such luck")}, ["compaction_fails"]),
        (GOOD, {0: health(imbalance=4.1)}, ["retrain_index"]),
        (None, {0: health(unseen=1000), 1: health(unseen=1)}, ["retrain_model"]),
        (None, {0: health(unseen=999), 1: health(unseen=1)}, []),
        (
            quality(0.5),
            {0: health(changed=900, imbalance=9.0, unseen=600)},
            ["compact", "retrain_index", "retrain_model"],
        ),
    ],
)
def test_a_repair_is_due_beyond_its_bound(found, shards, due) -> None:
    assert codes(found, shards) == due


def test_a_text_has_figure_bound_and_what_to_do() -> None:
    shards = {n: health(changed=300, imbalance=6.25, unseen=700, trouble="no") for n in range(6)}
    fails, compact, index, model = repairs_due(CONFIG, quality(0.812, queries=40), shards)
    assert compact.text.startswith("30% of the rows of shards 0, 1, 2, 3 and 2 more have changed")
    assert "bound 20%" in compact.text
    assert "recall@10 of 40 served queries is 0.812, bound 0.9" in index.text
    assert "6.2 times the work of even ones, bound 4" in index.text
    assert "70% of the items came after the generation was built, bound 50%" in model.text
    for repair, due in zip(Repair, (fails, compact, index, model), strict=True):
        assert due.text.endswith(TO_DO[repair])


def test_routers_are_taken_together_by_their_queries() -> None:
    assert together([]) is None
    one = quality(1.0, queries=30, since=9.0)
    assert together([one]) == one
    both = together([one, quality(0.6, queries=10, since=3.0, k=50)])
    assert both.recall == pytest.approx(0.9)
    assert (both.queries, both.k, both.since) == (40, 10, 3.0)


def test_the_controller_forgets_routers_and_other_generations() -> None:
    known = ClusterQuality(CONFIG)
    known.heard(("na", 1), RouterNews(quality=quality(1.0, queries=20)), 100.0)
    known.heard(("nb", 1), RouterNews(quality=quality(0.5, queries=20)), 105.0)
    known.heard(("nb", 1), RouterNews(quality=quality(0.7, queries=20)), 110.0)
    known.heard(("nc", 1), RouterNews(quality=quality(0.1, generation=2)), 110.0)
    assert known.quality(1, 110.0).recall == pytest.approx(0.85)
    assert known.quality(1, 100.0 + EXPIRE_S).recall == 0.7
    assert known.quality(1, 110.0 + EXPIRE_S) is None
    assert known.quality(2, 110.0).recall == 0.1
    known.heard(("nc", 1), RouterNews(), 111.0)
    assert known.quality(2, 111.0).recall == 0.1, "until it expires"


def test_the_report_has_the_worst_replica_of_each_shard() -> None:
    known = ClusterQuality(CONFIG)
    known.heard(("na", 1), RouterNews(quality=quality(0.5, queries=40)), 0.0)
    replicas = {
        ReplicaKey(1, 0, 0): health(changed=10),
        ReplicaKey(1, 0, 1): health(changed=500),
        ReplicaKey(1, 1, 0): health(changed=20),
        ReplicaKey(2, 2, 0): health(changed=999),
    }
    report = json.loads(json.dumps(known.report(1, replicas, 1.0)))
    assert [(each["shard"], each["changed"]) for each in report["health"]] == [(0, 500), (1, 20)]
    assert report["quality"]["recall"] == 0.5
    assert [each["code"] for each in report["repairs"]] == ["compact", "retrain_index"]
    assert [each.code for each in known.repairs(1, replicas, 1.0)] == ["compact", "retrain_index"]
    empty = ClusterQuality(CONFIG).report(1, {}, 0.0)
    assert empty == {"quality": None, "health": [], "repairs": []}


def test_served_queries_are_kept_by_model_and_bounded() -> None:
    known = ClusterQuality(CONFIG)
    assert known.served("m1") is None
    rows = np.arange(2 * MAX_SERVED, dtype=np.float32).reshape(-1, 2)
    for start in range(0, len(rows), 8):
        part = ServedQueries(model_version="m1", vectors=rows[start : start + 8])
        known.heard(("na", 1), RouterNews(served=part), 0.0)
    np.testing.assert_array_equal(known.served("m1"), rows[-MAX_SERVED:])
    greedy = ServedQueries(model_version="m2", vectors=np.zeros((MAX_SERVED, 2), np.float32))
    known.heard(("na", 1), RouterNews(served=greedy), 0.0)
    assert known.served("m1") is None
    assert known.served("m2").shape == (MAX_SERVED_AT_ONCE, 2)


def test_doctor_warns_of_what_is_due() -> None:
    report = {"quality": None, "repairs": [{"code": "compact", "text": "too much"}]}
    checks = list(index_checks(report))
    assert [(each.verdict, each.text) for each in checks] == [
        (Verdict.WARN, "compact: too much"),
        (Verdict.OK, "recall of served queries is not known yet"),
    ]
    (check,) = index_checks({"quality": {"recall": 0.987, "queries": 40, "k": 10}})
    assert check.text == "recall@10 0.987 of 40 served queries"


def test_a_compaction_that_fails_is_told_with_the_shard_and_the_reason() -> None:
    (due, *_) = repairs_due(CONFIG, GOOD, {0: WELL, 3: health(trouble="the disk is full")})
    assert "shard 3: the disk is full" in due.text
    assert "doctor" in due.text


def test_of_replicas_the_one_in_trouble_speaks_for_the_shard() -> None:
    found = ClusterQuality(CONFIG)
    replicas = {
        ReplicaKey(1, 0, 0): health(changed=190),
        ReplicaKey(1, 0, 1): health(trouble="no such luck"),
    }
    (due,) = found.repairs(1, replicas, now_s=0.0)
    assert due.code == "compaction_fails"
