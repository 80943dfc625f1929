"""A shard's replicas under any sequence of writes, compactions, restarts, changes of the primary
and errors of the disk, on real files, against a dict and brute force.

LIVE_MACHINE_STEPS=5000 makes a long run of it: about so many rules, in random sequences.
"""

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from io import BytesIO
from itertools import count
from pathlib import Path

import faiss
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from shardline.shards.core.errors import InvalidInput, NotFound, NotPrimary, ReadOnly
from shardline.shards.core.messages import NO_PARAMS, SearchParams, WriteReply
from shardline.shards.core.schema import Metric
from shardline.shards.live.compaction import compact
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.loading import load_caught_up
from shardline.shards.live.log_files import LogFiles
from shardline.shards.live.mains import compacted_seqs
from shardline.shards.live.records import Delete, Record, Upsert
from shardline.shards.live.writes import HEAL_S, ShardWrites, WriteRequest
from shardline.shards.server.shard import Shard
from shardline.shards.storage.generation import read_generation
from tests.live_model import Model
from tests.live_shard import (
    NEW_ITEMS,
    ROWS,
    built,
    contents,
    delete_request,
    opened,
    unit_vectors,
    upsert_request,
)
from tests.reference import assert_same_answers

STEPS = int(os.environ.get("LIVE_MACHINE_STEPS", "300"))
STEPS_PER_EXAMPLE = 50
REPLICAS = 3
KINDS = {"flat": {"kind": "flat"}, "ivf": {"kind": "ivf", "nlist": 2}}
ALL_LISTS = SearchParams(nprobe=2)
# few enough that writes often meet: of the generation, and new ones
POOL = [*range(0, ROWS, 4), *range(NEW_ITEMS, NEW_ITEMS + 20)]
ITEMS = st.lists(st.sampled_from(POOL), min_size=1, max_size=8, unique=True)
TWO_ITEMS = st.lists(st.sampled_from(POOL), min_size=2, max_size=2)

Titles = dict[int, str | None]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


