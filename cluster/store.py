"""The store: one folder with everything a cluster is made from, and which generation is live.

<store>/runs/<name>/               a training run: checkpoints, log
<store>/embeddings/<version>/      an embedding set
<store>/generations/000001/        an immutable generation
<store>/CURRENT                    the number of the live generation
<store>/counter.json               the largest table version or epoch given out, of any generation
<store>/generations.json           the largest number that a generation ever had
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardline.shards.core import files
from shardline.shards.core.errors import CorruptFile, NotFound

GENERATION_DIGITS = 6
COUNTER_NAME = "counter.json"
COUNTER_LOCK = "counter.lock"
GENERATIONS_NAME = "generations.json"


@dataclass(frozen=True, slots=True)
class Store:
    """Paths of a store; nothing is created before something is written into it."""

    root: Path

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def embeddings(self) -> Path:
        return self.root / "embeddings"

    @property
    def generations(self) -> Path:
        return self.root / "generations"

    def generation(self, number: int) -> Path:
        """The folder of a generation, existing or to come."""
        return self.generations / f"{number:0{GENERATION_DIGITS}d}"

    def counter(self) -> int:
        """The largest number given out as a table version or an epoch, of any generation; 0: none.

        A store of an older version has a counter per generation: the largest of them counts.

        Raises:
            CorruptFile: the counter does not hold a number.
        """
        path = self.root / COUNTER_NAME
        paths = [path] if path.is_file() else (self.root / "epochs").glob("*.json")
        return max(map(_counter_in, paths), default=0)

    def raise_counter(self, number: int) -> None:
        """Declares the numbers up to ``number`` given out; before anybody sees one of them.

        Never lowers it: controllers of two clusters may serve one store.
        """
        with self._lock():
            if number > self.counter():
                files.write_json(self.root / COUNTER_NAME, {"counter": number})

    def generation_numbers(self) -> list[int]:
        """Complete generations, oldest first."""
        return sorted(
            int(path.parent.name)
            for path in self.generations.glob(f"*/{files.MANIFEST_NAME}")
            if path.parent.name.isdigit()
        )

    def next_generation(self) -> int:
        """The next number that no generation has had: deleted ones count, and folders that are not
        complete.

        Raises:
            CorruptFile: the file that remembers the numbers of deleted ones is damaged.
        """
        taken = [int(path.name) for path in self.generations.glob("*") if path.name.isdigit()]
        return max([*taken, self._highest_generation()]) + 1

    def remember_generation(self, number: int) -> None:
        """Keeps the number from being given out again once its folder is gone."""
        with self._lock():
            if number > self._highest_generation():
                files.write_json(self.root / GENERATIONS_NAME, {"counter": number})

    def _highest_generation(self) -> int:
        path = self.root / GENERATIONS_NAME
        return _counter_in(path) if path.is_file() else 0

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.root / COUNTER_LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
            yield

    def current(self) -> int:
        """The live generation's number.

        Raises:
            NotFound: nothing was built yet.
            CorruptFile: CURRENT does not hold a number.
        """
        path = self.root / "CURRENT"
        if not path.is_file():
            raise NotFound(
                f"{self.root}: no live generation", hint="run `shardline build` to make one"
            )
        text = path.read_text().strip()
        if not text.isdigit():
            raise CorruptFile(f"{path}: not a generation number", got=repr(text[:40]))
        return int(text)

    def set_current(self, number: int) -> None:
        """Makes a complete generation the live one, in one atomic step.

        Raises:
            NotFound: that generation is absent or incomplete.
        """
        if not (self.generation(number) / files.MANIFEST_NAME).is_file():
            raise NotFound(f"{self.generation(number)}: no complete generation here")
        files.write_bytes(self.root / "CURRENT", f"{number}\n".encode())

    def newest_embeddings(self) -> Path:
        """The embedding set whose manifest was written last.

        Raises:
            NotFound: there is none.
        """
        manifests = list(self.embeddings.glob(f"*/{files.MANIFEST_NAME}"))
        if not manifests:
            raise NotFound(
                f"{self.embeddings}: no embedding set", hint="run `shardline export` to write one"
            )
        return max(manifests, key=lambda path: path.stat().st_mtime_ns).parent


def _counter_in(path: Path) -> int:
    try:
        return int(json.loads(path.read_bytes())["counter"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{path}: not a counter", got=repr(error)) from error
