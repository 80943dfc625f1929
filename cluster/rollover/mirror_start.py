"""Where the log of a generation is replayed from, for another one to have all its writes. Pure.

The log of a generation S has all writes that S has ever had, those too that a mirror brought it,
but not those that its rows had when it was built: they are in the logs of the generations of its
cut. A target T that lacks some of these cannot get them from S.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import ge, gt

from shardline.cluster.rollover.mirror_plan import NONE_UNREPLAYED, Unreplayed
from shardline.cluster.rollover.replayed_note import Replayed
from shardline.shards.core.errors import WritesLost
from shardline.shards.storage.cut import Cut
from shardline.shards.storage.generation import GenerationManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A generation, and the writes of others that its rows have."""

    generation: int
    num_shards: int
    cut: Cut | None

    @classmethod
    def of(cls, manifest: GenerationManifest) -> "Made":
        shards = len(manifest.shards)
        return cls(generation=manifest.generation, num_shards=shards, cut=manifest.cut)


def start_of(note: Replayed | None, source: Made, target: Made, run: str) -> Replayed:
    """Where to go on: by the target's note, if it is about the source and not before the cut; else
    at the cut of the target, if it or one before it is of the source; else at the first write. Any
    earlier write is as good a start. run: a new one, for a start without the note.

    Raises:
        WritesLost: the rows of the source have writes that the target cannot be shown to have.
    """
    cuts = {} if target.cut is None else {cut.generation: cut.seqs for cut in target.cut.all}
    seqs = cuts.get(source.generation, ())
    is_cut = len(seqs) == source.num_shards
    if not is_cut:
        seqs = (0,) * source.num_shards
    if (
        note is not None
        and note.generation == source.generation
        and len(note.seqs) == source.num_shards
        and (note.sending == seqs or any(map(gt, note.sending, seqs)))
    ):
        return note
    unreplayed = NONE_UNREPLAYED if is_cut else _left_out(note, cuts, source, target)
    return Replayed(
        generation=source.generation, seqs=seqs, sending=seqs, run=run, unreplayed=unreplayed
    )


def _left_out(
    note: Replayed | None, cuts: dict[int, tuple[int, ...]], source: Made, target: Made
) -> Unreplayed:
    """What the target lacks of the writes in the rows of the source: what its note counts, at most.

    Raises:
        WritesLost: there are, or may be, others.
    """
    for cut in () if source.cut is None else source.cut.all:
        if cut.generation == target.generation or _covers(cuts.get(cut.generation), cut):
            break  # and with that the rows of that generation, and the cuts before
        is_noted = note is not None and note.generation == cut.generation and not note.is_apart
        if note is not None and is_noted and _covers(note.seqs, cut):
            return note.unreplayed
        if any(cut.seqs):
            has = cuts.get(cut.generation)
            raise WritesLost(
                f"generation {source.generation} was built with writes of generation "
                f"{cut.generation} in its rows, which are not in its log; generation "
                f"{target.generation} may lack them",
                expected=f"of its shards the first {_shown(cut.seqs)}",
                got="none that are known" if has is None else f"the first {_shown(has)}",
                hint="build a generation from today's rows with `shardline build --from-live`, or "
                "publish with --without-writes",
            )
    return NONE_UNREPLAYED


def check_not_ahead(start: Replayed, ends: Sequence[int]) -> None:
    """Whether the log that ``start`` is about, of which the shards end with these writes, is the
    one that was read before: after a power cut, or when it was restored by hand, it may be shorter.
    Then later writes get numbers that are known as done, and nobody would bring them over.

    Raises:
        WritesLost: it ends earlier.
    """
    for shard, (sending, end) in enumerate(zip(start.sending, ends, strict=True)):
        if sending > end:
            raise WritesLost(
                f"shard {shard} of generation {start.generation}: its log was read up to write "
                f"{sending} before, and is another one now",
                expected=f"{sending} writes or more",
                got=str(end),
                hint="build a generation from today's rows with `shardline build --from-live`, or "
                "publish with --without-writes",
            )


def _covers(seqs: Sequence[int] | None, cut: Cut) -> bool:
    return seqs is not None and len(seqs) == len(cut.seqs) and all(map(ge, seqs, cut.seqs))


def _shown(seqs: Sequence[int]) -> str:
    """Short enough for a line."""
    return ", ".join(map(str, seqs[:8])) + (", ..." if len(seqs) > 8 else "")
