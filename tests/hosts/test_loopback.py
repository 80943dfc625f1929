"""Two hosts whose HTTP is on loopback: served, restarted, and ended from the host that is not the
head."""

import os
import time
from collections.abc import Iterator

import pytest

from tests.chaos.corpus import make_store
from tests.chaos.oracle import Corpus
from tests.hosts.launched import CHECKOUT, Launched, wait_until
from tests.hosts.rig import Host, environment_folders, raised

LOOPBACK = "--set cluster.http_host=127.0.0.1"
# not after the minute for which routers are waited that do not answer
SERVED_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def launched() -> Iterator[Launched]:
    with raised(2, [*environment_folders(), CHECKOUT]) as rig:
        launched = Launched(rig)
        launched.up_by_ssh()
        yield launched


@pytest.fixture(scope="module")
def corpus(launched: Launched) -> Corpus:
    return make_store(launched.rig.store)


@pytest.mark.timeout(600)
def test_loopback_is_served_and_ended_from_a_worker(launched: Launched, corpus: Corpus) -> None:
    head, worker = launched.rig.hosts
    refused = launched.shardline(head, "--set cluster.shard_host=127.0.0.1 serve", check=False)
    assert "cluster.shard_host" in refused.stderr, refused.stderr
    assert not running("ray::Shard", launched)

    began = time.monotonic()
    said = launched.shardline(head, f"{LOOPBACK} serve", timeout_s=200).stderr
    took_s = time.monotonic() - began
    assert took_s < SERVED_WITHIN_S, said
    assert " at http://127.0.0.1:8000  (POST" in said, said
    assert "a host whose router is away answers 503" in said, said
    for host in (head, worker):
        launched.shardline(host, f"{LOOPBACK} query --item {int(corpus.ids[7])} -k 3")
    assert "no restart is under way" in launched.shardline(worker, "restart --stop").stdout
    assert "replaced " in launched.shardline(worker, "restart --rolling").stdout

    (serve_controller,) = running("ray::ServeController", launched)
    os.kill(serve_controller, 9)
    assert "stopped" in launched.shardline(worker, "down").stdout
    assert not running("ray::Shard", launched)
    wait_until(lambda: not running("haproxy", launched), within_s=10, what="no HAProxy left")

    ended = launched.shardline(worker, "down --all").stdout.splitlines()
    assert [line for line in ended if line.startswith("ended Ray on")] == [
        f"ended Ray on {head.address}, the head",
        f"ended Ray on {worker.address}, this host",
    ]
    for host in launched.rig.hosts:
        wait_until(lambda host=host: not host.processes(), within_s=20, what=f"{host.name} empty")


def running(name: str, launched: Launched) -> list[int]:
    """Processes of all hosts whose name begins so."""

    def of(host: Host) -> list[int]:
        found = host.processes().items()
        return [pid for pid, words in found if words[0].rpartition("/")[2].startswith(name)]

    return [pid for host in launched.rig.hosts for pid in of(host)]
