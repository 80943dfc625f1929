"""The store: one folder with everything a cluster is made from, and which generation is live.

<store>/runs/<name>/               a training run: checkpoints, log
<store>/embeddings/<version>/      an embedding set
<store>/generations/000001/        an immutable generation
<store>/CURRENT                    the number of the live generation
<store>/counter.json               the largest table version or epoch given out, of any generation
<store>/controllers.json           of the newest clusters, which controller of each was started last
<store>/generations.json           the largest number that a generation ever had
<store>/live/000001/               what was written to a generation since it was built
<store>/publish.json               what is loaded beside the live generation, the newest publish
<store>/controllers.json           of each cluster, which controller was started last
<store>/events/2026-03-01/         what routers have stored of searches, and callers of outcomes
"""

import fcntl
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardline.shards.core import files
from shardline.shards.core.errors import CorruptFile, NotFound
from shardline.shards.core.small_files import MAX_STATE_BYTES, read_json, read_small

logger = logging.getLogger(__name__)

GENERATION_DIGITS = 6
MAX_COUNTER = 1 << 53  # exact in every reader of JSON; 285,000 years of 1,000 numbers per second
COUNTER_NAME = "counter.json"
COUNTER_LOCK = "counter.lock"
GENERATIONS_NAME = "generations.json"


