"""Whether the source of a mirror has all that its target was written: what the note for a mirror in
the other direction may claim. From files alone.

It has not where the target was live and the source was published without its writes.
"""

from collections.abc import Sequence
from pathlib import Path

from shardline.cluster.rollover.replayed_note import Replayed, key_prefix
from shardline.shards.core.errors import NotFound
from shardline.shards.live.log_tail import LogTail
from shardline.shards.storage.cut import Cut


def known_back(
    target: int, noted: Replayed | None, cut: Cut | None, start: Replayed, num_shards: int
) -> tuple[int, ...]:
    """Of each shard of the target, how many of its writes the source has: by its own note,
    ``noted``, which is about the target; by its own ``cut``; by the note of the run that goes on
    with ``start``."""
    counts = [(0,) * num_shards, start.back or ()]
    if noted is not None:
        counts.append(noted.seqs)
    if cut is not None:
        counts += [each.seqs for each in cut.all if each.generation == target]
    known = (each for each in counts if len(each) == num_shards)
    return tuple(map(max, zip(*known, strict=True)))


def has_all(
    logs: Sequence[Path], known: Sequence[int], seqs: Sequence[int], start: Replayed
) -> bool:
    """Whether the source has the first ``seqs`` writes of the target, of which it has ``known``:
    the later ones are of the run that goes on, which was killed before it noted them.

    logs: of the target's shards, which are not read without need.

    Raises:
        CorruptFile, OSError: of a log.
    """
    shards = zip(logs, known, seqs, strict=True)
    late = [(live, after) for live, after, seq in shards if after < seq]
    return not late or (
        start.back is not None and all(_is_of_run(live, after, start.run) for live, after in late)
    )


def _is_of_run(live: Path, after: int, run: str) -> bool:
    """Whether every write of a log after one of them has a key of the run."""
    try:
        records = LogTail(live, after_seq=after).read_proven()
    except NotFound:  # compacted, and their keys are not there any more
        return False
    return all(record.key.startswith(key_prefix(run)) for record in records)
