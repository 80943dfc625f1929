"""Remembers over restarts that a card has failed, and serves from the CPU when that goes on.

A CUDA error in a search ends the process within faiss, which raises nothing and says nothing to who
comes after. So a byte of a file that is mapped into memory says while the card is in use; the
next process of the replica finds it set. The file has the times of the last failures behind it and
lies on the host of the card.
"""

import hashlib
import mmap
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shardline.shards.core.errors import ConfigError, Unavailable
from shardline.shards.core.messages import ReplicaKey
from shardline.shards.index.spec import Device

FAILURES = 3  # so many within WINDOW_S, and the CPU is used, if that is allowed
WINDOW_S = 600.0
LAYOUT = struct.Struct(f"<B7x{FAILURES}d")  # is it in use; when it failed, 0 for never


def card_log_path(generation: Path, key: ReplicaKey) -> Path:
    """Of a replica, in a folder of this user alone on this host.

    Raises:
        Unavailable: there can be no such folder.
    """
    folder = Path(tempfile.gettempdir()) / f"shardline-cards-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise Unavailable("no folder for the failures of cards", got=str(error)) from error
    if found.st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink():
        raise Unavailable(
            "the folder for the failures of cards is another user's",
            expected="a folder of this user's",
            got=str(folder),
            hint="remove it, or set TMPDIR to another place",
        )
    place = hashlib.sha256(str(generation.resolve()).encode()).hexdigest()[:16]
    return folder / f"{place}-{key.shard}-{key.replica}"


class CardLog:
    """As ``gpu.CardWatch``, of one replica; used by any thread of one process."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Opens what earlier processes have left, and counts what ended the last one.

        Raises:
            Unavailable: the file cannot be read or written.
        """
        self._clock = clock
        self._lock = threading.RLock()
        self._inside = 0
        try:
            with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)) as file:
                if os.fstat(file.fileno()).st_size != LAYOUT.size:
                    os.ftruncate(file.fileno(), 0)
                    os.ftruncate(file.fileno(), LAYOUT.size)
                self._bytes = mmap.mmap(file.fileno(), LAYOUT.size)
        except OSError as error:
            raise Unavailable("the failures of a card are not known", got=str(error)) from error
        if self._bytes[0]:
            self.note_failure()

    @property
    def failures(self) -> int:
        """Within the last WINDOW_S."""
        _, *times = LAYOUT.unpack(self._bytes)
        now = self._clock()
        return sum(now - WINDOW_S <= when <= now for when in times)

    def note_failure(self) -> None:
        """One more; the oldest goes."""
        with self._lock:
            _, *times = LAYOUT.unpack(self._bytes)
            LAYOUT.pack_into(self._bytes, 0, self._inside > 0, *times[1:], self._clock())

    @contextmanager
    def using(self) -> Iterator[None]:
        """Around what the card does. An error within is a failure, but for a ConfigError, which is
        that of who loads: ``noting_refusals``."""
        self._step(1)
        try:
            yield
        except ConfigError:
            self._step(-1)
            raise
        except Exception:
            self._step(-1)
            self.note_failure()
            raise
        self._step(-1)

    def _step(self, change: int) -> None:
        with self._lock:
            self._inside += change
            self._bytes[0] = self._inside > 0

    def close(self) -> None:
        self._bytes.close()


def device_for(wanted: Device, failures: int, *, cpu_allowed: bool) -> tuple[Device, str | None]:
    """Where a replica is searched, and what `status` says of it."""
    if wanted is not Device.CUDA or not cpu_allowed or failures < FAILURES:
        return wanted, None
    return Device.CPU, (
        f"served from the CPU: its card has failed {failures} times within {WINDOW_S / 60:.0f} "
        "minutes; the next start after that tries the card again"
    )


@contextmanager
def noting_refusals(log: CardLog) -> Iterator[None]:
    """Around the loading of a shard: a card that has gone, or is full, is a failure too."""
    try:
        yield
    except ConfigError as error:
        if error.field == "index.device":
            log.note_failure()
        raise
