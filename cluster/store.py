"""The store: one folder with everything a cluster is made from, and which generation is live.

<store>/runs/<name>/               a training run: checkpoints, log
<store>/embeddings/<version>/      an embedding set
<store>/generations/000001/        an immutable generation
<store>/CURRENT                    the number of the live generation
"""

from dataclasses import dataclass
from pathlib import Path

from shardline.shards.core import files
from shardline.shards.core.errors import CorruptFile, NotFound

GENERATION_DIGITS = 6


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

    def counter(self, number: int) -> Path:
        """Where the controller of a generation keeps its counter of epochs and table versions."""
        return self.root / "epochs" / f"{number:0{GENERATION_DIGITS}d}.json"

    def generation_numbers(self) -> list[int]:
        """Complete generations, oldest first."""
        return sorted(
            int(path.parent.name)
            for path in self.generations.glob(f"*/{files.MANIFEST_NAME}")
            if path.parent.name.isdigit()
        )

    def next_generation(self) -> int:
        """A number no folder carries yet, complete or not."""
        taken = [int(path.name) for path in self.generations.glob("*") if path.name.isdigit()]
        return max(taken, default=0) + 1

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