class DiskThatFails(LogFiles):
    """The ``left``-th call from now fails, a write after some of its bytes; and all later ones,
    while it is not None."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.number = errno.EIO

    def write(self, descriptor: int, data: bytes | memoryview) -> int:
        if self._fails():
            super().write(descriptor, data[: random.randrange(len(data))])
            raise OSError(self.number, os.strerror(self.number))
        return super().write(descriptor, data)

    def create(self, path: Path) -> int:
        self._fail()
        return super().create(path)

    def sync(self, descriptor: int) -> None:
        self._fail()
        super().sync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._fail()
        super().rename(source, target)

    def sync_folder(self, folder: Path) -> None:
        self._fail()
        super().sync_folder(folder)

    def _fails(self) -> bool:
        if self.left is not None:
            self.left = max(0, self.left - 1)
        return self.left == 0

    def _fail(self) -> None:
        if self._fails():
            raise OSError(self.number, os.strerror(self.number))


class Replica:
    """A process: one shard, what writes it, and its own view of the disk."""

    def __init__(self, generation: Path) -> None:
        self.generation = generation
        self.disk = DiskThatFails()
        self.now_s = 0.0
        self.shard: Shard
        self.writes: ShardWrites
        self.start()

    def start(self) -> None:
        self.disk.left = None
        self.shard, self.writes = opened(self.generation, files=self.disk, clock=lambda: self.now_s)
        self.main_seq = (compacted_seqs(live_folder(self.generation, 0)) or [0])[-1]

    def change_over(self) -> bool:
        """To the newest compacted main index, as ``Changeover`` does; whether there was one."""
        live = live_folder(self.generation, 0)
        newest = (compacted_seqs(live) or [0])[-1]
        if newest <= self.main_seq:
            return False
        loaded = load_caught_up(self.generation, read_generation(self.generation), 0)
        if self.writes.adopt(loaded):
            self.main_seq = loaded.main_seq
        return True

    def catch_up(self) -> None:
        try:
            self.writes.catch_up()
        except NotFound:  # trimmed: what it misses is in a main index
            assert self.change_over()
            self.writes.catch_up()


class Snapshot:
    """All items after some writes, with their vectors and titles."""

    def __init__(self, model: Model, titles: Titles) -> None:
        self.model, self.titles = model, titles

    def after(self, request: WriteRequest) -> tuple["Snapshot", int]:
        """What a write makes of it, and how many of its items existed."""
        model, titles = Model([], []), dict(self.titles)
        model.items = dict(self.model.items)
        ids = request.item_ids
        change: Upsert | Delete = Delete(item_ids=ids)
        written: list[str | None] = []
        if hasattr(request, "vectors"):
            change = Upsert(item_ids=ids, vectors=request.vectors, attributes=b"")
            written = titles_of(request)
        applied = model.apply(Record(seq=1, epoch=1, key="", change=change))
        for item in ids.tolist():
            titles.pop(item, None)
        titles.update(zip(ids.tolist(), written, strict=False))
        return Snapshot(model, titles), applied.existed


def titles_of(request) -> list[str | None]:
    if not request.attributes:
        return [None] * len(request.item_ids)
    return msgpack.unpackb(request.attributes)["title"]


class LiveMachine(RuleBasedStateMachine):
    """after: a Snapshot for every seq. maybe: writes of a failed group, which are in the log all
    together, or not at all. sent: acknowledged requests with a key, and their replies."""

    steps = 0
    built: dict[tuple[str, Metric], Path]

    def __init__(self) -> None:
        super().__init__()
        self.numbers = count(1)
        self.epoch = 0
        self.leader: Replica | None = None
        self.maybe: list[WriteRequest] = []
        self.sent: list[tuple[WriteRequest, WriteReply]] = []
        self.store: Path | None = None

    @initialize(kind=st.sampled_from(sorted(KINDS)), metric=st.sampled_from(Metric))
    def begin(self, kind: str, metric: Metric) -> None:
        self.metric = metric
        self.params = ALL_LISTS if kind == "ivf" else NO_PARAMS
        self.store = Path(tempfile.mkdtemp(prefix="live-machine-"))
        template = self.built[kind, metric]
        self.generation = self.store / template.parent.name / template.name
        shutil.copytree(template, self.generation)
        model = Model(range(ROWS), unit_vectors(ROWS))
        self.after = [Snapshot(model, {item: f"item {item}" for item in range(ROWS)})]
        self.replicas = [Replica(self.generation) for _ in range(REPLICAS)]
        self.fail_over(0)

    # Writing

    def upsert(self, ids: list[int], with_titles: bool, key: bool) -> WriteRequest:
        number = next(self.numbers)
        titles = {"title": [f"{number} of {item}" for item in ids]} if with_titles else {}
        return upsert_request(ids, seed=100 + number, key=f"k{number}" if key else "", **titles)

    def delete(self, ids: list[int], key: bool) -> WriteRequest:
        return delete_request(ids, key=f"k{next(self.numbers)}" if key else "")

    def write(self, *requests: WriteRequest) -> None:
        """By the primary, as one group."""
        assert self.leader is not None
        replies = self.leader.writes.write(requests)
        if all(isinstance(reply, WriteReply) for reply in replies):
            self.resolve(self.leader.writes.seq - len(requests))
            for request, reply in zip(requests, replies, strict=True):
                assert isinstance(reply, WriteReply)
                snapshot, existed = self.after[-1].after(request)
                self.after.append(snapshot)
                assert (reply.rows, reply.existed) == (len(request.item_ids), existed)
                assert reply.seq == len(self.after) - 1
                if request.key:
                    self.sent.append((request, reply))
            return
        assert all(isinstance(reply, ReadOnly) for reply in replies), replies
        if not self.maybe:  # a log that was broken before takes nothing
            self.maybe = list(requests)

    def resolve(self, seq: int) -> None:
        """``seq`` writes are in the log now: those of the failed group are, or never will be."""
        if seq != len(self.after) - 1:
            assert seq == len(self.after) - 1 + len(self.maybe)
            for request in self.maybe:
                self.after.append(self.after[-1].after(request)[0])
        self.maybe = []

    @precondition(lambda self: self.leader is not None)
    @rule(ids=ITEMS, with_titles=st.booleans(), key=st.booleans())
    def upsert_items(self, ids: list[int], with_titles: bool, key: bool) -> None:
        self.write(self.upsert(ids, with_titles, key))

    @precondition(lambda self: self.leader is not None)
    @rule(ids=ITEMS, key=st.booleans())
    def delete_items(self, ids: list[int], key: bool) -> None:
        self.write(self.delete(ids, key))

    @precondition(lambda self: self.leader is not None)
    @rule(first=ITEMS, second=ITEMS, third=ITEMS, titles=st.booleans())
    def write_a_group(self, first, second, third, titles: bool) -> None:
        self.write(
            self.upsert(first, titles, True),
            self.delete(second, True),
            self.upsert(third, not titles, False),
        )

    @precondition(lambda self: self.leader is not None)
    @rule()
    def delete_all(self) -> None:
        if self.after[-1].model.items:
            self.write(self.delete(sorted(self.after[-1].model.items), False))

    @precondition(lambda self: self.leader is not None and self.sent)
    @rule(which=st.integers(0, 1 << 20))
    def repeat(self, which: int) -> None:
        """A request that was acknowledged at any time changes nothing, and has the same answer."""
        assert self.leader is not None
        request, reply = self.sent[which % len(self.sent)]
        before = self.leader.writes.seq
        (again,) = self.leader.writes.write([request])
        assert again == reply or isinstance(again, ReadOnly)
        if isinstance(again, WriteReply):
            assert self.leader.writes.seq >= before
            self.resolve(self.leader.writes.seq)

    @rule(ids=ITEMS, which=st.integers(0, REPLICAS - 1))
    def write_to_a_follower(self, ids: list[int], which: int) -> None:
        """Or to a primary of the past, which may not know it yet."""
        replica = self.replicas[which]
        if replica is not self.leader:
            (reply,) = replica.writes.write([self.delete(ids, True)])
            assert isinstance(reply, NotPrimary | ReadOnly)

    # Faults

    @precondition(lambda self: self.leader is not None)
    @rule(
        ids=ITEMS,
        call=st.integers(1, 4),
        number=st.sampled_from([errno.EIO, errno.ENOSPC]),
        is_upsert=st.booleans(),
    )
    def write_to_a_disk_that_fails(
        self, ids: list[int], call: int, number: int, is_upsert: bool
    ) -> None:
        assert self.leader is not None
        self.leader.disk.number, self.leader.disk.left = number, call
        self.write(self.upsert(ids, True, False) if is_upsert else self.delete(ids, False))
        self.leader.disk.left = None

    @precondition(lambda self: self.leader is not None)
    @rule()
    def heal(self) -> None:
        assert self.leader is not None
        self.leader.now_s += HEAL_S
        self.leader.writes.heal()
        assert self.leader.writes.trouble is None
        self.resolve(self.leader.writes.seq)

    @rule(which=st.integers(0, REPLICAS - 1))
    def fail_over(self, which: int) -> None:
        """The primary of the past is not told; that it takes no writes is another rule."""
        self.epoch += 1
        self.leader = self.replicas[which]
        self.resolve_after_lead(self.leader)

    def resolve_after_lead(self, replica: Replica) -> None:
        try:
            seq = replica.writes.lead(self.epoch)
        except NotFound:  # behind what was trimmed: as its thread does, it changes over first
            assert replica.change_over()
            self.epoch += 1
            seq = replica.writes.lead(self.epoch)
        self.resolve(seq)

    @rule(which=st.integers(0, REPLICAS - 1))
    def restart(self, which: int) -> None:
        """Killed, and started again."""
        replica = self.replicas[which]
        if replica is self.leader:
            self.leader = None
        replica.writes.close()
        replica.start()

    @rule()
    def restart_all(self) -> None:
        for which in range(REPLICAS):
            self.restart(which)

    # Compaction

    @rule()
    def compact(self) -> None:
        try:
            done = compact(self.generation, 0)
        except InvalidInput:
            assert not self.at(self.known_seq()).model.items
            return
        assert done.rows == len(self.at(done.seq).model.items)

    def known_seq(self) -> int:
        """How many writes a process that starts finds."""
        _, writes = opened(self.generation)
        return writes.seq

    @rule(which=st.integers(0, REPLICAS - 1))
    def change_over(self, which: int) -> None:
        replica = self.replicas[which]
        try:
            replica.change_over()
        except (NotPrimary, ReadOnly):
            assert replica is not self.leader or replica.writes.trouble is not None

    @precondition(lambda self: self.leader is not None and self.leader.writes.trouble is None)
    @rule(
        ids=st.lists(st.sampled_from(POOL), min_size=2, max_size=2),
        writes=st.sampled_from([1, 2, 0]),
    )
    def compact_while_it_is_written(self, ids: list[int], writes: int) -> None:
        """As in service: the primary changes over after some more writes, and trims its log."""
        assert self.leader is not None
        self.compact()
        for item in ids[:writes]:
            self.write(self.upsert([item], True, True))
        self.leader.change_over()
        assert self.known_seq() == len(self.after) - 1

    @precondition(lambda self: self.leader is not None and self.leader.writes.trouble is None)
    @rule(ids=ITEMS, which=st.integers(0, REPLICAS - 1))
    def one_that_was_behind_takes_over(self, ids: list[int], which: int) -> None:
        """What it missed has been trimmed; it knows keys from the main index alone."""
        self.write(self.upsert(ids, True, True))
        self.compact_while_it_is_written([], 0)
        replica = self.replicas[which]
        if replica.change_over():
            self.fail_over(which)
        if self.sent:
            self.repeat(len(self.sent) - 1)

    # Reading

    @rule(which=st.integers(0, REPLICAS - 1))
    def catch_up(self, which: int) -> None:
        if self.replicas[which] is not self.leader:
            self.replicas[which].catch_up()

    @rule(
        which=st.integers(0, REPLICAS - 1),
        k=st.sampled_from([1, 3, 10, ROWS, ROWS + 40]),
        queries=st.sampled_from([1, 4]),
    )
    def search(self, which: int, k: int, queries: int) -> None:
        state = self.replicas[which].shard.state
        asked = unit_vectors(queries, seed=10_000 + next(self.numbers))
        expected = self.at(state.seq).model.answer(asked, k, self.metric)
        assert_same_answers(state.search(asked, k, self.params), expected)

    @rule(which=st.integers(0, REPLICAS - 1), ids=ITEMS)
    def fetch_and_attributes(self, which: int, ids: list[int]) -> None:
        state = self.replicas[which].shard.state
        snapshot = self.at(state.seq)
        here = [item for item in ids if item in snapshot.model.items]
        found, vectors = state.fetch(np.array(ids))
        assert found.tolist() == here
        np.testing.assert_array_equal(
            vectors, np.array([snapshot.model.items[item] for item in here]).reshape(vectors.shape)
        )
        answer = state.attributes_of(np.array(ids), ["title"], np.inf, 1 << 20)
        assert answer is not None
        (titles,) = msgpack.Unpacker(BytesIO(answer[1]))
        assert titles == [snapshot.titles[item] for item in here]

    def at(self, seq: int) -> Snapshot:
        """What ``seq`` writes lead to. Somebody has seen those of the failed group: they count."""
        if seq >= len(self.after):
            self.resolve(seq)
        return self.after[seq]

    @invariant()
    def replicas_hold_what_was_acknowledged(self) -> None:
        LiveMachine.steps += 1
        if self.store is None:
            return
        for replica in self.replicas:
            seq = replica.shard.state.seq
            expected = {item: row.tobytes() for item, row in self.at(seq).model.items.items()}
            assert contents(replica.shard) == expected
        if self.leader is not None and self.leader.writes.trouble is None:
            assert self.leader.shard.state.seq == len(self.after) - 1

    def teardown(self) -> None:
        if self.store is None:
            return
        try:
            self.fail_over(0)
            self.write(self.upsert([POOL[0]], True, True))
            for replica in self.replicas[1:]:
                replica.catch_up()
            self.replicas_hold_what_was_acknowledged()
            shard, _ = opened(self.generation)
            assert contents(shard) == contents(self.replicas[0].shard)
        finally:
            for replica in self.replicas:
                replica.writes.close()
            shutil.rmtree(self.store)


@pytest.fixture(scope="module", autouse=True)
def generations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Built once; every sequence begins with a copy."""
    LiveMachine.built = {
        (kind, metric): built(tmp_path_factory.mktemp(f"{kind}-{metric}"), metric=metric, **fields)
        for kind, fields in KINDS.items()
        for metric in Metric
    }
    yield
    print(f"{LiveMachine.steps} steps")


TestLiveMachine = LiveMachine.TestCase
TestLiveMachine.settings = settings(
    max_examples=max(1, STEPS // STEPS_PER_EXAMPLE),
    stateful_step_count=STEPS_PER_EXAMPLE,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
