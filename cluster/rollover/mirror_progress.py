"""How far a mirror of writes is: plain data, for who publishes and for status pages."""

from collections.abc import Sequence
from dataclasses import dataclass

from shardline.shards.core.messages import Absence


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorProgress:
    """Of each shard of the source: positions, how many of its writes the target has, and ends, how
    many its log holds, estimated while part of it has not been read. target_seqs: of each shard of
    the target, how many writes it has with them. rows: items written to the target since the start.
    unreplayed: items that were written for the source's model only, and ids of some, examples.
    trouble: why it does not go on now, with ``NotFound.code`` if it never will; None: it does.
    """

    positions: tuple[int, ...]
    ends: tuple[int, ...]
    rows: int = 0
    unreplayed: int = 0
    examples: tuple[int, ...] = ()
    trouble: Absence | None = None
    target_seqs: tuple[int, ...] = ()

    @property
    def behind(self) -> int:
        """Writes that the target does not have yet."""
        pairs = zip(self.positions, self.ends, strict=True)
        return sum(max(0, end - position) for position, end in pairs)

    def has(self, seqs: Sequence[int]) -> bool:
        """Whether the target has so many writes of each shard."""
        return all(position >= seq for position, seq in zip(self.positions, seqs, strict=True))
