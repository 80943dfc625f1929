"""How a command with a private Ray ends: in time and with nothing left, whatever ends it.

A signal interrupts the command, which stops what it has started, in order. Ray cannot be
interrupted while it starts or stops: there the signal waits. A thread watches over all that, and
ends every process of the session at once, this one last, when

- the orderly end takes too long, or a second signal asks for more haste;
- Ray's own processes have ended, so that nothing is repaired any more and no order is possible.

It needs neither Ray nor the main thread, which may hang in either.
"""

import contextlib
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from shardline.cluster.exits import INTERRUPTED, exit_code
from shardline.cluster.serving.endpoint import is_alive
from shardline.cluster.serving.leftovers import end_session
from shardline.cluster.signals import handled_by, leave, not_ignored, terminal_files
from shardline.shards.core.errors import Unavailable

# How long an orderly end may take; killing what is left takes two seconds more. Who pressed Ctrl-C
# waits for it, so that has less.
ORDERLY_S = 15.0
ORDERLY_AFTER_CTRL_C_S = 6.0
# One event can bring several signals, as a closing terminal does, or `timeout` and the group's.
SAME_EVENT_S = 1.0
POLL_S = 0.5
SHOW_CURSOR = b"\x1b[?25h"  # which progress bars hide


def overdue(signals: Sequence[tuple[int, float]], now: float) -> str | None:
    """Why the orderly end is over, given the signals as (number, time in seconds); None: not yet.

    Times are those of one clock, in ascending order.
    """
    if not signals:
        return None
    number, first = signals[0]
    if signals[-1][1] - first > SAME_EVENT_S:
        return "signalled again"
    allowed = ORDERLY_AFTER_CTRL_C_S if number == signal.SIGINT else ORDERLY_S
    return f"not ended within {allowed:.0f} s" if now - first > allowed else None


