"""Routers as processes on one store: each goes by the lists of the others, and one that is killed
loses nothing that it acknowledged."""

import contextlib
import threading

import pytest

from shardline.router.client.retries import Retry
from shardline.router.client.sync_client import Client
from shardline.router.lists.list_store import ListStore
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import Unavailable
from tests.list_disk import new_store
from tests.router_process import start_router

CONFIG = RouterConfig()
FRESH_S = CONFIG.lists_fresh_ms / 1000
PATIENCE_S = 60.0


@pytest.fixture
def root(tmp_path):
    return new_store(tmp_path)


@pytest.fixture
def routers(root):
    """(process, URL) of two."""
    processes = [start_router(CONFIG, store=root.parent) for _ in range(2)]
    try:
        yield [(each, f"http://127.0.0.1:{int(each.stdout.readline())}") for each in processes]
    finally:
        for process in processes:
            process.communicate(timeout=30)


def test_each_goes_by_a_change_of_the_other_in_time(routers):
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(Client(url)) for _, url in routers]
        for number in range(1, 11):
            writer, reader = clients[number % 2], clients[(number + 1) % 2]
            reader.get_list("a") if number > 1 else None
            writer.change_list("a", add=[number])
            assert writer.get_list("a").version == number  # at once
            threading.Event().wait(FRESH_S)  # what is promised, and no longer
            assert reader.get_list("a").item_ids.tolist() == list(range(1, number + 1))


def test_changes_through_both_all_count_though_one_is_killed(routers, root):
    acknowledged, go_on = [], threading.Event()

    def write(url, first):
        """Until its router has ended."""
        with Client(url, retry=Retry(attempts=1)) as client:
            for number in range(first, first + 200, 2):
                try:
                    client.change_list("a", add=[number])
                except Unavailable:
                    return
                acknowledged.append(number)
                if len(acknowledged) >= 40:
                    go_on.set()

    threads = [
        threading.Thread(target=write, args=(url, first)) for first, (_, url) in enumerate(routers)
    ]
    for thread in threads:
        thread.start()
    assert go_on.wait(PATIENCE_S)
    routers[0][0].kill()
    for thread in threads:
        thread.join()
    assert set(range(1, 201, 2)) <= set(acknowledged)  # the other one's
    held = set(ListStore(root).newest("a").ids.tolist())
    assert set(acknowledged) <= held
    assert len(held - set(acknowledged)) <= 1  # whose answer was lost
    with Client(routers[1][1]) as client:
        assert set(client.get_list("a").item_ids.tolist()) == held
