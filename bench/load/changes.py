"""Other generations made live in mid-run, by the commands that users give."""

import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from shardline.bench.load.scenarios import Fault, FaultKind
from shardline.cluster.store import Store
from shardline.shards.core.errors import DataError, NotFound
from shardline.shards.storage.generation import GenerationManifest, read_generation

COMMAND = "from shardline.cluster.cli import main; main()"
DONE = "done"  # how the mark of a change that has ended ends
LAST_LINE = 300  # characters of what a failed command said


def another_generation(store: Store, live: GenerationManifest) -> int:
    """The newest complete one of the model that is live, with as many rows.

    Raises:
        NotFound: there is none.
    """
    for number in reversed(store.generation_numbers()):
        manifest = read_generation(store.generation(number))
        is_like_it = (manifest.model_version, manifest.rows) == (live.model_version, live.rows)
        if number != live.generation and is_like_it:
            return number
    raise NotFound(
        f"{store.generations}: no other generation of {live.model_version}",
        hint="`shardline build --from-live` makes one",
    )


@dataclass(slots=True, kw_only=True)
class ChangeRunner:
    """Runs the commands when their time comes, one at a time; a later one waits for its turn.

    generation: the one to publish. marks: (seconds, what was begun or done).
    """

    store: Path
    generation: int
    marks: list[tuple[float, str]] = field(default_factory=list)
    _due: list[tuple[float, FaultKind]] = field(default_factory=list)
    _running: "tuple[FaultKind, subprocess.Popen[bytes], IO[bytes]] | None" = None

    def arm(self, faults: tuple[Fault, ...], seconds: float) -> None:
        self._due = sorted((fault.at_share * seconds, fault.kind) for fault in faults)

    def tick(self, at_s: float) -> None:
        """Begins what is due, and notes what has ended.

        Raises:
            DataError: a command failed.
        """
        if self._running is not None:
            self._look(at_s)
        elif self._due and self._due[0][0] <= at_s:
            self._begin(self._due.pop(0)[1], at_s)

    def close(self) -> None:
        """Ends the command that runs: the controller goes on with what it was asked for."""
        if self._running is not None:
            _, process, said = self._running
            process.terminate()
            process.wait()
            said.close()
            self._running = None

    def _begin(self, kind: FaultKind, at_s: float) -> None:
        asked = [str(kind)] + [str(self.generation)] * (kind is FaultKind.PUBLISH)
        words = [sys.executable, "-c", COMMAND, "--store", str(self.store), *asked]
        said = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the process
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said)
        self._running = kind, process, said
        self.marks.append((at_s, f"{kind} begins"))

    def _look(self, at_s: float) -> None:
        assert self._running is not None
        kind, process, said = self._running
        if process.poll() is None:
            return
        said.seek(0)
        text = said.read().decode(errors="replace").strip()
        self.close()
        if process.returncode:
            raise DataError(f"`shardline {kind}` failed: {text[-LAST_LINE:]}")
        self.marks.append((at_s, f"{kind} {DONE}"))
