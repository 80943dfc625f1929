"""How far a mirror of writes is: plain data, for who publishes and for status pages."""

from collections.abc import Sequence
from dataclasses import dataclass

from shardline.shards.core.errors import (
    InvalidInput,
    NewerFormat,
    NotFound,
    VersionMismatch,
)
from shardline.shards.core.messages import Absence

HOPELESS = frozenset(kind.code for kind in (NotFound, InvalidInput, VersionMismatch, NewerFormat))


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorProgress:
    """Of each shard of the source: positions, how many of its writes the target has, and ends, how
    many its log holds, estimated while part of it has not been read; none of both while it has not
    begun. target_seqs: of each shard of the target, how many writes it has with them. rows: items
    written to the target since the start. unreplayed: items that the target cannot take, written
    for the source's model only or with an attribute of another type, and ids of some, examples.
    trouble: why it does not go on now; None: it does. is_apart: as of ``Replayed``.
    """

    positions: tuple[int, ...]
    ends: tuple[int, ...]
    rows: int = 0
    unreplayed: int = 0
    examples: tuple[int, ...] = ()
    trouble: Absence | None = None
    target_seqs: tuple[int, ...] = ()
    is_apart: bool = False

    @property
    def is_hopeless(self) -> bool:
        """Whether it will never go on: a later attempt would fail in the same way."""
        return self.trouble is not None and self.trouble.code in HOPELESS

    @property
    def behind(self) -> int:
        """Writes that the target does not have yet."""
        pairs = zip(self.positions, self.ends, strict=True)
        return sum(max(0, end - position) for position, end in pairs)

    def has(self, seqs: Sequence[int]) -> bool:
        """Whether the target has so many writes of each shard."""
        return all(position >= seq for position, seq in zip(self.positions, seqs, strict=True))
