"""Filters from outside: every attribute of the catalogue, codecs, clients, live writes."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgpack
import numpy as np
import pytest
from click.testing import CliRunner

from shardline.cluster.cli import cli
from shardline.router.client.async_client import AsyncClient
from shardline.router.client.sync_client import Client
from shardline.router.contract import Reason
from shardline.router.http.api_keys import Scope
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import FloatArray, Metric, Ranked, normalise
from shardline.shards.storage.embedding_set import open_embedding_set
from tests.batch_store import read_parts, write_queries
from tests.integration.conftest import NUM_ITEMS, Cluster
from tests.reference import assert_same_answers, brute_force

NEW_ITEMS = 2_000_000  # ids from here on are nobody else's in the session's cluster
K = 20
TIMEOUT_MS = 10_000.0  # the tests are not about speed, and share their host

Mask = np.ndarray


class Items:
    """The items as they are now: ids (n,), vectors (n, dim), and columns (n, ...)."""

    def __init__(self, ids: np.ndarray, vectors: FloatArray, columns: dict[str, np.ndarray]):
        self.ids, self.vectors, self.columns = ids, vectors, columns

    def __getitem__(self, name: str) -> np.ndarray:
        return self.ids if name == "item_id" else self.columns[name]

    def nearest(self, queries: FloatArray, mask: Mask, k: int) -> Ranked:
        ids, vectors = self.ids[mask], self.vectors[mask]
        return brute_force(normalise(queries), vectors, ids, k, Metric.COSINE)


@pytest.fixture(scope="module")
def items(cluster: Cluster) -> Items:
    batches = list(open_embedding_set(cluster.store.newest_embeddings()).batches())
    columns = {
        name: np.array([row for batch in batches for row in batch.attributes[name].to_pylist()])
        for name in batches[0].attributes.schema.names
    }
    return Items(
        np.concatenate([batch.item_ids for batch in batches]),
        np.concatenate([batch.vectors for batch in batches]),
        columns,
    )


@pytest.fixture(scope="module")
def queries(items: Items) -> FloatArray:
    return items.vectors[:3] + np.float32(0.05)


@pytest.fixture
def writer(cluster: Cluster) -> Iterator[Client]:
    with cluster.endpoint.address_for(Scope.WRITE).client() as client:
        yield client
        client.delete(np.arange(NEW_ITEMS, NEW_ITEMS + 100))


CASES: dict[str, tuple[dict[str, Any], Callable[[Items], Mask]]] = {
    "int32": ({"category": 3}, lambda items: items["category"] == 3),
    "int32 list": (
        {"category": {"$in": [1, 2, 19, 77]}},
        lambda items: np.isin(items["category"], [1, 2, 19]),
    ),
    "float32": (
        {"price": {"$lt": 12.5}, "rating": {"$gte": 4}},
        lambda items: (items["price"] < 12.5) & (items["rating"] >= 4),
    ),
    "list of float32": (
        {"attribute_vector": {"$gt": 3}},
        lambda items: (items["attribute_vector"] > 3).any(axis=1),
    ),
    "item_id": (
        {"item_id": {"$gte": 1500, "$ne": 1501}},
        lambda items: (items["item_id"] >= 1500) & (items["item_id"] != 1501),
    ),
    "logic": (
        {"$or": [{"category": {"$gt": 17}}, {"$not": {"price": {"$lt": 60}}}]},
        lambda items: (items["category"] > 17) | ~(items["price"] < 60),
    ),
    "exists": ({"price": {"$exists": True}}, lambda items: np.ones(NUM_ITEMS, np.bool_)),
    "missing": ({"category": None}, lambda items: np.zeros(NUM_ITEMS, np.bool_)),
    "ten thousand": (
        {"item_id": {"$nin": list(range(100, 10_100))}},
        lambda items: items["item_id"] < 100,
    ),
}


def test_there_is_a_case_for_every_attribute(items: Items) -> None:
    named = json.dumps([given for given, _ in CASES.values()])
    assert items.columns.keys() == {name for name in items.columns if f'"{name}"' in named}


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_brute_force_over_what_matches(
    client: Client, items: Items, queries: FloatArray, case: str
) -> None:
    given, holds = CASES[case]
    mask = holds(items)
    expected = items.nearest(queries, mask, K)
    for exact in (None, True):
        answer = client.search(
            vectors=queries, k=K, filter=given, exact=exact, timeout_ms=TIMEOUT_MS
        )
        assert_same_answers(Ranked(answer.ids, answer.scores), expected)
        count = int(mask.sum())
        told = [(each.query, each.code, each.matched) for each in answer.reasons]
        assert told == [(query, "filter", count) for query in range(3) if count < K]
        assert answer.coverage.share == 1.0


@pytest.mark.parametrize("media", ["json", "msgpack"])
def test_both_codecs_take_a_filter_per_query(
    cluster: Cluster, items: Items, queries: FloatArray, media: str
) -> None:
    names = ("int32", "float32", "missing")
    body = {
        "vectors": queries.tolist(),
        "k": K,
        "filter": [CASES[name][0] for name in names],
        "return": ["category"],
        "timeout_ms": TIMEOUT_MS,
    }
    pack, read = (json.dumps, json.loads) if media == "json" else (msgpack.packb, msgpack.unpackb)
    address = cluster.endpoint.address
    response = httpx.post(
        f"{address.url}/v1/search",
        content=pack(body),
        headers={
            "Content-Type": f"application/{media}",
            "Accept": f"application/{media}",
            "Authorization": f"Bearer {address.key}",
        },
    )
    assert response.status_code == 200, response.text
    answer = read(response.content)
    ids = answer["ids"]
    if media == "msgpack":
        array = np.frombuffer(ids["data"], ids["dtype"]).reshape(ids["shape"])
        ids = [row[row >= 0].tolist() for row in array]
    for row, name in enumerate(names):
        mask = CASES[name][1](items)
        assert set(ids[row]) <= set(items.ids[mask].tolist())
        assert len(ids[row]) == min(K, int(mask.sum()))
    assert ids[0] == items.nearest(queries[:1], CASES["int32"][1](items), K).ids[0].tolist()
    assert answer["attributes"]["category"][0] == [3] * K
    assert answer["reasons"] == [
        {"query": 2, "code": "filter", "text": "no item matches the filter", "matched": 0}
    ]


def test_the_asyncio_client_and_item_queries(
    cluster: Cluster, items: Items, queries: FloatArray
) -> None:
    address = cluster.endpoint.address
    mask = items["category"] == 3

    async def ask() -> None:
        async with AsyncClient(address.url, key=address.key) as client:
            asked = [
                client.search(vectors=queries, k=K, filter={"category": 3}, timeout_ms=TIMEOUT_MS)
                for _ in range(8)
            ]
            expected = items.nearest(queries, mask, K)
            for answer in await asyncio.gather(*asked):
                assert_same_answers(Ranked(answer.ids, answer.scores), expected)
            inside, outside = int(items.ids[mask][0]), int(items.ids[~mask][0])
            answer = await client.search(
                item_ids=[inside, outside], k=1000, filter={"category": 3}, timeout_ms=TIMEOUT_MS
            )
            members = set(items.ids[mask].tolist())
            found = [set(row[row >= 0].tolist()) for row in answer.ids]
            assert found == [members - {inside}, members]
            assert [each.matched for each in answer.reasons] == [len(members) - 1, len(members)]

    asyncio.run(ask())


def test_live_writes_come_and_go_in_filtered_answers(writer: Client) -> None:
    ids = np.arange(NEW_ITEMS, NEW_ITEMS + 40)
    vectors = normalise(np.random.default_rng(5).standard_normal((40, 128)).astype(np.float32))
    prices = [float(price) for price in range(40)]
    cheap = {"item_id": {"$gte": NEW_ITEMS}, "price": {"$lt": 10}}

    def found(seq: Any, k: int = 15) -> tuple[set[int], tuple[Reason, ...]]:
        answer = writer.search(
            vectors=vectors[:1], k=k, filter=cheap, min_seq=seq, timeout_ms=TIMEOUT_MS
        )
        return set(answer.ids[answer.ids >= 0].tolist()), answer.reasons

    assert found(None)[0] == set()
    done = writer.upsert(
        item_ids=ids, vectors=vectors, attributes={"price": prices, "category": [50] * 40}
    )
    members, reasons = found(done.seq)
    assert members == set(ids[:10].tolist())
    assert [(each.code, each.matched) for each in reasons] == [("filter", 10)]
    # an item of the generation becomes one of them, with another price and category
    before = writer.item(7)
    moved = writer.upsert(
        item_ids=[7], vectors=before.vector[None], attributes={"price": [1.0], "category": [50]}
    )
    answer = writer.search(vectors=before.vector[None], k=60, filter={"category": 50})
    assert set(answer.ids[answer.ids >= 0].tolist()) == {7, *ids.tolist()}
    old = {"category": before.attributes["category"]}
    answer = writer.search(vectors=before.vector[None], k=1, filter=old, min_seq=moved.seq)
    assert answer.ids[0, 0] != 7
    # dearer ones go, and come again without a price
    done = writer.upsert(item_ids=ids[:4], vectors=vectors[:4], attributes={"price": [99.0] * 4})
    assert found(done.seq)[0] == set(ids[4:10].tolist())
    done = writer.delete(ids[4:6])
    members, reasons = found(done.seq)
    assert members == set(ids[6:10].tolist())
    assert reasons[0].text == "4 items match the filter"
    assert found(done.seq, k=4)[1] == ()
    writer.upsert(
        item_ids=[7], vectors=before.vector[None], attributes={
            name: [value] for name, value in before.attributes.items()
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "field", "told"),
    [
        ({"colour": "red"}, "filter.colour", "one of item_id, category, price"),
        ({"price": {"$lt": "cheap"}}, "filter.price.$lt", "price is of type float"),
        ({"price": {"$near": 3}}, "filter.price.$near", "$eq"),
        ({"price": {"$lt": float("nan")}}, "filter.price.$lt", "finite"),
        ({"$or": {}}, "filter.$or", "a list of filters"),
        ([{"category": 1}, {"price": {"$lt": True}}], "filter[1].price.$lt", "price is of type"),
        ([{"category": 1}], "filter", "a list with one for each of 2"),
        ({"item_id": {"$in": list(range(10_001))}}, "filter.item_id.$in", "10000"),
    ],
)
def test_a_wrong_filter_is_the_callers_error(
    client: Client, queries: FloatArray, given: Any, field: str, told: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        client.search(vectors=queries[:2], filter=given)
    assert caught.value.field == field
    assert told in str(caught.value)


def test_the_command_line_takes_filters(
    cluster: Cluster, items: Items, queries: FloatArray, tmp_path: Any
) -> None:
    def run(*arguments: object) -> str:
        words = ["--store", str(cluster.store.root), *map(str, arguments)]
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, done.output
        return done.stdout

    vector, given = json.dumps(queries[0].tolist()), json.dumps({"category": 3})
    mask = items["category"] == 3
    asked = ("query", "--vector", vector, "--filter", given, "--show", "category", "--json")
    report = json.loads(run(*asked, "-k", K))
    expected = items.nearest(queries, mask, K).ids
    assert [row["item_id"] for row in report["results"]] == expected[0].tolist()
    assert {row["attributes"]["category"] for row in report["results"]} == {3}
    path = write_queries(tmp_path / "q.parquet", queries)
    for way in ((), ("--live",)):
        out = tmp_path / "-".join(("out", *way))
        run("batch", "--queries", path, "--out", out, "-k", K, "--filter", given, *way)
        assert read_parts(out)["ids"].to_pylist() == expected.tolist()
