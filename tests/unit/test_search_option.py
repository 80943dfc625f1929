"""An optional field of a search, from the HTTP body to the shard: what it takes to add one."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shardline.router.cache import cache_key
from shardline.router.contract import Degraded
from shardline.router.http.codec import decode_query
from shardline.router.http.media import Media
from shardline.router.http.problems import to_problem
from shardline.router.query import SearchAnswer, SeqOrigin
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.errors import Behind, InvalidInput
from shardline.shards.core.messages import NO_OPTIONS, SearchOptions, SearchRequest
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer
from shardline.shards.wire.frames import HEADER, decode_payload, encode_frame
from tests.engine import flat_shard
from tests.fake_shard import SECRET, ReplicaRoute, ShardRoute, make_rows, make_table

ROOT = Path(__file__).parents[2]
FOLDERS = ("shards", "router", "cluster", "training")
ASKING = {
    "router/past_items.py",
    "router/rearrange/pool_search.py",
    "router/recall_watch.py",
}
REFUSING = {"router/http/arm_settings.py"}  # as a setting of an arm
# where the numbers are from, and so what they ask of the generation that is live
ORIGIN = {
    "router/asked_seq.py",
    "router/client/seq.py",
    "router/http/codec.py",
    "router/limits.py",
    "router/one_item.py",
    "router/query.py",
}
CONFIG = RouterConfig(backoff_base_ms=1, backoff_max_ms=5)
IDS, VECTORS = make_rows(40, 8)
QUERY = VECTORS[:2].copy()


def shard_at(seq: int) -> Shard:
    shard = flat_shard(VECTORS, IDS)
    shard.state = replace(shard.state, seq=seq)
    return shard


def test_an_optional_field_touches_few_modules() -> None:
    """``min_seq`` is declared, described for HTTP and used. A search carries it unnamed; the router
    names it where it passes it on to look-ups: in the service and in the fan-out. Who asks for it
    in searches and look-ups of the router's own is no part of that, nor is where the numbers are
    from, which no shard hears of."""
    modules = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    naming = {
        path.relative_to(ROOT).as_posix() for path in modules if "min_seq" in path.read_text()
    }
    assert naming >= {"shards/core/messages.py", "router/http/models.py", "shards/server/shard.py"}
    assert len(naming - ASKING - REFUSING - ORIGIN) <= 7


@pytest.mark.parametrize(
    "options",
    [
        NO_OPTIONS,
        SearchOptions(min_seq=(7, 2**62)),
        SearchOptions(),
        SearchOptions(exact=True),
        SearchOptions(min_seq=(1,), exact=True),
        SearchOptions(filter=b"f" * 600_000),
    ],
)
def test_options_travel_in_the_tail(options: SearchOptions) -> None:
    request = SearchRequest(queries=QUERY, k=3, timeout_ms=5.0, options=options)
    frame = encode_frame(1, request)
    again = decode_payload(frame[HEADER.size :])
    assert again.options == options
    np.testing.assert_array_equal(again.queries, QUERY)
    plain = encode_frame(1, replace(request, options=NO_OPTIONS))
    assert (len(frame) > len(plain)) == (options != NO_OPTIONS), "defaults cost no bytes"


def test_a_body_without_it_shares_the_object_that_costs_nothing() -> None:
    body = {"vectors": QUERY.tolist()}
    assert decode_query(json.dumps(body).encode(), Media.JSON, CONFIG).options is NO_OPTIONS
    query = decode_query(json.dumps(body | {"min_seq": [5]}).encode(), Media.JSON, CONFIG)
    assert query.options == SearchOptions(min_seq=(5,))
    with pytest.raises(InvalidInput) as caught:
        decode_query(json.dumps(body | {"min_seq": [3, -1]}).encode(), Media.JSON, CONFIG)
    assert caught.value.field == "min_seq[1]"


def test_where_min_seq_is_from_is_checked() -> None:
    body = {"vectors": QUERY.tolist(), "min_seq": [5]}
    origin = {"generation": 2, "table_version": 9}
    query = decode_query(json.dumps(body | {"min_seq_of": origin}).encode(), Media.JSON, CONFIG)
    assert query.min_seq_of == SeqOrigin(generation=2, table_version=9)
    assert query.options == SearchOptions(min_seq=(5,)), "shards hear of the numbers alone"
    for given, field in [
        ({"generation": 2}, "min_seq_of.table_version"),
        (origin | {"generation": "2"}, "min_seq_of.generation"),
        (origin | {"seq": 1}, "min_seq_of.seq"),
        ([2, 9], "min_seq_of"),
    ]:
        with pytest.raises(InvalidInput) as caught:
            decode_query(json.dumps(body | {"min_seq_of": given}).encode(), Media.JSON, CONFIG)
        assert caught.value.field == field


def test_answers_of_other_options_are_not_taken_from_the_cache() -> None:
    bodies = [
        {"item_ids": [1]},
        {"item_ids": [1], "min_seq": [1]},
        {"item_ids": [1], "min_seq": [2]},
    ]
    queries = [decode_query(json.dumps(body).encode(), Media.JSON, CONFIG) for body in bodies]
    assert len({cache_key(1, QUERY, 3, query) for query in queries}) == 3


def test_a_batch_is_grouped_by_options() -> None:
    shard = shard_at(seq=3)
    requests = [
        SearchRequest(queries=QUERY, k=3, timeout_ms=1.0, options=SearchOptions(min_seq=(seq,)))
        for seq in (0, 3, 4, 3)
    ]
    replies = shard.search_batch(requests)
    assert [isinstance(reply, Behind) for reply in replies] == [False, False, True, False]
    assert {reply.seq for reply in replies if not isinstance(reply, Behind)} == {3}


async def test_a_shard_that_is_behind_is_left_out_and_said_so() -> None:
    servers = [ShardServer(shard_at(seq), secret=SECRET, replica=0) for seq in (5, 4)]
    for number, server in enumerate(servers):
        server.shard.shard, server.key = number, replace(server.key, shard=number)
    routes = []
    for number, server in enumerate(servers):
        address = server.bind()
        server.start(1)
        route = ReplicaRoute(key=server.key, epoch=1, address=address)
        routes.append(ShardRoute(shard=number, rows=40, replicas=(route,)))
    service = SearchService(CONFIG, SECRET, load_encoder=lambda _table: None)
    try:
        await service.apply(make_table(routes, 8, generation=7))
        for min_seq, degraded in [
            ([4, 4], ()),
            ([5], ()),
            ([4, 5], (Degraded(shard=1, code="behind", text="behind"),)),
        ]:
            body = {"vectors": QUERY.tolist(), "k": 3, "min_seq": min_seq}
            query = decode_query(json.dumps(body).encode(), Media.JSON, CONFIG)
            now = asyncio.get_running_loop().time()
            assert (await service.search(query, arrived_at=now)).coverage.degraded == degraded
        body = {"vectors": QUERY.tolist(), "min_seq": [6, 6]}
        query = decode_query(json.dumps(body).encode(), Media.JSON, CONFIG)
        with pytest.raises(Behind, match="no shard answered") as caught:
            await service.search(query, arrived_at=asyncio.get_running_loop().time())
        assert to_problem(caught.value, request_id="r", retry_after_s=1).status == 503
    finally:
        await service.close()
        for server in servers:
            server.stop()


async def test_a_background_search_hears_of_others_and_finds_what_they_find() -> None:
    server = ShardServer(shard_at(0), secret=SECRET)
    address = server.bind()
    server.start(1)
    route = ReplicaRoute(key=server.key, epoch=1, address=address)
    table = make_table([ShardRoute(shard=0, rows=40, replicas=(route,))], 8, generation=7)
    service = SearchService(CONFIG, SECRET, load_encoder=lambda _table: None)
    try:
        await service.apply(table)

        async def ask(**more: object) -> SearchAnswer:
            body = json.dumps({"item_ids": [3, 99], "k": 3, **more}).encode()
            query = decode_query(body, Media.JSON, CONFIG)
            return await service.search(query, arrived_at=asyncio.get_running_loop().time())

        alone = await ask(background=True)
        assert alone.others_share == 0
        other = await ask()
        assert other.others_share is None
        beside = await ask(background=True)
        assert beside.others_share is not None
        assert 0 < beside.others_share < 1
        for answer in (alone, beside):
            np.testing.assert_array_equal(answer.ranked.ids, other.ranked.ids)
            np.testing.assert_array_equal(answer.ranked.scores, other.ranked.scores)
    finally:
        await service.close()
        server.stop()