class Ending:
    """Watches over one command; use as a context manager around the session.

    The session's owner names its folder and Ray's processes with ``begin``, and calls ``finish``
    once both are gone.
    """

    def __init__(self) -> None:
        self.is_active = False  # else signals do here what they did before
        self._signals: list[tuple[int, float]] = []
        self._session: Path | None = None
        self._has_session = False
        self._followed: dict[str, int] = {}
        self._is_ray_dead = False
        self._callbacks: list[Callable[[], None]] = []
        self._starting = threading.Lock()
        self._is_over = False
        self._held = 0
        self._is_pending = False
        self._is_interrupted = False
        self._is_waiting = False
        self._asked = threading.Event()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Ending":
        if threading.current_thread() is not threading.main_thread():
            return self  # signals go to the main thread, which is not ours to interrupt
        self.is_active = True
        self._terminal = terminal_files()
        # Ctrl-C even where a script has started this in the background: it is how `serve` ends
        self._numbers = {signal.SIGINT, *not_ignored()}
        receiving, sending = socket.socketpair()
        sending.setblocking(False)
        # a daemon: an interruption of this very method must not leave Python waiting for it
        watcher = threading.Thread(
            target=self._watch, args=(receiving,), name="ending", daemon=True
        )
        watcher.start()
        self._stack.callback(receiving.close)
        self._stack.callback(watcher.join)
        self._stack.callback(sending.close)
        # written by the handler in C, whatever the main thread is doing
        before = signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)
        self._stack.callback(signal.set_wakeup_fd, before)
        self._stack.enter_context(handled_by(self._on_signal, self._numbers))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if self._session is not None:  # interrupted between the session and its end
            end_session(self._session, wait_s=0)

    def begin(self, session: Path) -> None:
        """From here on there may be processes to end, and ``session`` is to be removed."""
        self._session = session
        self._has_session = True

    def follow(self, processes: dict[str, int]) -> None:
        """The pids of what the session cannot do without, by the name that people know it by."""
        self._followed = processes

    def finish(self) -> None:
        """Nothing of the session is left."""
        self._session = None

    def also(self, callback: Callable[[], None]) -> None:
        """Has this called, too, when all is ended at once: code that was to run later never will.

        It is called in another thread, and Ray is gone.
        """
        self._callbacks.append(callback)

    def wait(self, announce: Callable[[], None]) -> None:
        """Returns when a signal asks for the end. That is no interruption, but what is meant to
        happen, from the moment on when ``announce`` is called."""
        self._is_waiting = True
        announce()
        # any thread may be the one that takes a signal, and this one does not wake up then: a
        # process that was stopped gives those that came meanwhile to whichever goes on first
        while not self._asked.wait(POLL_S):
            pass
        self._is_waiting = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lets signals wait for the end of the block."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if self._is_pending and not self._held:
                self._is_pending = False
                self._interrupt()

    @contextlib.contextmanager
    def stopping_ray(self) -> Iterator[None]:
        """``held``, for the end of Ray: its processes are meant to go."""
        with self.held():
            self._followed = {}
            yield

    @contextlib.contextmanager
    def starting_process(self) -> Iterator[None]:
        """Around the start of a process of the session: there is none after the end of all."""
        with self._starting:
            if self._is_over:
                raise KeyboardInterrupt
            yield

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave(self._terminal)
        if self._held:
            self._is_pending = True
        else:
            self._interrupt()

    def _interrupt(self) -> None:
        """Once: a second signal does not disturb the orderly end, the watcher cuts it off.

        Without a session the watcher does nothing, so each signal interrupts.
        """
        is_first, self._is_interrupted = not self._is_interrupted, True
        if self._is_waiting:
            self._asked.set()
        elif is_first or not self._has_session:
            raise KeyboardInterrupt

    def _watch(self, receiving: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(receiving, selectors.EVENT_READ)
            while True:
                if selector.select(POLL_S):
                    received = receiving.recv(64)
                    if not received:
                        return
                    self._note_signals(received)
                if self._session is not None:
                    self._end_where_needed(self._session)

    def _note_signals(self, received: bytes) -> None:
        now = time.monotonic()
        self._signals += [(number, now) for number in received if number in self._numbers]

    def _end_where_needed(self, session: Path) -> None:
        dead = [name for name, pid in self._followed.items() if not is_alive(pid)]
        late = overdue(self._signals, time.monotonic())
        if dead and not self._is_ray_dead:
            self._is_ray_dead = True  # looked at again: who ended Ray may be about to signal us
        elif dead and self._followed:  # else they have gone just now, as they should
            self._end_without_ray(session, " and ".join(dead))
        elif late:
            self._end_at_once(session, f"interrupted: {late}, killed", INTERRUPTED)

    def _end_without_ray(self, session: Path, dead: str) -> None:
        """Signalled as well: all of the command's processes were, as systemd does it."""
        if self._signals:
            code = 0 if self._asked.is_set() else INTERRUPTED
            self._end_at_once(session, f"interrupted: {dead} ended too, killed the rest", code)
        error = Unavailable(
            f"{dead} ended unexpectedly",
            hint="all of this command's processes were ended; start it again",
        )
        self._end_at_once(session, f"error: {error}", exit_code(error))

    def _end_at_once(self, session: Path, line: str, code: int) -> NoReturn:
        """Does not return. Whatever goes wrong here, this process ends: it hangs otherwise."""
        try:
            self._say(line)
            # the start of a process takes milliseconds; a lock held longer hangs in it
            self._starting.acquire(timeout=SAME_EVENT_S)
            self._is_over = True
            end_session(session, wait_s=0)
            for callback in self._callbacks:
                callback()
        except BaseException as error:  # noqa: BLE001 - said below, and there is no other thread
            self._say(f"internal error: {type(error).__name__}: {error}")
        finally:
            os._exit(code)

    def _say(self, line: str) -> None:
        cursor = SHOW_CURSOR if os.isatty(2) else b""
        with contextlib.suppress(OSError):  # a terminal or a pipe that is gone
            os.write(2, cursor + line.encode() + b"\n")
