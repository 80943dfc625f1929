"""Look-ups and attributes never come from an older state than was asked for, on any replica."""

import asyncio
import contextlib
import itertools
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from shardline.router import one_item
from shardline.router.http.codec import decode_query
from shardline.router.http.media import Media
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.errors import Behind, NotFound, Unavailable
from shardline.shards.core.messages import (
    MAX_RETURNED_BYTES,
    AttributesRequest,
    FetchRequest,
    ReplicaRoute,
    ShardRoute,
)
from shardline.shards.core.schema import Metric
from shardline.shards.live.item_attributes import ItemAttributes
from shardline.shards.live.state import ShardState
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer
from shardline.shards.wire.frames import HEADER, decode_payload, encode_frame
from tests.engine import build_main
from tests.fake_shard import SECRET, make_rows, make_table

# no hedging and no cache: which replica answers is the question here
CONFIG = RouterConfig(
    backoff_base_ms=1,
    backoff_max_ms=5,
    default_timeout_ms=10_000,
    hedge_min_ms=5_000,
    cache_bytes=0,
)
DIM = 8
IDS, VECTORS = make_rows(41, DIM)
NEW, CHANGED = 40, 7  # the write that one replica lacks: an item added, another replaced
OLD_SEQ, NEW_SEQ = 1, 2
ASKED = 16  # times: a replica that must not answer would, but for one time in 65,536


def state_of(rows: int, seq: int) -> ShardState:
    vectors = VECTORS[:rows].copy()
    vectors[CHANGED] = seq
    titles = ItemAttributes(pa.table({"title": [f"as of {seq}"] * rows}))
    main = build_main(vectors, metric=Metric.DOT, kind="flat")
    return replace(ShardState.of(main, IDS[:rows], titles), seq=seq)


def shard_of(state: ShardState) -> Shard:
    return Shard(shard=0, generation=7, state=state)


OLD, LATEST = state_of(40, OLD_SEQ), state_of(41, NEW_SEQ)


@contextlib.asynccontextmanager
async def replicas_of(*states: ShardState):
    """A service over the replicas of one shard, each with its state, and their servers."""
    servers = [
        ShardServer(shard_of(state), secret=SECRET, replica=replica)
        for replica, state in enumerate(states)
    ]
    routes = []
    for server in servers:
        routes.append(ReplicaRoute(key=server.key, epoch=1, address=server.bind()))
        server.start(1)
    service = SearchService(CONFIG, SECRET, load_encoder=lambda _table: None)
    try:
        shard = ShardRoute(shard=0, rows=41, replicas=tuple(routes))
        await service.apply(make_table([shard], DIM, generation=7))
        yield service, servers
    finally:
        await service.close()
        for server in servers:
            server.stop()


async def searched(service: SearchService, **body):
    query = decode_query(json.dumps(body).encode(), Media.JSON, CONFIG)
    return await service.search(query, arrived_at=asyncio.get_running_loop().time())


async def item(service: SearchService, item_id: int):
    return await service.item(item_id, arrived_at=asyncio.get_running_loop().time())


def asked_of(shard: Shard, seq: int):
    """What a shard answers to both requests for an item, of those that have seen ``seq``."""
    ids, min_seq = IDS[:1], (seq,)
    fetch = FetchRequest(item_ids=ids, timeout_ms=1e4, min_seq=min_seq)
    names = AttributesRequest(item_ids=ids, names=("title",), timeout_ms=1e4, min_seq=min_seq)
    return [
        *shard.fetch_batch([fetch]),
        *shard.attributes_batch([names], [MAX_RETURNED_BYTES]),
    ]


def test_a_shard_refuses_look_ups_of_writes_that_it_lacks() -> None:
    shard = shard_of(OLD)
    assert [reply.seq for reply in asked_of(shard, OLD_SEQ)] == [OLD_SEQ, OLD_SEQ]
    assert [type(reply) for reply in asked_of(shard, NEW_SEQ)] == [Behind, Behind]


@pytest.mark.parametrize("min_seq", [(), (3, 0, 2**62), tuple(range(2_000))])
def test_min_seq_travels_with_look_ups(min_seq: tuple[int, ...]) -> None:
    for request in (
        FetchRequest(item_ids=IDS, timeout_ms=5.0, min_seq=min_seq),
        AttributesRequest(item_ids=IDS, names=("title",), timeout_ms=5.0, min_seq=min_seq),
    ):
        again = decode_payload(encode_frame(1, request)[HEADER.size :])
        assert isinstance(again, type(request))
        assert again.min_seq == min_seq


async def test_items_that_are_asked_with_are_of_the_writes_asked_for() -> None:
    async with replicas_of(OLD, LATEST) as (service, _):
        for _ in range(ASKED):
            answer = await searched(service, item_ids=[NEW], k=3, min_seq=[NEW_SEQ])
            assert answer.reasons == ()
            assert answer.seq == (NEW_SEQ,)


