"""The gate before a switch: each figure against its bound, and measured on real shards of two
generations."""

import asyncio
import contextlib
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from shardline.bench.vectors import clustered
from shardline.cluster.rollover import gate_asking, gate_run, held_out
from shardline.cluster.rollover.gate import Figures, GateReport, judge
from shardline.cluster.rollover.gate_queries import sample_of
from shardline.cluster.rollover.gate_run import (
    GateSide,
    gate_of_generations,
    measure,
    overlap_of,
    run_gate,
)
from shardline.cluster.rollover.held_out import held_out_recall, read_held_out
from shardline.cluster.rollover.publish_config import PublishConfig
from shardline.router.fanout.fanout import Fanout
from shardline.router.router_config import RouterConfig
from shardline.shards.core.encoder_files import write_encoder
from shardline.shards.core.errors import DataError, NotFound, Overloaded, Unavailable
from shardline.shards.core.files import sha256_of
from shardline.shards.core.messages import ReplicaRoute, SearchParams, ShardRoute
from shardline.shards.core.schema import Metric
from shardline.shards.live.state import ShardState, apply
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer
from shardline.shards.storage.vector_files import QUERIES_NAME, write_queries
from tests.engine import build_generation, build_main
from tests.fake_encoder import FakeEncoder
from tests.fake_shard import SECRET, make_table
from tests.live_model import upsert

CONFIG = PublishConfig(
    min_recall=0.9, max_latency_ratio=2.0, min_rows_ratio=0.8, max_rows_ratio=2.0
)
GOOD = Figures(
    k=100, queries=64, recall=0.9, live_recall=0.95, p99_ms=4.0, live_p99_ms=2.0, rows=800,
    live_rows=1000,
)  # fmt: skip
DIM, ROWS = 16, 1500
IDS = np.arange(ROWS) * 2
VECTORS = clustered(ROWS, DIM, 30, seed=1)
QUERIES = clustered(40, DIM, 30, seed=1, first_row=ROWS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def failed(report: GateReport) -> list[str]:
    return [each.figure for each in report.failed]


@pytest.mark.parametrize(
    ("changes", "bounds", "figures"),
    [
        ({}, {}, []),
        ({"recall": 0.899}, {}, ["recall"]),
        ({"recall": None}, {}, ["recall"]),
        ({"recall": None}, {"min_recall": 0.0}, []),
        ({"served": 8, "served_recall": 0.9}, {}, []),
        ({"served": 8, "served_recall": 0.5}, {}, ["served_recall"]),
        ({"p99_ms": 4.01}, {}, ["latency_ratio"]),
        ({"p99_ms": 400.0}, {"max_latency_ratio": 0.0}, []),
        ({"p99_ms": 0.9, "live_p99_ms": 0.1}, {}, []),
        ({"p99_ms": 2.1, "live_p99_ms": 0.1}, {}, ["latency_ratio"]),
        ({"rows": 799}, {}, ["rows_ratio"]),
        ({"rows": 2001}, {}, ["rows_ratio"]),
        ({"rows": 9000}, {"max_rows_ratio": 0.0}, []),
        ({"rows": 5, "live_rows": 0}, {}, ["rows_ratio"]),
        ({"unreplayed": 1}, {}, ["unreplayed_rows"]),
        ({"unreplayed": 7}, {"max_unreplayed_rows": 7}, []),
        ({"overlap": 0.1}, {}, []),
        ({"overlap": 0.49}, {"min_overlap": 0.5}, ["overlap"]),
        ({"overlap": None}, {"min_overlap": 0.5}, ["overlap"]),
        ({"held_out": 9, "held_out_recall": 0.2}, {}, []),
        (
            {"held_out": 9, "held_out_recall": 0.2},
            {"held_out": "x", "min_held_out_recall": 0.3},
            ["held_out_recall"],
        ),
        (
            {"recall": 0.1, "p99_ms": 99.0, "rows": 1, "unreplayed": 3},
            {},
            ["recall", "latency_ratio", "rows_ratio", "unreplayed_rows"],
        ),
    ],
)
def test_each_figure_against_its_bound(changes, bounds, figures) -> None:
    config = PublishConfig(**(CONFIG.model_dump() | bounds))
    report = judge(replace(GOOD, **changes), config)
    assert failed(report) == figures
    assert report.ok == (not figures)
    assert len(report.reasons) == len(figures)


def test_a_report_says_what_was_measured_and_what_failed() -> None:
    config = PublishConfig(**(CONFIG.model_dump() | {"min_overlap": 0.5}))
    report = judge(replace(GOOD, recall=0.5, served=8, served_recall=0.97), config)
    content = json.loads(json.dumps(report.as_json()))
    assert not content["ok"]
    assert [each["figure"] for each in content["figures"]] == [
        "recall", "served_recall", "latency_ratio", "rows_ratio", "unreplayed_rows", "overlap",
    ]  # fmt: skip
    assert content["figures"][0] == {
        "figure": "recall",
        "value": 0.5,
        "bound": "publish.min_recall >= 0.9",
        "ok": False,
        "text": "recall@100 of 64 sample queries, against exact answers; live 0.95",
    }
    assert report.reasons == (
        "recall is 0.5, bound publish.min_recall >= 0.9",
        "overlap is unknown, bound publish.min_overlap >= 0.5",
    )
    assert str(report.figures[0]).startswith("FAIL  recall 0.5, bound publish.min_recall >= 0.9: ")
    assert "needs publish.held_out" in str(report.figures[-1])


def test_bounds_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="needs held_out"):
        PublishConfig(min_held_out_recall=0.1)
    with pytest.raises(ValidationError, match=r"min_rows_ratio = 3\.0 is above"):
        PublishConfig(min_rows_ratio=3.0)


