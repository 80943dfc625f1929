"""Who gets in: scopes, headers, and keys that change while the router serves."""

import asyncio
import logging
import os
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from shardline.router.contract import Forbidden, Unauthenticated
from shardline.router.http.api import RequestContext, create_app
from shardline.router.http.api_keys import Key, Keyring, Scope
from shardline.router.http.auth import RELOAD_S, AuthSettings, Guard, needed_scope
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.messages import ReplicaKey, ReplicaRoute, ShardRoute
from shardline.shards.core.metrics import Recorder
from tests.fake_shard import make_table

SEARCH = Key(Scope.SEARCH, "s" * 40)
ADMIN = Key(Scope.ADMIN, "a" * 40)
WRITE = Key(Scope.WRITE, "w" * 40)
SECOND = Key(Scope.SEARCH, "t" * 40)
RING = Keyring.of([SEARCH, WRITE, ADMIN])
ROUTES = [
    ("GET", "/", None),
    ("HEAD", "/docs", None),
    ("GET", "/healthz", None),
    ("GET", "/readyz", None),
    ("GET", "/docs", None),
    ("GET", "/openapi.json", None),
    ("POST", "/v1/search", Scope.SEARCH),
    ("GET", "/v1/items/7", Scope.SEARCH),
    ("GET", "/v1/status", Scope.SEARCH),
    ("HEAD", "/v1/status", Scope.SEARCH),
    ("GET", "/nowhere", Scope.SEARCH),
    ("GET", "/docs/../v1/status", Scope.SEARCH),
    ("GET", "/healthz/", Scope.SEARCH),
    ("PUT", "/v1/items", Scope.WRITE),
    ("DELETE", "/v1/items", Scope.WRITE),
    ("PUT", "/v1/items/", Scope.ADMIN),
    ("DELETE", "/v1/items/7", Scope.ADMIN),
    ("POST", "/v1/items", Scope.ADMIN),
    ("GET", "/v1/lists", Scope.SEARCH),
    ("PUT", "/v1/lists/a", Scope.WRITE),
    ("POST", "/v1/lists/a", Scope.WRITE),
    ("DELETE", "/v1/lists/a/b", Scope.WRITE),
    ("PUT", "/v1/lists", Scope.ADMIN),
    ("PATCH", "/v1/lists/a", Scope.ADMIN),
    ("PUT", "/v1/listsa", Scope.ADMIN),
    ("PATCH", "/v1/search", Scope.ADMIN),
    ("POST", "/v1/search/", Scope.ADMIN),
    ("POST", "/v1/admin/publish", Scope.ADMIN),
    ("GET", "/v1/admin/generations", Scope.ADMIN),
    ("BREW", "/v1/coffee", Scope.ADMIN),
]


def bearer(key: Key) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), (b"authorization", b"Bearer " + key.secret.encode())]


@pytest.mark.parametrize(("method", "path", "scope"), ROUTES)
def test_what_is_not_listed_as_reading_needs_the_admin_scope(method, path, scope) -> None:
    assert needed_scope(method, path) is scope
    guard = Guard(AuthSettings(keyring=RING))
    guard.check(method, path, bearer(ADMIN))
    if scope is None:
        guard.check(method, path, [])
        return
    with pytest.raises(Unauthenticated):
        guard.check(method, path, [])
    with pytest.raises(Unauthenticated):
        guard.check(method, path, bearer(SECOND))
    for key, may in ((SEARCH, "search"), (WRITE, "search, and write items and lists")):
        if key.scope is scope or scope is Scope.SEARCH:
            guard.check(method, path, bearer(key))
        elif key.scope is not scope and not key.scope.covers(scope):
            expected = f"may only {may}; expected a key of scope {scope}; got scope {key.scope}"
            with pytest.raises(Forbidden, match=expected) as caught:
                guard.check(method, path, bearer(key))
            assert caught.value.scope == scope


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ([], "no such headers"),
        ([b""], "another scheme"),
        ([b"Bearer"], "another scheme"),
        ([b"Bearer "], "another scheme"),
        ([b"Basic " + b"s" * 40], "another scheme"),
        ([b"s" * 40], "another scheme"),
        ([b"Bearer " + b"s" * 40] * 2, "2 such headers"),
    ],
)
def test_headers_that_carry_no_key(values: list[bytes], got: str) -> None:
    headers = [(b"authorization", value) for value in values]
    with pytest.raises(Unauthenticated, match=got):
        Guard(AuthSettings(keyring=RING)).check("GET", "/v1/status", headers)


