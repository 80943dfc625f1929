"""What a generation had when it took the place of another: a note beside the logs of its shards.

    <store>/live/<generation>/went_live.json

A controller that is started again tells routers what is in it; shards find there whose idempotency
keys they have to know. It is written before ``CURRENT`` names the generation.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from shardline.shards.core import files
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.files import number_of
from shardline.shards.core.small_files import MAX_STATE_BYTES, parse_json, read_small

logger = logging.getLogger(__name__)

NAME = "went_live.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WentLive:
    """has: of each shard, how many writes it had, all of the generation before among them; empty:
    none were brought over. keys_of: the folder, beside this one, of the generation whose keys count
    here too; None: of none."""

    has: tuple[int, ...] = ()
    keys_of: str | None = None


def write_went_live(folder: Path, note: WentLive) -> None:
    """folder: ``<store>/live/<generation>``, existing or to come. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / NAME, {"format": FORMAT_VERSION} | asdict(note))


def read_went_live(folder: Path) -> WentLive:
    """Empty where there is none. One that cannot be read is logged, and counts as none."""
    path = folder / NAME
    try:
        return parse_went_live(read_small(path, MAX_STATE_BYTES), path)
    except FileNotFoundError:
        return WentLive()
    except (ShardlineError, OSError, ValueError) as error:
        logger.error("nothing is known of when the generation went live: %s: %s", path, error)
        return WentLive()


def parse_went_live(content: bytes, path: Path) -> WentLive:
    """Raises CorruptFile, ValueError: it is none."""
    found = parse_json(content, path)
    try:
        if found["format"] != FORMAT_VERSION:
            raise ValueError(f"format {found['format']!r} instead of {FORMAT_VERSION}")
        keys_of = found["keys_of"]
        if keys_of is not None and (type(keys_of) is not str or number_of(keys_of) is None):
            raise ValueError(f"{keys_of!r} instead of a generation's folder")
        return WentLive(has=tuple(map(int, found["has"])), keys_of=keys_of)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(repr(error)) from error
