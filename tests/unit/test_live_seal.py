"""A sealed shard: nobody acknowledges a write of it, and its seal counts all that were."""

from dataclasses import replace
from pathlib import Path

import pytest

from shardline.shards.core.errors import NotPrimary, ReadOnly
from shardline.shards.core.messages import WriteReply
from shardline.shards.live.epoch_file import read_epoch
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.state import ShardState
from shardline.shards.live.writes import ShardWrites
from shardline.shards.server.shard import Shard
from shardline.shards.server.write_thread import WriteThread
from tests.fake_disk import FakeDisk, ProcessFiles
from tests.interleaving import paused
from tests.live_shard import built, contents, delete_request, opened, upsert_request, wrote

FOLDER = Path("live")


@pytest.fixture
def generation(tmp_path: Path) -> Path:
    return built(tmp_path)


class Replica:
    """A process of the shard whose log is on a fake disk; ``acknowledged``: of its writes, the
    highest seq."""

    def __init__(self, state: ShardState, files: ProcessFiles) -> None:
        self.acknowledged = 0
        self.shard = Shard(shard=0, generation=7, state=state)
        self.writes = ShardWrites(self.shard, FOLDER, files=files)

    def write(self, count: int) -> None:
        for _ in range(count):
            (reply,) = self.writes.write([delete_request([1])])
            if isinstance(reply, WriteReply):
                self.acknowledged = reply.seq
            else:
                assert isinstance(reply, NotPrimary | ReadOnly)

    def use(self, files: ProcessFiles) -> None:
        self.writes._files = files
        if self.writes._log is not None:
            self.writes._log._files = files

    def go_on(self, files: ProcessFiles) -> None:
        self.use(files)
        self.write(3)


@pytest.mark.parametrize("is_network", [False, True])
def test_a_writer_paused_before_every_call_of_a_seal(generation: Path, is_network: bool) -> None:
    """For every pair of calls: the writer stops, another replica seals so far, the writer goes
    on."""
    state = opened(generation)[0].state

    def sealing(files: ProcessFiles) -> int:
        return Replica(state, files).writes.seal(2)

    def began() -> tuple[FakeDisk, Replica]:
        disk = FakeDisk(is_network=is_network)
        old = Replica(state, ProcessFiles(disk))
        old.writes.lead(1)
        old.write(1)
        return disk, old

    disk, old = began()
    counts = []
    for work in (old.go_on, sealing):
        files = ProcessFiles(disk)
        work(files)
        counts.append(files.calls)
    fenced = 0
    for paused_at in range(counts[0] + 1):
        for interrupted_at in range(paused_at % 2, counts[1] + 1, 2):
            disk, old = began()
            with paused(disk, old.go_on, sealing) as (first, second):
                first.advance(paused_at)
                second.advance(interrupted_at)
                first.finish()
                second.finish()
            assert first.error is None and second.error is None
            fenced += old.acknowledged < 4
            old.use(ProcessFiles(disk))
            old.write(1)
            assert old.acknowledged <= second.result
            follower = Replica(state, ProcessFiles(disk))
            follower.writes.catch_up()
            assert follower.writes.seq == second.result, "replicas follow up to the seal"
            later = Replica(state, ProcessFiles(disk))
            assert later.writes.lead(3) == second.result
            later.write(1)
            assert later.acknowledged == second.result + 1
    assert fenced > 50


def test_the_primary_seals_itself_and_leads_again(generation: Path) -> None:
    shard, writes = opened(generation)
    writes.lead(1)
    wrote(writes, upsert_request([3, 1000]), delete_request([4]))
    assert writes.seal(2) == 2
    assert not writes.leads and writes.leading_epoch is None
    (refused,) = writes.write([delete_request([5])])
    assert isinstance(refused, NotPrimary)
    assert writes.seal(2) == 2, "repeated"
    with pytest.raises(NotPrimary):
        writes.lead(2)
    assert writes.lead(3) == 2
    (reply,) = wrote(writes, delete_request([5]))
    assert reply.seq == 3
    with pytest.raises(NotPrimary):
        writes.seal(3)
    assert writes.leads, "an epoch that is none of its successors changes nothing"
    assert 5 not in contents(shard)


def test_any_replica_seals_a_shard_whose_primary_goes_on(generation: Path) -> None:
    _, primary = opened(generation)
    primary.lead(1)
    wrote(primary, delete_request([1]))
    _, other = opened(generation)
    assert other.seal(2) == 1
    (refused,) = primary.write([delete_request([2])])
    assert isinstance(refused, NotPrimary)
    assert read_epoch(live_folder(generation, 0)) == 2
    assert other.catch_up() == 0 and other.seq == 1
    _, newer = opened(generation)
    assert newer.lead(3) == 1
    with pytest.raises(NotPrimary):
        other.seal(2)


def test_a_seal_comes_after_what_was_submitted_before(generation: Path) -> None:
    _, writes = opened(generation)
    thread = WriteThread(writes, lambda answered: None)
    thread.start()
    try:
        assert thread.lead(1).result() == 0
        assert thread.seal(2).result() == 0
        assert not writes.leads
        assert thread.lead(3).result() == 0
        assert writes.leads
    finally:
        thread.stop()


def test_a_write_by_an_older_table_is_refused_by_who_leads_anew(generation: Path) -> None:
    """As when a shard was sealed for a switch, leads again in the generation that was kept, and a
    router has not heard of it."""
    _, writes = opened(generation)
    writes.lead(1)
    stale = replace(delete_request([1]), epoch=1)
    wrote(writes, stale)
    writes.seal(2)
    writes.lead(3)
    (refused,) = writes.write([stale])
    assert isinstance(refused, NotPrimary)
    wrote(writes, replace(stale, epoch=3), replace(stale, epoch=0))


def test_a_shard_without_any_write_is_sealed_at_zero(generation: Path) -> None:
    _, writes = opened(generation)
    assert writes.seal(1) == 0
    assert writes.lead(2) == 0
