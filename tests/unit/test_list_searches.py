"""Searches that name lists, over shards: what is in a list does not come back, and k others do."""

import numpy as np
import pytest

from shardline.router.client.sync_client import Client
from shardline.router.http.api_keys import Key, Keyring, Scope
from shardline.router.http.auth import AuthSettings, Guard
from shardline.router.router_config import RouterConfig
from tests.fake_shard import brute_force, make_rows
from tests.live_router import DIM, NUM_ROWS, running_router

KEY = "k" * 43
GUARD = Guard(AuthSettings(keyring=Keyring.of([Key(Scope.WRITE, KEY)])))
ITEMS, VECTORS = make_rows(NUM_ROWS, DIM)


@pytest.fixture(scope="module")
def router():
    with running_router(RouterConfig(), GUARD) as router:
        yield router


@pytest.fixture
def client(router):
    with Client(router.url, key=KEY) as client:
        yield client


def expected(queries, k, *without):
    """The answer by brute force over the items that are in none of the lists."""
    kept = ~np.isin(ITEMS, np.concatenate([np.array(each, np.int64) for each in without]))
    return brute_force(VECTORS[queries], ITEMS[kept], VECTORS[kept], k)


def test_items_of_lists_do_not_come_back_and_k_others_do(client):
    rng = np.random.default_rng(3)
    seen, sold = rng.choice(ITEMS, 20, replace=False), rng.choice(ITEMS, 15, replace=False)
    client.put_list("seen:17", seen)
    client.put_list("sold-out", [*sold, 10**15])
    for names, lists in (
        (["seen:17"], [seen]),
        (["seen:17", "sold-out"], [seen, sold]),
        (["seen:17", "nobody"], [seen]),
    ):
        answer = client.search(vectors=VECTORS[:5], k=10, exclude_lists=names)
        ids, scores = expected(np.arange(5), 10, *lists)
        assert answer.ids.tolist() == ids.tolist()
        assert answer.scores.tolist() == scores.tolist()
        assert answer.reasons == ()


def test_lists_and_the_ids_of_a_search_are_both_left_out(client):
    client.put_list("blocked", ITEMS[:10])
    own = [ITEMS[10:15].tolist(), ITEMS[20:30].tolist()]
    answer = client.search(vectors=VECTORS[:2], k=10, exclude_lists=["blocked"], exclude=own)
    for row, ids in enumerate(own):
        best, _ = expected(np.array([row]), 10, ITEMS[:10], ids)
        assert answer.ids[row].tolist() == best[0].tolist()


def test_an_answer_that_a_list_makes_short_says_so(client):
    client.put_list("nearly-all", ITEMS[4:])
    answer = client.search(vectors=VECTORS[:1], k=10, exclude_lists=["nearly-all"])
    assert sorted(answer.ids[0][:4].tolist()) == ITEMS[:4].tolist()
    assert set(answer.ids[0][4:].tolist()) == {-1}
    (reason,) = answer.reasons
    assert (reason.code, reason.count) == ("exclusion", NUM_ROWS - 4)


def test_a_search_after_a_change_by_the_same_router_goes_by_it(client):
    for number in range(1, 20):
        best = client.search(vectors=VECTORS[:1], k=1, exclude_lists=["growing"]).ids[0][0]
        client.change_list("growing", add=[best])
        after = client.search(vectors=VECTORS[:1], k=NUM_ROWS, exclude_lists=["growing"])
        assert best not in after.ids
        assert len(client.get_list("growing").item_ids) == number


def test_a_block_works_both_ways(client):
    client.change_list("block:3", add=[5])
    client.change_list("block:5", add=[3])
    for who, whom in ((3, 5), (5, 3)):
        answer = client.search(vectors=VECTORS[:1], k=NUM_ROWS, exclude_lists=[f"block:{who}"])
        assert whom not in answer.ids
        assert who in answer.ids
