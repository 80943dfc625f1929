"""What a generation lacks of the writes of the live one, from files: where no cluster runs, nothing
brings them over."""

from shardline.cluster.rollover.replayed_note import Replayed, read_note
from shardline.cluster.store import Store
from shardline.shards.core.errors import CorruptFile, GateFailed, NotFound, ShardlineError
from shardline.shards.core.files import MANIFEST_NAME
from shardline.shards.live.live_rows import newest_write
from shardline.shards.storage.cut import Cut
from shardline.shards.storage.generation import GenerationManifest, read_generation


def check_none_left_behind(store: Store, number: int) -> None:
    """Whether generation ``number`` has every write that the live one has acknowledged.

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
        newest = tuple(newest_write(folder, entry.shard) for entry in made.shards)
    except (ShardlineError, OSError) as error:
        raise _unknown(number, error, hint) from error
    note = read_note(store.writes(number))
    known = contained(made, wanted.cut, note)
    lacks = sum(newest) if known is None else _beyond(newest, known)
    lacks += _lacks_of_older(made, wanted)
    rows = 0 if note is None or note.generation != live else note.unreplayed.rows
    if lacks or rows:
        raise GateFailed(
            f"generation {number} does not go live: it lacks {_said(lacks, rows)} of generation "
            f"{live}, which is live",
            got=f"no word in its manifest of which writes of generation {live} it has"
            if known is None
            else None,
            hint=hint,
        )


def contained(
    made: GenerationManifest, cut: Cut | None, note: Replayed | None
) -> tuple[int, ...] | None:
    """Of each shard of the generation ``made``, how many writes another has for certain: by its cut
    in its rows, by its note in its own writes. None: neither is about ``made``."""
    found = [
        each.seqs
        for each in (cut, note)
        if each is not None
        and each.generation == made.generation
        and len(each.seqs) == len(made.shards)
    ]
    return tuple(map(max, *found)) if len(found) == 2 else found[0] if found else None


def _lacks_of_older(made: GenerationManifest, wanted: GenerationManifest) -> int:
    """Writes to a third generation that are in the rows of ``made`` alone, as both cuts say."""
    has, cut = made.cut, wanted.cut
    if has is None or cut is None or has.generation != cut.generation:
        return 0
    return _beyond(has.seqs, cut.seqs) if len(has.seqs) == len(cut.seqs) else 0


def _beyond(newest: tuple[int, ...], known: tuple[int, ...]) -> int:
    return sum(max(0, new - old) for new, old in zip(newest, known, strict=True))


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
