"""The benchmark of the fan-out runs for real, small: shards in processes, answers complete."""

from shardline.bench.load.fanout_bench import measure
from shardline.bench.load.fanout_peers import PreparedShard
from shardline.router.merge import merge_top_k


def test_a_run_reports_every_figure() -> None:
    report = measure(shards=2, dim=8, k=5, rate=1000.0, count=10)
    for name in ("fan_out_ms", "echo_ms"):
        for how in ("sequential", "spaced"):
            assert 0 < report[name][how]["p50"] <= report[name][how]["p99"]
    assert 0 < report["merge_ms"]["p50"] < report["fan_out_ms"]["sequential"]["p50"]


def test_prepared_replies_are_answers_of_disjoint_shards() -> None:
    replies = [PreparedShard(s, dim=8, k=5, shards=3).reply(2) for s in range(3)]
    ids, scores = merge_top_k([reply.ranked for reply in replies], 15)
    assert len(set(ids[0].tolist())) == 15
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    assert (ids[0] == ids[1]).all()
