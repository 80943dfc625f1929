"""The chaos test's hostile clients reach a server, and say so when it fails inside."""

import random
import socketserver
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.chaos import hostile
from tests.chaos.hostile import HOSTILE_KINDS, Hostile, Target

LASTS_S = 0.8
ATTACKS = [
    hostile.random_bytes,
    hostile.random_requests,
    hostile.bodies_never_sent,
    hostile.huge_bodies,
    hostile.slow_headers,
    hostile.half_closes,
    hostile.wrong_keys,
    hostile.bombs,
    hostile.never_reading,
    hostile.shard_ports,
]
SILENT = {hostile.bodies_never_sent, hostile.slow_headers, hostile.never_reading}  # read nothing
NO_HTTP = {hostile.shard_ports}


class Broken(socketserver.ThreadingTCPServer):
    """Answers the first bytes of every connection with the same status; counts connections."""

    allow_reuse_address = True
    daemon_threads = False
    block_on_close = True
    request_queue_size = 1024

    def __init__(self, status: int) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.status, self.seen = status, 0


class Answer(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Broken)
        self.server.seen += 1
        self.request.settimeout(2)
        try:
            self.request.recv(65536)
            self.request.sendall(f"HTTP/1.1 {self.server.status} X\r\n\r\n".encode())
            while self.request.recv(1 << 20):  # else unread data would reset the answer away
                pass
        except OSError:
            return


@contextmanager
def serving(status: int) -> Iterator[Broken]:
    with Broken(status) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def attacked(attack: hostile.Attack, status: int) -> tuple[int, list[str]]:
    """Connections that a server saw which answers ``status``, and what the attack said of it."""
    with serving(status) as server:
        host, port = server.server_address[:2]
        target = Target(
            address=(str(host), int(port)),
            key="k" * 40,
            shards=((str(host), int(port)),),
            stop=threading.Event(),
        )
        fault = Hostile(target, attack, random.Random(1), held_s=LASTS_S)
        fault.inject()
        target.stop.wait(LASTS_S)
        fault.undo()
        return server.seen, [finding.text for finding in fault.findings]


@pytest.fixture(scope="module")
def found() -> dict[int, dict[str, tuple[int, list[str]]]]:
    """All attacks at once, on servers that answer 500, 400 and 401."""
    results: dict[int, dict[str, tuple[int, list[str]]]] = defaultdict(dict)

    def run(attack: hostile.Attack, status: int) -> None:
        results[status][attack.__name__] = attacked(attack, status)

    # what a right server says: 401 to unknown keys and to strangers, 400 to the rest
    right = {attack: 401 if attack is hostile.wrong_keys else 400 for attack in ATTACKS}
    threads = [
        threading.Thread(target=run, args=(attack, status))
        for attack in ATTACKS
        for status in (500, right[attack])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_kinds_are_tested_here() -> None:
    assert len(HOSTILE_KINDS) == len(ATTACKS)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_an_attack_reaches_its_server_and_tells_of_internal_errors(found, attack) -> None:
    seen, texts = found[500][attack.__name__]
    assert seen > 0
    assert bool(texts) == (attack not in SILENT | NO_HTTP)
    assert all("HTTP 500" in text for text in texts)
    right = found[401 if attack is hostile.wrong_keys else 400][attack.__name__]
    assert right[0] > 0
    assert right[1] == []