@pytest.mark.parametrize(
    "value", [b"bearer " + b"s" * 40, b"BEARER   " + b"s" * 40, b"Bearer " + b"s" * 40 + b" "]
)
def test_the_scheme_is_read_as_http_says(value: bytes) -> None:
    Guard(AuthSettings(keyring=RING)).check("GET", "/v1/status", [(b"authorization", value)])


@pytest.mark.parametrize("key", [b"\xff" * 40, b"s" * 41, b"s" * 39, b"\x00", b"s" * 100_000])
def test_a_wrong_key_is_not_repeated(key: bytes) -> None:
    headers = [(b"authorization", b"Bearer " + key)]
    with pytest.raises(Unauthenticated) as caught:
        Guard(AuthSettings(keyring=RING)).check("GET", "/v1/status", headers)
    assert "ss" not in str(caught.value).replace("missing", "")


def test_without_keys_everybody_gets_in() -> None:
    Guard().check("DELETE", "/v1/items", [])


def test_an_empty_ring_lets_nobody_in() -> None:
    guard = Guard(AuthSettings(keyring=Keyring(())))
    with pytest.raises(Unauthenticated):
        guard.check("GET", "/v1/status", bearer(SEARCH))
    guard.check("GET", "/healthz", [])


def answers(guard: Guard, *requests: tuple[str, str, dict]) -> list[httpx.Response]:
    """The app's answers to (method, path, options); it has no routing table."""

    async def run() -> list[httpx.Response]:
        config = RouterConfig()
        transport = httpx.ASGITransport(app=create_app(SearchService(config, b""), config, guard))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            return [await http.request(m, path, **options) for m, path, options in requests]

    return asyncio.run(run())


def test_401_says_how_to_ask_and_403_what_is_missing() -> None:
    search = {"authorization": f"Bearer {SEARCH.secret}"}
    admin = {"authorization": f"Bearer {ADMIN.secret}"}
    none, wrong, forbidden, in_vain, health, root, searched = answers(
        Guard(AuthSettings(keyring=RING)),
        ("GET", "/v1/status", {}),
        ("POST", "/v1/search", {"headers": {"authorization": "Bearer x"}, "content": b"{}"}),
        ("PUT", "/v1/items", {"headers": search}),
        ("PUT", "/v1/items", {"headers": admin}),
        ("HEAD", "/healthz", {}),
        ("GET", "/", {}),
        ("POST", "/v1/search", {"headers": search, "json": {"item_ids": [1]}}),
    )
    for response in (none, wrong):
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == 'Bearer realm="shardline"'
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert (problem["code"], problem["field"]) == ("unauthenticated", "Authorization")
        assert problem["request_id"] == response.headers["x-request-id"]
    assert forbidden.status_code == 403
    assert 'error="insufficient_scope", scope="write"' in forbidden.headers["www-authenticate"]
    assert forbidden.json()["code"] == "forbidden"
    assert in_vain.status_code == 415, "let in, and there is no body"
    assert health.status_code == 200
    assert (root.status_code, root.headers["location"]) == (307, "/docs")
    assert searched.status_code == 503, "let in, and there is no routing table"


async def test_a_stranger_is_turned_away_before_the_body_is_read_and_takes_no_place() -> None:
    config = RouterConfig(max_in_flight=1)
    service = SearchService(config, b"")
    app = create_app(service, config, Guard(AuthSettings(keyring=RING)))
    scope = {"type": "http", "method": "POST", "path": "/v1/search", "headers": []}
    sent = []

    async def receive():
        raise AssertionError("the body was asked for")

    async def send(message):
        sent.append(message)

    with service.admit():  # no room for another one
        await app(scope, receive, send)
    assert sent[0]["status"] == 401


async def test_websockets_are_refused_before_anything_looks_at_them() -> None:
    async def app(scope, receive, send):
        raise AssertionError("it came through")

    async def receive():
        raise AssertionError("it was read from")

    sent = []

    async def send(message):
        sent.append(message)

    config = RouterConfig()
    outermost = RequestContext(
        app, config, Guard(AuthSettings(keyring=RING)), direct={}, recorder=Recorder()
    )
    bearer = f"Bearer {ADMIN.secret}".encode()
    for headers in ([], [(b"authorization", bearer)]):
        for path in ("/v1/search", "/healthz", "/"):
            scope = {"type": "websocket", "path": path, "headers": headers}
            await outermost(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}] * 6


