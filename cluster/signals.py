"""Signals that end a command: Ctrl-C, SIGTERM, and SIGHUP of a terminal that closes.

Every command is interrupted by each of them as by Ctrl-C, so that what it has begun is undone:
temporary folders, unfinished files. A command with a Ray of its own takes them over for as long as
that runs (``cluster.serving.ending``).
"""

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


def ending_signals() -> tuple[signal.Signals, ...]:
    """The signals that end a command; SIGHUP is left out where it is ignored, as under nohup."""
    hangs_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hangs_up else ()))


@contextlib.contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Has ``handler`` called for each ending signal; does nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """For a command from its start to its end: each ending signal raises KeyboardInterrupt.

    What is left to do afterwards takes no time, and Python's own end is not to be interrupted in
    its middle: from there on a signal ends the process at once.
    """
    terminal = terminal_files()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave(terminal)
        raise KeyboardInterrupt

    try:
        with handled_by(interrupt):
            yield
    finally:
        if threading.current_thread() is threading.main_thread():
            atexit.register(_default)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Signals wait for the end of the block: an import, for one, that cannot be interrupted."""
    came: list[int] = []
    with handled_by(lambda number, frame: came.append(number)):
        yield
    if came:
        signal.raise_signal(came[0])


def terminal_files() -> tuple[int, ...]:
    """Which of the standard files are a terminal."""
    return tuple(number for number in (0, 1, 2) if os.isatty(number))


def leave(files: tuple[int, ...]) -> None:
    """Turns files of a terminal that has closed into /dev/null: each write to them would fail."""
    if files:
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in files:
            os.dup2(nothing, number)
        os.close(nothing)


def _default() -> None:
    for number in ending_signals():
        signal.signal(number, signal.SIG_DFL)