def unguarded() -> None:
    """For whoever does not act for a controller, of which there may be two for a while."""


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

    def writes(self, number: int) -> Path:
        """The folder of what was written to a generation's shards, existing or to come."""
        return self.root / files.LIVE_FOLDER / self.generation(number).name

    @property
    def events(self) -> Path:
        return self.root / "events"

    def counter(self) -> int:
        """The largest number on record as a table version or an epoch, of any generation; 0: none.

        A store of an older version has a counter per generation: the largest of them counts. A
        file that does not hold a number counts as none: shards and routers know what was given out
        (``cluster.control.placement``), and ``damaged_state`` names it.
        """
        current = _readable(self._existing(COUNTER_NAME))
        return max(current or _readable(self._older_counters()), default=0)

    def raise_counter(self, number: int, guard: Callable[[], None] = unguarded) -> None:
        """Declares the numbers up to ``number`` given out; before anybody sees one of them.

        Never lowers it: controllers of two clusters may serve one store. guard: called under the
        store's lock; nothing is written if it raises.
        """
        with self.lock():
            guard()
            if number > self.counter():
                self._write_counter(COUNTER_NAME, number)

    def damaged_state(self) -> list[CorruptFile]:
        """What is wrong with the files that hold the numbers given out; each is written anew with
        the next number, and nothing waits for that."""
        found = []
        counters = self._existing(COUNTER_NAME) or self._older_counters()
        for path in [*counters, *self._existing(GENERATIONS_NAME)]:
            try:
                _counter_in(path)
            except CorruptFile as error:
                found.append(error)
        return found

    def generation_numbers(self) -> list[int]:
        """Complete generations, oldest first."""
        manifests = self.generations.glob(f"*/{files.MANIFEST_NAME}")
        return sorted(
            number
            for path in manifests
            if (number := files.number_of(path.parent.name)) is not None
        )

    def next_generation(self) -> int:
        """The next number that no generation has had: deleted ones count, and folders that are not
        complete.

        Where the file that remembers deleted ones is damaged, what is left in the store counts.
        """
        names = [path.name for path in self.generations.glob("*")]
        taken = [number for name in names if (number := files.number_of(name)) is not None]
        try:
            taken.append(self.current())
        except (NotFound, CorruptFile):
            logger.debug("CURRENT names no generation")
        return max([*taken, self._highest_generation()]) + 1

    def claim_generation(self) -> int:
        """As ``next_generation``, and nobody else gets this number from now on."""
        with self.lock():
            number = self.next_generation()
            self._write_counter(GENERATIONS_NAME, number)
        return number

    def remember_generation(self, number: int) -> None:
        """Keeps the number from being given out again once its folder is gone."""
        with self.lock():
            if number > self._highest_generation():
                self._write_counter(GENERATIONS_NAME, number)

    def _highest_generation(self) -> int:
        return max(_readable(self._existing(GENERATIONS_NAME)), default=0)

    def _write_counter(self, name: str, number: int) -> None:
        path = self.root / name
        if path.is_dir():  # no file is renamed over a folder
            aside = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=self.root))
            path.rename(aside / name)
            logger.error("%s was a folder: it is in %s now", path, aside)
        files.write_json(path, {"counter": number})

    def _older_counters(self) -> list[Path]:
        return sorted((self.root / "epochs").glob("*.json"))

    def _existing(self, name: str) -> list[Path]:
        path = self.root / name
        return [path] if os.path.lexists(path) else []

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by one process at a time, and once in each. Raises OSError."""
        path = self.root / COUNTER_LOCK
        # not for writing alone: that would wait for the reader of a pipe
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NONBLOCK
        handle = os.open(path, flags | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # released when the file is closed
            yield
        finally:
            os.close(handle)

    def current(self) -> int:
        """The live generation's number.

        Raises:
            NotFound: nothing was built yet.
            CorruptFile: CURRENT does not hold a number.
        """
        path = self.root / "CURRENT"
        try:
            content = read_small(path, MAX_STATE_BYTES)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(
                f"{self.root}: no live generation", hint="run `shardline build` to make one"
            ) from error
        number = files.number_of(content.decode("latin-1").strip(" \t\r\n"))
        if number is None:
            raise CorruptFile(
                f"{path}: not a generation number",
                expected="ASCII digits",
                got=repr(content[:40]),
                hint="write the number of one into it: `shardline generations list`",
            )
        return number

    def set_current(self, number: int, guard: Callable[[], None] = unguarded) -> None:
        """Makes a complete generation the live one, in one atomic step. guard: as of
        ``raise_counter``.

        Raises:
            NotFound: that generation is absent or incomplete.
            OSError: the disk fails; which one it is after a power cut is not known then.
        """
        with self.lock():  # ``retire`` looks at what is live
            guard()
            if not (self.generation(number) / files.MANIFEST_NAME).is_file():
                raise NotFound(f"{self.generation(number)}: no complete generation here")
            files.write_bytes(self.root / "CURRENT", f"{number}\n".encode())

    def retire(self, number: int, in_use: Callable[[], Collection[int]]) -> bool:
        """Removes a generation's manifest, so that it cannot go live any more; False: it is among
        ``in_use``, which is asked when nothing can go live until the manifest is gone.

        Raises:
            OSError: there is no manifest, or it cannot be removed.
        """
        with self.lock():
            if number in in_use():
                return False
            (self.generation(number) / files.MANIFEST_NAME).unlink()
        return True

    def version_of(self, embeddings: Path) -> str | None:
        """The model version that an embedding set of this store must have; None: it lies elsewhere,
        under any name."""
        is_ours = embeddings.resolve().parent == self.embeddings.resolve()
        return embeddings.resolve().name if is_ours else None

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
    """Raises CorruptFile: there is no number from 0 to MAX_COUNTER in it."""
    try:
        content = read_json(path, MAX_STATE_BYTES)
    except OSError as error:
        raise CorruptFile(f"{path}: not a counter", got=error.strerror) from error
    found = content.get("counter") if isinstance(content, dict) else None
    if type(found) is not int or not 0 <= found <= MAX_COUNTER:
        raise CorruptFile(
            f"{path}: not a counter",
            expected=f'{{"counter": n}}, n from 0 to {MAX_COUNTER}',
            got=repr(content)[:40],
        )
    return found


def _readable(paths: list[Path]) -> list[int]:
    """The numbers in those of the files that hold one; the others are logged."""
    found = []
    for path in paths:
        try:
            found.append(_counter_in(path))
        except CorruptFile as error:
            logger.error("%s; going on without it", error)
    return found
