"""Both clients against a real HTTP server in a thread: answers as numpy, problems as errors."""

import inspect
import json
import socket

import numpy as np
import pytest

from shardline.router.client.async_client import AsyncClient
from shardline.router.client.calls import as_error
from shardline.router.client.http1 import Response
from shardline.router.client.retries import Retry
from shardline.router.client.sync_client import Client
from shardline.router.contract import Unauthenticated
from shardline.router.http.api_keys import Key, Keyring, Scope
from shardline.router.http.auth import AuthSettings, Guard
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import (
    DeadlineExceeded,
    DeltaFull,
    EncoderUnavailable,
    InvalidInput,
    NotFound,
    NotPrimary,
    Overloaded,
    ReadOnly,
    ShardlineError,
    StoreFull,
    Unavailable,
    VersionMismatch,
)
from shardline.shards.core.messages import SearchParams
from tests.client_pair import KINDS
from tests.fake_encoder import FakeEncoder
from tests.fake_shard import brute_force, make_rows
from tests.live_router import DIM, running_router

CONFIG = RouterConfig(default_k=10, max_k=50, default_timeout_ms=10_000)
KEY = "k" * 43
GUARD = Guard(AuthSettings(keyring=Keyring.of([Key(Scope.SEARCH, KEY)])))
ONCE = Retry(attempts=1)


@pytest.fixture(scope="module")
def url():
    with running_router(CONFIG, GUARD) as router:
        yield router.url


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def client(url, kind):
    with kind(url, key=KEY) as client:
        yield client


def test_both_have_the_same_verbs_and_arguments():
    verbs = {name for name in vars(Client) if not name.startswith("_")}
    assert verbs == {name for name in vars(AsyncClient) if not name.startswith("_")}
    asked = {"search", "item", "status", "healthy", "ready"}
    writing = {"upsert", "delete", "put_list", "change_list", "delete_list", "send_events"}
    assert verbs == asked | writing | {"get_list", "lists", "close"}
    for verb in verbs:
        ours, twins = (inspect.signature(getattr(each, verb)) for each in (Client, AsyncClient))
        assert ours.parameters == twins.parameters
        # of names it is an iterator, which the other one awaits
        assert verb == "lists" or ours.return_annotation == twins.return_annotation


def test_keys(url, kind):
    with kind(url) as stranger, pytest.raises(Unauthenticated, match="a key is needed"):
        stranger.status()
    with kind(url, key="w" * 43) as stranger, pytest.raises(Unauthenticated, match="not one of"):
        stranger.search(item_ids=[1])
    with kind(url) as stranger:
        assert stranger.ready(), "probes need no key"


@pytest.mark.parametrize("key", ["", "k" * 31, "k" * 40 + "\r\nx: y", "k" * 40 + " ", "é" * 40])
def test_what_no_key_looks_like_is_not_sent(key):
    with pytest.raises(InvalidInput, match="not an API key") as caught:
        Client("http://127.0.0.1:9", key=key)
    assert "kk" not in str(caught.value)


def test_a_key_shows_in_no_repr(url):
    with Client(url, key=KEY) as client:
        assert KEY not in repr(client._server)


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
    assert [(reason.query, reason.text) for reason in answer.reasons] == [(1, "item 999 not found")]


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
    with pytest.raises(InvalidInput, match=r"k: out of range; expected 1 to 50"):
        client.search(item_ids=[1], k=51)
    with pytest.raises(NotFound):
        client.item(60)
    with pytest.raises(InvalidInput, match="item_id"):
        client.item("seven")
    with pytest.raises(InvalidInput, match="timeout_ms: out of range"):
        client.item(16, timeout_ms=0)
    with pytest.raises(InvalidInput, match="timeout_ms: not to be sent"):
        client.item(16, timeout_ms="soon")
    assert client.item(16, timeout_ms=5000).item_id == 16


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_input", InvalidInput),
        ("payload_too_large", InvalidInput),
        ("unauthenticated", Unauthenticated),
        ("version_mismatch", VersionMismatch),
        ("unavailable", Unavailable),
        ("encoder_unavailable", EncoderUnavailable),
        ("delta_full", DeltaFull),
        ("not_primary", NotPrimary),
        ("read_only", ReadOnly),
        ("store_full", StoreFull),
        ("overloaded", Overloaded),
        ("deadline_exceeded", DeadlineExceeded),
        ("internal", ShardlineError),
        ("from_a_newer_server", ShardlineError),
    ],
)
def test_every_code_has_its_error(code, kind):
    problem = {"code": code, "detail": "what", "request_id": "r7", "field": "f", "hint": "h"}
    problem |= {"expected": "e", "got": "g"}
    headers = {b"content-type": b"application/problem+json"}
    error = as_error(Response(500, headers, json.dumps(problem).encode(), keep_alive=True))
    assert isinstance(error, kind)
    assert (error.message, error.field, error.expected, error.got) == ("what", "f", "e", "g")
    assert "r7" in error.hint if kind is ShardlineError else error.hint == "h"


STRANGE = [b'{"code": [1], "detail": "x"}', b'{"code": "x", "detail": null}', b"[" * 100_000]


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", *STRANGE])
@pytest.mark.parametrize("content_type", [b"text/html", b"application/problem+json"])
def test_an_answer_of_somebody_else_is_unavailable(body, content_type):
    error = as_error(Response(502, {b"content-type": content_type}, body, keep_alive=True))
    assert isinstance(error, Unavailable)
    assert error.got == "HTTP 502"


def test_the_details_of_a_problem_may_be_of_any_type():
    problem = {"code": "invalid_input", "detail": "what", "field": 3, "expected": [1], "got": None}
    headers = {b"content-type": b"application/problem+json"}
    error = as_error(Response(400, headers, json.dumps(problem).encode(), keep_alive=True))
    assert str(error) == str(InvalidInput("what", field="3", expected="[1]"))


@pytest.mark.parametrize("timeout", [0, -1, 1e10, float("inf"), float("nan")])
def test_a_timeout_that_no_socket_takes_is_refused(kind, timeout):
    with pytest.raises(InvalidInput, match="timeout"):
        kind("http://127.0.0.1:1", timeout=timeout)


def test_a_server_that_is_not_there_is_unavailable_with_a_hint(kind):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with kind(f"http://127.0.0.1:{port}", retry=ONCE) as client:
        with pytest.raises(Unavailable, match="cannot reach") as caught:
            client.search(item_ids=[1])
        assert "is the cluster up?" in caught.value.hint
        assert not client.healthy()
        assert not client.ready()
