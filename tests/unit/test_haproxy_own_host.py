"""HAProxy in front of routers on several hosts: its own host's first, the others when that is away.

The other host is another address of the loopback interface.
"""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shardline.router.serve.haproxy import CONNECT_TIMEOUT_MS, corrected
from tests.haproxy_in_front import LIMITS, OTHER_HOST, Front, haproxy_before, rendered

OWN, OTHER = "own", "other"
ASKED = 30
SOON_S = 0.4  # no time limit of HAProxy's was waited for


@contextmanager
def server(name: str, host: str, port: int | None = None) -> Iterator[int]:
    """Answers every GET with its name, and keeps no connection; the port."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = name.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *parts: object) -> None:
            """Nothing on the terminal."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # of connections: more are lost without a word

    with Server((host, port or 0), Answer) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield listening.server_address[1]
        finally:
            listening.shutdown()
            thread.join()


@contextmanager
def vanished(host: str) -> Iterator[int]:
    """A port that takes no connection and refuses none: what is sent there is lost."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind((host, 0))
        listening.listen(0)
        while True:
            filling = stack.enter_context(socket.socket())
            filling.settimeout(0.2)
            try:
                filling.connect(listening.getsockname())
            except TimeoutError:
                break
        yield listening.getsockname()[1]


def asked(front: Front, count: int = ASKED) -> list[tuple[str, float]]:
    """Who answered each of so many requests, and after how many seconds."""
    found = []
    for _ in range(count):
        began = time.monotonic()
        connection = HTTPConnection("127.0.0.1", front.port, timeout=20)
        connection.request("GET", "/v1/status", headers={"authorization": "Bearer k"})
        answer = connection.getresponse()
        who = answer.read().decode() if answer.status == 200 else f"HTTP {answer.status}"
        connection.close()
        found.append((who, time.monotonic() - began))
    return found


def test_the_own_hosts_router_is_asked_alone(tmp_path: Path) -> None:
    with (
        server(OWN, "127.0.0.1") as own,
        server(OTHER, OTHER_HOST) as other,
        haproxy_before(tmp_path, [own], others=[other]) as front,
    ):
        assert {name for name, _ in asked(front)} == {OWN}


@pytest.mark.parametrize("inter", ["1s", "100s"], ids=["found down", "not looked at"])
def test_one_that_ends_costs_another_try_until_it_is_back(tmp_path: Path, inter: str) -> None:
    """Also where no check finds it down: an HAProxy that ends after a reload makes none."""
    with server(OTHER, OTHER_HOST) as other, ExitStack() as ending:
        own = ending.enter_context(server(OWN, "127.0.0.1"))
        with haproxy_before(tmp_path, [own], others=[other], inter=inter) as front:
            assert asked(front, 1)[0][0] == OWN
            ending.close()
            with ThreadPoolExecutor(ASKED) as pool:
                first = list(pool.map(lambda _: asked(front, 1)[0], range(ASKED)))
            assert {name for name, _ in first} == {OTHER}
            assert max(seconds for _, seconds in first) < SOON_S
            names, seconds = zip(*asked(front), strict=True)
            assert set(names) == {OTHER}
            assert max(seconds) < SOON_S, "it is left alone"
            with server(OWN, "127.0.0.1", own):
                deadline = time.monotonic() + 5
                while asked(front, 1)[0][0] != OWN:
                    assert time.monotonic() < deadline


def test_one_that_has_vanished_costs_another_try_elsewhere(tmp_path: Path) -> None:
    with (
        vanished(OTHER_HOST) as gone,
        server(OTHER, OTHER_HOST) as other,
        haproxy_before(tmp_path, [], others=[gone, other], inter="1s") as front,
    ):
        names, seconds = zip(*asked(front), strict=True)
    assert set(names) == {OTHER}
    assert SOON_S < max(seconds) < 2 * CONNECT_TIMEOUT_MS / 1000 + SOON_S


def test_without_a_router_of_its_own_all_others_are_asked_alike(tmp_path: Path) -> None:
    with (
        server("one", OTHER_HOST) as one,
        server("two", OTHER_HOST) as two,
        haproxy_before(tmp_path, [], others=[one, two]) as front,
    ):
        names = [name for name, _ in asked(front)]
    assert set(names) == {"one", "two"}


@pytest.mark.parametrize(
    ("own", "others", "places"), [((1,), (2, 3), 1), ((1, 2), (), 2), ((), (2, 3), 2)]
)
def test_as_much_is_taken_as_the_routers_that_are_asked_can_do(
    tmp_path: Path, own: tuple[int, ...], others: tuple[int, ...], places: int
) -> None:
    text = corrected(rendered(tmp_path, 18000, own, others), LIMITS)
    assert f"be_conn(http-shardline) ge {places * LIMITS.max_in_flight} " in text
    is_split = bool(own and others)
    assert text.count("    use-server ") == 2 * len(own) * is_split, "of long bodies, too"
    assert " backup" not in text
    assert text.count(" on-error fastinter") == len(own) + len(others)
    assert "on-error mark-down" not in text
    assert text.count(" tcp-ut 2000ms") == 2 * len(others)
    assert text.count(" on-marked-down shutdown-sessions") == 2 * len(own)
    assert text.count("    option srvtcpka\n") == (2 if others else 0)
    assert text.count("timeout connect ") == 1
