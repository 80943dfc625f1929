"""The client against a real HTTP server in a thread: answers as numpy, problems as errors."""

import socket

import httpx
import numpy as np
import pytest

from shardline.router.client import Client, as_error
from shardline.router.http.api_keys import Key, Keyring, Scope
from shardline.router.http.auth import AuthSettings, Guard
from shardline.router.http.problems import Forbidden, Unauthenticated
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import (
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    Overloaded,
    ShardlineError,
    Unavailable,
    VersionMismatch,
)
from shardline.shards.core.messages import SearchParams
from tests.fake_encoder import FakeEncoder
from tests.fake_shard import brute_force, make_rows
from tests.live_router import DIM, running_router

CONFIG = RouterConfig(default_k=10, max_k=50)


KEY = "k" * 43
GUARD = Guard(AuthSettings(keyring=Keyring.of([Key(Scope.SEARCH, KEY)])))


@pytest.fixture(scope="module")
def client():
    with running_router(CONFIG, GUARD) as router, Client(router.url, key=KEY) as client:
        yield client


def test_keys(client):
    url = str(client._http.base_url)
    with Client(url) as stranger, pytest.raises(Unauthenticated, match="a key is needed"):
        stranger.status()
    with Client(url, key="w" * 43) as stranger, pytest.raises(Unauthenticated, match="not one of"):
        stranger.search(item_ids=[1])
    with Client(url) as stranger:
        assert stranger.ready(), "probes need no key"
    with pytest.raises(Forbidden, match="may only search"):
        client._send("PUT", "/v1/items")


@pytest.mark.parametrize("key", ["", "k" * 31, "k" * 40 + "\r\nx: y", "k" * 40 + " ", "é" * 40])
def test_what_no_key_looks_like_is_not_sent(key):
    with pytest.raises(InvalidInput, match="not an API key") as caught:
        Client("http://127.0.0.1:9", key=key)
    assert "kk" not in str(caught.value)


def test_vectors(client):
    ids, vectors = make_rows(60, DIM)
    answer = client.search(vectors=vectors[:3].tolist(), k=100 // 2)
    expected_ids, expected_scores = brute_force(vectors[:3], ids, vectors, 50)
    np.testing.assert_array_equal(answer.ids, expected_ids)
    np.testing.assert_array_equal(answer.scores, expected_scores)
    assert (answer.ids.dtype, answer.scores.dtype) == (np.int64, np.float32)
    assert (answer.generation, answer.model_version) == (1, "m1")
    assert answer.coverage.share == 1.0
    assert answer.took_ms > 0
    assert answer.request_id


def test_items_and_their_reasons_are_padded(client):
    answer = client.search(item_ids=[5, 999], params=SearchParams(nprobe=3))
    assert answer.ids.shape == (2, 10)
    assert 5 not in answer.ids[0]
    assert answer.ids[1].tolist() == [-1] * 10
    assert np.isneginf(answer.scores[1]).all()
    assert answer.reasons == {1: "item 999 not found"}


def test_features(client):
    answer = client.search(features=[{"slope": 0.5}], k=1, timeout_ms=900, min_coverage=1)
    ids, vectors = make_rows(60, DIM)
    expected, _ = brute_force(FakeEncoder(DIM).encode([{"slope": 0.5}]), ids, vectors, 1)
    assert answer.ids.tolist() == expected.tolist()


def test_item_status_health(client):
    _, vectors = make_rows(60, DIM)
    item = client.item(16)
    np.testing.assert_array_equal(item.vector, vectors[16])
    assert (item.shard, item.vector.dtype) == (1, np.float32)
    assert client.status()["rows"] == 60
    assert client.healthy()
    assert client.ready()


def test_problems_come_back_as_errors(client):
    with pytest.raises(InvalidInput) as caught:
        client.search(vectors=[[1.0] * 7])
    assert (caught.value.field, caught.value.expected, caught.value.got) == ("vectors", "8", "7")
    with pytest.raises(InvalidInput, match="exactly one kind"):
        client.search()
    with pytest.raises(NotFound):
        client.item(60)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_input", InvalidInput),
        ("payload_too_large", InvalidInput),
        ("version_mismatch", VersionMismatch),
        ("unavailable", Unavailable),
        ("overloaded", Overloaded),
        ("deadline_exceeded", DeadlineExceeded),
        ("internal", ShardlineError),
        ("from_a_newer_server", ShardlineError),
    ],
)
def test_every_code_has_its_error(code, kind):
    problem = {"code": code, "detail": "what", "request_id": "r7", "field": "f"}
    response = httpx.Response(
        500, json=problem, headers={"content-type": "application/problem+json"}
    )
    error = as_error(response)
    assert isinstance(error, kind)
    assert (error.message, error.field) == ("what", "f")
    if kind is ShardlineError:
        assert "r7" in error.hint


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}"])
def test_an_answer_of_somebody_else_is_unavailable(body):
    for content_type in ("text/html", "application/problem+json"):
        response = httpx.Response(502, content=body, headers={"content-type": content_type})
        error = as_error(response)
        assert isinstance(error, Unavailable)
        assert error.got == "HTTP 502"


def test_a_server_that_is_not_there_is_unavailable_with_a_hint():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(Unavailable, match="cannot reach") as caught:
            client.search(item_ids=[1])
        assert "is the cluster up?" in caught.value.hint
        assert not client.healthy()
        assert not client.ready()


def test_a_server_that_does_not_answer_is_a_missed_deadline():
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.05) as client,
        pytest.raises(DeadlineExceeded),
    ):
        client.status()