def write(path: Path, *keys: Key) -> None:
    """Replaces the file, as `shardline keys` does."""
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(f"{key.scope}:{key.secret}\n" for key in keys))
    temporary.chmod(0o600)
    temporary.replace(path)


def known(guard: Guard) -> list[bool]:
    assert guard.keyring is not None
    return [guard.keyring.scope_of(k.secret.encode()) is k.scope for k in (SEARCH, ADMIN, SECOND)]


def test_keys_follow_their_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    write(path, SEARCH)
    guard = Guard(AuthSettings(keyring=RING, key_file=str(path)))
    assert guard.refresh(), "it may have changed since it was read for this router"
    assert known(guard) == [True, False, False]
    assert not guard.refresh()
    write(path, SEARCH, SECOND)
    assert guard.refresh()
    assert known(guard) == [True, False, True]
    write(path, SECOND)
    assert guard.refresh()
    assert known(guard) == [False, False, True]
    write(path)
    assert guard.refresh()
    assert known(guard) == [False, False, False], "a file without keys lets nobody in"
    assert "API keys changed: 2 are good now" in caplog.text
    assert SECOND.secret not in caplog.text


def test_a_file_that_cannot_be_used_changes_nothing_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    write(path, SEARCH)
    guard = Guard(AuthSettings(keyring=RING, key_file=str(path)))
    guard.refresh()
    path.unlink()
    for _ in range(3):
        assert not guard.refresh()
    path.write_text(f"admin:{ADMIN.secret}\n")
    path.chmod(0o644)
    for _ in range(3):
        assert not guard.refresh()
    path.chmod(0o600)
    path.write_text(f"admin:{ADMIN.secret}\nnonsense {SECOND.secret}\n")
    for _ in range(3):
        assert not guard.refresh()
    assert known(guard) == [True, False, False]
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 3
    assert not any(key.secret in caplog.text for key in (SEARCH, ADMIN, SECOND))
    path.write_text(f"admin:{ADMIN.secret}\n")
    assert guard.refresh()
    assert known(guard) == [False, True, False]


def test_following_looks_again_and_again_and_ends_when_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        path = tmp_path / "keys"
        write(path, SEARCH)
        guard = Guard(AuthSettings(keyring=RING, key_file=str(path)))
        following = asyncio.create_task(guard.follow())
        async with asyncio.timeout(10):
            while known(guard) != [True, False, False]:
                await asyncio.sleep(0.001)
            write(path, SECOND)
            os.utime(path, ns=(1, 1))  # even with an older time than before
            while known(guard) != [False, False, True]:
                await asyncio.sleep(0.001)
        following.cancel()
        with pytest.raises(asyncio.CancelledError):
            await following
        for settings in (AuthSettings(keyring=None), AuthSettings(keyring=RING)):
            await asyncio.wait_for(Guard(settings).follow(), 1)

    assert 0 < RELOAD_S <= 2
    monkeypatch.setattr("shardline.router.http.auth.RELOAD_S", 0.002)
    asyncio.run(run())


