"""Excluded items from outside: both codecs, the clients, histories, live writes, the command."""

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner

from shardline.cluster.cli import cli
from shardline.router.client.async_client import AsyncClient
from shardline.router.client.sync_client import Client
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.router.http.api_keys import Scope
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import FloatArray, IdArray, Metric, Ranked, normalise
from shardline.shards.storage.embedding_set import open_embedding_set
from shardline.shards.storage.generation import QUERY_ENCODER_FOLDER
from shardline.training.evaluation.user_queries import query_features
from tests.integration.conftest import NUM_ITEMS, Cluster
from tests.reference import assert_same_answers, brute_force

K = 20
TIMEOUT_MS = 10_000.0  # the tests are not about speed, and share their host
NEW_ITEMS = 3_000_000  # ids from here on are nobody else's in the session's cluster


@pytest.fixture(scope="module")
def corpus(cluster: Cluster) -> tuple[IdArray, FloatArray]:
    batches = list(open_embedding_set(cluster.store.newest_embeddings()).batches())
    return (
        np.concatenate([batch.item_ids for batch in batches]),
        np.concatenate([batch.vectors for batch in batches]),
    )


@pytest.fixture(scope="module")
def queries(corpus: tuple[IdArray, FloatArray]) -> FloatArray:
    return corpus[1][:3] + np.float32(0.05)


def nearest(
    corpus: tuple[IdArray, FloatArray], queries: FloatArray, lists: list[Any], k: int = K
) -> Ranked:
    ids, vectors = corpus
    parts = [
        brute_force(normalise(query[None]), vectors, ids, k, Metric.COSINE, excluded=excluded)
        for query, excluded in zip(queries, lists, strict=True)
    ]
    return Ranked(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def test_answers_are_those_without_the_excluded_items(
    cluster: Cluster, client: Client, corpus: tuple[IdArray, FloatArray], queries: FloatArray
) -> None:
    best = nearest(corpus, queries, [[], [], []], 200).ids
    lists = [best[0].tolist(), [], [*best[2, :7].tolist(), *range(10**6, 10**6 + 9_993)]]
    expected = nearest(corpus, queries, lists)
    for exact in (None, True):
        answer = client.search(
            vectors=queries, k=K, exclude=lists, exact=exact, timeout_ms=TIMEOUT_MS
        )
        assert_same_answers(Ranked(answer.ids, answer.scores), expected)
        assert answer.reasons == ()
    address = cluster.endpoint.address
    body = {"vectors": queries.tolist(), "k": K, "exclude": lists, "timeout_ms": TIMEOUT_MS}
    response = httpx.post(
        f"{address.url}/v1/search", json=body, headers={"Authorization": f"Bearer {address.key}"}
    )
    assert response.status_code == 200, response.text
    assert response.json()["ids"] == answer.ids.tolist()

    async def together() -> None:
        async with AsyncClient(address.url, key=address.key) as client:
            asked = [
                client.search(
                    vectors=queries[row : row + 1],
                    k=K,
                    exclude=lists[row : row + 1] if row != 1 else None,
                    timeout_ms=TIMEOUT_MS,
                )
                for row in (0, 1, 2) * 5
            ]
            for place, answer in enumerate(await asyncio.gather(*asked)):
                row = slice(place % 3, place % 3 + 1)
                assert_same_answers(Ranked(answer.ids, answer.scores), expected.rows(row))

    asyncio.run(together())


def test_short_answers_say_what_was_excluded(
    client: Client, corpus: tuple[IdArray, FloatArray], queries: FloatArray
) -> None:
    all_but_5 = corpus[0][5:]
    answer = client.search(vectors=queries[:1], k=K, exclude=[all_but_5], timeout_ms=TIMEOUT_MS)
    assert sorted(answer.ids[0][:5].tolist()) == corpus[0][:5].tolist()
    told = [(each.query, each.code, each.count) for each in answer.reasons]
    assert told == [(0, "exclusion", NUM_ITEMS - 5)]
    with pytest.raises(InvalidInput) as caught:
        client.search(vectors=queries[:2], exclude=[[1]])
    assert caught.value.field == "exclude"


def test_the_items_of_histories_do_not_come_back(client: Client, cluster: Cluster) -> None:
    encoder = QueryEncoder.load(cluster.generation / QUERY_ENCODER_FOLDER)
    kinds = {feature["name"]: feature["kind"] for feature in encoder.features}
    users = query_features(cluster.dataset, kinds, np.arange(5), ("train", "val"))
    (name,) = (name for name, kind in kinds.items() if kind == "history")
    plain = client.search(features=users, k=1000, timeout_ms=TIMEOUT_MS)
    answer = client.search(features=users, k=K, exclude_history=True, timeout_ms=TIMEOUT_MS)
    for row, user in enumerate(users):
        assert np.isin(user[name], plain.ids[row]).any()
        kept = [item for item in plain.ids[row].tolist() if item not in user[name]]
        assert answer.ids[row].tolist() == kept[:K]


def test_written_items_are_excluded_too(cluster: Cluster) -> None:
    ids = np.arange(NEW_ITEMS, NEW_ITEMS + 40)
    rng = np.random.default_rng(5)
    vectors = normalise(rng.standard_normal((1, 128)) + rng.standard_normal((40, 128)) / 50)
    with cluster.endpoint.address_for(Scope.WRITE).client() as writer:
        try:
            done = writer.upsert(item_ids=ids, vectors=vectors)
            answer = writer.search(
                vectors=vectors[:2],
                k=K,
                exclude=[ids[:30], []],
                min_seq=done.seq,
                timeout_ms=TIMEOUT_MS,
            )
            assert set(answer.ids[0][:10].tolist()) == set(ids[30:].tolist())
            assert not np.isin(answer.ids[0], ids[:30]).any()
            assert np.isin(answer.ids[1], ids).all()
        finally:
            writer.delete(ids)


def test_the_command_takes_ids(cluster: Cluster, corpus: tuple[IdArray, FloatArray]) -> None:
    first = int(corpus[0][0])
    asked = ["--store", str(cluster.store.root), "query", "--item", str(first), "--json"]

    def found(*more: str) -> list[int]:
        result = CliRunner().invoke(cli, [*asked, *more])
        assert result.exit_code == 0, result.output
        return [row["item_id"] for row in json.loads(result.stdout)["results"]]

    best = found()
    left = found("--exclude", ",".join(map(str, best[:4])))
    assert left[:6] == best[4:]
    assert not set(left) & set(best[:4])
