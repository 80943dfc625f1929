"""Live writes over real sockets: a primary, a follower, threads, and compactions as processes."""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from shardline.shards.core.errors import CorruptFile, NotPrimary, Overloaded
from shardline.shards.core.messages import (
    MAX_WRITTEN_ROWS,
    ErrorReply,
    FetchReply,
    FetchRequest,
    SearchReply,
    SearchRequest,
    WriteReply,
)
from shardline.shards.live.changeover import Changeover
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.log_files import FILES, LogFiles
from shardline.shards.live.log_tail import LogTail
from shardline.shards.live.mains import compacted_seqs
from shardline.shards.live.records import Record
from shardline.shards.server.session import OVERTAKE_S
from shardline.shards.server.shard_server import ShardServer
from tests.live_shard import (
    NEW_ITEMS,
    built,
    contents,
    delete_request,
    opened,
    unit_vectors,
    upsert_request,
)
from tests.unit.test_server import SECRET, Client

SEARCHED = 1 << 20  # the request id of a search among writes
SOON_S = 20.0  # a process that compacts takes a second to start


class Replica:
    """A shard as its process holds it."""

    def __init__(
        self,
        generation: Path,
        replica: int,
        config: LiveConfig | None,
        files: LogFiles = FILES,
    ) -> None:
        self.shard, self.writes = opened(generation, files=files)
        self.change = None
        if config is not None:
            self.change = Changeover(generation, 0, main_seq=0, config=config)
        self.server = ShardServer(
            self.shard, secret=SECRET, replica=replica, writes=self.writes, changeover=self.change
        )
        self.address = self.server.bind()
        self.server.start(1)

    def ask(self, *requests):
        """The reply to each of requests that are under way together."""
        with closing(Client(self.address)) as client:
            for number, request in enumerate(requests):
                client.send(number + 1, request)
            return [reply for _, reply in sorted(client.receive() for _ in requests)]


@pytest.fixture
def generation(tmp_path: Path) -> Path:
    return built(tmp_path)


@pytest.fixture
def pair(generation: Path) -> Iterator[tuple[Replica, Replica]]:
    replicas = Replica(generation, 0, None), Replica(generation, 1, None)
    yield replicas
    for replica in replicas:
        replica.server.stop()


def until(holds) -> None:
    waited = threading.Event()
    for _ in range(int(SOON_S / 0.02)):
        if holds():
            return
        waited.wait(0.02)
    raise AssertionError("it never came")


def test_nobody_takes_writes_before_one_leads(pair) -> None:
    for replica in pair:
        (reply,) = replica.ask(delete_request([1]))
        assert isinstance(reply, ErrorReply)
        assert reply.code == NotPrimary.code
    assert pair[0].server.lead(1) == 0
    (reply,) = pair[0].ask(delete_request([1]))
    assert reply == WriteReply(rows=1, existed=1, generation=7, seq=1)


def test_a_shard_without_writes_refuses_them(generation: Path) -> None:
    shard, _ = opened(generation)
    server = ShardServer(shard, secret=SECRET)
    address = server.bind()
    server.start(1)
    try:
        with closing(Client(address)) as client:
            client.send(1, delete_request([1]))
            received = client.receive()
            assert received is not None
            assert isinstance(received[1], ErrorReply)
            assert received[1].code == NotPrimary.code
        with pytest.raises(NotPrimary):
            server.lead(1)
    finally:
        server.stop()


def test_what_is_acknowledged_is_in_the_next_search(pair) -> None:
    primary, follower = pair
    primary.server.lead(1)
    with closing(Client(primary.address)) as client:
        for number in range(1, 30):
            client.send(number, upsert_request([NEW_ITEMS + number], seed=number))
            received = client.receive()
            assert received is not None
            assert received[1].seq == number
            vectors = upsert_request([0], seed=number).vectors
            client.send(99, SearchRequest(queries=vectors, k=1, timeout_ms=5e3))
            found = client.receive()
            assert found is not None
            assert isinstance(found[1], SearchReply)
            assert found[1].ranked.ids.tolist() == [[NEW_ITEMS + number]]
    until(lambda: follower.writes.seq == primary.writes.seq)
    assert contents(follower.shard) == contents(primary.shard)


