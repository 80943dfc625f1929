"""`shardline plan`: its sizes against builds, its queues against theory, its figures."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from shardline.bench.plan_check import compared, planned
from shardline.bench.plan_costs import fit
from shardline.cluster.cli import main
from shardline.cluster.planner import sizing
from shardline.cluster.planner.card_plan import AskedCards, card_plan
from shardline.cluster.planner.fanout_tails import (
    Fleet,
    Offered,
    Spread,
    simulate,
    slowest_of,
    spread_of,
)
from shardline.cluster.planner.front_latency import front_of
from shardline.cluster.planner.index_sizes import HUGE_PAGES_BYTES, shard_size
from shardline.cluster.planner.measured_costs import (
    HTTP_COLD,
    SEARCH_SPREAD,
    SOURCES,
)
from shardline.cluster.planner.search_costs import Depth, centroid_us, search_terms
from shardline.cluster.planner.sizing import (
    MOST_BUSY,
    Asked,
    coldness,
    layouts_of,
    lists_for,
    missed,
    plan,
)
from shardline.cluster.preflight.free_memory import SHARD_BYTES
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import Metric
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexKind, IndexSpec
from shardline.shards.index.template import train_template, write_index
from shardline.shards.storage.generation import GenerationManifest
from tests.engine import build_generation

NO_WAIT = 0.001  # queries per second: no search meets another
ALWAYS_ONE = spread_of([(0.5, 1.0), (1.0, 1.0)])
NO_FRONT = {"front_p50_ms": 0.0, "front": ALWAYS_ONE, "routers": 1, "router_ms": 0.0}
ASKED = Asked(
    rows=1_000_000,
    dim=128,
    qps=100.0,
    p99_ms=20.0,
    k=100,
    metric=Metric.COSINE,
    kind=IndexKind.AUTO,
    recall=None,
    nprobe=4,
    rerank_factor=1,
    nlist=1024,
    shards=4,
    replicas=1,
    host_bytes=16 << 30,
    host_cores=2,
)
WORDS = ["plan", "--rows", "1e6", "--dim", "128", "--qps", "100", "--p99-ms", "20"]


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "ROUGH_QUERIES", 500)
    monkeypatch.setattr(sizing, "PRECISE_QUERIES", 1500)


def offered(qps: float, spread: Spread = ALWAYS_ONE, search_ms: float = 1.0) -> Offered:
    return Offered(qps=qps, search_p50_ms=search_ms, search=spread, **NO_FRONT)


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
@pytest.mark.parametrize("kind", ["flat", "ivf", "ivfpq", "ivfpq-fs"])
def test_planned_bytes_are_those_of_an_index(kind: str, metric: Metric, tmp_path: Path) -> None:
    rows, dim = 4000, 16
    vectors = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
    index = resolve(IndexSpec(kind=kind), rows=rows, dim=dim, metric=metric)
    template = train_template(index, vectors, metric=metric, seed=0, threads=1, iterations=2)
    template.add(vectors)
    write_index(template, tmp_path / "index")
    built = MainIndex.load(tmp_path / "index", metric=metric, defaults=index.search_params)
    size = shard_size(index, rows=rows, dim=dim, metric=metric)
    on_disk = (tmp_path / "index").stat().st_size + rows * 8
    assert size.file_bytes == pytest.approx(on_disk, rel=0.05)
    tables = built.layers.base.precomputed_table.size() * 4 if kind.startswith("ivfpq") else 0
    assert size.table_bytes == tables
    assert size.direct_map_bytes == (8 * rows if kind in ("ivf", "ivfpq") else 0)
    assert size.resident_bytes - size.loaded_bytes == SHARD_BYTES + HUGE_PAGES_BYTES


def test_planned_bytes_are_those_of_a_generation(tmp_path: Path) -> None:
    rows, dim, shards = 6000, 32, 2
    vectors = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
    manifest = build_generation(
        tmp_path, vectors, np.arange(rows), shards, kind="ivfpq-fs", nprobe=4, rerank_factor=1
    )
    size = shard_size(manifest.index, rows=rows // shards, dim=dim, metric=Metric.COSINE)
    for entry in manifest.shards:
        assert size.file_bytes == pytest.approx(sum(file.bytes for file in entry.files), rel=0.02)


@pytest.mark.parametrize("shards", [1, 10, 100])
def test_without_queues_a_query_is_as_slow_as_its_slowest_shard(shards: int) -> None:
    spread = spread_of([(0.5, 1.0), (0.9, 1.5), (0.99, 4.0), (1.0, 5.0)])
    found = simulate(Fleet(shards=shards, replicas=1), offered(NO_WAIT, spread), queries=4000)
    assert found.p50_ms == pytest.approx(slowest_of(spread, shards, 0.5), rel=0.1)
    assert found.p99_ms == pytest.approx(slowest_of(spread, shards, 0.99), rel=0.15)
    assert found.shard_p50_ms == pytest.approx(1.0, rel=0.02)


def test_queues_are_those_of_queueing_theory() -> None:
    """M/M/1: what waits and is served takes -ln(1 - q) / (mu - lambda), exponentially spread."""
    shares = np.concatenate([np.linspace(0.001, 0.99, 500), 1 - np.geomspace(0.0099, 1e-5, 100)])
    exponential = spread_of([(float(share), -math.log1p(-share)) for share in shares])
    for busy in (0.3, 0.6):
        load = offered(busy * 1000, exponential)
        found = simulate(Fleet(shards=6, replicas=1), load, queries=6000)
        assert found.shard_p50_ms == pytest.approx(math.log(2) / (1 - busy), rel=0.1)
        assert found.shard_p99_ms == pytest.approx(math.log(100) / (1 - busy), rel=0.2)
        assert found.busy_share == pytest.approx(busy, rel=0.05)


def test_shards_of_a_host_share_its_cores() -> None:
    at_once = Fleet(shards=5, replicas=1, group=5, cores=2)
    found = simulate(at_once, offered(NO_WAIT), queries=50)
    assert (found.p50_ms, found.p99_ms) == pytest.approx((3.0, 3.0))
    two_hosts = replace(at_once, group=3)  # three on one host, two on the other
    assert simulate(two_hosts, offered(NO_WAIT), queries=50).p50_ms == pytest.approx(2.0)


def test_hedging_cuts_the_tail_within_its_budget() -> None:
    stalling = spread_of([(0.5, 1.0), (0.98, 1.2), (0.981, 100.0), (1.0, 100.0)])
    load = offered(5.0, stalling)
    plain = Fleet(shards=4, replicas=2)
    one, two = (
        simulate(fleet, load, queries=2000)
        for fleet in (plain, replace(plain, hedge_share=0.05, hedge_min_ms=2.0))
    )
    assert one.p99_ms > 90 and one.hedged_share == 0 and one.hedge_delay_ms is None
    assert two.p99_ms < 10 and two.hedge_delay_ms is not None
    assert 0 < two.hedged_share <= 0.05
    none = simulate(replace(plain, hedge_share=0.001, hedge_min_ms=2.0), load, queries=2000)
    assert 0 < none.hedged_share <= 0.001


def test_hedging_does_no_harm_where_queues_are_long() -> None:
    """A hedge that reserved its replica before it is sent would leave it idle until then."""
    slow_ones = spread_of([(0.5, 1.0), (0.96, 1.0), (0.961, 6.0), (1.0, 6.0)])
    load, plain = offered(800.0, slow_ones), Fleet(shards=4, replicas=2)
    without = simulate(plain, load, queries=2000)
    hedged = simulate(replace(plain, hedge_share=0.05, hedge_min_ms=5.0), load, queries=2000)
    assert hedged.hedged_share > 0
    assert hedged.p99_ms < 1.2 * without.p99_ms


def test_replicas_shorten_queues() -> None:
    load = offered(600.0)
    one, two, three = (simulate(Fleet(shards=2, replicas=n), load, queries=2000) for n in (1, 2, 3))
    assert one.p99_ms > two.p99_ms > three.p99_ms
    assert one.busy_share == pytest.approx(2 * two.busy_share)


def test_a_router_has_a_queue() -> None:
    load = replace(offered(600.0, search_ms=0.001), router_ms=1.0)
    one = simulate(Fleet(shards=1, replicas=1), load, queries=2000)
    many = simulate(Fleet(shards=1, replicas=1), replace(load, routers=8), queries=2000)
    assert one.p99_ms > 2.0 > 0.5 > many.p99_ms


def test_the_front_lies_between_its_two_measurements() -> None:
    hot, cold = front_of(0.0), front_of(1.0)
    assert hot.p50_ms == pytest.approx(0.4 + 0.51, rel=0.1)
    assert cold.p50_ms == pytest.approx(0.8 + 1.1, rel=0.1)
    assert hot.p50_ms < front_of(0.5).p50_ms < cold.p50_ms
    assert cold.p50_ms * cold.spread.at(0.99) > HTTP_COLD.p99_ms
    assert front_of(0.0, 2.0).p50_ms == pytest.approx(hot.p50_ms + 2.0)


def test_coldness_is_what_is_left_of_the_interval() -> None:
    assert coldness(0.5, hot_us=500, more_us=0) == 0
    assert coldness(3.0, hot_us=500, more_us=0) == pytest.approx(0.5)
    assert coldness(100.0, hot_us=500, more_us=500) == 1
    cold = coldness(3.0, hot_us=500, more_us=1000)  # work and pause fill the interval
    assert 0.5 + cold * 1.0 + cold * 5.0 == pytest.approx(3.0)


def test_a_search_costs_what_it_reads() -> None:
    index = resolve(IndexSpec(nlist=1024), rows=1_000_000, dim=128, metric=Metric.COSINE)

    def cost(rows: int = 250_000, k: int = 100, nprobe: int = 16, dim: int = 128) -> dict:
        depth = Depth(nprobe=nprobe, rerank_factor=1)
        own = index.model_copy(update={"factory": f"IVF1024,PQ{dim // 2}x4fsr,Refine(SQfp16)"})
        terms = search_terms(own, depth, rows=rows, dim=dim, metric=Metric.COSINE, k=k)
        return {term.what: term for term in terms}

    base = cost()
    assert base["rows read"].count == 250_000 * 16 / 1024
    assert base["candidates re-ranked"].count == 100
    assert cost(rows=500_000)["rows read"].us == pytest.approx(2 * base["rows read"].us)
    assert cost(dim=256)["rows read"].us == pytest.approx(2 * base["rows read"].us)
    assert cost(k=1000)["lists opened"].count == 160
    assert cost(k=10)["candidates re-ranked"].count == 100
    assert cost(nprobe=4096)["lists opened"].count == 1024
    assert centroid_us(1) < centroid_us(8192) < centroid_us(1 << 20) == centroid_us(1 << 24)
    hnsw = resolve(IndexSpec(kind="hnsw"), rows=1000, dim=8, metric=Metric.COSINE)
    with pytest.raises(InvalidInput, match=r"--kind: .* expected one of flat, ivf"):
        search_terms(
            hnsw, Depth(nprobe=None, rerank_factor=None), rows=9, dim=8, metric=Metric.DOT, k=1
        )


def test_published_figures_are_met() -> None:
    """docs/PERFORMANCE.md: p50 2.4 ms at 100 per second; 2,010 queries per second on two cores."""
    found = plan(ASKED)
    assert missed(found) is None
    assert found.layout.hosts == 1 and found.layout.replicas == 1
    assert found.tails.p50_ms == pytest.approx(2.4, rel=0.25)
    assert found.tails.p99_ms == pytest.approx(6.5, rel=0.35)
    busy = next(layouts_of(replace(ASKED, qps=1000.0, host_cores=16)))
    hot = replace(busy, search_cold=0.0, router_cold=0.0)
    assert 2e6 / hot.query_us == pytest.approx(2010, rel=0.25)


def test_layouts_hold_rows_and_rate() -> None:
    asked = replace(
        ASKED, rows=10**9, qps=2000.0, nprobe=64, nlist=None, shards=None, replicas=None
    )
    asked = replace(asked, host_bytes=128 << 30, host_cores=16)
    layouts = list(layouts_of(asked))
    assert layouts
    for layout in layouts:
        assert layout.host_bytes <= 0.9 * asked.host_bytes
        assert layout.shards * layout.size.rows >= asked.rows
        assert layout.hosts >= layout.replicas  # never two replicas of a shard on one host
        assert layout.shards_per_host + layout.routers_per_host <= asked.host_cores + 1
        hot_us = replace(layout, search_cold=0.0).shard_us
        assert asked.qps * hot_us / 1e6 / layout.replicas <= MOST_BUSY
    assert {layout.index.nlist for layout in layouts} > {65_536}
    small = replace(ASKED, qps=50_000.0, shards=1, replicas=None, host_cores=64)
    assert all(1 < each.replicas <= each.hosts for each in layouts_of(small))


def test_more_lists_for_more_recall_and_more_rows() -> None:
    assert lists_for(0.9652, 1_000_000) == 64
    assert 64 < lists_for(0.98, 1_000_000) < 128
    assert lists_for(0.98, 62_500) == pytest.approx(62, abs=2)  # as measured
    assert lists_for(0.98, 250_000) == pytest.approx(79, abs=2)
    assert lists_for(0.98, 10**9) > 300


def test_every_figure_says_when_and_how() -> None:
    for source in SOURCES:
        assert len(source.date) == 10 and source.date.startswith("2026-")
        assert source.what and source.conditions
        assert "shardline" in source.command
    assert sorted(SEARCH_SPREAD.values) == list(SEARCH_SPREAD.values)


def test_the_fit_finds_the_costs_of_a_sum() -> None:
    rng = np.random.default_rng(0)
    work = rng.random((12, 3)) * (1, 100, 10_000) + 1
    costs = np.array((20.0, 0.5, 0.01))
    assert fit(work.tolist(), (work @ costs).tolist()) == pytest.approx(costs)
    assert min(fit(work.tolist(), (work @ (5.0, 1.0, -0.001)).tolist())) >= 0


def test_cards_by_their_bandwidth() -> None:
    def asked(kind: str, rows: int, **fields) -> AskedCards:
        spec = IndexSpec(kind=kind)
        index = resolve(spec, rows=rows, dim=128, metric=Metric.COSINE, gpu=True)
        given = {"qps": 100.0, "p99_ms": 50.0, "card_bytes": 80e9, "card_bytes_per_s": 2e12}
        depth = Depth(nprobe=64, rerank_factor=None)
        return AskedCards(
            rows=rows,
            dim=128,
            metric=Metric.COSINE,
            index=index,
            depth=depth,
            **given | fields,
        )

    one = card_plan(asked("flat", 10_000_000))
    assert one.cards == 1 and one.fixed_ms == pytest.approx(10_000_000 * 512 / 2e12 * 1e3)
    four = card_plan(asked("flat", 200_000_000))
    assert four.cards == 4 and four.shard_bytes <= 0.9 * 80e9
    assert card_plan(asked("ivf", 10_000_000, qps=50_000.0)).replicas > 1
    with pytest.raises(InvalidInput, match="--kind: does not run on a card"):
        card_plan(asked("ivfpq-fs", 1_000_000))
    with pytest.raises(InvalidInput, match="--p99-ms: no number of cards"):
        card_plan(asked("flat", 10_000_000, p99_ms=0.1))


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(words)
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_the_command_prints_its_arithmetic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    words = [*WORDS, "--shards", "4", "--nprobe", "8", "--nlist", "1024", "--json", str(path)]
    code, out, err = run(words, capsys)
    assert (code, err) == (0, "")
    report = json.loads(path.read_text())
    cost = report["cost"]
    assert cost["index_us"] > sum(term["us"] for term in cost["terms"]) > 0
    total = cost["router_us"] + report["shards"] * cost["shard_us"]
    assert cost["query_cpu_seconds"] == pytest.approx(total / 1e6)
    assert f"= {total:,.1f} us" in out
    assert f"p50 {report['latency']['p50_ms']:.2f} ms" in out
    for heading in ("memory", "processor time", "latency", "measured, and where"):
        assert f"\n{heading}\n" in out
    assert "--set index.nlist=1024" in out
    assert run(words, capsys)[1] == out  # the same plan every time


def test_a_bound_that_is_missed_is_an_error_below_the_arithmetic(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*WORDS[:-1], "0.5", "--shards", "1", "--nprobe", "1", "--nlist", "1024"]
    code, out, err = run(words, capsys)
    assert code == 2 and "processor time" in out
    assert err.startswith("error: --p99-ms: no layout") and err.count("\n") == 1


def test_cards_are_marked_as_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    code, out, _ = run([*WORDS, "--device", "gpu", "--json", str(path)], capsys)
    assert code == 0 and out.startswith("NOT MEASURED")
    assert json.loads(path.read_text())["measured"] is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "many"], "'many' is no number"),
        (["--rows", "1.5"], "not a whole number"),
        (["--rows", "0"], "not a whole number"),
        (["--rows", "nan"], "not a whole number"),
        (["--dim", "0"], "--dim"),
        (["--qps", "0"], "--qps"),
        (["--qps", "nan"], "--qps': nan is not a finite number above 0"),
        (["--qps", "fast"], "--qps': 'fast' is no number"),
        (["--qps", "1e9"], "no layout holds the rows"),
        (["--p99-ms", "-1"], "--p99-ms"),
        (["--p99-ms", "inf"], "not a finite number above 0"),
        (["--host-memory", "inf"], "not a finite number above 0"),
        (["--kind", "hnsw"], "--kind"),
        (["--host-cores", "0"], "--host-cores"),
        (["--recall", ".95", "--nprobe", "8"], "exclude each other"),
        (["--recall", ".9999"], "--recall: a recall that the measurement"),
        (["--shards", "1000", "--rows", "10"], "--shards: more shards than rows"),
        (["--rows", "1000", "--nlist", "2000"], "index.nlist"),
        (["--kind", "flat", "--nlist", "16"], "index.nlist"),
        (["--kind", "flat", "--nprobe", "16"], "--nprobe: has no effect"),
        (["--rows", "1e9", "--host-memory", "1", "--shards", "1"], "no layout holds the rows"),
        (["--device", "gpu", "--kind", "ivfpq-fs"], "does not run on a card"),
        (["--json", "no/such/folder.json"], "there is no folder"),
    ],
)
def test_bad_input_is_one_clear_error(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run([*WORDS, *words], capsys)
    assert code == 2 and out == "" and said in err
    assert "Traceback" not in err


def test_plan_check_compares_the_same_cluster() -> None:
    index = resolve(IndexSpec(nlist=1024), rows=1_000_000, dim=128, metric=Metric.COSINE)
    entry = SimpleNamespace(files=[SimpleNamespace(bytes=73 << 20)])
    manifest = cast(GenerationManifest, SimpleNamespace(index=index, shards=[entry]))
    setup = {"rows": 1_000_000, "dim": 128, "rate": 100.0, "k": 100, "metric": "cosine"}
    setup |= {"shards": 4, "cores": 2, "params": {"nprobe": 4, "rerank_factor": 1}}
    processes = [
        {"role": role, "memory_mib": mib, "cores": 0.05}
        for role, mib in [("shard", 230.0)] * 4 + [("router", 250.0), ("driver", 2000.0)]
    ]
    steps = [
        {"recall": None, "processes": [], "figures": {}},
        {"recall": 0.99, "processes": processes, "figures": {"p50_ms": 2.4, "p99_ms": 6.5}},
    ]
    report = {"setup": setup, "steps": steps}
    found = planned(report, manifest, host_bytes=16 << 30)
    assert found.asked == replace(ASKED, p99_ms=found.asked.p99_ms, kind=IndexKind.IVFPQ_FS)
    pairs = compared(report, found, manifest)
    assert pairs["shard, resident, MiB"][1] == 230.0
    assert pairs["shard, files, MiB"] == pytest.approx((73.5, 73.0), rel=0.01)
    assert pairs["p50, ms"] == (found.tails.p50_ms, 2.4)
    assert pairs["all processes but the first, resident, MiB"][1] == 4 * 230.0 + 250.0
    assert pairs["CPU per query, shards and router, ms"][1] == pytest.approx(2.5)
