"""Output for people: progress bars on a terminal, plain lines elsewhere, tables, errors."""

import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

PLAIN_INTERVAL_S = 5.0  # between two lines about one stage, where there is no terminal


class StageProgress:
    """A ``progress(stage, done, total)`` callback: one bar per stage on a terminal, else lines.

    Use as a context manager. ``note`` prints one line above the bars.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, float] = {}
        self._stage = ""
        self._detailed = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self.console,
            )
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._stage = stage
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total, detail="")
            self._bars.update(self._tasks[stage], completed=done, total=total)
            return
        now = time.monotonic()
        if done >= total or now - self._printed.get(stage, -PLAIN_INTERVAL_S) >= PLAIN_INTERVAL_S:
            self._printed[stage] = now
            self.note(f"{stage}: {done}/{total}")

    def detail(self, text: str) -> None:
        """A figure of the running stage: beside its bar, or as an occasional line."""
        if self._bars is not None:
            self._bars.update(self._tasks[self._stage], detail=text)
        elif text and time.monotonic() - self._detailed >= PLAIN_INTERVAL_S:
            self._detailed = time.monotonic()
            self.note(f"  {text}")

    def note(self, line: str) -> None:
        """Prints one plain line."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_warnings(texts: Iterable[str]) -> None:
    """One line each, on the standard error."""
    for text in texts:
        sys.stderr.write(f"warning: {text}\n")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; first column left, the others right.

    The title is a line of its own, which may be wider than the table.
    """
    table = Table()
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*row)
    # a pipe has no width: wide enough never to cut a figure
    width = None if sys.stdout.isatty() else 140
    console = Console(width=width)
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(table)
