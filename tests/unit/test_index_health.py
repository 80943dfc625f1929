"""What writes make of an index: its health by hand, and a catalogue that drifts away from it."""

import asyncio
import random
import weakref
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from shardline.bench.vectors import clustered
from shardline.cluster.control.quality_config import QualityConfig
from shardline.cluster.control.repairs import repairs_due
from shardline.router.limits import resolve
from shardline.router.recall_watch import RecallWatch
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.messages import ReplicaRoute, ShardHealth, ShardRoute
from shardline.shards.core.schema import Metric, normalise
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.resolve import resolve as resolve_index
from shardline.shards.index.spec import IndexSpec
from shardline.shards.index.template import train_template
from shardline.shards.live import health as health_module
from shardline.shards.live.health import HealthLook, are_in
from shardline.shards.live.state import ShardState, apply
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer
from tests.engine import build_generation, build_main
from tests.fake_shard import SECRET, make_table
from tests.live_model import delete, upsert
from tests.unit.test_live_state import random_records

ROWS, DIM = 3000, 32
IDS = np.arange(0, 2 * ROWS, 2)
FIELDS = {
    "kind": "ivfpq-fs", "nlist": 16, "m": 8, "nprobe": 6, "rerank": "fp32", "rerank_factor": 4,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def look_at(tmp_path: Path, ids: np.ndarray) -> HealthLook:
    vectors = normalise(np.random.default_rng(0).standard_normal((len(ids), 4)).astype(np.float32))
    build_generation(tmp_path / "built", vectors, ids, 1, kind="flat")
    return HealthLook(tmp_path / "built", 0)


def test_health_is_as_counted_by_hand(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(health_module, "BLOCK_ROWS", 50)
    rng = np.random.default_rng(1)
    vectors = clustered(600, 8, 5, seed=1)
    ids = np.sort(rng.choice(10**6, 600, replace=False))
    state = ShardState.of(build_main(vectors[:400], kind="flat"), ids[:400])
    look = look_at(tmp_path, ids[:400])
    assert look.look(state) == ShardHealth(rows=400, changed=0, unseen=0, imbalance=None)
    state, _ = apply(state, [upsert(1, ids[350:500], vectors[350:500]), delete(2, ids[[0, 490]])])
    assert look.look(state) == ShardHealth(
        rows=400 + 100 - 2, changed=150 + 50 + 1, unseen=99, imbalance=None
    )
    # a compaction: what was in the delta is in a new main index
    rows = np.delete(np.arange(500), [0, 490])
    main = build_main(vectors[rows], kind="ivf", nlist=4)
    state = ShardState.of(main, ids[rows], seq=2)
    state, _ = apply(state, [delete(3, ids[[1, 450, 451]]), upsert(4, ids[520:523], vectors[:3])])
    assert look.look(state) == ShardHealth(
        rows=498, changed=6, unseen=99 - 2 + 3, imbalance=main.imbalance
    )
    kept = weakref.ref(main)
    state, imbalance, lists = None, main.imbalance, main._layers.base.invlists
    sizes = np.array([lists.list_size(each) for each in range(4)])
    assert imbalance == pytest.approx(4 * (sizes**2).sum() / sizes.sum() ** 2)
    del main, lists
    assert kept() is None, "a look keeps no main index alive"


def test_health_after_random_writes(tmp_path) -> None:
    from tests.unit.test_live_state import IDS as OLD
    from tests.unit.test_live_state import VECTORS

    state, look = ShardState.of(build_main(VECTORS, kind="flat"), OLD), look_at(tmp_path, OLD)
    for record in random_records(np.random.default_rng(4), 40):
        state, _ = apply(state, [record])
        live = set(state.delta.ids.tolist()) | set(OLD[state.main_rows_of(OLD) >= 0].tolist())
        found = look.look(state)
        assert (found.rows, found.unseen) == (len(live), len(live - set(OLD.tolist())))


def test_ids_are_looked_up_at_every_edge() -> None:
    known = np.array([3, 5, 9])
    asked = np.array([2, 3, 4, 5, 9, 10])
    assert are_in(known, asked).tolist() == [False, True, False, True, True, False]
    assert are_in(known[:0], asked).tolist() == [False] * 6
    assert are_in(known, asked[:0]).tolist() == []


def drifted(vectors: np.ndarray) -> np.ndarray:
    """All in one direction, close to one another."""
    mean = np.random.default_rng(3).standard_normal(DIM).astype(np.float32)
    return normalise(mean / np.linalg.norm(mean) + np.float32(0.3) * vectors)


def index_over(rows: np.ndarray, sample: np.ndarray) -> MainIndex:
    """The template trained on ``sample``, as a compaction fills it with other rows."""
    resolved = resolve_index(IndexSpec(**FIELDS), rows=ROWS, dim=DIM, metric=Metric.COSINE)
    index = train_template(resolved, sample, metric=Metric.COSINE, seed=0, threads=1)
    index.add(rows)
    return MainIndex(index, metric=Metric.COSINE, defaults=resolved.search_params)


async def test_after_a_full_turnover_the_watch_says_that_the_template_is_to_be_trained_again(
    tmp_path,
) -> None:
    """Real shards, asked by a router: as built; with every row replaced by one of another
    distribution, and compacted; and with the template trained on those."""
    old, new = clustered(ROWS, DIM, 40, seed=1), drifted(clustered(ROWS, DIM, 40, seed=9))
    old_queries = clustered(40, DIM, 40, seed=1, first_row=ROWS)
    new_queries = drifted(clustered(40, DIM, 40, seed=9, first_row=ROWS))
    look = look_at(tmp_path, IDS)
    found = {}
    for name, main, queries in (
        ("built", index_over(old, old), old_queries),
        ("turned over", index_over(new, old), new_queries),
        ("trained again", index_over(new, new), new_queries),
    ):
        state = ShardState.of(main, IDS)
        quality = await recall_of(state, queries)
        due = repairs_due(QualityConfig(), quality, {0: look.look(state)})
        found[name] = quality.recall, [str(each.code) for each in due]
    assert found["built"][0] > 0.98
    assert found["turned over"][0] < 0.7
    assert found["trained again"][0] > 0.98
    assert [codes for _, codes in found.values()] == [[], ["retrain_index"], []]


async def recall_of(state: ShardState, queries: np.ndarray):
    """What a router's watch finds once it has been asked them."""
    server = ShardServer(Shard(shard=0, generation=1, state=state), secret=SECRET)
    address = server.bind()
    server.start(1)
    route = ReplicaRoute(key=server.key, epoch=1, address=address)
    table = make_table([ShardRoute(shard=0, rows=ROWS, replicas=(route,))], DIM)
    config = RouterConfig(watch_interval_s=1.0)
    service = SearchService(config, SECRET, load_encoder=lambda _table: None)
    clock = [0.0]
    service.watch = service._finder._watch = RecallWatch(
        service._fanout, service.recorder, 1.0, random.Random(1), now=lambda: clock[0]
    )
    try:
        await service.apply(replace(table, metric=Metric.COSINE))
        for number, query in enumerate(queries):
            clock[0] = 2.0 * (number + 1)
            asked = resolve(config, vectors=query[None].tolist(), k=10, timeout_ms=5000)
            await service.search(asked, arrived_at=asyncio.get_running_loop().time())
            await asyncio.wait([service.watch._task])
            await asyncio.sleep(0)
        return service.watch.quality()
    finally:
        await service.close()
        server.stop()
