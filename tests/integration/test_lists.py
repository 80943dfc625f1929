"""Named lists in a real cluster: all routers go by a change in time, none is lost with a router."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest

from shardline.router.client.sync_client import Client
from shardline.router.contract import Forbidden
from shardline.router.http.api_keys import Scope
from shardline.router.lists.list_paths import LISTS_FOLDER
from shardline.router.lists.list_store import ListStore
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import Unavailable
from tests.integration.conftest import Cluster

FRESH_S = RouterConfig().lists_fresh_ms / 1000
PATIENCE_S = 60.0


@pytest.fixture
def writer(cluster: Cluster):
    with cluster.endpoint.address_for(Scope.WRITE).client() as client:
        yield client


def fresh_answers(cluster: Cluster, count: int, ask):
    """What ``ask`` finds over new connections, which HAProxy deals out to all routers."""

    def one(_: int):
        with cluster.endpoint.address_for(Scope.WRITE).client() as client:
            return ask(client)

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(one, range(count)))


def test_every_router_goes_by_a_change_in_time(cluster: Cluster, writer: Client) -> None:
    best = writer.search(item_ids=[7], k=20).ids[0].tolist()
    name = "integration:seen"

    def search(client: Client) -> list[int]:
        return client.search(item_ids=[7], k=10, exclude_lists=[name]).ids[0].tolist()

    for number in range(1, 6):
        writer.change_list(name, add=best[:number])
        threading.Event().wait(FRESH_S)  # what is promised, and not more
        lists = fresh_answers(cluster, 12, lambda client: client.get_list(name).item_ids.tolist())
        assert lists == [sorted(best[:number])] * 12
        found = fresh_answers(cluster, 12, search)
        assert found == [best[number : number + 10]] * 12
    writer.delete_list(name)
    threading.Event().wait(FRESH_S)
    found = fresh_answers(cluster, 6, search)
    assert found == [best[:10]] * 6


def routers() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "ServeReplica" in " ".join(process.cmdline())
    ]


def test_a_router_that_is_killed_loses_no_acknowledged_change(cluster: Cluster) -> None:
    name, acknowledged, stop = "integration:killed", [], threading.Event()

    def write(first: int) -> None:
        with cluster.endpoint.address_for(Scope.WRITE).client() as client:
            number = first
            while not stop.is_set():
                # a change that nobody answers, because no other router is there, is sent again
                with suppress(Unavailable):
                    client.change_list(name, add=[number])
                    acknowledged.append(number)
                    number += 2

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + PATIENCE_S
    while len(acknowledged) < 20 and time.monotonic() < until:
        threading.Event().wait(0.01)
    victim = routers()[0]
    os.kill(victim.pid, signal.SIGKILL)
    before = len(acknowledged)
    while len(acknowledged) < before + 40 and time.monotonic() < until:
        threading.Event().wait(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(acknowledged) >= before + 40
    held = set(ListStore(cluster.store.root / LISTS_FOLDER).newest(name).ids.tolist())
    assert set(acknowledged) <= held
    assert len(held - set(acknowledged)) <= 2  # whose answer was lost with the router


def test_a_search_key_reads_lists_and_writes_none(cluster: Cluster, writer: Client) -> None:
    writer.put_list("integration:keys", [1])
    with cluster.endpoint.address.client() as reader:
        assert reader.get_list("integration:keys").item_ids.tolist() == [1]
        assert "integration:keys" in set(reader.lists("integration:"))
        with pytest.raises(Forbidden):
            reader.delete_list("integration:keys")
