"""A log under any sequence of appends, changes of the primary, faults and trims, against a list."""

import errno
import random
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shardline.shards.core.errors import NotFound, NotPrimary, ReadOnly
from shardline.shards.live.epoch_file import read_epoch
from shardline.shards.live.log import Log
from shardline.shards.live.log_segments import segment_names
from shardline.shards.live.log_tail import LogTail
from tests.fake_disk import FailingCalls, FakeDisk, ProcessFiles
from tests.live_writes import as_bytes, records

FOLDER = Path("live")
SEGMENT_BYTES = 400  # a few groups
MOST_RECORDS = 3  # of a group


class Following:
    """A follower and what it was given, after ``start``."""

    def __init__(self, disk: FakeDisk, start: int) -> None:
        self.start = start
        self.given: list[bytes] = []
        self._tail = LogTail(FOLDER, start, ProcessFiles(disk))

    def start_up(self) -> None:
        self.given += as_bytes(self._tail.read_proven())

    def poll(self) -> None:
        self.given += as_bytes(self._tail.read_new())


class LogMachine(RuleBasedStateMachine):
    """truth: the records that must be in the log. attempted: one group that may follow them.

    compacted: the seq that a compaction has made durable; recovery starts there. Epochs rise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.disk = FakeDisk()
        self.truth: list[bytes] = []
        self.attempted: list[bytes] = []
        self.compacted = 0
        self.epoch = 0
        self.leader: Log | None = None
        self.former: list[Log] = []
        self.followers: list[Following] = []

    def failing(self, log: Log, call: int, number: int, part: int | None) -> FailingCalls:
        files = log._files
        assert isinstance(files, ProcessFiles)
        files.before = failing = FailingCalls(files.calls + call, number, part)
        return failing

    def adopt(self, found: list[bytes], after: int) -> None:
        expected = self.truth[after:]
        assert found in (expected, [*expected, *self.attempted])
        self.truth[after:] = found
        self.attempted = []

    @rule()
    def change_the_primary(self) -> None:
        self.epoch += 1
        log, found = Log.open(
            FOLDER,
            self.epoch,
            after_seq=self.compacted,
            files=ProcessFiles(self.disk),
            segment_bytes=SEGMENT_BYTES,
        )
        self.adopt(as_bytes(found), self.compacted)
        if self.leader is not None:
            self.former.append(self.leader)
        self.leader = log
        assert log.seq == len(self.truth)

    @rule(call=st.integers(1, 30), number=st.sampled_from([errno.EIO, errno.ENOSPC]))
    def fail_to_change_the_primary(self, call: int, number: int) -> None:
        """The former primary may lead on, or nobody."""
        self.epoch += 1
        files = ProcessFiles(self.disk, FailingCalls(call, number, 20))
        try:
            log, found = Log.open(FOLDER, self.epoch, after_seq=self.compacted, files=files)
        except ReadOnly:
            return
        self.adopt(as_bytes(found), self.compacted)
        files.before = None
        if self.leader is not None:
            self.former.append(self.leader)
        self.leader = log

    @precondition(lambda self: self.leader is not None)
    @rule(count=st.integers(1, MOST_RECORDS))
    def append(self, count: int) -> None:
        self.try_to_append(count)

    @precondition(lambda self: self.leader is not None)
    @rule(
        count=st.integers(1, MOST_RECORDS),
        call=st.integers(1, 9),
        number=st.sampled_from([errno.EIO, errno.ENOSPC]),
        part=st.sampled_from([None, 0, 1, 33, 90]),
    )
    def append_on_a_disk_that_fails(
        self, count: int, call: int, number: int, part: int | None
    ) -> None:
        assert self.leader is not None
        failing = self.failing(self.leader, call, number, part)
        self.try_to_append(count)
        failing.heal()

    def try_to_append(self, count: int) -> None:
        log = self.leader
        assert log is not None
        group = records(log.seq + 1, log.seq + count, epoch=log.epoch)
        was_refusing = log._refusal is not None
        try:
            log.append(group)
        except (ReadOnly, NotPrimary) as error:
            if not was_refusing:
                self.attempted = as_bytes(group)
            if isinstance(error, NotPrimary):
                self.leader = None
            return
        assert not was_refusing
        self.truth += as_bytes(group)

    @precondition(lambda self: self.leader is not None)
    @rule()
    def reopen(self) -> None:
        assert self.leader is not None
        try:
            self.adopt(as_bytes(self.leader.reopen(len(self.truth))), len(self.truth))
        except NotPrimary:
            self.leader = None

    @precondition(lambda self: self.former)
    @rule(which=st.integers(0, 9), count=st.integers(1, 2))
    def a_former_primary_appends(self, which: int, count: int) -> None:
        log = self.former[which % len(self.former)]
        try:
            log.append(records(log.seq + 1, log.seq + count, epoch=log.epoch))
        except (NotPrimary, ReadOnly):
            return
        raise AssertionError("acknowledged by a former primary")

    @precondition(lambda self: self.former)
    @rule(which=st.integers(0, 9))
    def a_former_primary_reopens(self, which: int) -> None:
        log = self.former[which % len(self.former)]
        try:
            assert log.reopen(log.seq) == []
        except NotPrimary:
            return
        assert log._refusal is None

    @precondition(lambda self: self.leader is not None)
    @rule(back=st.integers(0, 6), roll=st.booleans())
    def compact(self, back: int, roll: bool) -> None:
        """Other files hold all up to some seq from here on, though the trim may fail."""
        assert self.leader is not None
        self.compacted = max(self.compacted, len(self.truth) - back)
        try:
            if roll:
                self.leader.roll()
            self.leader.trim(self.compacted)
        except NotPrimary:
            self.leader = None
        except ReadOnly:
            return

    @rule()
    def kill(self) -> None:
        """Every process ends; what they have written is there."""
        self.leader, self.former, self.followers = None, [], []

    @rule(seed=st.integers(0, 1 << 30), strict=st.booleans())
    def power_cut(self, seed: int, strict: bool) -> None:
        self.kill()
        self.disk = self.disk.power_cut(None if strict else random.Random(seed))

    @rule()
    def follow(self) -> None:
        if len(self.followers) < 4:
            self.followers.append(Following(self.disk, self.compacted))

    @rule()
    def start(self) -> None:
        """A replica that starts now must know what was acknowledged, but for one group at most."""
        following = Following(self.disk, self.compacted)
        following.start_up()
        files = ProcessFiles(self.disk)
        names = segment_names(files.names(FOLDER)) if self.disk.folders else []
        if names:
            leads = read_epoch(FOLDER, files) == names[-1].epoch
            known = self.compacted + len(following.given)
            assert known >= len(self.truth) - (0 if leads else MOST_RECORDS)
        if len(self.followers) < 4:
            self.followers.append(following)

    @rule()
    def poll(self) -> None:
        for follower in list(self.followers):
            try:
                follower.poll()
            except NotFound:
                assert follower.start + len(follower.given) < self.compacted
                self.followers.remove(follower)

    @invariant()
    def followers_were_given_the_beginning_of_the_log(self) -> None:
        known = [*self.truth, *self.attempted]
        for follower in self.followers:
            end = follower.start + len(follower.given)
            assert follower.given == known[follower.start : end]

    def teardown(self) -> None:
        self.change_the_primary()
        follower = Following(self.disk, self.compacted)
        follower.poll()
        self.poll()
        assert follower.given == self.truth[self.compacted :]
        for each in self.followers:
            assert each.start + len(each.given) == len(self.truth)


TestLogMachine = LogMachine.TestCase
TestLogMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
