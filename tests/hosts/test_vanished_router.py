"""HAProxy and a router on a host that vanishes: no Ray, a real network."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.haproxy_in_front import Front, haproxy_before
from tests.hosts.launched import wait_until
from tests.hosts.rig import Host, environment_folders, raised

PORT = 30000
ANSWERED_S = 5.0  # far below the router's own time limit, 12 s
# answers GET /slow after a minute, anything else at once
SERVER = f"""
import http.server, pathlib, time
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == '/slow':
            pathlib.Path.home().joinpath('asked').touch()
            time.sleep(60)
        self.send_response(200)
        self.send_header('Content-Length', '0')
        self.end_headers()
http.server.ThreadingHTTPServer(('0.0.0.0', {PORT}), Answer).serve_forever()
"""


@pytest.fixture(scope="module")
def other() -> Iterator[Host]:
    """A host with a server on it; this machine's HAProxy is to have none of its own."""
    with raised(1, environment_folders()) as rig:
        host = rig.hosts[0]
        with subprocess.Popen(
            host.entering(sys.executable, "-c", SERVER),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            yield host
            process.kill()


def status(front: Front, path: str) -> tuple[int, float]:
    """Of the answer to a GET, and the moment at which it came."""
    connection = HTTPConnection("127.0.0.1", front.port, timeout=30)
    connection.request("GET", path, headers={"authorization": "Bearer k"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, time.monotonic()


def test_what_a_vanished_host_was_asked_is_answered_in_time(other: Host, tmp_path: Path) -> None:
    with (
        haproxy_before(tmp_path, [], others=[PORT], other_host=other.address, inter="1s") as front,
        ThreadPoolExecutor(1) as pool,
    ):
        wait_until(lambda: status(front, "/v1/status")[0] == 200, within_s=10, what="an answer")
        under_way = pool.submit(status, front, "/slow")
        wait_until((other.home / "asked").exists, within_s=10, what="the request has arrived")
        other.cut()
        began = time.monotonic()
        asked_later, later_at = status(front, "/v1/status")
        asked_before, before_at = under_way.result()
        other.mend()
        assert asked_before in (502, 503, 504)
        assert asked_later in (502, 503, 504)
        assert before_at - began < ANSWERED_S
        assert later_at - began < ANSWERED_S
        wait_until(lambda: status(front, "/v1/status")[0] == 200, within_s=10, what="back")
