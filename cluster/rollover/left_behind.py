"""A publish where no cluster runs and nothing brings writes over: what a generation lacks of those
of the live one, by the rule that a mirror starts with; and the note that they were left out."""

from pathlib import Path

from shardline.cluster.rollover.mirror_start import Made, check_not_ahead, start_of
from shardline.cluster.rollover.replayed_note import new_run, read_note
from shardline.cluster.rollover.way_back import parting
from shardline.cluster.store import Store
from shardline.shards.core.errors import (
    CorruptFile,
    GateFailed,
    NotFound,
    ShardlineError,
    WritesLost,
)
from shardline.shards.core.files import MANIFEST_NAME
from shardline.shards.live.kept_segments import WithKept
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.live_rows import newest_write
from shardline.shards.live.log_files import FILES
from shardline.shards.live.log_tail import LogTail
from shardline.shards.storage.generation import read_generation


def check_none_left_behind(store: Store, number: int) -> None:
    """Whether generation ``number`` has every write that the live one has acknowledged; asked where
    no cluster writes either.

    Raises:
        GateFailed: it lacks some, with their number, or nobody can tell.
    """
    hint = (
        f"`shardline serve` and `shardline publish {number}` bring them over; `shardline build "
        f"--from-live` builds from them; `shardline publish {number} --without-writes` leaves them "
        "out"
    )
    try:
        live = store.current()
    except NotFound:
        return
    except CorruptFile as error:
        raise _unknown(number, error, hint) from error
    folder = store.generation(live)
    if live == number or not (folder / MANIFEST_NAME).is_file():
        return  # nothing can serve, or bring over, what was written to a generation that is gone
    try:
        made, wanted = read_generation(folder), read_generation(store.generation(number))
        newest = tuple(
            newest_write(folder, entry.shard, is_written=lambda: False) for entry in made.shards
        )
        note = read_note(store.writes(number))
        start = start_of(note, Made.of(made), Made.of(wanted), new_run())
        check_not_ahead(start, newest)
    except WritesLost as error:
        raise GateFailed(
            f"generation {number} does not go live: {error.message}",
            expected=error.expected,
            got=error.got,
            hint=hint,
        ) from error
    except (ShardlineError, OSError) as error:
        raise _unknown(number, error, hint) from error
    if start.is_apart:
        raise GateFailed(
            f"generation {number} does not go live: generation {live}, which is live, went live "
            f"without its writes, and has some of its own that {number} may lack",
            hint=hint,
        )
    writes = sum(
        changes_after(folder, shard, old) if new > old else 0
        for shard, (new, old) in enumerate(zip(newest, start.seqs, strict=True))
    )
    if writes or start.unreplayed.rows:
        raise GateFailed(
            f"generation {number} does not go live: it lacks "
            f"{_said(writes, start.unreplayed.rows)} of generation {live}, which is live",
            hint=hint,
        )


def changes_after(folder: Path, shard: int, seq: int) -> int:
    """Writes of a shard's log behind ``seq`` that change something; all of them where the log does
    not go back to that.

    Raises:
        CorruptFile, OSError: of the log.
    """
    live = live_folder(folder, shard)
    tail = LogTail(live, seq, WithKept(FILES))
    try:
        records = tail.read_all()
    except NotFound:
        return max(1, newest_write(folder, shard, is_written=lambda: False) - seq)
    return sum(len(record.change.item_ids) > 0 for record in records)


def part_from_live(store: Store, number: int) -> None:
    """Before ``number`` goes live without the writes of the live generation: notes, as a cluster's
    publish without writes does, where a mirror back begins. Without that it would bring older
    writes over newer ones. Nothing where there is no live generation that can be returned to.

    Raises:
        CorruptFile, NotFound, OSError: of the logs of ``number``; or the store takes no note.
    """
    try:
        live = store.current()
    except (NotFound, CorruptFile):
        return
    if live != number and (store.generation(live) / MANIFEST_NAME).is_file():
        parting(store, live, number, is_written=lambda: False)()


def _said(writes: int, rows: int) -> str:
    parts = [f"{writes:,} writes"] if writes else []
    if rows:
        parts.append(f"{rows:,} rows that were written as vectors of another model")
    return " and ".join(parts)


def _unknown(number: int, error: Exception, hint: str) -> GateFailed:
    return GateFailed(
        f"generation {number} does not go live: nobody can tell which writes it lacks",
        got=str(error),
        hint=hint,
    )
