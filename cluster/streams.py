"""The standard streams of a command, whose other ends may be closed or gone.

A command does its work and ends with its own exit code whether anybody reads what it prints or not:
what is written to a stream that was closed before the start (``>&-``), or whose reader has left
(``| head -1``), is dropped. A full disk behind standard output is still an error.
"""

import contextlib
import io
import os
import sys

STDIN, STDOUT, STDERR = range(3)


def open_closed_streams() -> None:
    """Opens the null device in place of each of the three that is closed.

    Otherwise the next file or socket that the program opens would get its number, and whatever a
    library prints would be written into that.
    """
    for number in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(number)
        except OSError:  # the system gives the lowest number that is free: this one
            os.open(os.devnull, os.O_RDONLY if number == STDIN else os.O_WRONLY)
    if sys.stdin is None:
        sys.stdin = open(STDIN, closefd=False)  # noqa: SIM115 - open until the process ends


def outlive_readers() -> None:
    """Makes standard output and error streams whose reader may leave; those that are not the
    process's own, as under a test, stay as they are."""
    if _is_own(sys.stdout, STDOUT):
        sys.stdout = _stream(_Outlet(STDOUT, "wb", closefd=False), sys.stdout)
    if _is_own(sys.stderr, STDERR):
        sys.stderr = _stream(_LastOutlet(STDERR, "wb", closefd=False), sys.stderr)


class _Outlet(io.FileIO):
    """A file descriptor that is the null device from the moment when its reader has left."""

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except BrokenPipeError:
            return self._dropped(data)

    def _dropped(self, data: "bytes | bytearray | memoryview") -> int:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        return memoryview(data).nbytes


class _LastOutlet(_Outlet):
    """For errors: where they cannot be written, there is nowhere to say so."""

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError:
            return self._dropped(data)


def _is_own(stream: object, number: int) -> bool:
    if stream is None:
        return True
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == number
    return False


def _stream(outlet: io.FileIO, before: object) -> io.TextIOWrapper:
    """A text stream like the one it replaces, which is flushed first; None: it was closed."""
    buffered = io.BufferedWriter(outlet)
    if not isinstance(before, io.TextIOWrapper):
        return io.TextIOWrapper(buffered, encoding="utf-8")
    before.flush()
    return io.TextIOWrapper(
        buffered,
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=before.line_buffering,
        write_through=before.write_through,
    )
