"""The writes of one shard: taken as its primary, or followed as one of its other replicas.

A write is acknowledged when it is in the log, fsynced, the epoch is still ours, and it is part of
``holder.state``. Whatever becomes of the log, searches go on. No threads here: one thread at a time
calls a ``ShardWrites``, while others read ``holder.state``.
"""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardline.shards.core.errors import (
    CorruptFile,
    NotFound,
    NotPrimary,
    ReadOnly,
    ShardlineError,
)
from shardline.shards.core.messages import (
    Absence,
    WriteReply,
)
from shardline.shards.live.carried_keys import CarriedKeys, leave_keys
from shardline.shards.live.epoch_file import read_epoch
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.live.loading import Loaded
from shardline.shards.live.log import Log
from shardline.shards.live.log_files import FILES, LogFiles
from shardline.shards.live.log_tail import LogTail
from shardline.shards.live.mains import remove_older
from shardline.shards.live.records import Delete, Record
from shardline.shards.live.state import Applied, ShardState, apply
from shardline.shards.live.write_group import Holder, WriteGroup, WriteRequest
from shardline.shards.live.write_keys import WriteKeys

logger = logging.getLogger(__name__)

HEAL_S = 1.0  # between two attempts to write a log again that could not be written
LOOK_S = 1.0  # between two looks of an idle primary at who leads


