"""A whole store under any sequence of writes, compactions, fail-overs, snapshots, restores, builds
from live rows, publishes, rollbacks and housekeeping, on real files, against a dict and brute
force.

STORE_MACHINE_STEPS=5000 makes a long run of it: about so many rules, in random sequences.
"""

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import faiss
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shardline.cluster.backup.restore import restore_snapshot
from shardline.cluster.backup.take_snapshot import take_snapshot
from shardline.cluster.build import build_generation
from shardline.cluster.corpus_from_live import live_corpus
from shardline.cluster.housekeeping.erase import Waiting, compact_away, drop_superseded
from shardline.cluster.housekeeping.removals import Policy, removals, remove
from shardline.cluster.rollover.way_back import parting
from shardline.cluster.store import Store
from shardline.router.merge import merge_top_k
from shardline.router.written import Part, by_shard
from shardline.shards.core.errors import Behind, NotPrimary, ShardlineError, WritesLost
from shardline.shards.core.messages import (
    NO_PARAMS,
    DeleteRequest,
    SearchOptions,
    SearchParams,
    SearchRequest,
    UpsertRequest,
    WriteReply,
)
from shardline.shards.core.schema import Metric, Ranked
from shardline.shards.live.records import Delete, Record
from shardline.shards.live.state import apply
from shardline.shards.server.shard import Shard
from shardline.shards.storage.generation import read_generation, verify_generation
from tests.engine import plan_of
from tests.live_store import Rows, live_store, rows_of, vectors_of
from tests.loaded_generation import CONFIG, Killed, Late, LoadedGeneration, Member, mirrored
from tests.reference import assert_same_answers, brute_force