# On real shards


class Side:
    """A generation of two shards, served in this process, and a fan-out over it."""

    def __init__(self, states: list[ShardState], generation: int, **table) -> None:
        self.shards = [
            Shard(shard=number, generation=generation, state=state)
            for number, state in enumerate(states)
        ]
        self.servers = [ShardServer(shard, secret=SECRET) for shard in self.shards]
        self.fanout = Fanout(SECRET, RouterConfig(backoff_base_ms=1), random.Random(1))
        self.table = {"generation": generation, "metric": Metric.COSINE, **table}

    async def start(self) -> None:
        routes = []
        for server in self.servers:
            address = server.bind()
            server.start(1)
            route = ReplicaRoute(key=server.key, epoch=1, address=address)
            rows = server.shard.rows
            routes.append(ShardRoute(shard=server.key.shard, rows=rows, replicas=(route,)))
        boundaries = (int(self.shards[1].state.ids_by_row[0]),)
        table = make_table(routes, DIM, boundaries=boundaries, **self.table)
        await self.fanout.apply(table, None)

    async def stop(self) -> None:
        await self.fanout.close()
        for server in self.servers:
            server.stop()


def states_of(vectors: np.ndarray, ids: np.ndarray = IDS, **fields) -> list[ShardState]:
    halves = zip(np.array_split(vectors, 2), np.array_split(ids, 2), strict=True)
    fields = fields or {"kind": "flat"}
    return [ShardState.of(build_main(part, **fields), own) for part, own in halves]


@contextlib.asynccontextmanager
async def two(candidate: list[ShardState], live: list[ShardState] | None = None, **table):
    sides = Side(candidate, 2, **table), Side(live or states_of(VECTORS), 1)
    try:
        for side in sides:
            await side.start()
        yield sides
    finally:
        for side in sides:
            await side.stop()


async def measured(candidate: Side, live: Side, queries: np.ndarray = QUERIES, **given) -> Figures:
    return await measure(
        GateSide(fanout=candidate.fanout, queries=queries),
        GateSide(fanout=live.fanout, queries=queries),
        **({"is_same_model": True, "rng": random.Random(1)} | given),
    )


@pytest.fixture(autouse=True)
def few_queries(monkeypatch) -> None:
    monkeypatch.setattr(gate_run, "LATENCY_QUERIES", 12)
    monkeypatch.setattr(gate_asking, "PAUSE_S", 0.01)


