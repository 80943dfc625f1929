"""Items written since the export count in histories, whichever router took the write."""

import asyncio
import contextlib
from dataclasses import replace

import numpy as np
import pytest

from shardline.router import past_items
from shardline.router.encoder.new_item_cache import (
    ABSENT_S,
    ENTRY_BYTES,
    NOTHING,
    PRESENT_S,
    NewItem,
    NewItemCache,
    NewItemLookup,
)
from shardline.router.limits import resolve
from shardline.router.past_items import made_of
from shardline.router.query import FoundAttributes
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.router.written import Upserts
from shardline.shards.core.messages import (
    AttributesRequest,
    ErrorReply,
    SearchOptions,
    SearchRequest,
)
from tests.fake_encoder import ITEM_FEATURES, history_encoder, item_vector, small_item_encoder
from tests.fake_shard import SECRET, make_rows, make_table, running_shards

DIM, ROWS, SHARDS, KNOWN = 8, 60, 4, 10
CONFIG = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, default_timeout_ms=5_000, cache_bytes=0)
HISTORY_ROWS = np.random.default_rng(0).standard_normal((KNOWN, 6)).astype(np.float32)
NEW, NEWER, NOBODY = 70, 71, 12345
ROW = np.array([1, 0, 1, 2, 0, 1], np.float32)  # of ITEM_FEATURES: category | tag | size | released


@contextlib.asynccontextmanager
async def routers(count: int = 2):
    """Routers over the same shards."""
    ids, vectors = make_rows(ROWS, DIM)
    async with running_shards(ids, vectors, SHARDS) as shards:
        services = [
            SearchService(
                CONFIG,
                SECRET,
                load_encoder=lambda _table: history_encoder(DIM, HISTORY_ROWS),
                load_items=lambda _table: small_item_encoder(DIM),
            )
            for _ in range(count)
        ]
        for service in services:
            await service.apply(make_table(shards, DIM))
        yield shards, services
        for service in services:
            await service.close()


async def write(service: SearchService, item_id: int, features=ITEM_FEATURES, **fields) -> tuple:
    now = asyncio.get_running_loop().time()
    given = Upserts(
        item_ids=[item_id], features=[features], attributes={}, timeout_ms=5_000, **fields
    )
    return (await service.writes.upsert(given, f"{now}", arrived_at=now, began_at=0.0)).seq


async def asked(service: SearchService, shards, *histories: list, **options) -> np.ndarray:
    """The vectors that shards were searched with."""
    now = asyncio.get_running_loop().time()
    features = [{"history": history} for history in histories]
    query = resolve(CONFIG, features=features, k=3, options=SearchOptions(**options))
    await service.search(query, arrived_at=now)
    (*_, last) = [each for each in shards[0].requests if isinstance(each, SearchRequest)]
    return last.queries


def expected(*rows: np.ndarray) -> np.ndarray:
    return np.array(item_vector(DIM, *np.mean(rows, axis=0)))


def looked_up(shards) -> int:
    return sum(isinstance(each, AttributesRequest) for shard in shards for each in shard.requests)


async def test_a_new_item_counts_for_every_router() -> None:
    async with routers() as (shards, (first, other)):
        await write(first, NEW)
        for service in (first, other):
            (vector,) = await asked(service, shards, [3, NEW, NOBODY])
            np.testing.assert_allclose(vector, expected(HISTORY_ROWS[3], ROW), atol=1e-6)
        found = await asked(other, shards, [NEW], [], [4], [NEW, 1, 2, 3, 4])
        np.testing.assert_allclose(found[0], expected(ROW), atol=1e-6)
        np.testing.assert_allclose(found[2], expected(HISTORY_ROWS[4]), atol=1e-6)
        np.testing.assert_allclose(found[3], expected(*HISTORY_ROWS[1:5]), atol=1e-6)


async def test_shards_are_asked_once_for_new_items_and_never_for_known_ones() -> None:
    async with routers(1) as (shards, (service,)):
        await write(service, NEW)
        await asked(service, shards, [3, 4], [])
        assert looked_up(shards) == 0
        for _ in range(3):
            await asked(service, shards, [3, NEW, NOBODY])
        assert looked_up(shards) == SHARDS, "one question, to each shard"


async def test_a_search_with_min_seq_sees_its_write_in_histories() -> None:
    async with routers() as (shards, (first, other)):
        (vector,) = await asked(other, shards, [NEW, 3])
        np.testing.assert_allclose(vector, expected(HISTORY_ROWS[3]), atol=1e-6)
        seq = tuple(each or 0 for each in await write(first, NEW))
        (vector,) = await asked(other, shards, [NEW, 3], min_seq=seq)
        np.testing.assert_allclose(vector, expected(HISTORY_ROWS[3], ROW), atol=1e-6)
        newest = ITEM_FEATURES | {"size": 4}
        seq = tuple(each or 0 for each in await write(first, NEW, newest))
        (vector,) = await asked(other, shards, [NEW, 3], min_seq=seq)
        changed = np.array([1, 0, 1, 4, 0, 1], np.float32)
        np.testing.assert_allclose(vector, expected(HISTORY_ROWS[3], changed), atol=1e-6)