def test_many_writers_at_once(pair) -> None:
    primary, follower = pair
    primary.server.lead(1)

    def write(writer: int) -> list[int]:
        ids = [NEW_ITEMS + 100 * writer + each for each in range(20)]
        replies = [primary.ask(upsert_request([item], seed=item))[0] for item in ids]
        primary.ask(delete_request(ids[:5]))
        return [reply.seq for reply in replies]

    with ThreadPoolExecutor(4) as pool:
        seqs = [seq for found in pool.map(write, range(4)) for seq in found]
    assert len(set(seqs)) == 80
    assert primary.writes.seq == 84
    until(lambda: follower.writes.seq == 84)
    assert contents(follower.shard) == contents(primary.shard)
    expected = {NEW_ITEMS + 100 * w + each for w in range(4) for each in range(5, 20)}
    assert {item for item in contents(primary.shard) if item >= NEW_ITEMS} == expected


def test_another_takes_over_and_the_old_primary_follows(pair) -> None:
    old, new = pair
    old.server.lead(1)
    old.ask(upsert_request([NEW_ITEMS]))
    assert new.server.lead(2) == 1
    (refused,) = old.ask(delete_request([NEW_ITEMS]))
    assert isinstance(refused, ErrorReply)
    assert refused.code == NotPrimary.code
    new.ask(delete_request([NEW_ITEMS]))
    until(lambda: old.writes.seq == 2)
    (reply,) = old.ask(FetchRequest(item_ids=np.array([NEW_ITEMS, 3]), timeout_ms=5e3))
    assert isinstance(reply, FetchReply)
    assert reply.item_ids.tolist() == [3]


def test_an_old_primary_that_nobody_writes_to_follows_too(pair) -> None:
    """It was stopped, say, or cut off: routers write to the new one, and search both."""
    old, new = pair
    old.server.lead(1)
    old.ask(upsert_request([NEW_ITEMS]))
    assert new.server.lead(2) == 1
    new.ask(delete_request([NEW_ITEMS]))
    until(lambda: old.writes.seq == 2)
    assert old.writes.leading_epoch is None
    assert contents(old.shard) == contents(new.shard)


def test_a_process_compacts_while_it_is_written_and_searched(generation: Path) -> None:
    config = LiveConfig(compact_share=1e-9, compact_min_rows=30)
    primary, follower = Replica(generation, 0, config), Replica(generation, 1, config)
    live = live_folder(generation, 0)
    try:
        primary.server.lead(1)
        for number in range(40):
            item = NEW_ITEMS + number % 35
            (reply,) = primary.ask(upsert_request([item], seed=number))
            assert isinstance(reply, WriteReply)

        def are_changed() -> bool:
            (answer,) = primary.ask(delete_request([9]))
            assert isinstance(answer, WriteReply)
            seqs = {each.change.main_seq for each in (primary, follower)}
            return seqs == set(compacted_seqs(live)[-1:])

        until(are_changed)
        until(lambda: follower.writes.seq == primary.writes.seq)
        assert contents(primary.shard) == contents(follower.shard)
        assert contents(opened(generation)[0]) == contents(primary.shard)
        assert primary.shard.state.main.rows >= 30 + 60
    finally:
        primary.server.stop()
        follower.server.stop()


def test_a_compaction_that_is_killed_is_tried_again_later(generation: Path) -> None:
    shard, writes = opened(generation)
    now_s = [0.0]
    change = Changeover(
        generation,
        0,
        main_seq=0,
        config=LiveConfig(compact_share=1e-9, compact_min_rows=1),
        clock=lambda: now_s[0],
    )
    writes.lead(1)
    writes.write([upsert_request([1])])
    try:
        change.turn(shard.state, leads=True)
        running = change._running
        assert running is not None
        running.send_signal(signal.SIGKILL)
        running.wait()
        change.turn(shard.state, leads=True)
        assert change.trouble is not None
        assert change._running is None, "not at once"
        now_s[0] += 100.0
        change.turn(shard.state, leads=True)
        until(lambda: change.turn(shard.state, leads=True) is not None)
        assert change.trouble is None
    finally:
        change.stop()
        writes.close()


