"""Where a store keeps what was written to a shard of a generation."""

from pathlib import Path

from shardline.shards.core.files import LIVE_FOLDER
from shardline.shards.storage.generation import shard_folder


def live_folder(generation: Path, shard: int) -> Path:
    """The folder of a shard's log; ``generation`` is ``<store>/generations/<number>``."""
    return generation.parent.parent / LIVE_FOLDER / generation.name / shard_folder(shard)
