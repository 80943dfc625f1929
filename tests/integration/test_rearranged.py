"""Caps, boosts and diversity from outside: codecs, clients, the command line, live writes."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import msgpack
import numpy as np
import pytest
from click.testing import CliRunner

from shardline.cluster.cli import cli
from shardline.router.client.async_client import AsyncClient
from shardline.router.client.sync_client import Client
from shardline.router.http.api_keys import Scope
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import FloatArray, normalise
from shardline.shards.storage.embedding_set import open_embedding_set
from tests.integration.conftest import Cluster

NEW_ITEMS = 3_000_000  # ids from here on are nobody else's in the session's cluster
TIMEOUT_MS = 10_000.0  # the tests are not about speed, and share their host
CAP = {"column": "category", "max": 2}


class Items:
    """All items: ids (n,), vectors (n, dim) of unit length, categories and prices (n,)."""

    def __init__(self, cluster: Cluster) -> None:
        batches = list(open_embedding_set(cluster.store.newest_embeddings()).batches())
        self.ids = np.concatenate([batch.item_ids for batch in batches])
        self.vectors = np.concatenate([batch.vectors for batch in batches])
        self.category, self.price = (
            np.array([row for batch in batches for row in batch.attributes[name].to_pylist()])
            for name in ("category", "price")
        )

    def ranking(self, query: FloatArray) -> np.ndarray:
        """Rows, best first."""
        scores = self.vectors @ normalise(query[None])[0]
        return np.lexsort((self.ids, -scores))

    def capped(self, query: FloatArray, k: int, most: int) -> list[int]:
        taken: list[int] = []
        counts: Counter[int] = Counter()
        for row in self.ranking(query).tolist():
            category = int(self.category[row])
            if counts[category] < most and len(taken) < k:
                counts[category] += 1
                taken.append(int(self.ids[row]))
        return taken


@pytest.fixture(scope="module")
def items(cluster: Cluster) -> Items:
    return Items(cluster)


@pytest.fixture(scope="module")
def queries(items: Items) -> FloatArray:
    return items.vectors[:3] + np.float32(0.05)


@pytest.fixture
def writer(cluster: Cluster) -> Iterator[Client]:
    with cluster.endpoint.address_for(Scope.WRITE).client() as client:
        yield client
        client.delete(np.arange(NEW_ITEMS, NEW_ITEMS + 100))


def test_caps_are_those_of_brute_force(client: Client, items: Items, queries: FloatArray) -> None:
    answer = client.search(vectors=queries, k=20, cap=CAP, exact=True, timeout_ms=TIMEOUT_MS)
    for row, query in enumerate(queries):
        assert answer.ids[row].tolist() == items.capped(query, 20, 2)
    assert len(answer.pool) == 3
    assert answer.reasons == ()
    categories = len(set(items.category.tolist()))
    answer = client.search(
        vectors=queries[:1], k=categories + 5, cap=CAP | {"max": 1}, exact=True,
        timeout_ms=TIMEOUT_MS,
    )  # fmt: skip
    live = answer.ids[answer.ids >= 0]
    assert live.tolist() == items.capped(queries[0], categories + 5, 1)
    (reason,) = answer.reasons
    assert reason.code == "cap"
    assert reason.count is not None
    assert reason.count > 0


def test_both_codecs_and_the_asyncio_client_say_the_same(
    cluster: Cluster, client: Client, queries: FloatArray
) -> None:
    fields: dict[str, Any] = {
        "k": 10,
        "cap": [CAP],
        "boost": {"column": "price", "weight": -0.001, "pool": 100},
        "diversify": {"lambda": 0.6},
        "timeout_ms": TIMEOUT_MS,
    }
    expected = client.search(vectors=queries, **fields)
    address = cluster.endpoint.address
    headers = {"authorization": f"Bearer {address.key}"}
    body = {"vectors": queries.tolist(), **fields}
    with httpx.Client(base_url=address.url, headers=headers) as http:
        as_json = http.post("/v1/search", json=body).json()
        as_msgpack = http.post(
            "/v1/search",
            content=msgpack.packb(body),
            headers={"content-type": "application/msgpack", "accept": "application/json"},
        ).json()
    for each in (as_json, as_msgpack):
        assert each["ids"] == expected.ids.tolist()
        assert each["pool"] == list(expected.pool) == [100] * 3

    async def ask() -> None:
        async with AsyncClient(address.url, key=address.key) as other:
            answer = await other.search(vectors=queries, **fields)
            np.testing.assert_array_equal(answer.ids, expected.ids)

    asyncio.run(ask())


def test_written_items_are_capped_and_boosted_at_once(writer: Client) -> None:
    ids = np.arange(NEW_ITEMS, NEW_ITEMS + 40)
    vectors = normalise(np.random.default_rng(9).standard_normal((40, 128)).astype(np.float32))
    done = writer.upsert(
        item_ids=ids,
        vectors=vectors,
        attributes={
            "category": [60 + number % 4 for number in range(40)],
            "price": [1000.0 * (number == 17) for number in range(40)],
        },
    )
    asked: dict[str, Any] = {
        "vectors": vectors[:1],
        "k": 12,
        "filter": {"item_id": {"$gte": NEW_ITEMS}},
        "min_seq": done.seq,
        "timeout_ms": TIMEOUT_MS,
    }
    answer = writer.search(**asked, cap=CAP | {"max": 3}, return_=["category"])
    assert Counter(answer.attributes["category"][0]) == {60: 3, 61: 3, 62: 3, 63: 3}
    answer = writer.search(**asked, cap=CAP)
    assert int((answer.ids >= 0).sum()) == 8
    assert [(each.code, each.count) for each in answer.reasons] == [("cap", 32)]
    answer = writer.search(**asked, boost={"column": "price", "weight": 1})
    assert answer.ids[0, 0] == ids[17]
    assert answer.scores[0, 0] > 900


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"cap": {"column": "colour", "max": 1}}, "cap.column"),
        ({"cap": {"column": "price", "max": 1}}, "cap.column"),
        ({"boost": {"column": "price", "weight": 1, "half_life_days": 7}}, "boost.column"),
        ({"boost": {"column": "price", "weight": float("nan")}}, "boost.weight"),
        ({"diversify": {"lambda": 2}}, "diversify.lambda"),
        ({"diversify": {"lambda": 0.5, "pool": 3}}, "diversify.pool"),
    ],
)
def test_what_is_wrong_is_the_callers_error(
    client: Client, queries: FloatArray, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        client.search(vectors=queries, k=10, **fields)
    assert caught.value.field == field


def test_the_command_line(cluster: Cluster, items: Items, queries: FloatArray) -> None:
    words = (
        "--store",
        str(cluster.store.root),
        "query",
        "--vector",
        json.dumps(queries[0].tolist()),
    )
    options = ("--cap", "category:1", "--boost", "price:0.0001", "--diversify", "0.9", "--json")
    done = CliRunner().invoke(cli, [*words, *options, "--show", "category", "-k", "5"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["pool"] == [200]
    assert len({row["attributes"]["category"] for row in report["results"]}) == 5
    done = CliRunner().invoke(cli, [*words, "--cap", "colour:1"])
    assert isinstance(done.exception, InvalidInput)
    assert done.exception.field == "--cap.column"