async def test_a_generation_of_the_same_rows_passes() -> None:
    async with two(states_of(VECTORS)) as (candidate, live):
        figures = await measured(candidate, live, served=QUERIES[:20])
    assert (figures.recall, figures.live_recall, figures.served_recall) == (1.0, 1.0, 1.0)
    assert (figures.queries, figures.served) == (40, 20)
    assert (figures.rows, figures.live_rows, figures.overlap) == (ROWS, ROWS, 1.0)
    assert figures.p99_ms > 0
    assert figures.live_p99_ms > 0
    assert failed(judge(figures, CONFIG.model_copy(update={"max_latency_ratio": 0.0}))) == []


async def test_a_generation_with_a_poor_index_fails_by_recall_and_overlap() -> None:
    coarse = states_of(VECTORS, kind="ivf", nlist=5, nprobe=1)
    async with two(coarse) as (candidate, live):
        figures = await measured(candidate, live)
        by_hand = []
        for query in QUERIES:
            both = [
                np.concatenate(
                    [
                        np.stack(each, axis=-1)
                        for state in side
                        for each in zip(*found_by(state, query), strict=True)
                    ]
                )
                for side in ([s.state for s in candidate.shards], [s.state for s in live.shards])
            ]
            tops = [set(rows[np.lexsort((rows[:, 0], -rows[:, 1]))][:100, 0]) for rows in both]
            by_hand.append(len(tops[0] & tops[1]) / 100)
    assert figures.overlap == pytest.approx(np.mean(by_hand), abs=1e-6)
    assert figures.recall == pytest.approx(figures.overlap, abs=0.01), "flat is the exact answer"
    assert 0 < figures.recall < 0.9
    assert figures.live_recall == 1.0
    config = CONFIG.model_copy(update={"min_overlap": 0.95, "max_latency_ratio": 0.0})
    assert failed(judge(figures, config)) == ["recall", "overlap"]


def found_by(state: ShardState, query: np.ndarray):
    ranked = state.search(query[None], 100, SearchParams())
    is_item = ranked.ids >= 0
    return ranked.ids[is_item][None], ranked.scores[is_item][None]


async def test_a_generation_that_lost_rows_fails_by_their_number() -> None:
    async with two(states_of(VECTORS[:600], IDS[:600])) as (candidate, live):
        report = judge(await measured(candidate, live), CONFIG)
    assert "rows_ratio" in failed(report)
    (figure,) = [each for each in report.figures if each.figure == "rows_ratio"]
    assert figure.value == pytest.approx(600 / ROWS)


async def test_a_slow_generation_fails_by_latency() -> None:
    async with two(states_of(VECTORS)) as (candidate, live):
        inner = candidate.shards[1].search_batch

        def slow(requests):
            time.sleep(0.02)  # in the shard's thread, in place of a larger index
            return inner(requests)

        candidate.shards[1].search_batch = slow
        figures = await measured(candidate, live, QUERIES[:8])
    assert figures.p99_ms > 20
    assert failed(judge(figures, CONFIG)) == ["latency_ratio"]


async def test_a_busy_moment_does_not_decide() -> None:
    """The clock jumps during two of three rounds, whichever side is asked then."""
    now, calls, jumps = [0.0], [0], [0, 0]

    def clock() -> float:
        calls[0] += 1
        now[0] += 0.002 if calls[0] not in jumps else 5.0
        return now[0]

    async with two(states_of(VECTORS)) as (candidate, live):
        for jumps[:] in ([20, 70], [21, 71], [22, 73], [24, 120]):
            calls[0] = 0
            figures = await measured(candidate, live, QUERIES[:8], clock=clock)
            assert figures.p99_ms == pytest.approx(2.0)
            assert figures.live_p99_ms == pytest.approx(2.0)


