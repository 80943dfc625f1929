"""Bodies that do not come, at the router itself, as HAProxy or a stranger on its port meets it."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from shardline.router.http.api_keys import Key, Keyring, Scope
from shardline.router.http.auth import AuthSettings, Guard
from shardline.router.http.body import LINGER_S
from shardline.router.router_config import RouterConfig
from tests.live_router import LiveRouter, running_router

PLACES = 4
KEY = Key(Scope.SEARCH, "k" * 40)
GOOD = {"authorization": f"Bearer {KEY.secret}"}
QUERY = {"item_ids": [1], "k": 3, "timeout_ms": 9000}
MIB = 1 << 20


@pytest.fixture(scope="module")
def router() -> Iterator[LiveRouter]:
    guard = Guard(AuthSettings(keyring=Keyring.of([KEY])))
    with running_router(RouterConfig(max_in_flight=PLACES), guard) as router:
        yield router


def begun(router: LiveRouter, path: str, key: str, length: int, body: bytes) -> socket.socket:
    opened = socket.create_connection(("127.0.0.1", int(router.url.rpartition(":")[2])), 10)
    lines = (f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}")
    lines = (*lines, "Content-Type: application/json", f"Content-Length: {length}", "\r\n")
    opened.sendall("\r\n".join(lines).encode() + body)
    return opened


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/v1/search", "w" * 40, 401),
        ("/v1/admin/x", KEY.secret, 403),
        ("/healthz", KEY.secret, 405),
        ("/docs/none", "w" * 40, 401),
    ],
)
def test_an_answer_to_a_body_that_does_not_come_ends_the_connection(
    router: LiveRouter, path: str, key: str, status: int
) -> None:
    started = time.monotonic()
    with begun(router, path, key, MIB, b"{") as opened:
        answer = b""
        while part := opened.recv(4096):
            if not answer:
                assert time.monotonic() - started < LINGER_S, "the answer itself comes at once"
            answer += part
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert time.monotonic() - started < LINGER_S + 3


def test_a_refusal_reaches_who_is_still_sending(router: LiveRouter) -> None:
    for size in (100, 100_000, 20 * MIB):
        with httpx.Client(base_url=router.url, timeout=30) as http:
            for _ in range(3):
                assert http.post("/v1/search", content=b" " * size).status_code == 401


def test_bodies_under_way_take_no_place_of_work_and_have_as_many_of_their_own(
    router: LiveRouter,
) -> None:
    with ExitStack() as stack:
        slow = [
            stack.enter_context(begun(router, "/v1/search", KEY.secret, MIB, b"{" * 1000))
            for _ in range(PLACES)
        ]
        deadline = time.monotonic() + 5
        while router.service.arriving.taken < PLACES and time.monotonic() < deadline:
            time.sleep(0.01)
        assert router.service.arriving.taken == PLACES
        for _ in range(3):
            assert httpx.post(f"{router.url}/v1/search", json=QUERY, headers=GOOD).is_success
        with begun(router, "/v1/search", KEY.secret, MIB, b"{" * 1000) as one_more:
            assert one_more.recv(4096).startswith(b"HTTP/1.1 429 ")
        for each in slow:
            each.close()
    deadline = time.monotonic() + 5
    while router.service.arriving.taken and time.monotonic() < deadline:
        time.sleep(0.01)
    assert router.service.arriving.taken == 0, "who leaves gives the place back"
