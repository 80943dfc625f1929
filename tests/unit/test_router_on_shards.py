"""The router on real shard servers: a flat index each, real sockets, one process."""

import asyncio
import contextlib

import faiss
import numpy as np
import pytest

from shardline.router.limits import resolve
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.errors import InvalidInput, NotFound
from shardline.shards.core.messages import ReplicaRoute, SearchParams, ShardRoute
from shardline.shards.core.schema import Metric, query_vectors
from shardline.shards.index.main_index import MainIndex
from shardline.shards.live.state import ShardState
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer
from tests import reference
from tests.fake_shard import SECRET, make_table, until

DIM = 8
FAST = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, default_timeout_ms=10_000)
METRICS = {
    Metric.COSINE: faiss.IndexFlatIP,
    Metric.DOT: faiss.IndexFlatIP,
    Metric.L2: faiss.IndexFlatL2,
}


def make_server(shard, ids, vectors, metric, epoch=1):
    """(server, its route); the caller stops it."""
    index = METRICS[metric](DIM)
    index.add(vectors)
    main = MainIndex(index, metric=metric, defaults=SearchParams())
    server = ShardServer(
        Shard(shard=shard, generation=1, state=ShardState.of(main, ids)), secret=SECRET
    )
    address = server.bind()
    server.start(epoch)
    route = ReplicaRoute(key=server.key, epoch=epoch, address=address)
    return server, ShardRoute(shard=shard, rows=len(ids), replicas=(route,))


@contextlib.asynccontextmanager
async def cluster(metric, num_shards):
    """(service, servers, routes, ids, vectors) over 90 rows with ids of their own."""
    rng = np.random.default_rng(5)
    vectors = query_vectors(rng.standard_normal((90, DIM)), dim=DIM, metric=metric)
    ids = np.sort(rng.choice(10_000, 90, replace=False))
    parts = zip(np.array_split(ids, num_shards), np.array_split(vectors, num_shards), strict=True)
    made = [make_server(shard, *part, metric) for shard, part in enumerate(parts)]
    servers, routes = [server for server, _ in made], [route for _, route in made]
    service = SearchService(FAST, SECRET, load_encoder=lambda _table: None)
    boundaries = tuple(int(part[0]) for part in np.array_split(ids, num_shards)[1:])
    try:
        await service.apply(make_table(routes, DIM, metric=metric, boundaries=boundaries))
        yield service, servers, routes, ids, vectors
    finally:
        await service.close()
        for server in servers:
            server.stop()


async def search(service, **query):
    arrived_at = asyncio.get_running_loop().time()
    return await service.search(resolve(service.config, **query), arrived_at=arrived_at)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("metric", list(Metric))
async def test_answers_equal_brute_force_for_any_number_of_shards(metric, num_shards):
    async with cluster(metric, num_shards) as (service, _, _, ids, vectors):
        answer = await search(service, vectors=vectors[:5], k=20)
        expected = reference.brute_force(vectors[:5], vectors, ids, 20, metric)
        np.testing.assert_allclose(answer.ranked.scores, expected.scores, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(answer.ranked.ids, expected.ids)
        assert answer.coverage.share == 1.0

        answer = await search(service, item_ids=[int(ids[7]), 10_001], k=20)
        expected = reference.brute_force(vectors[7:8], vectors, ids, 20, metric, excluded=[ids[7]])
        assert answer.ranked.ids[0].tolist() == expected.ids[0].tolist()
        assert [str(reason.text) for reason in answer.reasons] == ["item 10001 not found"]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
@pytest.mark.parametrize("metric", list(Metric))
async def test_exclusions_equal_brute_force_for_any_number_of_shards(metric, num_shards):
    """Of searches alone, of a batch, and of searches that share frames."""
    rng = np.random.default_rng(num_shards)
    async with cluster(metric, num_shards) as (service, _, _, ids, vectors):
        lists = [rng.choice(ids, size, replace=False).tolist() for size in (0, 5, 40, 60, 88, 90)]
        lists[1].append(10_001)
        expected = [
            reference.brute_force(vectors[row : row + 1], vectors, ids, 20, metric, excluded=each)
            for row, each in enumerate(lists)
        ]
        arrays = tuple(np.unique(np.array(each, np.int64)) for each in lists)
        whole = await search(service, vectors=vectors[:6], k=20, excluded=arrays)
        shared = await asyncio.gather(
            *(
                search(
                    service, vectors=vectors[row : row + 1], k=20, excluded=arrays[row : row + 1]
                )
                for row in range(6)
            )
        )
        for row, wanted in enumerate(expected):
            found = whole.ranked.rows(slice(row, row + 1))
            for got in (found, shared[row].ranked):
                np.testing.assert_array_equal(got.ids, wanted.ids)
                np.testing.assert_allclose(got.scores, wanted.scores, rtol=1e-5, atol=1e-5)
        told = [(each.query, str(each.code), each.count) for each in whole.reasons]
        assert told == [(4, "exclusion", 88), (5, "exclusion", 90)]

        item, others = int(ids[7]), ids[10:80]
        answer = await search(service, item_ids=[item], k=20, excluded=(others,))
        gone = [item, *others.tolist()]
        wanted = reference.brute_force(vectors[7:8], vectors, ids, 20, metric, excluded=gone)
        np.testing.assert_array_equal(answer.ranked.ids, wanted.ids)
        told = [(each.query, str(each.code), each.count) for each in answer.reasons]
        assert told == [(0, "exclusion", 70)]


async def test_an_item_without_attributes_is_answered_and_costs_no_link():
    """A search that is under way on the same connections is not harmed by it."""
    async with cluster(Metric.COSINE, 3) as (service, _, _, ids, vectors):
        for row in (0, 40, 89):
            now = asyncio.get_running_loop().time()
            searching = asyncio.create_task(search(service, vectors=vectors[:2], k=5))
            answer = await service.item(int(ids[row]), arrived_at=now)
            np.testing.assert_allclose(answer.vector, vectors[row], rtol=1e-6)
            assert answer.attributes == {}
            assert (await searching).coverage.share == 1.0
        with pytest.raises(NotFound):
            await service.item(10_001, arrived_at=asyncio.get_running_loop().time())


async def test_a_parameter_that_is_wrong_for_a_shard_is_the_callers_error():
    async with cluster(Metric.DOT, 2) as (service, _, _, _, vectors):
        with pytest.raises(InvalidInput, match="out of range; expected 1 to 2048") as caught:
            await search(service, vectors=vectors[:1], params=SearchParams(nprobe=10**9))
        assert caught.value.field == "params.nprobe"


async def test_a_shard_that_stops_is_missed_and_comes_back_at_another_port():
    async with cluster(Metric.DOT, 3) as (service, servers, routes, ids, vectors):
        servers[1].stop()
        await until(lambda: service.ready()[1]["shards_connected"] == 2)
        answer = await search(service, vectors=vectors[:1], k=90)
        assert (answer.coverage.rows_asked, answer.coverage.rows_answered) == (90, 60)
        servers[1], routes[1] = make_server(1, ids[30:60], vectors[30:60], Metric.DOT, epoch=2)
        await service.apply(make_table(routes, DIM, version=2))
        answer = await search(service, vectors=vectors[:1], k=90)
        assert sorted(answer.ranked.ids[0]) == ids.tolist()
        assert answer.coverage.share == 1.0