async def test_without_its_shard_an_item_is_left_out_and_looked_up_again() -> None:
    async with routers(1) as (shards, (service,)):
        await write(service, NEW)
        shards[3].fetch_error = ErrorReply(code="unavailable", message="loading")
        (vector,) = await asked(service, shards, [NEW, 3])
        np.testing.assert_allclose(vector, expected(HISTORY_ROWS[3]), atol=1e-6)
        shards[3].fetch_error = None
        (vector,) = await asked(service, shards, [NEW, 3])
        np.testing.assert_allclose(vector, expected(HISTORY_ROWS[3], ROW), atol=1e-6)


async def test_items_that_the_tower_refuses_are_left_out_alone() -> None:
    """Written by vector, their attributes may be anything; those of these shards are texts."""
    async with routers(1) as (shards, (service,)):
        await write(service, NEW)
        (vector,) = await asked(service, shards, [20, NEW, 50, 3])
        np.testing.assert_allclose(vector, expected(HISTORY_ROWS[3], ROW), atol=1e-6)


async def test_too_many_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past_items, "MAX_LOOKED_UP", 2)
    async with routers(1) as (shards, (service,)):
        await write(service, NEW)
        await write(service, NEWER)
        found = await asked(service, shards, [NEW], [NOBODY], [NEWER, 3])
        np.testing.assert_allclose(found[0], expected(ROW), atol=1e-6)
        np.testing.assert_allclose(found[2], expected(HISTORY_ROWS[3]), atol=1e-6)
        sizes = [len(each.item_ids) for each in shards[3].requests if hasattr(each, "names")]
        assert max(sizes) == 2


async def test_without_an_item_encoder_histories_are_as_exported() -> None:
    async with routers(1) as (shards, (service,)):
        await write(service, NEW)
        for unusable in (None, small_item_encoder(DIM, "m0")):
            service._fanout.snapshot.items = unusable
            (vector,) = await asked(service, shards, [3, NEW])
            np.testing.assert_allclose(vector, expected(HISTORY_ROWS[3]), atol=1e-6)
        assert looked_up(shards) == 0


async def test_many_new_items_are_made_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past_items, "ENCODE_IN_LOOP", 1)
    async with routers(1) as (shards, (service,)):
        await write(service, NEW)
        await write(service, NEWER)
        (vector,) = await asked(service, shards, [NEW, NEWER])
        np.testing.assert_allclose(vector, expected(ROW, ROW), atol=1e-6)


def test_what_shards_bring_is_made_to_rows() -> None:
    encoder = small_item_encoder(DIM)
    nothing = dict.fromkeys(ITEM_FEATURES)
    given = {1: ITEM_FEATURES, 2: nothing, 3: ITEM_FEATURES | {"size": "x"}}
    values = {name: {item: row[name] for item, row in given.items()} for name in encoder.names}
    found = FoundAttributes(item_ids=np.array([3, 1, 2, 1]), values=values, size=0, missing=())
    made = made_of(encoder, found)
    assert made[2] == made[3] == NOTHING
    assert made[1].row is not None and made[1].score is None
    np.testing.assert_allclose(made[1].row, ROW, atol=1e-6)
    assert made_of(encoder, replace(found, item_ids=np.array([], np.int64))) == {}


def test_entries_expire_and_the_oldest_make_room() -> None:
    row = np.zeros(25, np.float32)
    cache = NewItemCache(max_bytes=3 * (ENTRY_BYTES + row.nbytes))
    cache.put(1, NewItem(row, 0.5), now=10.0)
    cache.put(2, NOTHING, now=10.0)
    assert cache.get(1, 10.0 + PRESENT_S - 0.1) == NewItem(row, 0.5)
    assert cache.get(1, 10.0 + PRESENT_S) is None
    assert cache.get(2, 10.0 + ABSENT_S - 0.1) == NOTHING
    assert cache.get(2, 10.0 + ABSENT_S) is None
    for item in range(3, 6):
        cache.put(item, NewItem(row, None), now=10.0)
    assert [cache.get(item, 10.0) is not None for item in range(1, 6)] == [False] * 2 + [True] * 3
    for _ in range(10):
        cache.put(5, NewItem(row, None), now=10.0)
    assert cache.get(3, 10.0) is not None, "an entry that is replaced takes no room twice"


def test_a_look_up_takes_what_was_found_first_and_notes_what_it_misses() -> None:
    cache = NewItemCache()
    rows = {item: NewItem(np.full(3, item, np.float32), float(item)) for item in (1, 2)}
    cache.put(1, rows[1], now=0.0)
    cache.put(4, NOTHING, now=0.0)
    lookup = NewItemLookup(cache, 1.0)
    is_found, found, scores = lookup.find(np.array([4, 1, 2, 1]))
    assert is_found.tolist() == [False, True, False, True]
    assert found is not None and found[:, 0].tolist() == [1, 1]
    assert scores is not None and scores.tolist() == [1, 1]
    assert list(lookup.missed) == [2]
    lookup.found[2] = rows[2]
    is_found, found, _ = lookup.find(np.array([2]))
    assert is_found.all() and found is not None and found.tolist() == [[2, 2, 2]]
    fresh = NewItemLookup(cache, 1.0, is_fresh=True)
    assert fresh.find(np.array([1, 4]))[1] is None
    assert list(fresh.missed) == [1, 4]