async def test_writes_in_between_are_waited_for_and_refusals_tried_again() -> None:
    async with two(states_of(VECTORS)) as (candidate, live):
        shard = candidate.shards[0]
        inner, seen = shard.search_exactly, []

        def written_before(request, look):
            seen.append(shard.state.seq)
            if len(seen) == 1:
                change = upsert(1, [1], QUERIES[:1])
                shard.state = apply(shard.state, [change])[0]
            if len(seen) == 2:
                return Overloaded("other exact searches wait already")
            return inner(request, look)

        shard.search_exactly = written_before
        figures = await measured(candidate, live, QUERIES[:8])
        assert figures.recall == 1.0
        assert (figures.rows, len(seen)) == (ROWS + 1, 3)
        shard.search_exactly = lambda *_: Overloaded("other exact searches wait already")
        with pytest.raises(Unavailable, match="too few rows answered"):
            await measured(candidate, live, QUERIES[:8])


def test_overlap_counts_items_of_the_same_query() -> None:
    live = np.array([[1, 2, 3], [4, 5, -1]])
    assert overlap_of(np.array([[3, 2, 9], [9, 9, 9]]), live) == pytest.approx(2 / 5)
    assert overlap_of(live[:, ::-1], live) == 1.0
    assert overlap_of(np.full((2, 3), -1), live) == 0.0
    assert overlap_of(live, np.full((2, 3), -1)) == 1.0


# What is asked


def write_held_out(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


async def test_the_gate_reads_what_it_asks_and_reports(tmp_path, monkeypatch) -> None:
    """Sample queries of its folder, vectors of held-out users, queries served lately."""
    write_queries(tmp_path / QUERIES_NAME, QUERIES)
    exact = np.argsort(-(QUERIES[:3] @ VECTORS.T), axis=1)
    relevant = [IDS[exact[0, :2]].tolist(), [1], IDS[exact[2, [5, 700]]].tolist()]
    path = write_held_out(tmp_path / "held.parquet", embedding=list(QUERIES[:3]), relevant=relevant)
    config = PublishConfig(
        queries=10, held_out=path, min_held_out_recall=0.6, max_latency_ratio=0.0
    )
    folder = {"generation_dir": str(tmp_path)}
    async with two(states_of(VECTORS), **folder) as (candidate, live):
        await live.fanout.apply(
            replace(live.fanout.snapshot.table, version=2, generation_dir=str(tmp_path)), None
        )
        report = await run_gate(
            candidate.fanout, live.fanout, config, served=QUERIES[:20], unreplayed=2
        )
        by_name = {each.figure: each for each in report.figures}
        assert by_name["recall"].value == 1.0
        assert "of 10 sample queries" in by_name["recall"].text
        assert "of 10 queries served lately" in by_name["served_recall"].text
        assert by_name["held_out_recall"].value == pytest.approx((1 + 0 + 0.5) / 3)
        assert by_name["overlap"].value == 1.0
        assert failed(report) == ["unreplayed_rows", "held_out_recall"]
        await candidate.fanout.apply(
            replace(candidate.fanout.snapshot.table, version=2, model_version="m2"), None
        )
        with pytest.raises(DataError, match="no queries") as caught:
            await run_gate(candidate.fanout, live.fanout, config)
        assert "vectors are of one" in str(caught.value)
        without = config.model_copy(update={"held_out": None, "min_held_out_recall": 0.0})
        monkeypatch.setattr(gate_asking, "PAUSE_S", 0.5)
        right = {side.table["generation"]: side.fanout.snapshot.table for side in (candidate, live)}
        asked = []

        async def table_of(generation: int, version: int, timeout_s: float):
            """First a table of before a restart: nobody is at the address that it has."""
            asked.append(generation)
            first, *others = right[generation].shards
            gone = replace(first.replicas[0], address=("127.0.0.1", 1))
            if version == 0:
                shards = (replace(first, replicas=(gone,)), *others)
                return replace(right[generation], version=8, shards=shards)
            await asyncio.sleep(0.05 if version == 8 else timeout_s)
            return replace(right[generation], version=9)

        report = await gate_of_generations(2, 1, table_of, without, secret=SECRET, served=QUERIES)
        assert len(asked) > 2
        assert [each.figure for each in report.figures] == [
            "recall", "latency_ratio", "rows_ratio", "unreplayed_rows",
        ]  # fmt: skip


async def test_a_generation_that_ends_before_its_first_table_ends_the_gate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gate_run, "TABLES_S", 0.05)

    async def table_of(generation: int, version: int, timeout_s: float):
        if generation == 1:
            return make_table((), DIM, version=9) if version == 0 else await asyncio.sleep(60)
        raise Unavailable("generation 2 is not loaded")

    with pytest.raises(
        Unavailable, match=r"each gen.*expected within 0\.05 s; got .*2 is not loaded"
    ):
        await gate_of_generations(2, 1, table_of, CONFIG, secret=SECRET)


