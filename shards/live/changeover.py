"""Changes a shard over to a newer main index while it serves.

The primary starts a compaction, a process of its own, when enough has been written. Any replica
that sees a newer complete ``main-<seq>`` loads it beside the one in use, in a thread of its own,
with what the log has had since; who writes then swaps it in (``ShardWrites.adopt``).
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Protocol

from shardline.shards.core.errors import Unavailable
from shardline.shards.core.messages import Absence
from shardline.shards.index.main_index import set_search_threads
from shardline.shards.index.spec import Device
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.loading import Loaded, load_caught_up
from shardline.shards.live.mains import compacted_seqs, main_folder
from shardline.shards.live.state import ShardState
from shardline.shards.live.takeover import Takeover
from shardline.shards.storage.generation import OwnIndex, read_generation

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks for a newer main index
PAUSE_S = 60.0  # after a compaction that failed
ENDS_WITHIN_S = 5.0  # a compaction that is told to end; then it is killed


class Running(Protocol):
    """A compaction that is under way; ``subprocess.Popen`` is one."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def compaction_process(generation: Path, shard: int, until: int) -> Running:
    return _process(str(generation), str(shard), str(until))


def takeover_process(
    generation: Path, shard: int, until: int, takeover: Takeover, keys: bytes
) -> Running:
    with TemporaryFile() as given:  # larger than a pipe holds
        given.write(keys)
        given.seek(0)
        return _process(str(generation), str(shard), str(until), takeover.to_json(), given=given)


