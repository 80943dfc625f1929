"""The whole cluster from outside: every answer over HTTP, checked against brute force."""

import time
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from shardline.cluster.commands.budget import measure_budget
from shardline.cluster.commands.remote import evaluate_cluster
from shardline.cluster.console import StageProgress
from shardline.cluster.serving.launched import asked, controller
from shardline.router.client.sync_client import Client
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.core.errors import InvalidInput, NotFound
from shardline.shards.core.schema import FloatArray, IdArray, Metric, Ranked, normalise
from shardline.shards.storage.embedding_set import open_embedding_set
from shardline.shards.storage.generation import QUERY_ENCODER_FOLDER
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.evaluation.user_queries import query_features
from tests.integration.conftest import NUM_ITEMS, Cluster
from tests.reference import assert_same_answers, brute_force

JSON = (("content-type", "application/json"),)


@pytest.fixture(scope="module")
def corpus(cluster: Cluster) -> tuple[IdArray, FloatArray]:
    """All item ids and vectors."""
    embeddings = open_embedding_set(cluster.store.newest_embeddings())
    batches = list(embeddings.batches())
    return (
        np.concatenate([batch.item_ids for batch in batches]),
        np.concatenate([batch.vectors for batch in batches]),
    )


@pytest.fixture(scope="module")
def user_features(cluster: Cluster) -> list[dict[str, Any]]:
    encoder = QueryEncoder.load(cluster.generation / QUERY_ENCODER_FOLDER)
    kinds = {feature["name"]: feature["kind"] for feature in encoder.features}
    return query_features(cluster.dataset, kinds, np.arange(5), ("train", "val"))


def exact(queries: FloatArray, corpus: tuple[IdArray, FloatArray], k: int) -> Ranked:
    """The answer of the slow way."""
    item_ids, vectors = corpus
    return brute_force(normalise(queries), vectors, item_ids, k, Metric.COSINE)


@pytest.mark.parametrize("k", [1, 10, 100, 1000])
def test_vectors_over_msgpack_equal_brute_force(
    client: Client, corpus: tuple[IdArray, FloatArray], k: int
) -> None:
    queries = corpus[1][:3] + np.float32(0.05)
    answer = client.search(vectors=queries, k=k)
    assert_same_answers(Ranked(answer.ids, answer.scores), exact(queries, corpus, k))
    assert answer.coverage.rows_answered == answer.coverage.rows_asked == NUM_ITEMS
    assert answer.coverage.shards_answered == answer.coverage.shards_asked == 3
    assert answer.coverage.degraded == ()


def test_recall_is_watched_and_status_says_it(
    cluster: Cluster, client: Client, corpus: tuple[IdArray, FloatArray]
) -> None:
    """This index answers exactly, and an exact search says the same."""
    queries = corpus[1][:4] + np.float32(0.05)
    found = client.search(vectors=queries, k=20, exact=True)
    assert_same_answers(Ranked(found.ids, found.scores), exact(queries, corpus, 20))
    deadline = time.monotonic() + 15
    while (quality := client.status()["quality"]) is None or quality["queries"] < 3:
        assert time.monotonic() < deadline, "no query was watched"
        client.search(vectors=queries[:1] + np.random.default_rng().random(1), k=10)
        time.sleep(0.05)
    assert quality["generation"] == cluster.endpoint.generation
    assert quality["recall"] == 1.0
    report = asked(controller().report.remote(), timeout_s=10)
    healths = [(each["shard"], each["rows"], each["unseen"]) for each in report["health"]]
    assert [shard for shard, _, _ in healths] == [0, 1, 2]
    assert sum(rows for _, rows, _ in healths) == NUM_ITEMS
    assert all(each["imbalance"] >= 1 for each in report["health"])


def test_vectors_over_json_equal_brute_force(
    cluster: Cluster, corpus: tuple[IdArray, FloatArray]
) -> None:
    vectors = corpus[1]
    body = orjson.dumps({"vectors": vectors[:2].tolist(), "k": 5})
    response = httpx.post(
        f"{cluster.endpoint.url}/v1/search",
        content=body,
        headers=[*JSON, ("x-request-id", "mine-17"), *cluster.endpoint.address.headers],
    )
    assert response.status_code == 200
    assert response.headers["x-request-id"] == "mine-17"
    answer = response.json()
    assert answer["request_id"] == "mine-17"
    assert answer["generation"] == cluster.endpoint.generation
    found = Ranked(np.array(answer["ids"]), np.array(answer["scores"], dtype=np.float32))
    assert_same_answers(found, exact(vectors[:2], corpus, 5))