def write_tower(folder: Path, model_version: str, users: np.ndarray) -> str:
    """A query encoder that is a table of users' vectors; its checksum."""
    config = {
        "model_version": model_version,
        "dim": DIM,
        "projection": "identity",
        "features": [
            {"kind": "id", "column": "user", "value_type": "int", "values": list(range(len(users)))}
        ],
    }
    unknown = users.mean(axis=0, keepdims=True)
    target = folder / "query_encoder"
    target.mkdir(parents=True)
    write_encoder(target, config, {"embedding.0": np.concatenate([unknown, users])})
    return sha256_of(target / "encoder.json")


async def test_another_model_is_measured_by_held_out_features(tmp_path) -> None:
    """The same items and users in a space that is turned: every answer is the same. Then the live
    encoder takes other features, and has no figure."""
    turn = np.linalg.qr(np.random.default_rng(5).standard_normal((DIM, DIM)))[0].astype(np.float32)
    users = QUERIES[:6]
    exact = np.argsort(-(users @ VECTORS.T), axis=1)
    path = write_held_out(
        tmp_path / "held.parquet",
        user=list(range(6)),
        relevant=[IDS[exact[row, [3, 500 + row]]].tolist() for row in range(6)],
    )
    config = PublishConfig(held_out=path, min_overlap=0.99, max_latency_ratio=0.0, queries=8)
    tables = {}
    for name, vectors in (("m2", users @ turn), ("m1", users)):
        folder = tmp_path / name
        folder.mkdir()
        write_queries(folder / QUERIES_NAME, vectors)
        checksum = write_tower(folder, name, vectors)
        tables[name] = {
            "model_version": name, "encoder_checksum": checksum, "generation_dir": str(folder)
        }  # fmt: skip
    async with two(states_of(VECTORS @ turn), **tables["m2"]) as (candidate, live):
        table = replace(live.fanout.snapshot.table, version=2, **tables["m1"])
        await live.fanout.apply(table, None)
        report = await run_gate(candidate.fanout, live.fanout, config, served=QUERIES)
        by_name = {each.figure: each for each in report.figures}
        assert "served_recall" not in by_name, "served by the other model"
        assert by_name["recall"].value == 1.0
        assert by_name["held_out_recall"].value == 0.5
        assert by_name["held_out_recall"].text.endswith("; live 0.5")
        assert by_name["overlap"].value > 0.99
        assert report.ok
        await live.fanout.apply(replace(table, version=3, encoder_checksum=None), None)
        report = await run_gate(candidate.fanout, live.fanout, config)
        assert failed(report) == ["overlap"]
        assert report.figures[-1].value is None


async def test_without_sample_queries_items_are_asked_for(tmp_path) -> None:
    build_generation(tmp_path, VECTORS, IDS, 2, kind="flat")
    folder = {"generation_dir": str(tmp_path)}
    async with two(states_of(VECTORS), **folder) as (candidate, _live):
        table = candidate.fanout.snapshot.table
        sample = await sample_of(candidate.fanout, table, 12, seed=3)
        again = await sample_of(candidate.fanout, table, 12, seed=3)
        np.testing.assert_array_equal(sample, again)
        assert sample.shape == (12, DIM)
        distances = np.abs(sample[:, None] - VECTORS[None]).max(axis=2)
        assert (distances.min(axis=1) < 1e-6).all()
        assert len(set(distances.argmin(axis=1).tolist())) == 12
    gone = [replace(state, ids_by_row=state.ids_by_row + 1) for state in states_of(VECTORS)]
    gone = [replace(s, ids_by_row=np.append(s.ids_by_row[:-1], -1)) for s in gone]
    async with two(gone, **folder) as (candidate, _live):
        with pytest.raises(Unavailable, match="nothing to ask"):
            await sample_of(candidate.fanout, candidate.fanout.snapshot.table, 12, seed=3)


