"""Which writes of a live generation rows contain: what ``publish`` need not replay to them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

MOST_BEFORE = 7  # generations whose cuts are remembered: more lie back than a store keeps


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Of shard s of ``generation`` the first ``seqs[s]`` writes; any later one may be missing.

    before: the cut of that generation itself, whose rows are contained too; None: it has none.
    """

    generation: int
    seqs: tuple[int, ...]
    before: "Cut | None" = None

    @property
    def all(self) -> Iterator["Cut"]:
        """This one, then those before it."""
        cut: Cut | None = self
        while cut is not None:
            yield cut
            cut = cut.before

    def to_json(self) -> dict[str, Any]:
        """As manifests keep it."""
        own = {"generation": self.generation, "seqs": list(self.seqs)}
        return own if self.before is None else own | {"before": self.before.to_json()}


def cut_of(generation: int, seqs: tuple[int, ...], before: Cut | None) -> Cut:
    """Of a generation with the cut ``before``, of which the newest MOST_BEFORE are remembered."""
    kept = None
    for each in reversed(tuple(before.all)[:MOST_BEFORE] if before is not None else ()):
        kept = replace(each, before=kept)
    return Cut(generation=generation, seqs=seqs, before=kept)


def cut_from_json(value: Any) -> Cut | None:
    """What ``to_json`` made; None for None, as older manifests have it.

    Raises:
        ValueError, TypeError, KeyError: anything else.
    """
    if value is None:
        return None
    numbers = [value["generation"], *value["seqs"]]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"cut: {value}")
    before = cut_from_json(value.get("before"))
    return Cut(generation=numbers[0], seqs=tuple(numbers[1:]), before=before)
