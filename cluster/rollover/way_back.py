"""Whether the source of a mirror has all that its target was written: what the note for a mirror in
the other direction may claim. From files alone.

It has not where the target was live and the source was published without its writes.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from shardline.cluster.rollover.mirror_start import Made, start_of
from shardline.cluster.rollover.mirror_term import MirrorTerm
from shardline.cluster.rollover.replayed_note import Replayed, key_prefix, new_run, read_note
from shardline.cluster.store import Store
from shardline.shards.core.errors import NotFound, ShardlineError
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.live_rows import newest_write
from shardline.shards.live.log_tail import LogTail
from shardline.shards.storage.cut import Cut
from shardline.shards.storage.generation import read_generation

logger = logging.getLogger(__name__)


def known_back(
    target: int, noted: Replayed | None, cut: Cut | None, start: Replayed, num_shards: int
) -> tuple[int, ...]:
    """Of each shard of the target, how many of its writes the source has: by its own note,
    ``noted``, which is about the target; by its own ``cut``; by the note of the run that goes on
    with ``start``."""
    counts = [(0,) * num_shards, start.back or ()]
    if noted is not None and not noted.is_apart:
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
    changes = (record for record in records if len(record.change.item_ids))
    return all(record.key.startswith(key_prefix(run)) for record in changes)


def parting(
    store: Store, live: int, coming: int, *, is_written: Callable[[], bool] = lambda: True
) -> Callable[[], None]:
    """For a switch from ``live`` to ``coming`` that brings no writes over. What it returns notes
    that a mirror back begins behind what ``coming`` has now: anything older would come over newer
    writes that ``live`` has acknowledged. Call that under the seal, and let nobody write to
    ``coming`` meanwhile; a mirror that still could is ended for good here. is_written: whether a
    primary of ``coming`` may be running.

    Raises:
        CorruptFile, NotFound, OSError: of the logs of ``coming``. What is returned raises OSError,
            or MirrorReplaced.
    """
    term = MirrorTerm(store, (live, coming))
    folder = store.generation(coming)
    shards = [entry.shard for entry in read_generation(folder).shards]
    seqs = tuple(newest_write(folder, shard, is_written=is_written) for shard in shards)
    note = Replayed(
        generation=coming,
        seqs=seqs,
        sending=seqs,
        run=new_run(),
        is_apart=not _has_all_of(store, live, coming, seqs),
    )
    return partial(term.write_note, store.writes(live), note)


def _has_all_of(store: Store, live: int, coming: int, seqs: tuple[int, ...]) -> bool:
    """Whether ``live`` can be shown to have the first ``seqs`` writes of ``coming``. Not where its
    files are damaged: somebody may leave its writes out because of that."""
    folder = store.generation(coming)
    try:
        made, wanted = map(Made.of, map(read_generation, (store.generation(live), folder)))
        noted = read_note(store.writes(live))
        if noted is not None and noted.generation != coming:
            noted = None
        start = start_of(read_note(store.writes(coming)), made, wanted, new_run())
        known = known_back(coming, noted, made.cut, start, len(seqs))
        logs = [live_folder(folder, shard) for shard in range(len(seqs))]
        return has_all(logs, known, seqs, start)
    except (ShardlineError, OSError) as error:
        logger.warning("what generation %d has of %d is not known: %s", live, coming, error)
        return False