def _process(*arguments: str, given: IO[bytes] | None = None) -> Running:
    command = [sys.executable, "-m", "shardline.shards.live.compaction", *arguments]
    return subprocess.Popen(
        command, stdin=given or subprocess.DEVNULL, stdout=subprocess.PIPE, env=_environment()
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Changeover:
    """``turn`` is called again and again by the thread that writes; it never waits."""

    def __init__(
        self,
        generation: Path,
        shard: int,
        *,
        main_seq: int,
        own: OwnIndex | None = None,
        config: LiveConfig | None = None,
        start: Callable[[Path, int, int], Running] = compaction_process,
        start_takeover: Callable[[Path, int, int, Takeover, bytes], Running] = takeover_process,
        prepare: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        device: Device | None = None,
    ) -> None:
        """main_seq: of the main index in use, 0 for the generation's own; own: as of
        ``ShardEntry``, of that. prepare: called when a newer one has been loaded, before it is
        searched, in the thread that loads. device: what newer ones are searched on; None: the
        manifest's."""
        self.main_seq = main_seq
        self.own = own
        self.takeover: Takeover | None = None  # the newest that was ordered here
        self.takeover_failure: Absence | None = None  # why it failed
        self.trouble: str | None = None  # why the newest compaction or change failed
        self._generation, self._shard = generation, shard
        self._live = live_folder(generation, shard)
        self._config = config or LiveConfig()
        self._start, self._start_takeover = start, start_takeover
        self._prepare, self._clock = prepare, clock
        self._device = device
        self._running: Running | None = None
        self._is_takeover = False  # what runs, or ran last
        self._newest = main_seq  # of the main indexes on disk, when they were last looked at
        self._damaged: int | None = None  # of one that was passed over; the next repairs the shard
        self._not_before = self._looked_at = -float("inf")
        self._loader: threading.Thread | None = None
        self._loaded: Loaded | None = None

    @property
    def is_busy(self) -> bool:
        return self._running is not None or self._loader is not None

    def turn(self, state: ShardState, *, leads: bool) -> Loaded | None:
        """What is to be swapped in now, else None. A compaction is started by who ``leads``."""
        now = self._clock()
        if self._running is not None and self._is_takeover and not leads:
            self._end_process()  # whoever leads now is ordered to do it, and may compact meanwhile
        self._see_process(now)
        if self._loader is not None:
            return self._loaded_by_now(now)
        if now >= self._looked_at + LOOK_S:
            self._look(now, state)
        # not while a newer one waits to be swapped in: what is due may be in it already
        is_free = self._running is None and self._loader is None and self._has_newest
        if leads and is_free and now >= self._not_before and self._is_due(state):
            self._running = self._start(self._generation, self._shard, state.seq)
            self._is_takeover = False
            logger.info("shard %d: a compaction begins, at write %d", self._shard, state.seq)
        return None

    def take_over(self, takeover: Takeover, mark: Callable[[], tuple[int, bytes]]) -> None:
        """Starts a process that makes a main index of another generation's, as ``takeover`` says.
        mark: ``ShardWrites.mark``.

        Raises:
            Unavailable: a compaction is under way, or a change to a newer main index.
            OSError: no process can be started. Else as ``mark``.
        """
        if self.is_busy or not self._has_newest:
            raise Unavailable(f"shard {self._shard}: a compaction is under way")
        seq, keys = mark()
        self._running = self._start_takeover(self._generation, self._shard, seq, takeover, keys)
        self._is_takeover = True
        self.takeover, self.takeover_failure = takeover, None
        logger.info("shard %d: takes over the index of %s", self._shard, takeover.source)

    def adopted(self, loaded: Loaded) -> None:
        """What ``turn`` has returned is in use."""
        self.main_seq, self.own = loaded.main_seq, loaded.own

    def put_off(self, error: Exception | None = None) -> None:
        """What was loaded could not be swapped in now, or ``error`` came of it: it is tried again
        after PAUSE_S."""
        self._looked_at = self._not_before = self._clock() + PAUSE_S
        if error is not None:
            self.trouble = f"no change to a newer main index: {error}"
            logger.error("shard %d: %s", self._shard, self.trouble, exc_info=error)

    def describe(self) -> dict[str, Any]:
        """For status pages."""
        return {
            "main_seq": self.main_seq,
            "index_of": None if self.own is None else self.own.generation,
            "compacting": self._running is not None,
            "compaction_trouble": self.trouble,
        }

    def stop(self) -> None:
        """Ends what is under way."""
        if self._running is not None:
            self._end_process()
        if self._loader is not None:
            self._loader.join()

    @property
    def _has_newest(self) -> bool:
        """Of the main indexes on disk, but for one that is damaged."""
        return self._newest <= self.main_seq or self._newest == self._damaged

    def _is_due(self, state: ShardState) -> bool:
        return self._config.is_due(
            written=state.delta.rows,
            hidden=state.hidden,
            rows=state.main.rows,
            writes=state.seq - self.main_seq,
            shard=self._shard,
        )

    def _end_process(self) -> None:
        assert self._running is not None
        self._running.terminate()
        try:
            self._running.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._running.kill()
            self._running.wait()
        if isinstance(self._running, subprocess.Popen) and self._running.stdout is not None:
            self._running.stdout.close()  # not read: a child of it may hold it for a moment
        self._running = None

    def _see_process(self, now: float) -> None:
        if self._running is None or (code := self._running.poll()) is None:
            return
        said, self._running = _output_of(self._running), None
        self._looked_at = -float("inf")
        self._damaged = None  # it may have been written anew
        if code:
            self._failed(code, said, now)

    def _failed(self, code: int, said: bytes, now: float) -> None:
        why = _told(said) or Absence(
            Unavailable.code, f"it ended with code {code}: the log of the shard says why"
        )
        if self._is_takeover:
            self.takeover_failure = why
            logger.error("shard %d: the index is not taken over: %s", self._shard, why.text)
            return
        self.trouble = f"a compaction failed: {why.text}"
        self._not_before = now + PAUSE_S
        logger.error("shard %d: %s", self._shard, self.trouble)

    def _look(self, now: float, state: ShardState) -> None:
        self._looked_at = now
        self._newest = (compacted_seqs(self._live) or [0])[-1]
        if self._newest > self.main_seq:
            self._loader = threading.Thread(
                target=self._load,
                args=(state.main.is_prepared_for_filters,),
                name="shard-changeover",
                daemon=True,
            )
            self._loader.start()

    def _load(self, has_filters: bool) -> None:
        """has_filters: searches of the index in use have them, and are not to wait for the new
        one's first."""
        set_search_threads(1)  # of this thread
        try:
            manifest = read_generation(self._generation)
            loaded = load_caught_up(self._generation, manifest, self._shard, device=self._device)
            if loaded.main_seq > self.main_seq:
                if has_filters:
                    loaded.state.main.prepare_for_filters()
                self._prepare()
                self._loaded = loaded
            elif loaded.damaged:
                self._pass_over(loaded.damaged[-1])
        except Exception as error:  # whatever is wrong with the new one, the old one serves on
            self.trouble = f"the newest main index cannot be used: {error}"
            logger.exception("shard %d: the newest main index cannot be used", self._shard)

    def _pass_over(self, seq: int) -> None:
        """The newest main index is damaged, and the shard whole without it: another compaction, not
        at once on what may be a failing disk, takes its place."""
        if seq != self._damaged:
            self._damaged = seq
            self._not_before = self._clock() + PAUSE_S
        path = main_folder(self._live, seq)
        self.trouble = f"the newest main index is damaged, and not used: {path}"

    def _loaded_by_now(self, now: float) -> Loaded | None:
        assert self._loader is not None
        if self._loader.is_alive():
            return None
        self._loader = None
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            self._looked_at = now + PAUSE_S
            return None
        self.trouble = None
        return loaded


def _output_of(ended: Running) -> bytes:
    if not isinstance(ended, subprocess.Popen) or ended.stdout is None:
        return b""
    with ended.stdout as stdout:
        found: bytes = stdout.read()
        return found


def _told(said: bytes) -> Absence | None:
    """The last line of what a compaction has printed; None: it is no reason."""
    try:
        found = json.loads(said.splitlines()[-1])
        return Absence(str(found["code"]), str(found["text"]))
    except (IndexError, ValueError, KeyError, TypeError):
        return None