class ShardWrites:
    """Follows the log in ``folder`` from the start; ``lead`` makes it the one who writes it."""

    def __init__(
        self,
        holder: Holder,
        folder: Path,
        *,
        keys: WriteKeys | None = None,
        config: LiveConfig | None = None,
        files: LogFiles = FILES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._holder = holder
        self._folder = folder
        self._keys = keys or WriteKeys()
        self._carried = CarriedKeys(folder)
        self._config = config or LiveConfig()
        self._files, self._clock = files, clock
        self._log: Log | None = None
        self._tail: LogTail | None = None
        self._healed_at = 0.0
        self._looked_at = 0.0
        self.epoch = 0  # of this replica as primary; 0: it follows
        self._sealed = 0  # the epoch of the newest ``seal`` by this replica
        # why writes are refused, or not followed, now; None: they are taken
        self.trouble: ShardlineError | OSError | None = None

    @property
    def leads(self) -> bool:
        return self._log is not None

    @property
    def leading_epoch(self) -> int | None:
        """With which it is the primary; None: it is not."""
        return self.epoch if self.leads else None

    @property
    def refused(self) -> Absence | None:
        """Why a primary takes no writes now; None: it takes them, or is none."""
        trouble = self.trouble
        if trouble is None or not self.leads:
            return None
        return Absence(getattr(trouble, "code", ReadOnly.code), str(trouble))

    def newest_epoch(self) -> int:
        """Of all primaries of the shard; 0 if there was none, or its file cannot be read."""
        try:
            return read_epoch(self._folder, self._files)
        except (CorruptFile, OSError):
            return 0

    @property
    def state(self) -> ShardState:
        return self._holder.state

    @property
    def seq(self) -> int:
        return self._holder.state.seq

    def lead(self, epoch: int) -> int:
        """Becomes the primary; the number of writes that are part of its state then.

        Raises:
            NotPrimary: a later epoch has been given to another.
            CorruptFile: the log is damaged. NotFound: it was trimmed behind this state, so a newer
            main index is to be adopted first. OSError: it cannot be read or written.
        """
        if self._log is not None and epoch <= self.epoch:
            return self.seq
        if self._log is None:
            self.catch_up()  # which notices a log that is not the one followed until now
        self._close_log()
        try:
            log, records = Log.open(self._folder, epoch, after_seq=self.seq, files=self._files)
        except Exception as error:
            if isinstance(error, ShardlineError | OSError):
                self.trouble = copy.copy(error)
            raise
        self._tail = None
        self._log, self.epoch, self.trouble = log, epoch, None
        self._apply_logged(records)
        logger.info("shard %d: writes are taken from %d on, epoch %d", *self._numbers, epoch)
        return self.seq

    def seal(self, epoch: int) -> int:
        """Nobody acknowledges a write from then on, until a replica leads with a later epoch; the
        number of writes that are part of its state then: all that were ever acknowledged.

        It takes the epoch and reads the log as ``lead`` does, so every primary before it is fenced,
        and gives up the lead. Replicas, this one too, follow the log to that number. The same
        epoch again answers the same. Its keys are left for the generation that goes live.

        Raises:
            NotPrimary: a later epoch, or this one, has been given to a primary. OSError: the keys
                cannot be left. Else as ``lead``.
        """
        if epoch == self._sealed == self.newest_epoch():
            return self.seq
        if self._log is not None and epoch <= self.epoch:
            raise NotPrimary(
                "cannot be sealed", expected=f"an epoch above {self.epoch}", got=str(epoch)
            )
        self.lead(epoch)
        self._close_log()
        leave_keys(self._folder, epoch, self._keys, self._files)
        self._sealed = epoch
        logger.info("shard %d: sealed, no writes are taken from %d on", *self._numbers)
        return self.seq

    def notice_successor(self) -> None:
        """A primary that nobody asks to write learns from the log's epoch that another leads, and
        follows that one from then on: its searches would go on without the other's writes. Reads
        the epoch not more often than LOOK_S."""
        if self._log is None or self._clock() < self._looked_at + LOOK_S:
            return
        self._looked_at = self._clock()
        newest = self.newest_epoch()
        if newest > self.epoch:
            self._failed(NotPrimary(f"epoch {newest} leads"))

    def catch_up(self) -> int:
        """Applies what the primary has written since; the number of records. None as primary.

        Raises:
            CorruptFile: the log is damaged. OSError: it cannot be read.
        """
        if self._log is not None:
            return 0
        if self._tail is None:
            self._tail = LogTail(self._folder, self.seq, self._files)
        records = self._tail.read_new()
        self._apply(records)
        self.trouble = None
        return len(records)

    def write(self, requests: Sequence[WriteRequest]) -> list[WriteReply | ShardlineError]:
        """A reply to each request, in order, all of them durable by one fsync; or its error.

        After NotPrimary, ReadOnly and StoreFull a write may still turn out to be part of the log:
        who repeats it with the same key has one effect.
        """
        try:
            log = self._writable_log()
        except ShardlineError as error:
            return [error] * len(requests)
        self._carried.look(self._files)
        most = self._config.max_delta_rows
        group = WriteGroup(self._keys, self._carried, self._holder, self.epoch, most)
        for request in requests:
            group.add(request)
        if group.records:
            try:
                self._append(log, group.records)
            except (NotPrimary, ReadOnly) as error:
                return group.replies([], error)
        return group.replies(self._apply_logged(group.records), None)

    def _append(self, log: Log, records: Sequence[Record]) -> None:
        """Raises NotPrimary, ReadOnly; from then on writes are refused."""
        try:
            log.append(records)
        except (NotPrimary, ReadOnly) as error:
            self._failed(error)
            raise
        except Exception:  # a bug: nothing can be said of the log, so another is to lead
            self._close_log()
            raise

    def mark(self) -> tuple[int, bytes]:
        """Logs a write that changes nothing, so that no main index has its number yet, nor any
        router's cache; that number, and the keys of all writes up to it, packed.

        Raises:
            NotPrimary, ReadOnly, StoreFull: it cannot be logged.
        """
        log = self._writable_log()
        nothing = Delete(item_ids=np.empty(0, np.int64))
        record = Record(seq=self.seq + 1, epoch=self.epoch, key="", change=nothing)
        self._append(log, [record])
        self._apply_logged([record])
        return self.seq, self._keys.pack()

    def adopt(self, loaded: Loaded) -> bool:
        """Takes a newer main index in place of the one in use, with all that is in the state;
        whether it was taken. As primary, removes what the log need no longer keep.

        Raises:
            CorruptFile, OSError: of the log.
        """
        tail = LogTail(self._folder, loaded.state.seq, self._files)
        state, own = loaded.state, self.seq
        # once: all that this replica has applied was in the log before; catch_up reads the rest
        records = tail.read_new()
        state, applied = apply(state, records)
        newer: list[tuple[Record, Applied]] = list(zip(records, applied, strict=True))
        if state.seq < self.seq or (self._log is not None and state.seq > self.seq):
            return False
        if own < loaded.state.seq:  # a replica that was behind has not seen what lies between
            self._keys = loaded.keys
        for record, outcome in newer:
            if record.seq > own:
                self._keys.add(record, rows=outcome.rows, existed=outcome.existed)
        self._holder.state = state
        if self._log is None:
            self._tail = tail
        else:
            self._trim(self._log, loaded.main_seq)
        return True

    def _trim(self, log: Log, seq: int) -> None:
        """Removes what a durable main index has; what is left over goes with the next one."""
        try:
            log.roll()
            log.trim(seq, self._config.keep_log_bytes)
            remove_older(self._folder)
        except (NotPrimary, ReadOnly) as error:
            self._failed(error)
        except OSError as error:
            logger.warning("shard %d: the log is not trimmed: %s", self._holder.shard, error)

    def heal(self) -> None:
        """Tries to write a log again that could not be written; not more often than HEAL_S."""
        if self._log is None or self.trouble is None or self._clock() < self._healed_at + HEAL_S:
            return
        self._healed_at = self._clock()
        try:
            self._apply_logged(self._log.reopen(self.seq))
        except (NotPrimary, ReadOnly, CorruptFile, NotFound) as error:
            self._failed(error)
        else:
            self.trouble = None
            logger.info("shard %d: writes are taken again from %d on", *self._numbers)

    def describe(self) -> dict[str, Any]:
        """For status pages: ``leads`` is the epoch of the primary, None of others."""
        trouble = self.trouble
        return {
            "leads": self.leading_epoch,
            "seq": self.seq,
            "trouble": None if trouble is None else str(trouble),
        }

    def close(self) -> None:
        self._close_log()

    @property
    def _numbers(self) -> tuple[int, int]:
        return self._holder.shard, self.seq + 1

    def _writable_log(self) -> Log:
        """Raises NotPrimary, ReadOnly."""
        self.heal()
        if self._log is None:
            raise NotPrimary("another replica takes the writes of this shard")
        if isinstance(self.trouble, ShardlineError):
            raise copy.copy(self.trouble)  # an exception collects the trace of every raise
        return self._log

    def _failed(self, error: ShardlineError) -> None:
        if isinstance(error, NotPrimary):
            logger.warning("shard %d: no longer the primary of epoch %d: %s",
                           self._holder.shard, self.epoch, error)  # fmt: skip
            self._close_log()
            return
        kept = copy.copy(error)  # the trace of what was raised keeps the requests alive
        logger.error("shard %d: writes are refused: %s", self._holder.shard, kept)
        self.trouble, self._healed_at = kept, self._clock()

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log, self.epoch = None, 0

    def _apply_logged(self, records: Sequence[Record]) -> list[Applied]:
        """Of the log that this replica writes: it is ahead of the state until this is done."""
        try:
            return self._apply(records)
        except Exception:  # a bug: nothing may be added to a log that is ahead of the state
            self._close_log()
            raise

    def _apply(self, records: Sequence[Record]) -> list[Applied]:
        if not records:
            return []
        state, applied = apply(self._holder.state, records)
        for record, outcome in zip(records, applied, strict=True):
            self._keys.add(record, rows=outcome.rows, existed=outcome.existed)
        self._holder.state = state
        return applied