STEPS = int(os.environ.get("STORE_MACHINE_STEPS", "120"))
STEPS_PER_EXAMPLE = 40
REPLICAS = 2
KINDS = {"flat": {"kind": "flat"}, "ivf": {"kind": "ivf", "nlist": 2}}
PARAMS = {"flat": NO_PARAMS, "ivf": SearchParams(nprobe=2)}  # all lists: answers are exact
SPREADS = [(1, "range"), (2, "hash-range"), (3, "range"), (3, "hash-range")]
# few enough that writes often meet: of the first generation, and new ones before and behind it
POOL = [*range(0, 180, 8), *range(1, 20, 2), *range(1000, 1010)]
ITEMS = st.lists(st.sampled_from(POOL), min_size=1, max_size=8, unique=True)
WHICH = st.integers(0, 1 << 16)
TIMEOUT_MS = 1e4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """Processes are killed here, and no power is cut: nothing depends on it, and it is half of the
    time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda descriptor: None)
        yield


@dataclass
class Made:
    """What is known of a generation. Moments count the acknowledged writes of the store: it has all
    up to ``has``, and notes say how many of those of generation ``source`` these are. erased_at:
    what it had then is not in its log any more. as_built: its rows, until it is written. timeline:
    a generation that went live without the writes of the one before began it."""

    source: int
    has: int
    timeline: int
    as_built: Rows | None
    erased_at: int = 0


@dataclass
class Sent:
    """Acknowledged requests with a key."""

    generation: int
    part: Part
    reply: WriteReply


class StoreMachine(RuleBasedStateMachine):
    """rows: every live item. beside: the generation that is loaded besides the live one; is_kept:
    which was live before. brought: its rows when all was brought to it last; None: not known.
    parted: the rows that it must have once all is brought to it, where the live one went live
    without its writes; None: those of the live one."""

    steps = 0
    counted: ClassVar[Counter[str]] = Counter()
    built: dict[str, Path]
    root: Path | None = None

    @initialize(kind=st.sampled_from(sorted(KINDS)), is_second=st.booleans())
    def begin(self, kind: str, is_second: bool) -> None:
        """is_second: the live generation is the second one, so that one is kept."""
        self.root = Path(tempfile.mkdtemp(prefix="store-machine-"))
        shutil.copytree(self.built[kind], self.root / "store")
        self.store = Store(self.root / "store")
        self.numbers = count(1)
        self.moment = self.timeline = 0
        self.rows = rows_of(self.store.generation(1))
        self.next_generation = count(2)
        self.made = {1: Made(source=0, has=0, timeline=0, as_built=None)}
        self.live = LoadedGeneration(self.store, 1, REPLICAS)
        self.beside: LoadedGeneration | None = None
        self.is_kept = False
        self.brought: Rows | None = None
        self.parted: Rows | None = None
        self.snapshots: list[tuple[str, Made]] = []
        self.sent: list[Sent] = []
        self.late: list[Late] = []
        if is_second:
            self.upsert(POOL[::7], True, True)
            self.build_from_live(kind, SPREADS[-1], True)

    def counts(self, name: str) -> None:
        self.counted[name] += 1

    # Writing

    @rule(ids=ITEMS, has_titles=st.booleans(), has_key=st.booleans())
    def upsert(self, ids: list[int], has_titles: bool, has_key: bool) -> None:
        number = next(self.numbers)
        vectors = vectors_of(len(ids), 1000 + number)
        titles = [f"{number} of {item}" if has_titles else None for item in ids]
        for shard, at in self.by_shard(ids):
            attributes = {"title": [titles[row] for row in at.tolist()]}
            message = UpsertRequest(
                item_ids=np.array(ids, np.int64)[at],
                vectors=vectors[at],
                attributes=msgpack.packb(attributes) if has_titles else b"",
                key=f"k{number}" if has_key else "",
                timeout_ms=TIMEOUT_MS,
            )
            self.deliver(Part(shard=shard, message=message))
        for row, item in enumerate(ids):
            for rows in self.written:
                rows[item] = (vectors[row].tobytes(), {"title": titles[row], "price": None})

    @rule(ids=ITEMS, has_key=st.booleans())
    def delete(self, ids: list[int], has_key: bool) -> None:
        key = f"k{next(self.numbers)}" if has_key else ""
        for shard, at in self.by_shard(ids):
            part = np.array(ids, np.int64)[at]
            message = DeleteRequest(item_ids=part, key=key, timeout_ms=TIMEOUT_MS)
            self.deliver(Part(shard=shard, message=message))
        for item in ids:
            for rows in self.written:
                rows.pop(item, None)

    @property
    def written(self) -> list[Rows]:
        """What a write changes, now or once it is brought over."""
        return [self.rows] if self.parted is None else [self.rows, self.parted]

    def by_shard(self, ids: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        self.moment += 1
        self.made[self.live.number].as_built = None
        return by_shard(np.array(ids, np.int64), np.arange(len(ids)), self.live.table, 4096)

    def deliver(self, part: Part) -> None:
        ids = part.message.item_ids.tolist()
        existed = sum(item in self.rows for item in ids)
        reply = self.live.deliver(part)
        assert (reply.rows, reply.existed) == (len(ids), existed)
        assert (reply.generation, reply.seq) == (self.live.number, self.live.seqs[part.shard])
        if part.message.key:
            self.sent.append(Sent(self.live.number, part, reply))

    @precondition(lambda self: any(each.generation == self.live.number for each in self.sent))
    @rule(which=WHICH)
    def repeat(self, which: int) -> None:
        """Of any time in which this generation was live: no effect, and the same answer."""
        sent = [each for each in self.sent if each.generation == self.live.number]
        before, chosen = self.live.seqs, sent[which % len(sent)]
        assert self.live.deliver(chosen.part) == chosen.reply
        assert self.live.seqs == before

    # Faults and compactions, of the live generation or the one beside it

    def chosen(self, which: int) -> LoadedGeneration:
        return self.beside if which % 3 == 0 and self.beside is not None else self.live

    @rule(which=WHICH, shard=WHICH)
    def fail_over(self, which: int, shard: int) -> None:
        loaded = self.chosen(which)
        shard %= len(loaded.members)
        old = loaded.leaders[shard]
        loaded.elect(shard, which)
        if old not in (None, loaded.leaders[shard]):
            self.refuses(old)

    @rule(which=WHICH, shard=WHICH)
    def restart(self, which: int, shard: int) -> None:
        loaded = self.chosen(which)
        loaded.restart(shard % len(loaded.members), which)
        loaded.settle()

    def refuses(self, member: Member) -> None:
        """One that has not heard that it is not the primary any more."""
        message = DeleteRequest(item_ids=np.array(POOL), key="", timeout_ms=TIMEOUT_MS)
        (reply,) = member.writes.write([message])
        assert isinstance(reply, NotPrimary)

    @rule(which=WHICH, shard=WHICH)
    def compact(self, which: int, shard: int) -> None:
        loaded = self.chosen(which)
        leader = loaded.leaders[shard % len(loaded.members)]
        leader.change_over()
        state = leader.writes.state
        assert (state.delta.rows, state.hidden) == (0, 0)

    @rule(which=WHICH, shard=WHICH)
    def change_over(self, which: int, shard: int) -> None:
        """Any replica, while it may be behind."""
        loaded = self.chosen(which)
        members = loaded.members[shard % len(loaded.members)]
        members[which % len(members)].change_over()

    # Searching

    @rule(
        which=WHICH,
        k=st.sampled_from([1, 10, 200]),
        excluded=st.one_of(st.just([]), st.lists(st.sampled_from(POOL), unique=True)),
        is_exact=st.booleans(),
    )
    def search(self, which: int, k: int, excluded: list[int], is_exact: bool) -> None:
        """By any replica of each shard. excluded: as a filter has rows hidden."""
        asked = vectors_of(2, 5000 + next(self.numbers))
        request = SearchRequest(
            queries=asked,
            k=k,
            timeout_ms=TIMEOUT_MS,
            params=NO_PARAMS if is_exact else PARAMS[self.live.manifest.index.kind],
            options=SearchOptions(min_seq=self.live.seqs, exact=is_exact),
        )
        parts = []
        for shard, members in enumerate(self.live.members):
            member = members[(which + shard) % len(members)]
            if member.writes.seq < self.live.seqs[shard]:
                with pytest.raises(Behind):
                    self.answer(member, request)
                member.catch_up()
            parts.append(self.answer(member, request, excluded))
        ids = np.array(sorted(self.rows))
        vectors = np.array([np.frombuffer(self.rows[item][0], np.float32) for item in ids.tolist()])
        expected = brute_force(asked, vectors, ids, k, Metric.COSINE, excluded)
        assert_same_answers(merge_top_k(parts, k), expected)

    def answer(
        self, member: Member, request: SearchRequest, excluded: Sequence[int] = ()
    ) -> Ranked:
        shard = member.shard
        if excluded:
            hidden = Record(
                seq=shard.state.seq + 1, epoch=1, key="", change=Delete(item_ids=np.array(excluded))
            )
            state, _ = apply(shard.state, [hidden])
            shard = Shard(shard=shard.shard, generation=shard.generation, state=state)
        if request.options.exact:
            reply = shard.search_exactly(request, lambda: None)
            if isinstance(reply, ShardlineError):
                raise reply
        else:
            reply = shard.search(request)
        assert reply.generation == self.live.number
        return reply.ranked

    @rule(ids=ITEMS)
    def look_up(self, ids: list[int]) -> None:
        found = {}
        for leader in self.live.leaders:
            here, vectors = leader.shard.state.fetch(np.array(ids))
            answer = leader.shard.state.attributes_of(
                np.array(ids), ["title", "price"], np.inf, 1 << 20
            )
            assert answer is not None and answer[0].tolist() == here.tolist()
            titles, prices = msgpack.Unpacker(BytesIO(answer[1]))
            for row, item in enumerate(here.tolist()):
                assert item not in found, "an item has one shard"
                values = {"title": titles[row], "price": prices[row]}
                found[item] = (vectors[row].tobytes(), values)
        assert found == {item: self.rows[item] for item in ids if item in self.rows}

    # Generations

    @rule()
    def snapshot(self) -> None:
        url = str(self.root / f"snapshot-{next(self.numbers)}")
        taken = take_snapshot(self.store, self.live.number, url)
        assert taken.seqs == self.live.seqs
        self.snapshots.append((url, self.now()))

    @precondition(lambda self: self.snapshots)
    @rule(which=WHICH, shards=st.sampled_from([None, 1, 3]), is_published=st.booleans())
    def restore(self, which: int, shards: int | None, is_published: bool) -> None:
        url, known = self.snapshots[which % len(self.snapshots)]
        made = restore_snapshot(self.store, url, num_shards=shards)
        self.has_made(made.generation, known)
        if is_published:
            self.load(made.generation)
            if self.is_of_this_timeline:
                self.switch(which, None)

    @rule(
        kind=st.sampled_from(sorted(KINDS)),
        spread=st.sampled_from(SPREADS),
        is_published=st.booleans(),
    )
    def build_from_live(self, kind: str, spread: tuple[int, str], is_published: bool) -> None:
        shards, partitioning = spread
        plan = plan_of(shards, partitioning=partitioning, **KINDS[kind])
        with live_corpus(self.store, self.live.number, lambda *_: None) as corpus:
            made = build_generation(self.store, corpus, plan)
        assert made.cut is not None
        assert (made.cut.generation, made.cut.seqs) == (self.live.number, self.live.seqs)
        self.has_made(made.generation, self.now())
        if is_published:
            self.load(made.generation)
            self.switch(shards, None)

    def now(self) -> Made:
        """Of a generation with all that the live one has."""
        return Made(
            source=self.live.number,
            has=self.moment,
            timeline=self.timeline,
            as_built=dict(self.rows),
        )

    def has_made(self, number: int, known: Made) -> None:
        assert number == next(self.next_generation), "no number comes twice"
        self.made[number] = replace(known)
        folder = self.store.generation(number)
        assert rows_of(folder) == known.as_built
        verify_generation(folder, read_generation(folder))

    def others(self) -> list[int]:
        """Complete generations that are not loaded."""
        loaded = {self.live.number, self.beside.number if self.beside else 0}
        return sorted(self.made.keys() - loaded)

    @precondition(lambda self: self.others())
    @rule(which=WHICH)
    def load_another(self, which: int) -> None:
        """As a candidate; one that was kept is ended first."""
        others = self.others()
        self.load(others[which % len(others)])

    def load(self, number: int) -> None:
        self.end_beside()
        self.beside = LoadedGeneration(self.store, number, REPLICAS)

    @rule()
    def end_beside(self) -> None:
        """As ``publish --finish``, or a publish that failed."""
        if self.beside is not None:
            self.beside.close()
        self.beside, self.is_kept = None, False
        self.brought = self.parted = None

    @precondition(lambda self: self.is_of_this_timeline)
    @rule(kill_at=st.one_of(st.none(), st.integers(0, 8)))
    def mirror(self, kill_at: int | None) -> None:
        """Until nothing is left to bring over, or killed before that."""
        assert self.beside is not None
        with suppress(Killed):
            self.bring_over(self.live.seqs, kill_at=kill_at)

    def bring_over(self, final: tuple[int, ...], **options: Any) -> bool:
        """Whether all of it is there; False: it was refused, as it must be."""
        assert self.beside is not None
        to = self.made[self.beside.number]
        to.as_built = self.brought = None
        try:
            mirrored(self.store, self.live.number, self.beside, final, late=self.late, **options)
        except WritesLost:
            assert not self.must_be_possible, "nothing is missing"
            self.counts("refused")
            return False
        to.has, to.source = self.moment, self.live.number
        self.brought = dict(self.rows if self.parted is None else self.parted)
        assert self.beside.contents() == vectors_in(self.brought)
        return True

    @property
    def is_of_this_timeline(self) -> bool:
        """What two timelines make together is neither, but for one that is kept."""
        if self.beside is None:
            return False
        is_same = self.made[self.beside.number].timeline == self.timeline
        return is_same or self.parted is not None

    @property
    def must_be_possible(self) -> bool:
        """Whether all that the generation beside lacks is in the log of the live one, and notes say
        from where on."""
        assert self.beside is not None
        to, live = self.made[self.beside.number], self.made[self.live.number]
        return to.source == self.live.number and to.has >= live.erased_at

    @precondition(lambda self: self.late)
    @rule(which=WHICH)
    def part_arrives_late(self, which: int) -> None:
        """It was sent again, so it is known by its key; or it is for a primary of the past."""
        late = self.late.pop(which % len(self.late))
        for loaded in (self.live, self.beside):
            if loaded is not None and loaded.number == late.generation:
                self.counts("late")
                with suppress(NotPrimary):
                    loaded.deliver(late.part)
                if loaded is self.beside and self.brought is not None:
                    assert loaded.contents() == vectors_in(self.brought)

    @precondition(lambda self: self.is_of_this_timeline)
    @rule(ids=ITEMS, kill_at=st.integers(0, 3))
    def mirror_is_killed_and_its_part_late(self, ids: list[int], kill_at: int) -> None:
        """The items are written again before it goes on: newer than what comes late."""
        self.upsert(ids, True, False)
        self.mirror(kill_at)
        self.upsert(ids, False, False)
        self.mirror(None)
        while self.late:
            self.part_arrives_late(0)

    @precondition(lambda self: self.is_of_this_timeline)
    @rule(which=WHICH, kill_at=st.one_of(st.none(), st.integers(0, 8)))
    def switch(self, which: int, kill_at: int | None) -> None:
        """The end of a publish, or of a rollback. kill_at: of a mirror that is started again."""
        primaries, before = list(self.live.leaders), self.live.seqs
        final = self.live.seal(which)
        assert final == before
        if which % 2:
            for member in primaries:
                self.refuses(member)
        if kill_at is not None:
            with suppress(Killed):
                self.bring_over(final, kill_at=kill_at)
        if not self.bring_over(final, is_sealed=True):
            self.live.settle()
            return
        assert self.beside is not None
        self.counts("rollback" if self.is_kept else "publish")
        is_apart = self.parted is not None
        if self.parted is not None:
            self.rows, self.timeline = self.parted, self.timeline + 1
            self.made[self.beside.number].timeline = self.timeline
        self.change_places()
        if is_apart:  # what it had before is not known to the one that is live now
            self.counts("rollback after without writes")
            self.end_beside()
        else:
            self.brought = dict(self.rows)
        assert rows_of(self.live.folder) == self.rows

    def change_places(self) -> None:
        assert self.beside is not None
        self.store.set_current(self.beside.number)
        left = self.made[self.live.number]
        left.has, left.source = self.moment, self.beside.number
        self.live, self.beside, self.is_kept = self.beside, self.live, True
        self.beside.settle()

    @precondition(lambda self: self.is_kept)
    @rule(ids=ITEMS, which=WHICH, is_mirrored=st.booleans())
    def write_and_roll_back(self, ids: list[int], which: int, is_mirrored: bool) -> None:
        self.upsert(ids, True, True)
        if is_mirrored:
            self.mirror(None)
        self.delete(ids[:2], True)
        self.switch(which, None)

    @rule(which=WHICH)
    def switch_that_is_given_up(self, which: int) -> None:
        final = self.live.seal(which)
        for members in self.live.members:
            for member in members:
                self.refuses(member)
        self.live.settle()
        assert self.live.seqs == final

    @precondition(lambda self: any(self.made[each].as_built is not None for each in self.others()))
    @rule(which=WHICH)
    def publish_without_writes(self, which: int) -> None:
        """Back to what a generation was built with."""
        others = [each for each in self.others() if self.made[each].as_built is not None]
        self.load(others[which % len(others)])
        assert self.beside is not None
        self.go_live_without_writes(which, self.made[self.beside.number].as_built)
        self.counts("without writes")

    @precondition(lambda self: self.brought is not None)
    @rule(ids=ITEMS, which=WHICH)
    def publish_what_is_beside_without_writes(self, ids: list[int], which: int) -> None:
        """It has older versions than the live one of what was written since."""
        self.upsert(ids, True, False)
        self.counts("kept, without writes" if self.is_kept else "candidate, without writes")
        self.go_live_without_writes(which, self.brought)

    @precondition(lambda self: self.is_of_this_timeline)
    @rule(ids=ITEMS, which=WHICH)
    def publish_without_writes_and_roll_back(self, ids: list[int], which: int) -> None:
        self.upsert(ids, True, False)
        if self.bring_over(self.live.seqs):
            self.publish_what_is_beside_without_writes(ids, which)
            self.mirror(None)
            self.switch(which, None)

    def go_live_without_writes(self, which: int, rows: Rows | None) -> None:
        """rows: what it has now. The one before is kept, and gets what is written from now on."""
        assert self.beside is not None and rows is not None
        part = parting(self.store, self.live.number, self.beside.number)
        self.live.seal(which)
        part()
        self.change_places()
        self.parted, self.rows = self.rows, dict(rows)
        self.brought = dict(self.parted)
        self.timeline += 1
        self.made[self.live.number].timeline = self.timeline

    # Housekeeping

    @rule(keep=st.integers(0, 2))
    def collect_garbage(self, keep: int) -> None:
        held = {self.live.number} | ({self.beside.number} if self.beside else set())
        policy = Policy(
            live=self.store.current(),
            held=held,
            keep=keep,
            keep_log_bytes=CONFIG.keep_log_bytes,
        )
        for removal in removals(self.store, policy):
            assert remove(self.store, removal, lambda: held)
        left = self.store.generation_numbers()
        gone = self.made.keys() - left
        assert all(number < self.live.number for number in gone) and not gone & held
        self.made = {number: self.made[number] for number in left}
        self.counts("removed" if gone else "nothing to remove")

    @rule(shard=WHICH)
    def erase(self, shard: int) -> None:
        """While it is served: its replicas change over meanwhile."""
        shard %= len(self.live.members)
        now = time.time()  # as files have it

        def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds
            for member in self.live.members[shard]:
                member.change_over()

        waiting = Waiting(sleep=sleep, now=lambda: now)
        number = self.live.number
        done = compact_away(self.store, number, shard, is_loaded=True, waiting=waiting)
        drop_superseded(self.store, done, is_loaded=True, waiting=waiting)
        assert done.left is None
        assert done.seq == self.live.seqs[shard]
        self.made[self.live.number].erased_at = self.moment
        self.counts("erased")

    # Always

    @property
    def vectors(self) -> dict[int, bytes]:
        return vectors_in(self.rows)

    @invariant()
    def what_was_acknowledged_is_live(self) -> None:
        if self.root is None:
            return
        StoreMachine.steps += 1
        assert self.live.contents() == self.vectors
        assert self.store.current() == self.live.number
        assert self.store.generation_numbers() == sorted(self.made)

    def teardown(self) -> None:
        """The store is started again: from files alone."""
        if self.root is None:
            return
        try:
            for loaded in (self.live, self.beside):
                if loaded is not None:
                    loaded.close()
            folder = self.store.generation(self.store.current())
            assert rows_of(folder) == self.rows
            verify_generation(folder, read_generation(folder))
        finally:
            shutil.rmtree(self.root)


@pytest.fixture(scope="module", autouse=True)
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Built once; every sequence begins with a copy."""
    StoreMachine.built = {}
    for kind, fields in KINDS.items():
        made = live_store(tmp_path_factory.mktemp(kind), 2, **fields)
        StoreMachine.built[kind] = made.store.root
    yield
    print(f"{StoreMachine.steps} steps: {StoreMachine.counted}")


def vectors_in(rows: Rows) -> dict[int, bytes]:
    return {item: vector for item, (vector, _) in rows.items()}


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=max(1, STEPS // STEPS_PER_EXAMPLE),
    stateful_step_count=STEPS_PER_EXAMPLE,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