def test_a_router_that_starts_again_takes_no_key_of_long_ago(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write(path, SECOND)
    guard = Guard(AuthSettings(keyring=RING, key_file=str(path)))
    asyncio.run(guard.begin())
    assert known(guard) == [False, False, True], "what the file says now, not what it said then"

    path.unlink()
    guard = Guard(AuthSettings(keyring=RING, key_file=str(path)))
    asyncio.run(guard.begin())
    assert known(guard) == [False, False, False], "it cannot know which keys are still good"
    write(path, SEARCH)
    assert guard.refresh()
    assert known(guard) == [True, False, False]

    guard = Guard(AuthSettings(keyring=RING))
    asyncio.run(guard.begin())
    assert known(guard)[:2] == [True, True], "without a file there is nothing to read"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket", "20 GiB"])
async def test_keys_are_read_from_regular_files_only_and_a_later_file_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whatever lies where the key file was: a router starts, and takes the next file there is."""
    monkeypatch.chdir(tmp_path)  # the path of a Unix socket must be short
    path = Path("keys")

    def replace_by(kind: str) -> None:
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path, 0o600)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir(0o700)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
            path.chmod(0o600)
        else:
            path.touch(0o600)
            os.truncate(path, 20 << 30)

    write(path, SEARCH)
    guard = Guard(AuthSettings(keyring=RING, key_file=str(path)))
    assert guard.refresh()
    assert guard.warning is None
    replace_by(kind)
    assert not guard.refresh()
    assert known(guard) == [True, False, False], "as they were"
    assert guard.warning is not None
    assert str(path) in guard.warning.text

    started = Guard(AuthSettings(keyring=RING, key_file=str(path)))
    async with asyncio.timeout(5):
        await started.begin()
    assert known(started) == [False, False, False]
    if kind == "folder":
        path.rmdir()
    write(path, SECOND)
    for each in (guard, started):
        assert each.refresh()
        assert known(each) == [False, False, True], "the key taken out is good no longer"
        assert each.warning is None


async def test_a_key_file_on_a_share_that_hangs_stops_no_router_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    write(path, SEARCH)
    monkeypatch.setattr("shardline.router.http.auth.RELOAD_S", 0.002)
    monkeypatch.setattr("shardline.router.http.auth.KEY_FILE_TIMEOUT_S", 0.02)
    answers, stuck, real = threading.Event(), threading.Semaphore(0), Path.stat
    answers.set()

    def stat(self: Path, **options: bool) -> os.stat_result:
        if self == path and not answers.is_set():
            stuck.release()
            answers.wait()
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    running = Guard(AuthSettings(keyring=RING, key_file=str(path)))
    await running.begin()
    assert known(running) == [True, False, False]

    answers.clear()
    try:
        started = Guard(AuthSettings(keyring=RING, key_file=str(path)))
        async with asyncio.timeout(5):
            await started.begin()
        assert known(started) == [False, False, False], "it cannot know which keys are good"
        following = [asyncio.create_task(guard.follow()) for guard in (running, started)]
        async with asyncio.timeout(5):
            while running.warning is None or started.warning is None:
                await asyncio.sleep(0.002)
        assert known(running) == [True, False, False], "as they were"
        assert "no answer for" in running.warning.text
        assert stuck.acquire(timeout=5)
        assert stuck.acquire(timeout=5)
        await asyncio.sleep(0.05)
        assert not stuck.acquire(blocking=False), "one look at a time, however long it takes"
        assert caplog.text.count("no answer for") == 2, "once a minute for each router"
        write(path, SECOND)
    finally:
        answers.set()
    async with asyncio.timeout(5):
        while known(running) != [False, False, True] or known(started) != [False, False, True]:
            await asyncio.sleep(0.002)
        while running.warning or started.warning:
            await asyncio.sleep(0.002)
    for task in following:
        task.cancel()
    await asyncio.gather(*following, return_exceptions=True)


def test_a_router_stops_while_its_key_file_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving the event loop joins the threads of its executor: the look must not be one of them.
    The same for a process that ends."""
    path = tmp_path / "keys"
    write(path, SEARCH)
    monkeypatch.setattr("shardline.router.http.auth.KEY_FILE_TIMEOUT_S", 0.01)
    answers = threading.Event()
    monkeypatch.setattr(Path, "stat", lambda self, **options: answers.wait())
    before = set(threading.enumerate())
    try:
        began = time.monotonic()
        asyncio.run(Guard(AuthSettings(keyring=RING, key_file=str(path))).begin())
        assert time.monotonic() - began < 2
        (left,) = set(threading.enumerate()) - before
        assert left.daemon
    finally:
        answers.set()


def test_status_says_that_keys_may_not_be_those_of_their_file(tmp_path: Path) -> None:
    guard = Guard(AuthSettings(keyring=RING, key_file=str(tmp_path / "keys")))
    guard.refresh()
    (response,) = answers_with_table(guard)
    (warning,) = response.json()["warnings"]
    assert (warning["about"], warning["code"]) == ("api_keys", "not_found")
    assert "keys are as they were before" in warning["text"]


def answers_with_table(guard: Guard) -> list[httpx.Response]:
    """The app's answer to a request for its status, on a table without connections."""

    async def run() -> list[httpx.Response]:
        config = RouterConfig()
        service = SearchService(config, b"", load_encoder=lambda table: None)
        route = ReplicaRoute(key=ReplicaKey(1, 0), epoch=0, address=None)
        await service.apply(make_table([ShardRoute(shard=0, rows=1, replicas=(route,))], 4))
        transport = httpx.ASGITransport(app=create_app(service, config, guard))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            headers = {"authorization": f"Bearer {SEARCH.secret}"}
            found = [await http.get("/v1/status", headers=headers)]
        await service.close()
        return found

    return asyncio.run(run())