async def test_items_that_no_replica_has_yet_are_behind_and_not_missing() -> None:
    async with replicas_of(OLD, OLD) as (service, _):
        with pytest.raises(Behind):
            await searched(service, item_ids=[NEW], k=3, min_seq=[NEW_SEQ])


async def test_attributes_are_of_the_state_that_was_searched() -> None:
    query = {"vectors": VECTORS[NEW:].tolist(), "k": 41, "return": ["title"]}
    async with replicas_of(OLD, LATEST) as (service, _):
        for _ in range(ASKED):
            answer = await searched(service, **query, min_seq=[NEW_SEQ])
            assert answer.returned.missing == ()
            assert answer.returned.attributes["title"] == [["as of 2"] * 41]
        for _ in range(ASKED):
            answer = await searched(service, **query)
            (seq,), (titles,) = answer.seq, answer.returned.attributes["title"]
            assert set(titles) <= {f"as of {at}" for at in (seq, NEW_SEQ)}


async def test_attributes_that_only_an_older_state_has_are_missing() -> None:
    async with replicas_of(LATEST) as (service, (server,)):
        attributes = service._fanout.attributes

        async def later(*arguments, **named):
            server.shard.state = OLD
            return await attributes(*arguments, **named)

        service._fanout.attributes = later
        answer = await searched(service, vectors=VECTORS[:1].tolist(), k=1, **{"return": ["title"]})
        assert [each.code for each in answer.returned.missing] == ["behind"]
        server.shard.state = LATEST
        with pytest.raises(Unavailable, match="its attributes did not come"):
            await item(service, CHANGED)


def assert_of_one_version(answer, seq: int) -> None:
    """Vector and attributes of ``state_of`` say of which state they are."""
    assert answer.vector.tolist() == [seq] * DIM
    assert answer.attributes["title"] == f"as of {seq}"


async def test_vector_and_attributes_of_an_item_are_of_one_version_on_any_replicas() -> None:
    async with replicas_of(OLD, LATEST) as (service, _):
        for _ in range(2 * ASKED):
            answer = await item(service, CHANGED)
            assert_of_one_version(answer, answer.seq)


def written_between(service: SearchService, server: ShardServer, states) -> None:
    """The shard takes its next state before each look-up, of vectors or attributes."""
    left = iter(states)

    def after_a_write(look_up):
        async def later(*arguments, **named):
            server.shard.state = next(left, server.shard.state)
            return await look_up(*arguments, **named)

        return later

    service._fanout.fetch = after_a_write(service._fanout.fetch)
    service._fanout.attributes = after_a_write(service._fanout.attributes)


@pytest.mark.parametrize("writes", range(2 * one_item.READS + 1))
async def test_an_item_that_is_written_between_its_two_parts_is_read_again(writes: int) -> None:
    states = [state_of(41, NEW_SEQ + number) for number in range(writes)]
    async with replicas_of(OLD) as (service, (server,)):
        written_between(service, server, states)
        answer = await item(service, CHANGED)
        assert_of_one_version(answer, answer.seq)
        assert answer.seq == server.shard.state.seq


async def test_an_item_that_is_written_all_the_time_is_an_error_in_the_end() -> None:
    states = (state_of(41, number) for number in itertools.count(NEW_SEQ))
    async with replicas_of(OLD) as (service, (server,)):
        written_between(service, server, states)
        with pytest.raises(Unavailable, match="written faster than it can be read"):
            await item(service, CHANGED)
        assert server.shard.state.seq == NEW_SEQ + 2 * one_item.READS


async def test_writes_of_other_items_do_not_keep_an_item_from_being_read() -> None:
    states = (replace(LATEST, seq=number) for number in itertools.count(NEW_SEQ + 1))
    async with replicas_of(LATEST) as (service, (server,)):
        written_between(service, server, states)
        answer = await item(service, CHANGED)
        assert_of_one_version(answer, NEW_SEQ)
        assert answer.seq == NEW_SEQ + 2, "of the state that its attributes are from"


async def test_an_item_that_is_deleted_between_its_vector_and_its_attributes_is_not_found() -> None:
    without = replace(OLD, seq=LATEST.seq + 1)  # which never had it
    async with replicas_of(LATEST) as (service, (server,)):
        attributes = service._fanout.attributes

        async def later(*arguments, **named):
            server.shard.state = without
            return await attributes(*arguments, **named)

        service._fanout.attributes = later
        with pytest.raises(NotFound, match="no such item"):
            await item(service, NEW)


def test_states_differ_as_the_tests_above_say() -> None:
    assert np.array_equal(LATEST.fetch(np.array([CHANGED]))[1], np.full((1, DIM), NEW_SEQ))
    assert OLD.fetch(np.array([NEW]))[0].size == 0
