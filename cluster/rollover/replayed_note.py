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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from operator import ge, gt
from pathlib import Path

from shardline.cluster.rollover.mirror_plan import NONE_UNREPLAYED, Unreplayed
from shardline.shards.core import files
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.small_files import read_json
from shardline.shards.storage.cut import Cut

logger = logging.getLogger(__name__)

NAME = "replayed.json"
FORMAT_VERSION = 1
MAX_BYTES = 1 << 20  # numbers of 4096 shards take 200 KB


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """Of each shard of ``generation``: seqs, the writes that the target has; sending, up to which
    it may have more. run: what its keys have in common. rows that were written to the target since
    the start; those that could not be."""

    generation: int
    seqs: tuple[int, ...]
    sending: tuple[int, ...]
    run: str
    rows: int = 0
    unreplayed: Unreplayed = NONE_UNREPLAYED


def new_run() -> str:
    """Unlike that of any other run, whatever became of its note."""
    return secrets.token_hex(8)


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
        unreplayed = found["unreplayed"]
        return Replayed(
            generation=int(found["generation"]),
            seqs=tuple(map(int, found["seqs"])),
            sending=tuple(map(int, found["sending"])),
            run=str(found["run"]),
            rows=int(found["rows"]),
            unreplayed=Unreplayed(
                rows=int(unreplayed["rows"]), examples=tuple(map(int, unreplayed["examples"]))
            ),
        )
    except FileNotFoundError:
        return None
    except (ShardlineError, OSError, KeyError, TypeError, ValueError) as error:
        logger.error("writes are brought over from the start: %s: %s", note_path(live), error)
        return None


def start_of(
    note: Replayed | None, cut: Cut | None, source: int, num_shards: int, run: str
) -> Replayed:
    """Where to go on: by the note, if it is about ``source`` and not before the cut; else at the
    cut of the target, if that is of ``source``; else at its first write. Any earlier write is as
    good a start. run: a new one, for a start without the note."""
    seqs: tuple[int, ...] = (0,) * num_shards
    if cut is not None and cut.generation == source and len(cut.seqs) == num_shards:
        seqs = cut.seqs
    is_of_source = note is not None and note.generation == source and len(note.seqs) == num_shards
    if note is not None and is_of_source and any(map(gt, note.sending, seqs)):
        return note
    return Replayed(generation=source, seqs=seqs, sending=seqs, run=run)


def has_all_before(
    target: int, known: tuple[Cut, ...], source: int, cut_of: Callable[[int], Cut | None]
) -> bool:
    """Whether generation ``target`` has every write that ``source`` was built with, so that the log
    of ``source`` brings it all the rest. known: which writes of others it has, by its cut and its
    note. cut_of: of any generation, None: it was built from no other.

    Raises:
        NotFound: ``cut_of`` does, of a generation that was removed.
    """
    if source in (target, *(each.generation for each in known)):
        return True
    cut = cut_of(source)
    if cut is None or cut.generation == target or any(_holds(each, cut) for each in known):
        return True
    # nothing was written to the one before: what that was built with is the question
    return not any(cut.seqs) and has_all_before(target, known, cut.generation, cut_of)


def _holds(known: Cut, wanted: Cut) -> bool:
    is_same = known.generation == wanted.generation and len(known.seqs) == len(wanted.seqs)
    return is_same and all(map(ge, known.seqs, wanted.seqs))
