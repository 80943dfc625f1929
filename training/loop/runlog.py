"""The log of a run: one JSON object per line, appended, so that a resumed run goes on in it.

Every line has ``event``, ``time`` (s since 1970), ``epoch`` (of the step, from 1) and ``step``
(optimiser steps done). Events: start, warm_start (``origin``: the run whose weights it starts from;
then their validation, of epoch 0), step, validation, mining, end; the last one says whether it was
early and which epoch is kept. Loss, shares and logits of a step line are means over the ranks at
that step. examples_per_s and gathered_bytes are of the steps since the line before or the epoch's
start, without validation, mining and checkpoints; gathered_bytes came to rank 0 per step from the
others, without the dense gradients, which are reduced.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from shardline.shards.core.errors import CorruptFile, NotFound, Unavailable
from shardline.shards.core.small_files import open_regular, read_small

LOG = "log.jsonl"  # inside the run folder
MAX_LOG_BYTES = 1 << 30  # 300 bytes per line: three million lines
POLL_S = 0.5  # how often the log of ranks elsewhere is read for progress

Event = dict[str, Any]
OnEvent = Callable[[Event], None]


class RunLog:
    """Appends events to a file and hands each to ``on_event``."""

    def __init__(self, path: Path, on_event: OnEvent | None, batch_size: int) -> None:
        self._path = path
        self._on_event = on_event
        self._batch_size = batch_size
        self._last = (0, 0, time.perf_counter())  # step, bytes received, when

    def start(self, step: int, *, received: int) -> None:
        """Steps begin, or go on, after ``step``: what came since the last one was something else.

        received: bytes that rank 0 has got from the others by gathers since it began.
        """
        self._last = (step, received, time.perf_counter())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Steps are not what the time within the block is spent on."""
        began = time.perf_counter()
        yield
        step, received, at = self._last
        self._last = (step, received, at + time.perf_counter() - began)

    def write(self, kind: str, *, epoch: int, step: int, **values: Any) -> None:
        """Appends one line.

        Raises:
            Unavailable: the disk is full, or the file cannot be written.
        """
        event = {"event": kind, "time": time.time(), "epoch": epoch, "step": step, **values}
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(event, allow_nan=False) + "\n")
        except OSError as error:
            raise Unavailable(
                f"{self._path}: cannot be written",
                got=str(error),
                hint="make room, then train with --resume",
            ) from error
        if self._on_event is not None:
            self._on_event(event)

    def step(self, step: int, *, epoch: int, received: int, **values: Any) -> None:
        """received: as in ``start``."""
        before, had, at = self._last
        seconds = time.perf_counter() - at
        self.write(
            "step",
            epoch=epoch,
            step=step,
            examples_per_s=(step - before) * self._batch_size / seconds,
            gathered_bytes=(received - had) // (step - before),
            **values,
        )
        self.start(step, received=received)  # whoever reads the line may have taken their time


def trim_log(path: Path, step: int) -> None:
    """Cuts off what was logged after ``step``, and a half line: a resumed run writes it again."""
    if not path.exists():
        return
    kept = 0
    for line in read_small(path, MAX_LOG_BYTES).splitlines(keepends=True):
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        kept += len(line)
    os.truncate(path, kept)


def read_log(path: Path) -> list[Event]:
    """All complete lines, in order.

    Raises:
        NotFound: there is no such file. CorruptFile: a line is not JSON.
    """
    try:
        content = read_small(path, MAX_LOG_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{path}: no log", hint="train first") from error
    events = []
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):  # else it is being written
            try:
                events.append(json.loads(line))
            except ValueError as error:
                raise CorruptFile(f"{path}:{number}: not JSON", got=str(error)) from error
    return events


@contextmanager
def followed(log: Path, on_event: OnEvent | None) -> Iterator[None]:
    """Hands lines that ranks elsewhere append to the log to ``on_event``, until the block ends."""
    if on_event is None:
        yield
        return
    ended = threading.Event()
    start = log.stat().st_size if log.exists() else 0
    follower = threading.Thread(target=_follow, args=(log, start, on_event, ended))
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def _follow(log: Path, start: int, on_event: OnEvent, ended: threading.Event) -> None:
    last_round = False
    while not last_round:
        last_round = ended.wait(POLL_S)
        if log.exists():
            start = min(start, log.stat().st_size)  # ranks that start again cut the log first
            with open_regular(log) as file:
                start = _line_start(file, start)
                for line in file:
                    if line.endswith(b"\n"):  # else half a line: next time
                        start += len(line)
                        on_event(json.loads(line))


def _line_start(file: BinaryIO, place: int) -> int:
    """The file goes on from ``place``, or from the next line if that is within one: ranks that
    started again may have cut the log and written past ``place`` since it was read last.
    """
    file.seek(max(0, place - 1))
    if place and file.read(1) != b"\n":
        file.readline()
    return file.tell()
