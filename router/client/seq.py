"""The sequence numbers of an answer, which know what they count."""

from collections.abc import Iterable
from itertools import zip_longest


class Seq(tuple[int | None, ...]):
    """Of each shard, by its number, how many writes an answer had, None where it says nothing.

    As ``min_seq`` of a search it asks for all of them, also after another generation went live: so
    it remembers the generation that they are of, and the version of the routing table that the
    answer was made with. None for both: of the generation that is live, whichever that is, as for
    a plain tuple. It can be copied and pickled; parts of it are plain tuples.
    """

    generation: int | None
    table_version: int | None

    def __new__(
        cls,
        numbers: Iterable[int | None] = (),
        generation: int | None = None,
        table_version: int | None = None,
    ) -> "Seq":
        made = super().__new__(cls, numbers)
        made.generation, made.table_version = generation, table_version
        return made

    @property
    def origin(self) -> dict[str, int] | None:
        """``min_seq_of`` of a request; None: it is not known."""
        if self.generation is None or self.table_version is None:
            return None
        return {"generation": self.generation, "table_version": self.table_version}


def newer(first: Seq, second: Seq) -> Seq:
    """What asks for both: of one generation the larger numbers, of two those of the later one,
    which has all that the one before had."""
    of_first, of_second = first.table_version or 0, second.table_version or 0
    if first.generation != second.generation:
        return first if of_first > of_second else second
    pairs = zip_longest(first, second)
    numbers = (max((n for n in pair if n is not None), default=None) for pair in pairs)
    version = None if second.table_version is None else max(of_first, of_second)
    return Seq(numbers, second.generation, version)