def test_a_replica_whose_log_is_damaged_says_so(generation: Path, monkeypatch) -> None:
    shard, writes = opened(generation)
    told: list[CorruptFile] = []
    server = ShardServer(shard, secret=SECRET, writes=writes, on_damage=told.append)
    server.bind()
    damage = CorruptFile("log-1: damaged")

    def read_new(tail: LogTail) -> list[Record]:
        raise damage

    monkeypatch.setattr(LogTail, "read_new", read_new)
    server.start(1)
    try:
        until(lambda: bool(told))
        assert told[0] is damage
        assert "log-1: damaged" in str(writes.describe()["trouble"])
    finally:
        server.stop()


def test_stopping_writes_what_was_submitted(generation: Path) -> None:
    replica = Replica(generation, 0, None)
    replica.server.lead(1)
    with closing(Client(replica.address)) as client:
        for number in range(50):
            client.send(number + 1, upsert_request([NEW_ITEMS + number]))
        replies = [client.receive() for _ in range(10)]
        replica.server.stop()
    acknowledged = {reply[0] for reply in replies if reply is not None}
    assert len(acknowledged) == 10
    kept = contents(opened(generation)[0])
    assert {NEW_ITEMS + number - 1 for number in acknowledged} <= kept.keys()


class HangingDisk(LogFiles):
    """Its fsyncs return once ``works`` is set."""

    def __init__(self) -> None:
        self.works = threading.Event()
        self.works.set()

    def sync(self, descriptor: int) -> None:
        assert self.works.wait(SOON_S)
        super().sync(descriptor)


FLOODS = {
    "rows": lambda: delete_request(range(MAX_WRITTEN_ROWS)),
    "bytes": lambda: upsert_request([NEW_ITEMS], title=["x" * (1 << 20)]),
    "requests": lambda: delete_request([1]),
}


@pytest.mark.parametrize(("flood", "count"), [("rows", 30), ("bytes", 50), ("requests", 1100)])
def test_searches_go_on_while_the_disk_hangs_under_many_writes(
    generation: Path, flood: str, count: int
) -> None:
    disk = HangingDisk()
    replica = Replica(generation, 0, None, disk)
    replica.server.lead(1)
    write = FLOODS[flood]()
    disk.works.clear()
    try:
        with closing(Client(replica.address)) as one, closing(Client(replica.address)) as other:
            refused = dict.fromkeys((one, other), 0)
            for client in (one, other):
                for number in range(count):
                    client.send(number + 1, write)
            for pause_s in (0.0, 2 * OVERTAKE_S):
                threading.Event().wait(pause_s)
                for client in (one, other):
                    client.send(
                        SEARCHED, SearchRequest(queries=unit_vectors(1), k=1, timeout_ms=5e3)
                    )
                    refused[client] += refusals_before_search(client)
            admitted = {client: count - refused[client] for client in refused}
            assert 0 < sum(admitted.values()) < 2 * count
            assert replica.server.queue_depth == sum(admitted.values())
            disk.works.set()
            for client, waiting in admitted.items():
                replies = [client.receive() for _ in range(waiting)]
                assert all(reply and isinstance(reply[1], WriteReply) for reply in replies)
            assert replica.server.queue_depth == 0
            assert [session._written for session in replica.server.sessions] == [0, 0]
            one.send(1, write)
            taken = one.receive()
            assert taken is not None
            assert isinstance(taken[1], WriteReply)
    finally:
        disk.works.set()
        replica.server.stop()


def refusals_before_search(client: Client) -> int:
    """Reads until the reply to the search has come; how many writes were refused before it."""
    refused = 0
    while True:
        received = client.receive()
        assert received is not None
        if received[0] == SEARCHED:
            assert isinstance(received[1], SearchReply)
            return refused
        assert isinstance(received[1], ErrorReply)
        assert received[1].code == Overloaded.code
        refused += 1
