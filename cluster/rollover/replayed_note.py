"""How far the writes of one generation have been brought to another: a note in the store.

    <store>/live/<target>/replayed.json

It is written before a round of writes is sent, and says which round that is: whoever goes on after
a kill sends that round again first, as it was, so that its keys make both one effect. Were it cut
differently, a frame of the killed process that arrives late would bring back older versions.

Keys are those of one run: of rounds that follow one another without a gap, after kills too. Who
begins anywhere else begins a run. Else a write that comes a second time, behind older ones that
came again with it, would be taken for a repetition, and the older ones would stay.
"""

import logging
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from shardline.cluster.rollover.mirror_plan import NONE_UNREPLAYED, Unreplayed
from shardline.shards.core import files
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.small_files import read_json
from shardline.shards.live.write_keys import MIRRORS

logger = logging.getLogger(__name__)

NAME = "replayed.json"
FORMAT_VERSION = 1
MAX_BYTES = 1 << 20  # numbers of 4096 shards take 200 KB


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """Of each shard of ``generation``: seqs, the writes that the target has; sending, up to which
    it may have more. run: what its keys have in common. rows that were written to the target since
    the start; those that could not be. back: of each shard of the target how many of its writes
    ``generation`` has, up to now; None: that cannot be shown. is_apart: ``generation`` went live
    without the writes of the target, which may lack some that it had until then: those are not in
    ``seqs`` for having been brought, but because they must not come over newer ones."""

    generation: int
    seqs: tuple[int, ...]
    sending: tuple[int, ...]
    run: str
    rows: int = 0
    unreplayed: Unreplayed = NONE_UNREPLAYED
    back: tuple[int, ...] | None = None
    is_apart: bool = False


def new_run() -> str:
    """Unlike that of any other run, whatever became of its note."""
    return secrets.token_hex(8)


def key_prefix(run: str) -> str:
    """What the idempotency keys of a run begin with."""
    return f"{MIRRORS}{run}-"


def note_path(live: Path) -> Path:
    """live: ``<store>/live/<target>``, existing or to come."""
    return live / NAME


def write_note(live: Path, replayed: Replayed) -> None:
    """Raises OSError."""
    live.mkdir(parents=True, exist_ok=True)
    files.write_json(note_path(live), {"format": FORMAT_VERSION} | asdict(replayed))


def read_note(live: Path) -> Replayed | None:
    """None where there is none. One that cannot be read is logged and counts as none: what the
    target has already is brought again."""
    try:
        found = read_json(note_path(live), MAX_BYTES)
        if found["format"] > FORMAT_VERSION:
            raise ValueError(f"format {found['format']}, expected {FORMAT_VERSION} at most")
        unreplayed, back = found["unreplayed"], found["back"]
        return Replayed(
            generation=int(found["generation"]),
            seqs=tuple(map(int, found["seqs"])),
            sending=tuple(map(int, found["sending"])),
            run=str(found["run"]),
            rows=int(found["rows"]),
            unreplayed=Unreplayed(
                rows=int(unreplayed["rows"]), examples=tuple(map(int, unreplayed["examples"]))
            ),
            back=None if back is None else tuple(map(int, back)),
            is_apart=found.get("is_apart", False) is True,  # not in notes of older versions
        )
    except FileNotFoundError:
        return None
    except (ShardlineError, OSError, KeyError, TypeError, ValueError) as error:
        logger.error("writes are brought over from the start: %s: %s", note_path(live), error)
        return None