def test_held_out_queries_by_features_or_vectors(tmp_path) -> None:
    path = write_held_out(
        tmp_path / "a.parquet",
        slope=[0.5, 1.0, 2.0],
        relevant=[[3, 3, 1], None, [2**40]],
        known=[[7], [8], None],
    )
    held = read_held_out(path, seed=0)
    assert [each.tolist() for each in held.relevant] == [[1, 3], [2**40]], "who has some"
    assert [each.tolist() for each in held.known] == [[7], []]
    vectors = held.vectors(FakeEncoder(4), dim=4, metric=Metric.DOT)
    np.testing.assert_array_equal(vectors, FakeEncoder(4).encode([{"slope": 0.5}, {"slope": 2.0}]))
    with pytest.raises(DataError, match=r"no queries.*a column embedding"):
        held.vectors(None, dim=4, metric=Metric.DOT)
    path = write_held_out(
        tmp_path / "b.parquet", vector=[[1.0, 0.0], [0.0, 2.0]], relevant=[[1], [2]]
    )
    held = read_held_out(path, seed=0)
    assert held.vectors(FakeEncoder(2), dim=2, metric=Metric.COSINE).tolist() == [[1, 0], [0, 1]]
    with pytest.raises(DataError, match="not usable as query vectors"):
        held.vectors(None, dim=3, metric=Metric.DOT)
    with pytest.raises(DataError, match=r"the features of the encoder \(slope\)"):
        held.vectors(FakeEncoder(2), dim=2, metric=Metric.COSINE, takes_vectors=False)


def test_held_out_files_that_cannot_be_used(tmp_path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        read_held_out(tmp_path / "none.parquet", seed=0)
    (tmp_path / "text").write_text("a,b\n")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_held_out(tmp_path / "text", seed=0)
    for columns, wrong in (
        ({"vector": [[1.0]]}, "no such column"),
        ({"relevant": [5]}, "not lists of item ids"),
        ({"relevant": [["a"]]}, "not lists of item ids"),
        ({"relevant": pa.array([[], None], pa.list_(pa.int64()))}, "nothing to measure"),
    ):
        path = write_held_out(tmp_path / "x.parquet", **columns)
        with pytest.raises(DataError, match=wrong):
            read_held_out(path, seed=0)


def test_held_out_recall_by_hand(tmp_path) -> None:
    path = write_held_out(
        tmp_path / "a.parquet",
        vector=[[1.0]] * 3,
        relevant=[[1, 2], [3], [9]],
        known=[[5], [], [9]],
    )
    found = np.array([[5, 1, 4, 2], [7, 8, 3, -1], [9, 1, 2, 3]])
    held = read_held_out(path, seed=0)
    # k = 2 without the known ones: [1, 4], [7, 8]; the third has nothing left to be found
    assert held_out_recall(found, held, 2) == pytest.approx((0.5 + 0) / 2)
    assert held_out_recall(found, held, 3) == pytest.approx((1 + 1) / 2)


def test_a_large_held_out_file_is_drawn_from(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(held_out, "MAX_QUERIES", 10)
    path = write_held_out(
        tmp_path / "a.parquet",
        vector=[[float(n)] for n in range(50)],
        relevant=[[n] for n in range(50)],
    )
    held = read_held_out(path, seed=1)
    drawn = [int(each[0]) for each in held.relevant]
    assert len(set(drawn)) == 10
    vectors = held.vectors(None, dim=1, metric=Metric.DOT)
    assert vectors[:, 0].tolist() == drawn
    assert [int(e[0]) for e in read_held_out(path, seed=1).relevant] == drawn
