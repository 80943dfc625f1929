"""A peer that proves itself, asks for much and reads nothing: what a shard keeps for it.

The shard is a process of its own, so that the peak of its resident memory can be looked at.
"""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from shardline.shards.core.messages import (
    AttributesReply,
    AttributesRequest,
    ErrorReply,
    FetchReply,
    FetchRequest,
    SearchReply,
    SearchRequest,
)
from shardline.shards.server.session import MAX_KEPT_BYTES
from shardline.shards.wire.frames import Message, encode_frame
from tests.unit.test_server import Client
from tests.unread_server import DIM, ROWS, SECRET

CLAIM_BYTES = 128 << 20  # docs/SECURITY.md
FLOOD_BYTES = 24 << 20  # that the peer would send, if it could
QUIET_S = 0.7  # a shard that takes nothing for so long reads no more


@dataclass(frozen=True)
class Served:
    pid: int
    port: int

    def memory(self, name: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@pytest.fixture
def served() -> Iterator[Served]:
    command = [sys.executable, "-m", "tests.unread_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Served(process.pid, int(process.stdout.readline()))
        process.stdin.close()


def search(queries: int, k: int) -> SearchRequest:
    vectors = np.random.default_rng(queries).random((queries, DIM), np.float32)
    return SearchRequest(queries=vectors, k=k, timeout_ms=60_000)


ASKED = {
    "a result of each of many": (search(1, 2048), SearchReply),
    "many results of many": (search(300, 2048), SearchReply),
    "vectors": (FetchRequest(item_ids=np.arange(ROWS), timeout_ms=60_000), FetchReply),
    "attributes": (
        AttributesRequest(item_ids=np.arange(ROWS), names=("text",), timeout_ms=60_000),
        AttributesReply,
    ),
    "attributes of one": (
        AttributesRequest(item_ids=np.zeros(4000, np.int64), names=("text",), timeout_ms=60_000),
        AttributesReply,
    ),
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_peer_that_asks_and_does_not_read_stops_itself(served, asked) -> None:
    message, kind = ASKED[asked]
    frame = encode_frame(7, message)
    address = "127.0.0.1", served.port
    with closing(Client(address, SECRET)) as good:
        good.ask(search(1, 10))
        with closing(Client(address, SECRET)) as deaf:
            served.forget_peak()
            before = served.memory("VmRSS")
            sent = flood(deaf.socket, frame, count=max(3, FLOOD_BYTES // len(frame)))
            assert sent > 3 * len(frame) or len(frame) > MAX_KEPT_BYTES
            assert isinstance(answer_to(good), SearchReply)
            # who reads after all gets what was asked for, or is told that the queue was full
            answers = (type(deaf.receive()[1]) for _ in range(100_000))
            assert next(each for each in answers if each is not ErrorReply) is kind
            grown = served.memory("VmHWM") - before
            assert grown <= CLAIM_BYTES, f"{grown >> 20} MiB"


def answer_to(client: Client) -> Message:
    """The queue is everybody's: while it is full, others are refused."""
    for _ in range(200):
        answer = client.ask(search(1, 10))
        if not isinstance(answer, ErrorReply):
            break
        time.sleep(0.02)
    return answer


def flood(peer: socket.socket, frame: bytes, count: int) -> int:
    """Sends the frame again and again until nothing is taken any more; bytes sent."""
    peer.setblocking(False)
    data, sent, moved_at = memoryview(frame * count), 0, time.monotonic()
    while sent < len(data) and time.monotonic() < moved_at + QUIET_S:
        try:
            sent += peer.send(data[sent : sent + (1 << 16)])
            moved_at = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
    peer.settimeout(10.0)
    return sent