def test_features_are_encoded_by_the_query_tower(
    client: Client,
    cluster: Cluster,
    corpus: tuple[IdArray, FloatArray],
    user_features: list[dict[str, Any]],
) -> None:
    encoder = QueryEncoder.load(cluster.generation / QUERY_ENCODER_FOLDER)
    answer = client.search(features=user_features, k=50)
    expected = exact(encoder.encode(user_features), corpus, 50)
    assert_same_answers(Ranked(answer.ids, answer.scores), expected)
    assert answer.model_version == encoder.model_version


def test_item_to_item_leaves_the_item_itself_out(
    client: Client, corpus: tuple[IdArray, FloatArray]
) -> None:
    item_ids, vectors = corpus
    answer = client.search(item_ids=[int(item_ids[5]), 10**12], k=10)
    ids, scores = exact(vectors[5:6], corpus, 11)
    kept = ids[0] != item_ids[5]
    np.testing.assert_allclose(answer.scores[0], scores[0][kept], rtol=1e-5)
    assert answer.ids[1].tolist() == [-1] * 10
    assert [(r.query, r.text) for r in answer.reasons] == [(1, "item 1000000000000 not found")]


def test_one_item_can_be_read_back(client: Client, corpus: tuple[IdArray, FloatArray]) -> None:
    item_ids, vectors = corpus
    item = client.item(int(item_ids[1234]))
    np.testing.assert_allclose(item.vector, vectors[1234], atol=1e-6)
    with pytest.raises(NotFound):
        client.item(10**12)


def test_metrics_through_the_cluster_equal_the_exact_ones(client: Client, cluster: Cluster) -> None:
    with StageProgress() as progress:
        through = evaluate_cluster(client, cluster.dataset, "test", (10, 100), progress)
    direct = evaluate_exact(cluster.run, cluster.dataset, ks=(10, 100))
    assert through.users == direct.users == 400
    assert through.means == pytest.approx(direct.means, abs=2e-3)
    assert direct.means["recall@100"] > 0.2, "the model learnt something"


def test_the_recall_budget_ends_at_the_cluster(cluster: Cluster) -> None:
    """The shards loaded here answer what the cluster does, so that HTTP loses nothing."""
    with StageProgress() as progress:
        results = measure_budget(
            cluster.store,
            cluster.dataset,
            "test",
            (10, 100),
            progress,
            generation=None,
            cluster=cluster.endpoint.address,
            max_users=100,
        )
    assert results[0].name == "model"
    here, there = results[-2:]
    assert (here.name, there.name) == ("configured", "cluster")
    assert there.metrics.means == pytest.approx(here.metrics.means, abs=1e-9)
    assert there.agreement == pytest.approx(here.agreement, abs=1e-9)
    with pytest.raises(NotFound):
        measure_budget(
            cluster.store, cluster.dataset, "test", (10,), progress,
            generation=99, cluster=cluster.endpoint.address, max_users=10,
        )  # fmt: skip


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/status", "/docs", "/openapi.json"])
def test_pages_that_people_and_probes_read(cluster: Cluster, path: str) -> None:
    response = httpx.get(cluster.endpoint.url + path, headers=cluster.endpoint.address.headers)
    assert response.status_code == 200
    assert response.content


@pytest.mark.parametrize(
    ("body", "code", "named"),
    [
        (b'{"vectors": [[1, 2, 3]]}', "invalid_input", "vectors"),
        (b'{"vectors": [], "k": 3}', "invalid_input", "vectors"),
        (b'{"item_ids": [1], "k": 0}', "invalid_input", "k"),
        (b'{"item_ids": [1], "k": 2147483648}', "invalid_input", "k"),
        (b'{"item_ids": [1], "kk": 3}', "invalid_input", "kk"),
        (b'{"features": [{"age": "old"}]}', "invalid_input", "features[0]"),
        (b"{", "invalid_input", None),
    ],
)
def test_bad_input_is_a_problem_that_names_the_field(
    cluster: Cluster, body: bytes, code: str, named: str | None
) -> None:
    response = httpx.post(
        f"{cluster.endpoint.url}/v1/search",
        content=body,
        headers=[*JSON, *cluster.endpoint.address.headers],
    )
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["code"] == code
    if named is not None:
        assert problem["field"].startswith(named)


def test_the_cluster_is_whole_after_bad_input(client: Client) -> None:
    with pytest.raises(InvalidInput):
        client.search(vectors=[[float("nan")] * 128], k=1)
    assert client.search(item_ids=[1], k=3).coverage.share == 1.0
